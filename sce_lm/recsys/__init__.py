"""Item-token recommenders: items are tokens, histories are sequences, the model is any causal
language model."""

from sce_lm.recsys.data import (
    LeaveOneOut,
    catalogue,
    leave_one_out,
    read_interactions,
    statistics,
    training_dataset,
    user_sequences,
)
from sce_lm.recsys.evaluation import (
    ItemRanking,
    Scorer,
    evaluate_items,
    popularity_scorer,
    rank_items,
)
from sce_lm.recsys.tokenizer import build_item_tokenizer, item_tokens

__all__ = [
    "ItemRanking",
    "LeaveOneOut",
    "Scorer",
    "build_item_tokenizer",
    "catalogue",
    "evaluate_items",
    "item_tokens",
    "leave_one_out",
    "popularity_scorer",
    "rank_items",
    "read_interactions",
    "statistics",
    "training_dataset",
    "user_sequences",
]
