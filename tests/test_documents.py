"""README and manual: every Python block runs, every link leads somewhere, every command's files are
there."""

import contextlib
import dataclasses
import functools
import io
import re
import runpy
import subprocess
import sys

import pytest
from support.documents import (
    HUB_MODEL,
    LINKED,
    PAGES,
    ROOT,
    anchors,
    code_blocks,
    commands,
    links,
    write_files,
)
from support.launch import ONE_THREAD

from sce_lm import objectives
from sce_lm.commands import COMMANDS, main
from sce_lm.training.train_config import TrainConfig


def page_id(page):
    return str(page.relative_to(ROOT))


def test_every_block_runs_as_it_stands(tmp_path):
    """Each in a namespace of its own, all in one process: importing takes longer than running."""
    write_files(tmp_path)
    program = "\n".join(
        f"exec(compile({block.replace(HUB_MODEL, 'model')!r}, '{page_id(page)} {n}', 'exec'), {{}})"
        for page in PAGES
        for n, block in enumerate(code_blocks(page), 1)
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        env={**ONE_THREAD, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr[-3000:]


def test_configuration_page_names_every_configuration():
    """Their fields come from the dataclasses themselves, and the script's from docs/hooks.py."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    named = set(re.findall(r"^::: sce_lm\.\w+\.(\w+)$", page, re.MULTILINE))
    configs = {type(objectives.get(name).config).__name__ for name in objectives.names()}
    shared = {"ObjectiveConfig", "SoftmaxConfig", "LikelihoodConfig"}
    assert named == configs | {"PublishedSCEConfig", *shared}
    assert len(re.findall("^TRAINING_FIELDS$", page, re.MULTILINE)) == 1


def test_table_of_the_script_has_every_field():
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    rows = hooks["on_page_markdown"]("TRAINING_FIELDS").splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [f.name for f in dataclasses.fields(TrainConfig)]
    assert all(
        "`" in row and field.metadata["help"].replace("|", "\\|") in row
        for row, field in zip(rows, dataclasses.fields(TrainConfig), strict=True)
    )


@pytest.mark.parametrize("page", LINKED, ids=page_id)
def test_every_link_leads_somewhere(page):
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_that_is_named_is_there(page):
    named = re.findall(r"\b(?:scripts|examples|tests|sce_lm)/[\w/.{}*-]*[\w/}*]", page.read_text())
    for name in named:
        assert "{" in name or list(ROOT.glob(name)), name


@functools.cache
def help_of(*command):
    """What a command says of itself."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        main([*command, "--help"])
    return said.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_has_the_options_that_it_is_given(page):
    for name, *words in commands(page):
        assert name in COMMANDS, name
        known = help_of(name, *words[:1]) if name == "benchmark" else help_of(name)
        if "those of sce-lm train" in known:
            known += help_of("train")
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"{option}(?![\w-])", known), [name, *words]


def test_the_commands_of_the_pages_are_found():
    assert sum(len(commands(page)) for page in PAGES) > 15


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
