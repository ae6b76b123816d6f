"""YAML below, command line above, and one sentence for whatever does not fit."""

import dataclasses

import pytest

from sce_lm.training.command_line import as_arguments, parse_config
from sce_lm.training.train_config import TrainConfig

MODEL = "model_config: {model_type: llama, hidden_size: 64}\n"


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_goes_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = write(tmp_path, MODEL + "learning_rate: 1e-3\nmax_steps: 7\nwarmup_steps: 3\n")
    config = parse_config([path, "--max_steps", "9", "--betas", "0.9", "0.98"])
    assert (config.learning_rate, config.max_steps, config.warmup_steps) == (1e-3, 9, 3)
    assert config.betas == [0.9, 0.98]
    assert config.sequence_length == TrainConfig(model="any").sequence_length


def test_values_are_read_as_the_type_of_their_field(tmp_path):
    text = MODEL + "mixed_precision: no\nmax_grad_norm: 1\nresume: false\nheld_out: null\n"
    options = ["--objective_options", '{"tail_candidates": 64}', "--gradient_checkpointing"]
    config = parse_config([write(tmp_path, text), *options])
    assert config.mixed_precision == "no"
    assert isinstance(config.max_grad_norm, float)
    assert config.resume is False
    assert config.held_out is None
    assert config.objective_options == {"tail_candidates": 64}
    assert config.gradient_checkpointing is True


def test_the_dictionary_form_builds_the_same_configuration(tmp_path):
    config = parse_config([write(tmp_path, MODEL), "--trackers", "tensorboard"])
    assert TrainConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("eval_k: 5", "eval_k", [5]),
        ("max_steps: 1e4", "max_steps", 10_000),
        ("max_steps: 010", "max_steps", 10),
        ("trackers: tensorboard", "trackers", ["tensorboard"]),
        ("split_time: 2023-11-15", "split_time", "2023-11-15"),
        ("split_time: 2023-11-15 10:00:00", "split_time", "2023-11-15 10:00:00"),
        ("split_time: 1.7e9", "split_time", "1.7e9"),
        ("user_column: no", "user_column", "no"),
        ("output_dir: 007", "output_dir", "007"),
        ("resume: no", "resume", False),
        ("objective_options: {uniform_floor: 5e-2}", "objective_options", {"uniform_floor": 0.05}),
        ("objective_options: {rounds: 2e0}\nobjective: rece", "objective_options", {"rounds": 2}),
        ("data_options: {packages: [no, 12:30]}", "data_options", {"packages": ["no", "12:30"]}),
        ('data_options: {"\\ud83d\\ude00": 1}', "data_options", {"\U0001f600": 1}),
    ],
)  # fmt: skip
def test_yaml_is_read_as_it_is_meant(tmp_path, text, field, value):
    found = getattr(parse_config([write(tmp_path, f"{MODEL}{text}\n")]), field)
    assert found == value
    assert type(found) is type(value)


def test_numbers_of_a_model_and_merged_keys(tmp_path):
    text = "model_config: {<<: &base {rms_norm_eps: 1e-5, hidden_size: 32}, hidden_size: 64, "
    config = parse_config([write(tmp_path, text + "model_type: llama}\ndata_options: *base\n")])
    small = {"rms_norm_eps": 1e-5, "hidden_size": 32}
    assert config.model_config == {**small, "hidden_size": 64, "model_type": "llama"}
    assert config.data_options == small


def test_the_arguments_of_changes_are_read_back(tmp_path):
    changes = {"eval_k": [5, 10], "data": "a b", "held_out": None, "resume": False}
    changes |= {"objective_options": {"prior_power": 1e-7}, "learning_rate": 1e-5}
    config = parse_config([write(tmp_path, MODEL), *as_arguments(changes)])
    assert {name: getattr(config, name) for name in changes} == changes


