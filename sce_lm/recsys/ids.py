"""Ids as text, by one rule for every source: a whole float is that whole number (7.0 is "7"), and
None, NaN and empty text are no id, which is missing."""

import math

import numpy as np
import polars as pl

FLOAT_TEXT = r"^(?:-?\d+\.0|NaN|nan|-?inf)$"
"""Floats of whole numbers as pandas writes them: ids of a column of text that has no others are
whole numbers."""


def id_text(value: object) -> str | None:
    """One id of any type as text; None where it is none."""
    if isinstance(value, float | np.floating):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    return None if value is None else str(value) or None


def id_column(ids: pl.Expr, dtype: pl.DataType, place: str) -> pl.Expr:
    """A column of ids as text, null where they are none (fractions too: :func:`fractions`).

    Args:
        place: "SOURCE has items in column ...", for messages.

    Raises:
        ValueError: ids of a type that has none.
    """
    if dtype.is_nested() or dtype.is_temporal() or dtype == pl.Object:
        raise ValueError(f"{place} of type {dtype}, but ids are text or whole numbers.")
    if dtype.is_float() or dtype.is_decimal():
        return _whole(ids).cast(pl.String)
    text = ids.cast(pl.String)
    return pl.when(text != "").then(text)


def fractions(ids: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """The numbers of a column that are not whole, as text; null where there is none."""
    if not (dtype.is_float() or dtype.is_decimal()):
        return pl.lit(None, dtype=pl.String)
    return pl.when(_whole(ids).cast(dtype) != ids).then(ids.cast(pl.String))


def _whole(numbers: pl.Expr) -> pl.Expr:
    return numbers.cast(pl.Int128, strict=False)
