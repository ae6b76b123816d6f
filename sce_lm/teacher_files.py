"""Stored teachers as files: the k best classes of every position, in safetensors or parquet.

    teacher.safetensors    tensors "ids" (int32) and "log_probs" (fp32, fp16 or bf16), [..., k] each
    teacher.parquet        a row for each position: "ids" (list of int32), "log_probs" (list of
                           fp32), k long each; positions in the order of the flattened [...]

Both have text metadata beside the numbers: "format" ("sce_lm.teacher.1"), "rest" and "temperature"
of :class:`sce_lm.distillation.StoredTopK`, and parquet "shape", the [...] of the positions. A file
is written under a temporary name and renamed, so it is complete or not there. Reading decodes
numbers and text and nothing else: neither format can hold code.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from sce_lm.distillation import StoredTopK
from sce_lm.files import in_one_line, replacing

FORMAT = "sce_lm.teacher.1"


def write_teacher(path: str | Path, teacher: StoredTopK) -> None:
    """Write a stored teacher; the name's ending, .safetensors or .parquet, says in which format.

    Raises:
        ValueError: another ending, or ids and log-probabilities of different shapes.
    """
    path, ids, log_probs = Path(path), teacher.ids, teacher.log_probs
    is_parquet = _is_parquet(path)
    if ids.shape != log_probs.shape or not ids.dim():
        raise ValueError(
            f"ids has shape {tuple(ids.shape)} and log_probs {tuple(log_probs.shape)}; give the "
            "same [..., k] for both."
        )
    ids = ids.detach().to("cpu", torch.int32)
    log_probs = log_probs.detach().cpu()
    if log_probs.dtype == torch.float64 or is_parquet:
        log_probs = log_probs.float()
    metadata = {
        "format": FORMAT,
        "rest": teacher.rest,
        "temperature": repr(float(teacher.temperature)),
    }
    with replacing(path) as partial:
        if is_parquet:
            import polars as pl

            metadata["shape"] = json.dumps(ids.shape[:-1])
            k = ids.shape[-1]
            columns = {
                "ids": pl.Series(ids.reshape(-1, k).numpy(), dtype=pl.Array(pl.Int32, k)),
                "log_probs": pl.Series(
                    log_probs.reshape(-1, k).numpy(), dtype=pl.Array(pl.Float32, k)
                ),
            }
            table = pl.DataFrame(columns).select(pl.all().arr.to_list())
            table.write_parquet(partial, metadata=metadata)
        else:
            from safetensors.torch import save_file

            tensors = {"ids": ids.contiguous(), "log_probs": log_probs.contiguous()}
            save_file(tensors, partial, metadata)


def read_teacher(path: str | Path) -> StoredTopK:
    """Read what :func:`write_teacher` wrote, ids as int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, or not such a file.
    """
    path = Path(path)
    is_parquet = _is_parquet(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; write_teacher makes one.")
    try:
        ids, log_probs, metadata = _parquet(path) if is_parquet else _safetensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        if ids.shape != log_probs.shape or not log_probs.is_floating_point():
            raise ValueError("ids and log_probs do not belong together")
        temperature = float(metadata["temperature"])
        rest: Any = metadata["rest"]
        if rest not in ("ghost", "uniform", "drop") or not 0 < temperature < math.inf:
            raise ValueError(f"rest is {rest!r} and temperature {temperature}")
    except Exception as error:
        raise ValueError(
            f"{path} is no stored teacher ({type(error).__name__}: {in_one_line(error, 200)}); "
            "give a file that write_teacher wrote."
        ) from None
    return StoredTopK(ids.long(), log_probs, rest, temperature)


def _is_parquet(path: Path) -> bool:
    if path.suffix not in (".safetensors", ".parquet"):
        raise ValueError(f"{path} ends in {path.suffix!r}; name it .safetensors or .parquet.")
    return path.suffix == ".parquet"


def _safetensors(path: Path) -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        return file.get_tensor("ids"), file.get_tensor("log_probs"), metadata


def _parquet(path: Path) -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
    import polars as pl

    metadata = pl.read_parquet_metadata(path)
    table = pl.read_parquet(path, columns=["ids", "log_probs"], hive_partitioning=False)
    shape = [int(size) for size in json.loads(metadata.get("shape", "null")) or [len(table)]]
    ids, log_probs = (
        torch.from_numpy(table[name].explode().cast(dtype).to_numpy().copy())
        for name, dtype in (("ids", pl.Int32), ("log_probs", pl.Float32))
    )
    k = len(ids) // max(len(table), 1)
    lengths = table.select(pl.all().list.len()).unique()
    if len(table) and lengths.rows() != [(k, k)]:
        raise ValueError("its lists are not all of one length")
    return ids.reshape(*shape, k), log_probs.reshape(*shape, k), metadata
