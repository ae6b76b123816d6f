"""The code blocks of README and manual, and a folder with the files that they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import polars as pl
from support.training import documentation, write_text
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M"
"""The model that pages name; a small one of the same kind stands in for it here."""

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMANDS = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def code_blocks(page: Path) -> list[str]:
    return _BLOCK.findall(page.read_text())


def commands(page: Path) -> list[list[str]]:
    """The words behind `sce-lm` of each line of the blocks for a shell."""
    lines = "\n".join(_COMMANDS.findall(page.read_text())).replace("\\\n", " ").splitlines()
    found = (re.search(r"(?:sce-lm|-m sce_lm) (.*)", line.split("#")[0]) for line in lines)
    return [shlex.split(match[1]) for match in found if match]


def links(page: Path) -> list[tuple[str, str]]:
    """Relative paths ("": the page itself) and anchors (or "")."""
    found = _LINK.findall(page.read_text())
    return [(path, anchor) for path, anchor in found if "://" not in path]


def anchors(page: Path) -> set[str]:
    """What a link to a heading ends in, as mkdocs and GitHub make it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def write_files(folder: Path) -> None:
    """A small Llama with its tokenizer in ``model``, `my_text.txt`, and `log.parquet`."""
    _, tokenizer = write_text(folder)
    tokenizer.rename(folder / "model")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=600,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model.save_pretrained(folder / "model")
    (folder / "my_text.txt").write_text("\n".join(documentation()[0].split("\n")[:200]))
    users = range(40)
    rows = [
        {"user_id": f"user-{u}", "item_id": f"item-{(u + t) % 12}", "timestamp": 100 * u + t}
        for u in users
        for t in range(5 + u % 4)
    ]
    pl.DataFrame(rows).write_parquet(folder / "log.parquet")
