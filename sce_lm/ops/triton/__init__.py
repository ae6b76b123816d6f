"""The numeric core as Triton kernels, for CUDA and ROCm devices.

Operations with the semantics of their PyTorch twins, each with a predicate that says why it cannot
take some inputs, and each one node for ``torch.compile``:

    candidate_cross_entropy    candidate_cross_entropy_supported
    exact_cross_entropy        exact_cross_entropy_supported
    chunk_cross_entropy        chunk_cross_entropy_supported
    catalogue_topk             catalogue_topk_supported
    priority_sample            priority_sample_supported
    row_reductions             row_reductions_supported

The twins choose between the two (:mod:`sce_lm.ops.dispatch`). The modules import Triton, which is
there on Linux alone, and are imported where they are used.
"""
