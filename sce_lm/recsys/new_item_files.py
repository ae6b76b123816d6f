"""What is known of new items, from files."""

from pathlib import Path
from typing import Any

import polars as pl

from sce_lm.files import in_one_line


def read_new_items(
    items: Path | None = None, neighbours: Path | None = None, features: Path | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """The ids of a file, and what it says of them, as arguments of ``append_items``.

    Args:
        items: text, an id a line.
        neighbours: csv or parquet with columns ``item`` and ``neighbour``, a row a pair.
        features: csv or parquet with a column ``item`` and columns of numbers.

    Raises:
        ValueError: a file that cannot be read, or none or several of the three.
    """
    if sum(path is not None for path in (items, neighbours, features)) != 1:
        raise ValueError("Give one file: items, neighbours or features.")
    if items is not None:
        lines = items.read_text(encoding="utf-8-sig").splitlines()
        return [line.strip() for line in lines if line.strip()], {}
    if features is not None:
        table = read_table(features, "item")
        return table["item"].to_list(), {"features": table}
    assert neighbours is not None
    table = read_table(neighbours, "item", "neighbour")
    of_item = dict(table.group_by("item", maintain_order=True).agg("neighbour").iter_rows())
    return list(of_item), {"neighbours": of_item}


def read_table(path: Path, *needed: str) -> pl.DataFrame:
    """A csv (ids as text) or parquet file with the columns that are needed.

    Raises:
        ValueError: another kind of file, one that cannot be read, or without a column.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{path} ends in {path.suffix!r}; give a .csv or .parquet file.")
    try:
        if path.suffix == ".csv":
            ids = dict.fromkeys(needed, pl.String)
            table = pl.read_csv(path, schema_overrides=ids, infer_schema_length=None)
        else:
            table = pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} cannot be read ({in_one_line(error, 200)}).") from error
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path} has the columns {', '.join(map(repr, table.columns))} and not "
            f"{' and '.join(map(repr, missing))}; rename them."
        )
    return table.drop_nulls(list(needed))