def test_options_of_the_published_form_are_its_own(tmp_path):
    options = {"published": True, "bucket_candidates": 256, "mix": False}
    text = MODEL + "objective_options: {published: true, bucket_candidates: 256, mix: false}\n"
    assert parse_config([write(tmp_path, text)]).objective_options == options


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("sce", "published: true, tail_candidates: 9", "tail_candidates is no option of objective"),
        ("sce", "published: true, alpha: 0", r"alpha is 0\.0; give a positive number"),
        ("sce", "published: true, mix: 3", "mix is 3; expected true or false"),
        ("sce", "published: true, bucket_candidates: auto", "bucket_candidates is 'auto'; expecte"),
        ("sce", "mix: false", "mix is no option of objective 'sce'"),
        ("sce", "correction: none", "correction is no option of objective 'sce'"),
        ("exact", "published: true", "published is True: objective 'exact' has no other published"),
    ],
)
def test_options_that_a_form_does_not_have_are_refused(tmp_path, objective, options, message):
    text = f"{MODEL}objective: {objective}\nobjective_options: {{{options}}}\n"
    with pytest.raises(ValueError, match=rf"config\.yaml: objective_options\.{message}"):
        parse_config([write(tmp_path, text)])


def test_help_shows_every_field_and_default(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_config(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    defaults = TrainConfig(model="any").to_dict() | {"model": None}
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name} " in shown
        about = f"{field.metadata['help']} (default: {defaults[field.name]})"
        assert "".join(about.split()) in shown.replace(" ", ""), field.name


def test_every_field_is_documented():
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainConfig))


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("max_step: 3\n", [], "'max_step'.*did you mean 'max_steps'"),
        ("", ["--learning-rte", "1"], "'learning_rte'.*did you mean 'learning_rate'"),
        ("", ["--max_steps", "many"], "the command line: max_steps is 'many'; expected int"),
        ("max_steps: [3]\n", [], r"max_steps is \[3\]; expected int"),
        ("max_steps: 2.5\n", [], "max_steps is 2.5; expected int"),
        ("max_steps: 0\n", [], "max_steps is 0; expected at least 1"),
        ("resume: maybe\n", [], "resume"),
        ("task: sort\n", [], "task.*'sort'"),
        ("betas: [0.9]\n", [], "betas.*two numbers"),
        ("betas: [0.9, high]\n", [], "betas is 'high'; expected float"),
        ("scheduler: sine\n", [], "scheduler.*cosine"),
        ("held_out_fraction: 1\n", [], "held_out_fraction is 1.0; expected between 0 and 1"),
        ("objective_options: 3\n", [], "objective_options is 3; expected a mapping"),
        ("", ["--objective_options", "{oops"], "objective_options.*'{oops'"),
        ("", ["stray"], "'stray' where a --field was expected"),
        ("model: gpt2\n", [], "Both model .'gpt2'. and model_config"),
        ("split_quantile: 1\n", [], "split_quantile is 1.0; expected between 0 and 1"),
        ("eval_k: [10, 0]\n", [], r"eval_k is \[10, 0\]; expected numbers from 1 up"),
        ("patience: 3\neval_every: 0\n", [], "patience is 3 and eval_every 0"),
        ("min_user_events: 0\n", [], "min_user_events is 0; expected at least 1"),
        ("optimizer: sgd\n", [], "optimizer.*'sgd'.*rowwise_adagrad"),
        ("sparse_learning_rate: 1\n", [], "sparse_learning_rate is 1.0 and the optimizer is adamw"),
        ("optimizer: sparse_adam\nsparse_learning_rate: 0\n", [], "0.0; expected above 0"),
        ("optimizer: sparse_adam\ndtype: bfloat16\n", [], "dtype is 'bfloat16' and the optimizer"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, text, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_config([write(tmp_path, MODEL + text), *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list\n", "holds a list; expected a mapping"),
        ("a: [unclosed\n", "cannot be read as YAML"),
        ("", "Neither model nor model_config"),
        (MODEL + "lora_rank: 4", "lora_rank is 4, which freezes a pretrained model"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_config([write(tmp_path, text)])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no configuration file"):
        parse_config([str(tmp_path / "none.yaml")])
