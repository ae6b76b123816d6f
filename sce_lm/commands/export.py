"""Write the items of a trained recommender as vectors, or as an index for fast lists.

    sce-lm export RUN_DIR --output vectors --format parquet
    sce-lm export RUN_DIR --output index --format faiss --recall 0.98
    sce-lm recommend RUN_DIR --index index --input LOG.csv --output LISTS.parquet

Inner products of the vectors with hidden states of the model rank as the model does: bias and scale
are folded in, and card.json says how a query is made. An index looks as far as it must to find the
share --recall of exact lists of 10 for the run's test histories (of a folder that is no run's: for
histories of one item); card.json says what it found.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from sce_lm import recsys
from sce_lm.commands import recommender_parser
from sce_lm.training.recommenders import asked_histories, load_recommender

TUNED_ON = 256


def main(prog: str, arguments: Sequence[str]) -> None:
    """Export, and print the card."""
    parser = recommender_parser("export", prog, __doc__ or "", "Inner products")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be new")
    parser.add_argument("--format", choices=recsys.EXPORT_FORMATS, default="safetensors")
    parser.add_argument("--recall", type=float, default=0.98, help="of an index, at 10")
    told = parser.parse_args(arguments)
    model, tokenizer, trained_with = load_recommender(told.run)
    card = recsys.export(
        model,
        tokenizer,
        told.output,
        told.format,
        recall=told.recall,
        histories=asked_histories(told.run, TUNED_ON),
        max_length=trained_with.get("sequence_length"),
    )
    print(json.dumps(card, indent=2))
