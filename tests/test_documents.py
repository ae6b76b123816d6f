"""README and manual: every Python block runs, every link leads somewhere, every command's files are
there."""

import re
import subprocess
import sys

import pytest
from support.documents import HUB_MODEL, PAGES, ROOT, anchors, code_blocks, links, write_files
from support.launch import ONE_THREAD


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


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_leads_somewhere(page):
    for path, anchor in links(page):
        target = (page.parent / path).resolve()
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_that_is_named_is_there(page):
    named = re.findall(r"\b(?:scripts|examples|tests|sce_lm)/[\w/.{}*-]*[\w/}*]", page.read_text())
    for name in named:
        assert "{" in name or list(ROOT.glob(name)), name


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
