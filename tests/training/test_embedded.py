import dataclasses
import json
import sys
from pathlib import Path

import polars as pl
import pytest
from transformers import AutoTokenizer

from sce_lm.training.embedded import api_calls, embedded_interactions, embedded_text, text
from sce_lm.training.embedded.calls import call_sequences
from sce_lm.training.embedded.docstrings import docstrings
from sce_lm.training.embedded.sources import find_sources, read_files

PACKAGES = ("json", "email", "accelerate", "a_package_that_is_not_installed")
TEXT_OPTIONS = {"packages": PACKAGES, "heldout_share": 0.2, "vocab_size": 2_000, "progress": False}
CALL_OPTIONS = {"packages": PACKAGES, "progress": False}

SOURCE = '''
"""A module."""
import os.path
import numpy as np
import torch.nn.functional as F
from collections import OrderedDict as Ordered
from . import sibling
from ..base import helper

try:
    import json
except ImportError:
    json = None

logger = np.get_logger()


def first(x, np=None):
    """Parameters and variables hide imports."""
    np.zeros(1)
    helper = x
    helper()
    return later(sibling.join(os.path.exists(x)), key=lambda y: json.dumps(y))


class Layer:
    size = first(1)

    @staticmethod
    def make(rows):
        return Layer.of(rows[0].build().run(), [str(r) for r in range(3)])

    def forward(self, x):
        import math as m

        @m.cached(Ordered())
        def inner(y, z=len("")):
            Layer(m.sqrt(y))
            return self.norm(np.zeros(y))

        logger.info(f"{inner(x)}")
        table["a"]()
        self.head.linear(F.relu(x))(print)
        first() if helper() else super().forward(x)


async def later(x):
    return await x.get()
'''


def make_package(folder: Path, name: str, **modules: str) -> None:
    (folder / name).mkdir(parents=True)
    for module, source in {"__init__": "", **modules}.items():
        (folder / name / f"{module}.py").write_text(source)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def made_text(tmp_path_factory):
    return embedded_text(tmp_path_factory.mktemp("text"), **TEXT_OPTIONS)


@pytest.fixture(scope="module")
def made_log(tmp_path_factory):
    return embedded_interactions(tmp_path_factory.mktemp("calls"), **CALL_OPTIONS)


class TestCalls:
    def test_written_source(self, tmp_path):
        path = tmp_path / "module.py"
        path.write_text(SOURCE)
        assert call_sequences("pkg.sub.module", str(path)) == [
            (
                "first",
                [
                    ".zeros",
                    "helper",
                    "pkg.sub.module.later",
                    "pkg.sub.sibling.join",
                    "os.path.exists",
                    "json.dumps",
                ],
            ),
            ("Layer.make", ["pkg.sub.module.Layer.of", ".build", ".run", "str", "range"]),
            (
                "Layer.forward",
                [
                    "math.cached",
                    "collections.OrderedDict",
                    "len",
                    ".info",
                    "inner",
                    ".linear",
                    "torch.nn.functional.relu",
                    "pkg.sub.module.first",
                    "pkg.base.helper",
                    "super",
                    ".forward",
                ],
            ),
            (
                "Layer.forward.<locals>.inner",
                ["pkg.sub.module.Layer", "math.sqrt", ".norm", "numpy.zeros"],
            ),
            ("later", [".get"]),
        ]

    def test_relative_import_in_a_package_file(self, tmp_path):
        path = tmp_path / "__init__.py"
        path.write_text("from .inner import f\ndef g():\n    f()\n")
        assert call_sequences("pkg", str(path)) == [("g", ["pkg.inner.f"])]

    def test_reading_order_of_nested_and_chained_calls(self, tmp_path):
        path = tmp_path / "m.py"
        path.write_text("def g():\n    a(b(c())).d(e()).f()\n")
        assert call_sequences("m", str(path)) == [("g", ["a", "b", "c", ".d", "e", ".f"])]

    @pytest.mark.parametrize("source", [b"def f(:", b"\xff\xfe\x00", b"x = 1\x00"])
    def test_no_python_gives_nothing(self, tmp_path, source):
        path = tmp_path / "bad.py"
        path.write_bytes(source)
        assert call_sequences("bad", str(path)) == []
        assert docstrings("bad", str(path)) == []
        assert call_sequences("absent", str(tmp_path / "absent.py")) == []


