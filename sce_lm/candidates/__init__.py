"""Where candidates come from: priority samples, priors, buckets, and the state behind them."""
