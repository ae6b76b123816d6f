"""Does `apply_sce` with the exact objective equal the stock model, for a type of transformers?

    python tests/programs/conformance.py --json conformance.json    # every causal LM, some minutes
    python tests/programs/conformance.py t5 bart --head seq2seq     # some types, another head

For each type the smallest valid model is built, copied and patched, and both are asked the same:
loss and gradient of every parameter with ignored labels, with `num_items_in_batch`, `shift_labels`
and `logits_to_keep`; loss and logits in evaluation; `generate`. The answer is an :class:`Outcome`.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where this runs as a program

from support.small_configs import VOCAB_SIZE, small_config

from sce_lm import apply_sce, objectives

HEADS = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "masked": AutoModelForMaskedLM,
    "vision": AutoModelForImageTextToText,
}
"""Kind of head: the class that builds a model with it from any config."""

ROWS, LENGTH, KEPT = 3, 16, 6
LARGEST = 50_000_000
"""Parameters of the largest model that is built."""


class Outcome(StrEnum):
    """What became of a type."""

    EQUAL = "equal without materialising"
    MATERIALISED = "equal after materialising"
    REFUSED = "refused"
    UNBUILDABLE = "not buildable"
    WRONG = "wrong"


@dataclass
class Result:
    """One row of the table."""

    model_type: str
    outcome: Outcome
    reason: str = ""
    """Why, where the outcome is not the first; one line."""
    model_class: str = ""
    answers: dict[str, str] = field(default_factory=dict)
    """Question: "equal", "materialised", or why the stock model has no answer."""
    seconds: float = 0.0


def types(head: str = "causal") -> list[str]:
    """The model types that have such a head."""
    return list(HEADS[head]._model_mapping._model_mapping)


def tiny_model(model_type: str, head: str = "causal") -> PreTrainedModel:
    """The smallest model of a type, fp32, without dropout, its logits spread over some units."""
    config = small_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in HEADS[head].from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"no small config: {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = HEADS[head].from_config(config, dtype=torch.float32)
    weight = getattr(model.get_output_embeddings(), "weight", None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
        if isinstance(weight, torch.Tensor):
            weight.mul_(0.3 / weight.std().clamp_min(1e-6))
    return model.train()


def tiny_batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`, `labels` with ignored ones, and pixels where they must be."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, VOCAB_SIZE, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(11, VOCAB_SIZE, (ROWS, LENGTH), generator=generator)
    labels[0, :5] = -100
    labels[-1, -4:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if model.config.model_type == "git":
        size = model.config.vision_config.image_size
        batch["pixel_values"] = torch.randn(ROWS, 3, size, size, generator=generator)
    return batch


# ---------------------------------------------------------------------------------- the questions

Answer = dict[str, Any]


def _train(model: PreTrainedModel, batch: dict[str, Any]) -> Answer:
    """Loss, logits, and the gradient of every parameter."""
    model.train().zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss, "logits": output.logits, **gradients}


@torch.no_grad()
def _evaluate(model: PreTrainedModel, batch: dict[str, Any]) -> Answer:
    output = model.eval()(**batch)
    return {"loss": output.loss, "logits": output.logits}


@torch.no_grad()
def _predict(model: PreTrainedModel, batch: dict[str, Any]) -> Answer:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return {"logits": model.eval()(**inputs).logits}


@torch.no_grad()
def _generate(model: PreTrainedModel, batch: dict[str, Any]) -> Answer:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return {"ids": model.eval().generate(**inputs, **options)}


def questions(model: PreTrainedModel) -> dict[str, Callable[[PreTrainedModel], Answer]]:
    """Name: what is asked of the stock and of the patched model."""
    batch = tiny_batch(model)
    variants = {
        "labels": batch,
        "num_items_in_batch": {**batch, "num_items_in_batch": torch.tensor(31)},
        "shift_labels": {**batch, "shift_labels": batch["labels"].roll(-1, 1)},
    }
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept = {"labels": batch["labels"][:, -KEPT:].contiguous(), "logits_to_keep": KEPT}
        variants["logits_to_keep"] = {**batch, **kept}
    asked = {name: lambda m, given=given: _train(m, given) for name, given in variants.items()}
    asked["evaluation"] = lambda m: _evaluate(m, batch)
    asked["prediction"] = lambda m: _predict(m, batch)
    if model.can_generate():
        asked["generation"] = lambda m: _generate(m, batch)
    return asked


# ------------------------------------------------------------------------------------- the answer


def check(model_type: str, head: str = "causal", seconds: int = 120) -> Result:
    """Compare the patched and the stock model of a type, each question within a time limit."""
    result = Result(model_type, Outcome.UNBUILDABLE)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check(model_type, head, seconds, result)
    result.seconds = round(time.perf_counter() - started, 1)
    return result


def _check(model_type: str, head: str, seconds: int, result: Result) -> None:
    try:
        with _time_limit(seconds):
            stock = tiny_model(model_type, head)
    except Exception as error:
        result.reason = _line(error)
        return
    result.model_class = type(stock).__name__
    patched = copy.deepcopy(stock)
    try:
        apply_sce(patched, objectives.get("exact"))
    except (TypeError, ValueError) as error:
        result.outcome, result.reason = Outcome.REFUSED, _line(error)
        return
    result.outcome = Outcome.EQUAL
    for name, question in questions(stock).items():
        try:
            with _time_limit(seconds):
                want = _ask(question, stock)
        except Exception as error:
            result.answers[name] = f"stock: {_line(error)}"
            if name == "labels":
                result.outcome, result.reason = Outcome.UNBUILDABLE, result.answers[name]
                return
            continue
        try:
            with _time_limit(seconds), _streamed_loss(patched) as streamed:
                got = _ask(question, patched)
                late = "loss" in want and not streamed()
            _compare(got, want)
            result.answers[name] = "materialised" if late else "equal"
        except Exception as error:
            result.answers[name] = _line(error)
            result.outcome, result.reason = Outcome.WRONG, f"{name}: {_line(error)}"
            return
    late = [name for name, answer in result.answers.items() if answer == "materialised"]
    if late:
        result.outcome, result.reason = Outcome.MATERIALISED, ", ".join(late)


def _ask(question: Callable[[PreTrainedModel], Answer], model: PreTrainedModel) -> Answer:
    torch.manual_seed(7)  # some routers draw noise
    return question(model)


@contextmanager
def _streamed_loss(model: PreTrainedModel) -> Iterator[Callable[[], bool]]:
    """Tells whether the head gave losses only: what it returns has no vocabulary dimension."""
    shapes: list[torch.Size] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    try:
        yield lambda: bool(shapes) and all(shape == () for shape in shapes)
    finally:
        handle.remove()


def _compare(got: Answer, want: Answer) -> None:
    """Raise AssertionError unless all of an answer agrees to float32 precision."""
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    for name, expected in want.items():
        value, expected = got[name].detach(), expected.detach()
        assert value.shape == expected.shape, f"{name}: {value.shape}, not {expected.shape}"
        assert expected.isfinite().all(), f"{name} of the stock model is not finite"
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        error = float((value - expected).abs().max()) if expected.numel() else 0.0
        assert error <= 1e-4 * scale + 1e-7, f"{name} differs by {error:.1e} of {scale:.1e}"


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Of processor time, so that what else the machine does has no say in the outcome."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _line(error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("types", nargs="*", help="model types; without, all of them")
    parser.add_argument("--head", choices=HEADS, default="causal")
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--seconds", type=int, default=120, help="limit for each question")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = []
    for model_type in options.types or types(options.head):
        result = check(model_type, options.head, options.seconds)
        results.append(result)
        print(f"{result.model_type:28} {result.outcome:28} {result.reason}", flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    counts = Counter(result.outcome for result in results)
    print()
    for outcome in Outcome:
        print(f"{outcome:28} {counts[outcome]:4}")
    print(f"{'types':28} {len(results):4}")


if __name__ == "__main__":
    main()