class TestDocstrings:
    def test_written_source(self, tmp_path):
        path = tmp_path / "module.py"
        path.write_text(
            '"""The module.\n\n    Indented.\n"""\n'
            'class A:\n    """The class."""\n    if True:\n        def f(self):\n'
            '            "The method. \\ud800"\n            def g(): "Inner."\n'
            'add_docstr(torch.abs, merge("short", r"""abs(x)""", """\n  Absolute value.\n"""))\n'
            'add_newdoc("numpy", "ndarray", ("copy", "A copy."))\n'
            'print("not documentation", "at all")\n'
        )
        assert docstrings("m", str(path)) == [
            ("m", "The module.\n\nIndented."),
            ("m.A", "The class."),
            ("m.A.f", "The method. "),
            ("m.A.f.g", "Inner."),
            ("torch.abs", "Absolute value."),
            ("numpy.ndarray.copy", "A copy."),
        ]

    def test_language_reference(self):
        (source,) = [s for s in find_sources(["pydoc_data"]) if s[0] == "pydoc_data.topics"]
        topics = dict(docstrings(*source))
        assert topics["assert"].startswith('The "assert" statement')
        assert len(topics) > 50


class TestSources:
    def test_finds_without_importing(self):
        modules = dict(find_sources(["turtle", "accelerate", "a_package_that_is_not_installed"]))
        assert {"turtle", "accelerate", "accelerate.utils.memory"} <= modules.keys()
        assert "turtle" not in sys.modules

    def test_standard_library_without_tests_and_site_packages(self):
        modules = dict(find_sources(["stdlib"]))
        assert {"json", "json.decoder", "pathlib", "asyncio.events"} <= modules.keys()
        assert not any({"test", "tests", "torch"} & set(m.split(".")) for m in modules)

    def test_answers_come_in_order_and_early_close_ends(self, tmp_path):
        program = tmp_path / "echo.py"
        program.write_text(
            "import sys, json, time\n"
            "for line in sys.stdin:\n"
            "    time.sleep(0.02 if '7' in line else 0)\n"
            "    print(json.dumps(json.loads(line)[0]), flush=True)\n"
        )
        files = [(str(i), "") for i in range(100)]
        assert list(read_files(str(program), files, workers=3)) == [name for name, _ in files]
        answers = read_files(str(program), files, workers=2)
        assert next(answers) == "0"
        answers.close()

    def test_worker_that_dies_is_an_error(self, tmp_path):
        program = tmp_path / "dies.py"
        program.write_text("input()\n")
        with pytest.raises(RuntimeError, match=r"reading some\.py ended early"):
            list(read_files(str(program), [("m", "some.py")], workers=1))


class TestText:
    def test_split_is_disjoint_and_counted(self, made_text):
        train, heldout = texts(made_text.train), texts(made_text.heldout)
        assert (len(train), len(heldout)) == (
            made_text.train_documents,
            made_text.heldout_documents,
        )
        assert len(train) > len(heldout) > 5
        assert not set(train) & set(heldout)
        assert sum(len(t.encode()) for t in heldout) == made_text.heldout_bytes

    def test_no_docstring_twice(self, tmp_path, monkeypatch):
        copied = "A sentence which two modules have in common, and which is long enough.\n" * 3
        source = f'def f():\n    """{copied}"""\ndef g():\n    """{copied} One thing is new."""\n'
        others = {
            f"other{i}": f'"""{f"A text that is found in module {i} alone. " * 3}"""'
            for i in range(30)
        }
        make_package(tmp_path, "twice", a=source, b=source, **others)
        monkeypatch.syspath_prepend(str(tmp_path))
        options = {**TEXT_OPTIONS, "packages": ["twice"], "heldout_share": 0.5}
        made = embedded_text(tmp_path / "cache", **options)
        together = "\n".join(texts(made.train) + texts(made.heldout))
        assert together.count("two modules have in common") == 3
        assert together.count("module 29 alone") == 3
        assert "One thing is new" not in together

    def test_deterministic_and_independent_of_workers(self, made_text, tmp_path):
        again = embedded_text(tmp_path, **TEXT_OPTIONS, workers=1)
        assert content(again.train.parent) == content(made_text.train.parent)
        assert again.train.parent.name == made_text.train.parent.name

    def test_second_call_reads_nothing(self, made_text, monkeypatch):
        monkeypatch.setattr(text, "read_files", None)
        again = embedded_text(made_text.train.parent.parent, **TEXT_OPTIONS)
        assert again == made_text

    def test_seed_and_budget(self, made_text, tmp_path):
        other = embedded_text(tmp_path, **TEXT_OPTIONS, seed=1)
        assert texts(other.train) != texts(made_text.train)
        small = embedded_text(tmp_path, **TEXT_OPTIONS, max_bytes=100_000)
        total = small.train_bytes + small.heldout_bytes
        assert 100_000 <= total <= 100_000 + 2 * text.DOCUMENT_CHARACTERS
        assert small.train.parent != other.train.parent

    def test_tokenizer(self, made_text):
        tokenizer = AutoTokenizer.from_pretrained(made_text.tokenizer)
        assert len(tokenizer) == made_text.vocab_size == 2_000
        assert tokenizer.eos_token == text.END_OF_TEXT
        for document in [*texts(made_text.heldout), "naïve  ‘x’\t\n  ∑ 你好 🙂 <|end|> .", ""]:
            ids = tokenizer(document).input_ids
            assert tokenizer.decode(ids) == document
            assert tokenizer.eos_token_id not in ids

    def test_leftovers_of_a_killed_run_are_ignored(self, made_text, tmp_path):
        leftover = tmp_path / f".{made_text.train.parent.name}.0123456789abcdef"
        leftover.mkdir()
        (leftover / "train.jsonl").write_text('{"text": "half a li')
        again = embedded_text(tmp_path, **TEXT_OPTIONS)
        assert content(again.train.parent) == content(made_text.train.parent)

    def test_failure_while_writing_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(path, texts):
            path.write_text("half")
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(text, "_write_lines", fail)
            with pytest.raises(OSError, match="disk full"):
                embedded_text(tmp_path, **TEXT_OPTIONS)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("packages", [(), ("a_package_that_is_not_installed",)])
    def test_no_text_is_an_error(self, tmp_path, packages):
        with pytest.raises(ValueError, match=r"^0 documents of text in .*: name more installed"):
            embedded_text(tmp_path, packages=packages, progress=False)
        assert list(tmp_path.iterdir()) == []


