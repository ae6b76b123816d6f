"""Candidates of a sampled distillation: what SCE chooses for the student, and the teacher's best.

The shared list holds the labels, the most frequent classes, and every class that a stored teacher
kept at some position. Of a teacher with a head the classes with the largest logits at the centre
of a bucket are candidates of that bucket, beside the student's own: its positions are few and
alike. Without buckets of the student's there are ones of the teacher's. The tail is SCE's. All of
it is chosen without gradient, and fixed before the tail's noise is drawn or independent of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sce_lm.candidates.buckets import kmeans_buckets
from sce_lm.candidates.state import SCEState
from sce_lm.config import SCEConfig
from sce_lm.objectives.call import Call
from sce_lm.objectives.sce import SCE
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.catalogue_scan import catalogue_topk
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.teachers import HeadTeacher, Teacher, TopKTeacher

TEACHER_CLASSES = 512
"""Classes of a teacher's bucket."""
BUCKET_POSITIONS, MOST_BUCKETS = 16, 64
"""Positions of a teacher's bucket in the mean, and buckets at most."""

UNSUITED = {
    "bucket_sampling": ("priority", "weighs each bucket's list for the student's softmax alone"),
    "control_variate": (True, "knows the mean of one head, and here are two"),
    "row_control_variate": (True, "expects the gradient of a cross-entropy"),
    "shared_labels": (False, "leaves out classes that a teacher is sure of"),
}
"""Options of SCE with which there is no sampled distillation, and why."""


def refuse_unsuited(config: SCEConfig) -> None:
    """Raise one sentence for options that do not go with distillation."""
    for name, (value, why) in UNSUITED.items():
        if getattr(config, name) == value:
            raise ValueError(f"SCEConfig.{name}={value!r} {why}; leave it out for distillation.")
    for name, default in (("labels_first", 0), ("target_relative_error", None)):
        if getattr(config, name) != default:
            raise ValueError(
                f"SCEConfig.{name}={getattr(config, name)!r} is for training on labels; leave it "
                "out for distillation."
            )


@torch.no_grad()
def distilled_candidates(
    config: SCEConfig,
    head: Head,
    positions: Positions,
    teacher: Teacher,
    call: Call,
    state: SCEState | None,
    generator: torch.Generator | None,
) -> Candidates:
    """The lists of one call; ``shared`` is ascending, and there is no control variate."""
    of_students = {"bucket_sampling": "top", "control_variate": False, "row_control_variate": False}
    sce = SCE(replace(config, **of_students), state)
    wanted = positions.labels
    if isinstance(teacher, TopKTeacher):
        wanted = torch.cat([wanted, teacher.ids.reshape(-1)])
    call = call.begin(sce.state, wanted, head.vocab_size, generator)
    candidates = sce.choose(head, positions, call).candidates
    if not isinstance(teacher, HeadTeacher):
        return candidates
    return _with_best(candidates, teacher, call)


def _with_best(candidates: Candidates, teacher: HeadTeacher, call: Call) -> Candidates:
    """The same with the teacher's best classes in the list of each bucket."""
    hidden = teacher.hidden.to(compute_dtype(teacher.hidden))
    rest = teacher.head.vocab_size - len(candidates.shared)
    if rest == 0:
        return candidates
    own, bucket_of = candidates.bucket_items, candidates.bucket_of
    if own is None or bucket_of is None:
        num_buckets = max(1, min(MOST_BUCKETS, len(hidden) // BUCKET_POSITIONS))
        centers, bucket_of = kmeans_buckets(hidden, num_buckets, call.stream("teacher"))
    else:
        centers = hidden.new_zeros(len(own), hidden.shape[1]).index_add_(0, bucket_of, hidden)
        count = torch.bincount(bucket_of, minlength=len(own)).clamp_min(1)
        centers /= count.unsqueeze(1)
    best = catalogue_topk(
        centers,
        teacher.head,
        min(TEACHER_CLASSES, rest),
        excluded=candidates.shared,
        backend=call.backend,
    )
    if own is None:
        return replace(candidates, bucket_items=best, bucket_of=bucket_of)
    items = torch.cat([own, best], dim=1).sort(dim=1).values
    # An id that both have has an empty slot behind its own.
    log_weights = torch.zeros_like(items, dtype=hidden.dtype)
    log_weights[:, 1:].masked_fill_(items[:, 1:] == items[:, :-1], -torch.inf)
    return replace(
        candidates, bucket_items=items, bucket_of=bucket_of, bucket_log_weights=log_weights
    )
