"""One configuration in every way of writing it is one configuration, or one sentence."""

import json
import re
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sce_lm.training.command_line import parse_config
from sce_lm.training.train_config import TrainConfig
from sce_lm.training.yaml12 import Plain, plain_value

MANY = settings(
    max_examples=25,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

COUNT = st.integers(1, 10**7)
RATE = st.floats(1e-12, 0.9, allow_subnormal=False)
TRICKY = (
    "007",
    "1e5",
    "0.10",
    "no",
    "on",
    "null",
    "~",
    "true",
    "12:30",
    "1_000",
    "2023-11-15",
    "=",
)
TRICKY += (
    "2023-11-15T10:00:00Z",
    "2023-11-15 10:00:00",
    "a b",
    "c: d",
    "#e",
    "- f",
    "'",
    '"',
    "<<",
)
TEXT = st.sampled_from(TRICKY) | st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Cn", "Co")), min_size=1, max_size=12
).filter(lambda text: "\ufeff" not in text)

FIELDS = {
    "max_steps": COUNT,
    "seed": st.integers(0, 10**18),
    "learning_rate": RATE,
    "process_timeout": st.floats(1e-3, 1e12) | st.integers(1, 10**6).map(float),
    "eval_k": st.lists(COUNT, min_size=1, max_size=3),
    "betas": st.tuples(RATE, RATE).map(list),
    "trackers": st.lists(TEXT, max_size=2),
    "output_dir": TEXT,
    "data": TEXT,
    "user_column": TEXT,
    "split_time": st.none() | TEXT,
    "held_out": st.none() | TEXT,
    "resume": st.booleans(),
    "keep_best": st.booleans(),
    "mixed_precision": st.sampled_from(["no", "bf16", "fp16"]),
    "objective_options": st.fixed_dictionaries(
        {},
        optional={
            "uniform_floor": RATE | st.just("auto"),
            "tail_candidates": COUNT,
            "prior": st.just("labels") | st.fixed_dictionaries({"labels": RATE, "uniform": RATE}),
            "control_variate": st.booleans(),
            "target_relative_error": st.none() | RATE,
        },
    ),
    "data_options": st.dictionaries(
        TEXT, st.none() | st.booleans() | st.integers() | RATE | TEXT | st.lists(TEXT, max_size=2),
        max_size=2,
    ),
}  # fmt: skip
MODEL = st.fixed_dictionaries(
    {"model_type": st.just("llama"), "rms_norm_eps": RATE},
    optional={"hidden_size": COUNT, "name": TEXT, "rope_scaling": st.none()},
)
CONFIGURATIONS = st.fixed_dictionaries({"model_config": MODEL}, optional=FIELDS)
OF_TEXT = {"trackers", "output_dir", "data", "user_column", "split_time", "held_out"}


class Writer:
    """Writes values as YAML in drawn styles."""

    def __init__(self, draw):
        self.draw = draw

    def one_of(self, *styles):
        return self.draw(st.sampled_from(styles))

    def scalar(self, value, *, of_text=False, in_flow=False):
        if value is None:
            return self.one_of("null", "Null", "~", *([] if in_flow else [""]))
        if isinstance(value, bool):
            return self.one_of(*(style(str(value)) for style in (str, str.lower, str.upper)))
        if isinstance(value, int):
            styles = [str(value), json.dumps(value)]
            if value >= 0:
                styles += [f"+{value}", f"0{value}", f"{value:#x}", f"{value:#o}"]
            return self.one_of(*styles)
        if isinstance(value, float):
            return self.one_of(repr(value), f"{value:.17e}", f"+{value:.17E}", f"{value:.40f}"[:400]
                               if value > 1e-3 else repr(value))  # fmt: skip
        styles = [json.dumps(value), json.dumps(value, ensure_ascii=False)]
        styles.append("'" + value.replace("'", "''") + "'")
        means_itself = plain_value(Plain(value)) == value
        is_null = plain_value(Plain(value)) is None
        if re.fullmatch(r"[\w./+][\w./+-]*", value) and (means_itself or of_text) and not is_null:
            styles += [value, "!!str " + value]
        return self.one_of(*styles)

    def whole(self, value):
        """An int as a float is written, where that is the same number."""
        styles = [f"{value}.0", f"{value}.", f"{value:e}", f"{value:.1E}", f"{value}e0"]
        return self.one_of(
            *(s for s in styles if abs(value) < 2**53 and float(s) == value),
            str(value),
        )

    def flow(self, value, *, of_text=False):
        if isinstance(value, dict):
            pairs = [f"{self.key(k)}: {self.flow(v)}" for k, v in value.items()]
            return "{" + ", ".join(pairs) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(self.flow(v, of_text=of_text) for v in value) + "]"
        return self.scalar(value, of_text=of_text, in_flow=True)

    def key(self, key):
        return self.scalar(key, of_text=True)

    def block(self, value, indent, *, of_text=False):
        """What follows a key's colon."""
        comment = self.one_of("", "  # a comment: with {signs}")
        if isinstance(value, dict) and value and self.draw(st.booleans()):
            inner = indent + self.one_of(" ", "  ", "    ")
            lines = [f"{inner}{self.key(k)}:{self.block(v, inner)}" for k, v in value.items()]
            return f"{comment}\n" + "\n".join(lines)
        if isinstance(value, list) and value and self.draw(st.booleans()):
            lines = [f"{indent}- {self.scalar(v, of_text=of_text)}" for v in value]
            return f"{comment}\n" + "\n".join(lines)
        return f" {self.flow(value, of_text=of_text)}{comment}"

    def field(self, name, value):
        if name in ("max_steps", "seed") and value < 2**53 and self.draw(st.booleans()):
            return f"{name}: {self.whole(value)}"
        if isinstance(value, list) and len(value) == 1 and self.draw(st.booleans()):
            return f"{name}: {self.scalar(value[0], of_text=name in OF_TEXT)}"
        if isinstance(value, dict) and value and self.draw(st.booleans()):
            return f"{name}:\n  <<: &{name} {self.flow(value)}"
        return f"{name}:{self.block(value, '', of_text=name in OF_TEXT)}"

    def lines(self, values):
        return [self.field(name, values[name]) for name in self.draw(st.permutations(list(values)))]

    def bytes(self, lines):
        text = "\n".join([*self.one_of([], ["# first"], ["---"], ["", "--- # here"]), *lines, ""])
        if self.draw(st.booleans()):
            text = text.replace("\n", "\r\n")
        encoding = self.one_of("utf-8", "utf-8-sig", "utf-16")
        return text.encode(encoding)


