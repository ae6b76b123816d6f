"""Item-token recommenders: items are tokens, histories are sequences, the model is any causal
language model.

Importing this package makes the model types ``sasrec`` and ``two_tower`` known to transformers,
from version 5 on.
"""

from importlib.metadata import version
from typing import Any

from sce_lm.requirements import require

require("sce_lm.recsys", "datasets", "polars", "tqdm")

from sce_lm.recsys.baselines import item_knn_scorer, markov_scorer, of_last_days, popularity_scorer
from sce_lm.recsys.data import read_interactions
from sce_lm.recsys.evaluation import (
    ItemRanking,
    check_list_lengths,
    evaluate_items,
    rank_items,
    ranking_report,
)
from sce_lm.recsys.events import Events, filter_interactions
from sce_lm.recsys.export import EXPORT_FORMATS, export, load_index
from sce_lm.recsys.history_files import HistoryParts, read_histories, scan_histories
from sce_lm.recsys.item_index import ItemIndex
from sce_lm.recsys.item_vectors import ItemVectors, item_vectors
from sce_lm.recsys.new_items import append_items
from sce_lm.recsys.pairs import evaluate_pairs, random_split
from sce_lm.recsys.recommendation import Recommendations, recommend
from sce_lm.recsys.recommendation_files import recommend_file
from sce_lm.recsys.scoring import Scorer
from sce_lm.recsys.sequences import catalogue, statistics, training_dataset, user_sequences
from sce_lm.recsys.splits import Split, last_items, last_n, leave_one_out, temporal_split
from sce_lm.recsys.tokenizer import (
    build_item_tokenizer,
    count_items,
    is_item_tokenizer,
    item_counts,
    item_tokens,
)

if int(version("transformers").split(".")[0]) >= 5:
    from sce_lm.recsys.sasrec import SASRecConfig, SASRecForCausalLM
    from sce_lm.recsys.two_tower import TwoTowerConfig, TwoTowerForCausalLM
else:

    def __getattr__(name: str) -> Any:
        """Says which version the models need."""
        if name in ("SASRecConfig", "SASRecForCausalLM"):
            from sce_lm.recsys import sasrec as models
        elif name in ("TwoTowerConfig", "TwoTowerForCausalLM"):
            from sce_lm.recsys import two_tower as models
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(models, name)


__all__ = [
    "EXPORT_FORMATS",
    "Events",
    "HistoryParts",
    "ItemIndex",
    "ItemRanking",
    "ItemVectors",
    "Recommendations",
    "SASRecConfig",
    "SASRecForCausalLM",
    "Scorer",
    "Split",
    "TwoTowerConfig",
    "TwoTowerForCausalLM",
    "append_items",
    "build_item_tokenizer",
    "catalogue",
    "check_list_lengths",
    "count_items",
    "evaluate_items",
    "evaluate_pairs",
    "export",
    "filter_interactions",
    "is_item_tokenizer",
    "item_counts",
    "item_knn_scorer",
    "item_tokens",
    "item_vectors",
    "last_items",
    "last_n",
    "leave_one_out",
    "load_index",
    "markov_scorer",
    "of_last_days",
    "popularity_scorer",
    "random_split",
    "rank_items",
    "ranking_report",
    "read_histories",
    "read_interactions",
    "recommend",
    "recommend_file",
    "scan_histories",
    "statistics",
    "temporal_split",
    "training_dataset",
    "user_sequences",
]
