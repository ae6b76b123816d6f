"""Candidates of a sampled distillation: what SCE chooses for the student, and the teacher's best.

The shared list holds the labels, the most frequent classes, and every class that a stored teacher
kept at some position. A bucket that samples for itself, as those of wide heads do, draws by the
mean of the student's softmax and the teacher's, each at the centre of the bucket's positions in its
own space. Otherwise the classes with the teacher's largest logits there are candidates of the
bucket, beside the student's own; without buckets of the student's there are ones of the teacher's;
and the tail is SCE's. All of it is chosen without gradient, and fixed before the noise is drawn or
independent of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import normalize

from sce_lm.candidates.buckets import kmeans_buckets
from sce_lm.candidates.center_softmax import CenterSoftmax
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
    "control_variate": (True, "knows the mean of one head, and here are two"),
    "row_control_variate": (True, "expects the gradient of a cross-entropy"),
    "shared_labels": (False, "leaves out classes that a teacher is sure of"),
}
"""Options of SCE with which there is no sampled distillation, and why."""


def refuse_unsuited(config: SCEConfig, is_stored: bool) -> None:
    """Raise one sentence for options that do not go with distillation, or a stored teacher."""
    if is_stored and config.bucket_sampling == "priority":
        raise ValueError(
            "SCEConfig.bucket_sampling='priority' draws by the teacher's softmax at the buckets, "
            "which a stored teacher has not; leave it out."
        )
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
    config = replace(config, control_variate=False, row_control_variate=False)
    wanted = positions.labels
    if isinstance(teacher, HeadTeacher):
        sce = _OfBoth(config, state, teacher)
    else:
        sce = SCE(replace(config, bucket_sampling="top"), state)
        if isinstance(teacher, TopKTeacher):
            wanted = torch.cat([wanted, teacher.ids.reshape(-1)])
    call = call.begin(sce.state, wanted, head.vocab_size, generator)
    candidates = sce.choose(head, positions, call).candidates
    is_sampled = candidates.bucket_log_weights is not None
    if is_sampled or not isinstance(teacher, HeadTeacher):
        return candidates
    return _with_best(candidates, teacher, call)


class _OfBoth(SCE):
    """Corrected SCE whose buckets draw by the mean of the student's and the teacher's softmax."""

    def __init__(self, config: SCEConfig, state: SCEState | None, teacher: HeadTeacher) -> None:
        super().__init__(config, state)
        self.teacher = teacher

    def bucket_softmax(
        self, centers: torch.Tensor, bucket_of: torch.Tensor, head: Head
    ) -> CenterSoftmax:
        of_student = super().bucket_softmax(centers, bucket_of, head)
        theirs = _means(self.teacher, bucket_of, len(centers)).to(centers.dtype)
        of_teacher = super().bucket_softmax(theirs, bucket_of, self.teacher.head)
        shares = [normalize(each.share, p=1, dim=1) for each in (of_student, of_teacher)]
        return of_student._replace(share=shares[0] + shares[1])


def _means(teacher: HeadTeacher, bucket_of: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """``[n_b, d]`` the teacher's mean hidden state of each bucket."""
    hidden = teacher.hidden.to(compute_dtype(teacher.hidden))
    sums = hidden.new_zeros(num_buckets, hidden.shape[1]).index_add_(0, bucket_of, hidden)
    return sums / torch.bincount(bucket_of, minlength=num_buckets).clamp_min(1).unsqueeze(1)


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
        centers = _means(teacher, bucket_of, len(own))
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
