"""The numeric core as Triton kernels, for CUDA and ROCm devices.

Three operations with the semantics of their PyTorch twins in :mod:`sce_lm.ops`, each with a
predicate that says why it cannot take some inputs:

    candidate_cross_entropy    candidate_cross_entropy_supported
    exact_cross_entropy        exact_cross_entropy_supported
    catalogue_topk             catalogue_topk_supported

and :func:`~sce_lm.ops.triton.tail_sample.tail_sample`, a priority sample with noise made on chip.
The losses are one node each for ``torch.compile``. The modules import Triton, which is there on
Linux alone: import them where they are used.
"""