@contextmanager
def one_sentence(*names):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (what it says is checked below)
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    for name in names:
        assert name in message, message


@MANY
@given(values=CONFIGURATIONS, data=st.data())
def test_the_same_configuration_comes_back(tmp_path, values, data):
    path, wanted = tmp_path / "a.yaml", TrainConfig(**values)
    writer = Writer(data.draw)
    path.write_bytes(writer.bytes(writer.lines(values)))
    assert parse_config([str(path)]) == wanted
    # JSON is YAML, and what a run keeps is JSON
    path.write_text(json.dumps(wanted.to_dict(), indent=writer.one_of(None, 2)))
    assert parse_config([str(path)]) == wanted


@MANY
@given(values=CONFIGURATIONS, data=st.data())
def test_the_command_line_reads_as_the_file_does(tmp_path, values, data):
    writer, arguments = Writer(data.draw), []

    def written(value):
        return value if isinstance(value, str) else writer.scalar(value)

    for name, value in list(values.items()):
        if isinstance(value, dict):
            texts = [writer.flow(value)]
        else:
            texts = [written(v) for v in (value if isinstance(value, list) else [value])]
        means_another = any(v in ("null", "~") or v.startswith("-") for v in texts if v in TRICKY)
        if texts and not (means_another and value is not None):
            arguments += [f"--{name}", *texts]
        else:  # such a text is given as --name=text or in the file
            del values[name]
    assert parse_config(arguments) == TrainConfig(**values)


WRONG = [
    ("max_steps: {}", ["ten", "1.5", "true", "'5'", "[5, 6]", "", "null", "0", "-3", "1e400"]),
    ("learning_rate: {}", ["nan", ".inf", "fast", "false", "0", "{a: 1}", "2023-11-15", "1_0"]),
    ("resume: {}", ["maybe", "1", "", "[true, false]"]),
    ("eval_k: {}", ["[]", "", "[1, x]", "0", "[1.5]", "{a: 1}"]),
    ("output_dir: {}", ["", "[a]", "{a: b}", "~"]),
    ("task: {}", ["sort", "", "1"]),
    ("objective_options: {}", ["", "3", "[]", "a", "[{a: 1}]"]),
    ("data_options: {}", ["", "[]", "no"]),
]  # fmt: skip
OPTIONS = ["uniform_flor: 0.1", "uniform_floor: '5e-2'", "uniform_floor: 2", "published: no"]
OPTIONS += ["tail_candidates: 1.5", "tail_candidates: -1", "prior: {labels: x}", "alpha: high"]
DAMAGE = ["\tmax_steps: 1", "betas: [0.9", "data: 'open", "{", "a: b: c", "data: @x", "x: *none"]
DAMAGE += ["data: !!python/object/apply:os.system ['true']", "a: &a [*a]", "? [a]\n: 1", "- 1"]
DAMAGE += ["--- \n--- \n", "<<: 3", 'data: "\\ud800"', "!!set {a}", "data: \x07", "\udcff"]


@MANY
@given(values=CONFIGURATIONS, data=st.data())
def test_one_fault_is_one_sentence_that_names_field_and_file(tmp_path, values, data):
    path, writer = tmp_path / "a.yaml", Writer(data.draw)
    kind = writer.one_of("twice", "twice inside", "unknown", "wrong", "option", "damage")
    names = []
    if kind == "twice":
        name = writer.one_of(*values)
        lines = writer.lines(values)
        # An anchor that is given twice is refused as such.
        again = writer.field(name, values[name]).replace(f"&{name}", f"&{name}_again")
        lines.insert(data.draw(st.integers(0, len(lines))), again)
        names = [name, "given twice", ", line "]
    elif kind == "twice inside":
        values.pop("objective_options", None)
        inside = writer.one_of("{a: 1, b: 2, a: 1}", "\n  a: 1\n  b: {}\n  a: 2", "{'a': 1, a: 1}")
        lines = [*writer.lines(values), f"objective_options: {inside}"]
        names = ["objective_options.a", "given twice", ", line "]
    elif kind == "unknown":
        name = writer.one_of("max_step", "1", "learning-rate", "eval_K", "no", "Seed")
        lines = [*writer.lines(values), f"{name}: 1"]
        names = [f"'{name}'", "did you mean"]
    elif kind == "wrong":
        line, faults = writer.one_of(*WRONG)
        names = [line.split(":")[0]]
        values.pop(names[0], None)
        lines = [*writer.lines(values), line.replace("{}", writer.one_of(*faults))]
    elif kind == "option":
        values.pop("objective_options", None)
        option = writer.one_of(*OPTIONS)
        lines = [*writer.lines(values), f"objective_options: {{{option}}}"]
        names = ["objective_options." + option.split(":")[0]]
    else:
        lines = [*writer.lines(values), writer.one_of(*DAMAGE)]
    text = "\n".join(lines) + "\n"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with one_sentence(str(path), *names):
        parse_config([str(path)])
