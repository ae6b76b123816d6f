"""A run with a teacher: a model beside it, or what `sce-lm teach` stored of one."""

import json

import pytest
import torch
from accelerate import Accelerator
from support.training import NO_DROPOUT, SMALL_SCE, figures, lm_fields, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from sce_lm import commands
from sce_lm.teacher_files import read_teacher
from sce_lm.teacher_folder import TeacherFolder
from sce_lm.training import teaching
from sce_lm.training.run_building import build_run
from sce_lm.training.train_config import TrainConfig


def fields(corpus, folder, **changes):
    model = {**lm_fields(corpus)["model_config"], **NO_DROPOUT}
    defaults = {
        "held_out_fraction": 0.8,
        "eval_batches": 1,
        "model_config": model,
        "max_steps": 3,
        "checkpoint_every": 0,
        "eval_every": 0,
    }
    return lm_fields(corpus, output_dir=str(folder), **{**defaults, **changes})


@pytest.fixture(scope="module")
def teacher(corpus):
    """A model with peaked predictions, its head padded by some rows, and the run's tokenizer."""
    folder = corpus / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    options = {**lm_fields(corpus)["model_config"], "vocab_size": len(tokenizer) + 8}
    torch.manual_seed(1)
    options.pop("model_type")
    model = AutoModelForCausalLM.from_config(GPT2Config(**options))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(config):
    run = build_run(TrainConfig(**config))
    run.train()
    return [record["loss"] for record in figures(run.folder.path) if "loss" in record]


def straight_line(config, teacher, share):
    """The loss of the first step over formed logits."""
    run = build_run(TrainConfig(**config))
    try:
        model = run.learner.plain_model.eval()
        tokens = torch.cat([batch["input_ids"] for batch in run._next_batches()])
        student = AutoModelForCausalLM.from_config(model.config)
        student.load_state_dict(model.state_dict())
        theirs = AutoModelForCausalLM.from_pretrained(teacher).eval()
        with torch.no_grad():
            ours = student.eval()(tokens).logits[:, :-1].flatten(0, 1)
            theirs = theirs(tokens).logits[:, :-1, : ours.shape[-1]].flatten(0, 1)
        nll = torch.nn.functional.cross_entropy(ours, tokens[:, 1:].flatten())
        q, log_p = (theirs / 2).log_softmax(-1), (ours / 2).log_softmax(-1)
        return share * (q.exp() * (q - log_p)).sum(-1).mean() + (1 - share) * nll
    finally:
        run.lock.release()


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_first_loss_is_that_of_formed_logits(share, corpus, teacher, tmp_path):
    options = {"teacher": str(teacher), "teacher_share": share, "teacher_temperature": 2.0}
    want = straight_line(fields(corpus, tmp_path / "a", **options), teacher, share)
    losses = train(fields(corpus, tmp_path / "b", **options))
    assert losses[0] == pytest.approx(want.item(), rel=1e-5)


def test_a_stored_teacher_is_the_model_to_what_was_rounded(corpus, teacher, tmp_path, monkeypatch):
    """With all classes stored; a folder that lacks a part is refused, and goes on."""
    monkeypatch.setattr(teaching, "ROWS_PER_PART", 40)
    config = write_config(tmp_path / "c.yaml", fields(corpus, tmp_path / "run"))
    folder = tmp_path / "stored"
    command = ["teach", str(config), str(folder), "--teacher", str(teacher), "--k", "600"]
    commands.main(command)
    parts = sorted(folder.glob("part-*"))
    assert len(parts) > 2
    before = read_teacher(parts[1])
    parts[1].unlink()
    stored = fields(corpus, tmp_path / "a", teacher=str(folder))
    with pytest.raises(ValueError, match="lacks 1 of its"):
        build_run(TrainConfig(**stored))
    commands.main(command)
    again = read_teacher(parts[1])
    assert torch.equal(again.ids, before.ids)
    assert torch.equal(again.log_probs, before.log_probs)
    own = train(fields(corpus, tmp_path / "b", teacher=str(teacher)))
    assert train(stored) == pytest.approx(own, rel=1e-3)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["memory_estimate_mib"]["teacher"] >= 0


def test_a_sampled_divergence_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    corpus, teacher, tmp_path
):
    options = {
        "teacher": str(teacher),
        "teacher_sampled": True,
        "objective": "sce",
        "objective_options": SMALL_SCE,
        "checkpoint_every": 2,
        "scheduler": "constant",
    }
    whole = train(fields(corpus, tmp_path / "whole", max_steps=4, **options))
    assert train(fields(corpus, tmp_path / "cut", max_steps=2, **options)) == whole[:2]
    assert train(fields(corpus, tmp_path / "cut", max_steps=4, **options)) == whole


def test_what_cannot_teach_is_refused(corpus, teacher, tmp_path):
    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            build_run(TrainConfig(**fields(corpus, tmp_path / "run", **options)))

    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(bare)
    # Older versions of transformers cannot load a tokenizer that is not there.
    refused("has no tokenizer beside it|cannot be loaded", teacher=str(bare))
    other = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    tokenizer.add_tokens(["<one more>"])
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(other)
    tokenizer.save_pretrained(other)
    refused("has 601 tokens and the run 600, and 1 of them are not", teacher=str(other))
    with pytest.raises(ValueError, match="task items"):
        TrainConfig(task="items", model_config={"model_type": "gpt2"}, teacher="a")

    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "file").write_text("kept")
    config = TrainConfig(**fields(corpus, tmp_path / "run", teacher=str(teacher)))
    with pytest.raises(ValueError, match="is there already and holds something else"):
        teaching.store_teacher(config, occupied, Accelerator(), 4, "ghost")
    with pytest.raises(ValueError, match=r"give a number of classes in \[1, 600\]"):
        teaching.store_teacher(config, tmp_path / "new", Accelerator(), 601, "ghost")
    assert not (tmp_path / "new").exists()

    stored = tmp_path / "stored"
    teaching.store_teacher(config, stored, Accelerator(), 4, "ghost")
    with pytest.raises(ValueError, match=r"holds another stored teacher \(k 4 -> 5"):
        teaching.store_teacher(config, stored, Accelerator(), 5, "ghost")
    refused("stored for other blocks", teacher=str(stored), sequence_length=16)
    refused("stored at 1.0; use that one", teacher=str(stored), teacher_temperature=2.0)
    part = TeacherFolder.read(stored).part(0)
    part.write_bytes(part.read_bytes()[:100])
    run = build_run(TrainConfig(**fields(corpus, tmp_path / "run", teacher=str(stored))))
    with pytest.raises(ValueError, match="cannot be read"):
        run.train()
