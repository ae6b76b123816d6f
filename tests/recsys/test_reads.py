"""How often a log is read: once to check it and once for its events, whatever is done with them."""

import datetime

import polars as pl
import pytest
from polars.io.plugins import register_io_source

from sce_lm.recsys import (
    build_item_tokenizer,
    catalogue,
    delimited,
    filter_interactions,
    leave_one_out,
    log_files,
    read_histories,
    read_interactions,
    user_sequences,
)

LOG = pl.DataFrame(
    {
        "user_id": [f"u{i % 7}" for i in range(100)],
        "item_id": [float(i % 11) for i in range(100)],
        "time": [datetime.datetime(2024, 1, 1) + datetime.timedelta(hours=i) for i in range(100)],
    }
)


@pytest.fixture
def reads(monkeypatch):
    """A list that grows by a word each time that a file is read."""
    reads = []

    def counted(scan):
        def scan_counted(*arguments, **options) -> pl.LazyFrame:
            frame = scan(*arguments, **options).collect()

            def source(with_columns, predicate, n_rows, batch_size):
                reads.append("rows")
                found = frame.lazy() if predicate is None else frame.lazy().filter(predicate)
                found = found if n_rows is None else found.head(n_rows)
                yield (found if with_columns is None else found.select(with_columns)).collect()

            return register_io_source(source, schema=frame.schema)

        return scan_counted

    for name in ("scan_csv", "scan_parquet", "scan_ndjson"):
        monkeypatch.setattr(pl, name, counted(getattr(pl, name)))

    def open_bytes(path):
        reads.append("bytes")
        return open_file(path)

    open_file = delimited.open_bytes
    for module in (delimited, log_files):
        monkeypatch.setattr(module, "open_bytes", open_bytes)
    return reads


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_log_is_read_once_to_check_it_and_once_for_its_events(tmp_path, reads, suffix):
    path = tmp_path / f"log{suffix}"
    {".csv": LOG.write_csv, ".parquet": LOG.write_parquet, ".jsonl": LOG.write_ndjson}[suffix](path)
    # Text is seen as bytes first: all of a csv file, the first lines of JSON.
    opened = [] if suffix == ".parquet" else ["bytes"]

    log = read_interactions(path, time="time")
    assert reads == [*opened, "rows"]
    events = filter_interactions(log, duplicates="consecutive", min_user_events=2)
    events = filter_interactions(events, min_item_events=2)
    sequences = user_sequences(events, build_item_tokenizer(catalogue(events)))
    leave_one_out(sequences)
    assert reads == [*opened, "rows", "rows"]

    reads.clear()
    read_histories(path, time="time")
    assert reads == [*opened, *opened, "rows", "rows"]
