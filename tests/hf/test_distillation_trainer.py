"""DistillationTrainer beside the straight line: stock models, all logits, both losses."""

import sys

import pytest
import torch
from support.allocations import VocabularySized
from support.models import VOCAB_SIZE, tiny_batch, tiny_model
from support.training import QUIET, Losses
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments

from sce_lm import SCEConfig, apply_sce, objectives
from sce_lm.distillation import HeadScores
from sce_lm.hf.adapter import lazy_logits
from sce_lm.hf.distillation_trainer import DistillationTrainer

STEPS, ACCUMULATED, ROWS = 5, 2, 2
LEARNING_RATE, TEMPERATURE = 1e-2, 2.0


def examples():
    batch = tiny_batch(0, batch=STEPS * ACCUMULATED * ROWS, length=12)
    for row in range(len(batch["labels"])):  # so that the number of labels matters
        # The first label is no target, and transformers 4 counts it all the same.
        batch["labels"][row, : 1 + row % 7] = -100
    return [{n: t[row] for n, t in batch.items()} for row in range(len(batch["labels"]))]


class InOrder(DistillationTrainer):
    """Rows in the order of the data."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def teacher():
    return tiny_model("gemma2", seed=7, num_hidden_layers=1)


def train(model, folder, teacher, **options):
    losses = Losses()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATED,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        optim="sgd",
        max_grad_norm=0.0,
        **QUIET,
    )
    trainer = InOrder(
        model, arguments, teacher=teacher, train_dataset=examples(), callbacks=[losses], **options
    )
    trainer.train()
    return trainer, losses.losses


def straight_line(model, teacher, alpha):
    """The same steps with stock models."""
    rows, losses = examples(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    teacher.eval()
    for step in range(STEPS):
        size = ACCUMULATED * ROWS
        group = rows[step * size : (step + 1) * size]
        batch = {name: torch.stack([row[name] for row in group]) for name in group[0]}
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            theirs = teacher(**batch).logits[:, :-1] / TEMPERATURE
        ours = model(**batch).logits[:, :-1]
        own = nn.functional.cross_entropy(ours.flatten(0, 1), labels.flatten())
        q, log_p = theirs.log_softmax(-1), (ours / TEMPERATURE).log_softmax(-1)
        kl = (q.exp() * (q - log_p)).sum(-1)[labels != -100].mean()
        loss = alpha * kl + (1 - alpha) * own
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_steps_equal_the_straight_line(alpha, tmp_path):
    stock, patched = tiny_model("llama"), apply_sce(tiny_model("llama"), objectives.get("exact"))
    expected = straight_line(stock, teacher(), alpha)
    options = {"alpha": alpha, "temperature": TEMPERATURE}
    trainer, losses = train(patched, tmp_path, teacher(), **options)
    assert losses == pytest.approx(expected, rel=1e-4, abs=6e-5)  # transformers 4 rounds its logs
    for (name, p), q in zip(patched.named_parameters(), stock.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    assert all(p.grad is None for p in trainer.teacher.parameters())


def test_sampled_steps_form_no_logits(tmp_path):
    """With all classes among the candidates the losses are those of the exact divergence."""
    exact, sampled = (
        train(
            apply_sce(tiny_model("llama"), objectives.get("exact")),
            tmp_path,
            teacher(),
            distill=distill,
            divergence="jsd",
        )[1]
        for distill in ("exact", SCEConfig(tail_candidates=1000))
    )
    assert sampled == pytest.approx(exact, rel=1e-4)
    trainer = DistillationTrainer(
        apply_sce(tiny_model("llama"), SCEConfig(tail_candidates=20, shared_frequent=4)),
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        teacher=teacher(),
        distill=SCEConfig(tail_candidates=20, shared_frequent=4, num_buckets=0),
    )
    batch = tiny_batch(batch=16, length=16)
    with VocabularySized(16 * 15, VOCAB_SIZE) as seen:
        trainer.compute_loss(trainer.model.train(), batch).backward()
    assert seen.count == 0


def test_columns_of_the_data_stand_for_a_teacher(tmp_path, monkeypatch):
    """With all classes in them the losses are those of the teacher that they were made of."""
    model, rows = apply_sce(teacher().eval(), objectives.get("exact")), examples()
    with torch.no_grad(), lazy_logits(model):
        for row in rows:
            logits = model(input_ids=row["input_ids"][None], use_cache=False).logits[0]
            best = HeadScores.of(logits).top_k(VOCAB_SIZE, temperature=TEMPERATURE)
            row |= {"teacher_ids": best.ids, "teacher_log_probs": best.log_probs}
    options = {"temperature": TEMPERATURE, "alpha": 0.6}
    plain = apply_sce(tiny_model("llama"), objectives.get("exact"))
    _, want = train(plain, tmp_path, teacher(), **options)
    patched = apply_sce(tiny_model("llama"), objectives.get("exact"))
    with pytest.raises(ValueError, match="remove_unused_columns drops the columns"):
        train(patched, tmp_path, None, **options)
    monkeypatch.setitem(QUIET, "remove_unused_columns", False)
    with pytest.raises(ValueError, match="give it teacher_ids and teacher_log_probs"):
        train(patched, tmp_path, None, **options)
    monkeypatch.setattr(sys.modules[__name__], "examples", lambda: rows)
    _, got = train(patched, tmp_path, None, **options)
    assert got == pytest.approx(want, rel=1e-4)


def test_evaluation_is_the_likelihood(tmp_path):
    model = apply_sce(tiny_model("llama"), SCEConfig())
    trainer = DistillationTrainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        teacher=teacher(),
        eval_dataset=examples(),
    )
    stock = tiny_model("llama").eval()
    batch = {n: torch.stack([row[n] for row in examples()]) for n in examples()[0]}
    logits = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    want = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    found = trainer.compute_loss(model.eval(), batch)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_a_model_without_objective_and_a_wrong_share_are_refused(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="has no objective"):
        DistillationTrainer(tiny_model("llama"), arguments, teacher=teacher())
    patched = apply_sce(tiny_model("llama"), SCEConfig())
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        DistillationTrainer(patched, arguments, teacher=teacher(), alpha=1.5)


def test_a_teacher_whose_head_is_not_linear_is_refused(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    patched, odd = apply_sce(tiny_model("llama"), SCEConfig()), teacher()
    odd.lm_head = nn.Sequential(odd.lm_head, nn.Tanh())
    with pytest.raises(ValueError, match="needs a linear layer"):
        DistillationTrainer(patched, arguments, teacher=odd)