class TestInteractions:
    def test_log_and_statistics(self, made_log):
        log = pl.read_parquet(made_log.path)
        assert dict(log.schema) == {
            "user_id": pl.String,
            "item_id": pl.String,
            "timestamp": pl.Int64,
        }
        assert dataclasses.astuple(made_log)[1:] == (
            log["user_id"].n_unique(),
            len(log),
            log["item_id"].n_unique(),
        )
        sequences = log.group_by("user_id", maintain_order=True).all()
        assert sequences["item_id"].list.len().min() >= 5
        assert sequences["user_id"].is_sorted()
        for items, times in sequences.select("item_id", "timestamp").iter_rows():
            assert times == list(range(len(items)))
            assert len(set(items)) == len(items)
        assert "json.decoder:JSONArray" in sequences["user_id"]

    def test_repeats_copies_and_short_functions(self, tmp_path, monkeypatch):
        calls = "    a(); b(); a(); b(); c(); d(); e()\n"
        own = "def a(): pass\ndef f(x):\n    a(); x.b(); x.c(); x.d(); x.e()\n"
        make_package(
            tmp_path,
            "copies",
            first=f"def f():\n{calls}def short():\n    a(); b(); a(); b(); c(); d()\n",
            second=f"def g():\n{calls}def g():\n    x(); y(); z(); u(); v()\n",
            third=own,
            fourth=own,
        )
        monkeypatch.syspath_prepend(str(tmp_path))

        def users(**options):
            made = embedded_interactions(
                tmp_path / "cache", packages=["copies"], progress=False, **options
            )
            return sorted(set(pl.read_parquet(made.path)["user_id"]))

        assert users() == ["copies.first:f", "copies.fourth:f", "copies.second:g#2"]
        everything = ["copies.first:f", "copies.first:short", "copies.fourth:f"]
        everything += ["copies.second:g", "copies.second:g#2", "copies.third:f"]
        assert users(keep_repeats=True, keep_copies=True) == everything
        assert users(min_calls=4, keep_copies=True) == everything

    def test_deterministic_and_independent_of_workers(self, made_log, tmp_path):
        again = embedded_interactions(tmp_path, **CALL_OPTIONS, workers=1)
        assert content(again.path.parent) == content(made_log.path.parent)

    def test_second_call_reads_nothing(self, made_log, monkeypatch):
        monkeypatch.setattr(api_calls, "read_files", None)
        assert embedded_interactions(made_log.path.parent.parent, **CALL_OPTIONS) == made_log

    def test_upgraded_package_is_read_again(self, tmp_path, monkeypatch):
        make_package(tmp_path, "upgraded", m="def f():\n    a(); b(); c(); d(); e()\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        before = embedded_interactions(tmp_path / "cache", packages=["upgraded"], progress=False)
        (tmp_path / "upgraded" / "m.py").write_text("def f():\n    a(); b(); c(); d(); e(); g()\n")
        after = embedded_interactions(tmp_path / "cache", packages=["upgraded"], progress=False)
        assert (before.events, after.events) == (5, 6)
        assert before.path != after.path

    def test_no_sequence_is_an_error(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"^no function with at least 1000 calls in \d+ Python"
        ):
            embedded_interactions(tmp_path, packages=["json"], min_calls=1000, progress=False)
        assert list(tmp_path.iterdir()) == []
