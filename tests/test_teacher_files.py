import pickle
import warnings

import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from sce_lm.distillation import HeadScores, StoredTopK
from sce_lm.teacher_files import read_teacher, write_teacher

ENDINGS = ["safetensors", "parquet"]


def teacher(*positions, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(*positions, 6, generator=draw)
    scores = HeadScores(hidden, torch.randn(40, 6, generator=draw))
    stored = scores.top_k(5, temperature=1.5, rest="uniform")
    return StoredTopK(stored.ids, stored.log_probs.to(dtype), stored.rest, stored.temperature)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("positions", [(7,), (2, 3)], ids=str)
def test_what_is_written_is_read(ending, positions, tmp_path):
    stored = teacher(*positions)
    write_teacher(tmp_path / f"teacher.{ending}", stored)
    found = read_teacher(tmp_path / f"teacher.{ending}")
    assert found.ids.dtype == torch.int64
    assert torch.equal(found.ids, stored.ids)
    assert torch.equal(found.log_probs, stored.log_probs)
    assert (found.rest, found.temperature) == ("uniform", 1.5)
    assert [p.name for p in tmp_path.iterdir()] == [f"teacher.{ending}"]


def test_half_precision_is_kept(tmp_path):
    stored = teacher(4, dtype=torch.bfloat16)
    write_teacher(tmp_path / "t.safetensors", stored)
    assert torch.equal(read_teacher(tmp_path / "t.safetensors").log_probs, stored.log_probs)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    write_teacher(path, teacher(4))

    def fail(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", fail)
    with pytest.raises(OSError, match="no space"):
        write_teacher(path, teacher(9))
    assert read_teacher(path).ids.shape == (4, 5)
    assert len(list(tmp_path.iterdir())) == 1


class Bomb:
    def __reduce__(self):
        return warnings.warn, ("code ran",)


@pytest.mark.parametrize("ending", ENDINGS)
def test_other_files_are_refused_and_nothing_runs(ending, tmp_path, recwarn):
    path = tmp_path / f"t.{ending}"
    for content in (b"", b"text", pickle.dumps(Bomb())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no stored teacher"):
            read_teacher(path)
    torch.save(Bomb(), path)
    with pytest.raises(ValueError, match="is no stored teacher"):
        read_teacher(path)
    assert not recwarn.list


def test_files_of_the_format_with_other_contents_are_refused(tmp_path):
    ids = torch.zeros(3, 2, dtype=torch.int32)
    save_file({"ids": ids, "log_probs": ids.float()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="its format is None"):
        read_teacher(tmp_path / "a.safetensors")
    table = pl.DataFrame({"ids": [[1, 2], [3]], "log_probs": [[-1.0, -2.0], [-3.0]]})
    metadata = {"format": "sce_lm.teacher.1", "rest": "ghost", "temperature": "1.0"}
    table.write_parquet(tmp_path / "b.parquet", metadata=metadata)
    with pytest.raises(ValueError, match="not all of one length"):
        read_teacher(tmp_path / "b.parquet")


def test_names_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"name it \.safetensors or \.parquet"):
        write_teacher(tmp_path / "t.pt", teacher(3))
    with pytest.raises(FileNotFoundError, match="write_teacher makes one"):
        read_teacher(tmp_path / "t.parquet")
