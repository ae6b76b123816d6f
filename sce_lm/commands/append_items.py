"""Add new items to a trained recommender, without training it again.

    sce-lm append_items RUN_DIR --items NEW.txt --output MODEL
    sce-lm append_items RUN_DIR --neighbours PAIRS.csv --output MODEL
    sce-lm append_items RUN_DIR --features TABLE.parquet --output MODEL
    sce-lm train CONFIG.yaml --model MODEL --data NEW_LOG.parquet

What the model knows of a new item: nothing (--items: an id a line), the mean of the known items
that it resembles (--neighbours: columns item and neighbour, a row a pair), or what a linear map
says that is fitted on the known items (--features: column item and columns of numbers, known items
too). The new items are those of the file that the model does not know. Old items keep their ids.

Items without training have a place in lists that means something with neighbours or features only:
`sce-lm recommend --trained_only` leaves them out until they are trained. To train the model on with
new events, start from the new folder: --model MODEL.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from sce_lm import recsys
from sce_lm.commands import recommender_parser
from sce_lm.files import new_folder
from sce_lm.recsys.new_item_files import read_new_items
from sce_lm.training.recommenders import load_recommender


def main(prog: str, arguments: Sequence[str]) -> None:
    """Append, save, and print how many items are new."""
    parser = recommender_parser("append_items", prog, __doc__ or "", "What the model")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be new")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--items", type=Path, help="text, an id a line")
    source.add_argument("--neighbours", type=Path, help="csv or parquet: item, neighbour")
    source.add_argument("--features", type=Path, help="csv or parquet: item, numbers")
    told = parser.parse_args(arguments)
    if told.output.exists():
        raise FileExistsError(f"{told.output} exists already; give a folder that does not.")
    model, tokenizer, _ = load_recommender(told.run)
    items, known = read_new_items(told.items, told.neighbours, told.features)
    extended = recsys.append_items(tokenizer, items, model, **known)
    with new_folder(told.output) as partial:
        model.save_pretrained(partial)
        extended.save_pretrained(partial)
    counts = {
        "new_items": len(extended) - len(tokenizer),
        "items": len(recsys.item_tokens(extended)),
        "output": str(told.output),
    }
    print(json.dumps(counts, indent=2))
