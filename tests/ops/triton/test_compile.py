"""Kernels compiled for GPUs that are not here: nothing spills, everything fits, products run on
the matrix unit. Results are kept by a hash of source, types and options."""

import re
from pathlib import Path

import pytest
import torch

from sce_lm.benchmarks import kernels
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.triton.compile_offline import Compiled, compile_launch
from sce_lm.ops.triton.configurations import ARCHITECTURES, DTYPES
from sce_lm.ops.triton.exact_cross_entropy import exact_cross_entropy_supported

BF16, PLAIN = torch.bfloat16, kernels.Variant()
FOLDER = Path(kernels.compile_launch.__code__.co_filename).parent
KERNELS = {
    name
    for path in FOLDER.glob("*.py")
    for name in re.findall(r"^def (\w+)_kernel\(", path.read_text(), re.MULTILINE)
}


def faults(launches, dtype) -> list[str]:
    found = []
    for launch in launches:
        reason = kernels.fault(launch, compile_launch(launch, kernels.CACHE), dtype)
        if reason is not None:
            found.append(f"{launch.name} {launch.configuration} ({launch.variant}): {reason}")
    return found


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(a, id=a.name, marks=() if a.name == "sm_90" else pytest.mark.slow)
        for a in ARCHITECTURES.values()
    ],
)
def test_each_kernel_compiles(architecture):
    """One configuration a kernel and architecture, bf16."""
    launches = kernels.launches(architecture, BF16, kernels.FULL[0])
    chosen = {}
    for launch in sorted(launches, key=lambda launch: launch.num_arguments):
        chosen[launch.name] = launch
    assert len(KERNELS) >= 9
    assert set(chosen) == KERNELS
    try:
        assert not faults(chosen.values(), BF16)
    except Exception as error:
        if "ld.lld not found" in str(error):
            pytest.skip("this Triton has no linker for AMD devices of its own")
        raise


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda a: a.name)
def test_every_configuration_and_variant_compiles(architecture, dtype):
    launches = {}
    for variant in kernels.VARIANTS:
        for launch in kernels.launches(architecture, dtype, variant):
            launches[launch.key] = launch
    assert not faults(launches.values(), dtype)


def test_each_fault_is_named():
    launch = next(
        x for x in kernels.launches(ARCHITECTURES["sm_80"], BF16, PLAIN) if x.name == "forward"
    )
    assert launch.has_product
    assert kernels.fault(launch, Compiled(255, 0, 1000, 4), BF16) is None
    assert "spilled" in kernels.fault(launch, Compiled(255, 3, 1000, 4), BF16)
    assert "166912 are there" in kernels.fault(launch, Compiled(255, 0, 166913, 4), BF16)
    assert "no HMMA" in kernels.fault(launch, Compiled(255, 0, 1000, 0), BF16)
    assert kernels.fault(launch, Compiled(255, 0, 1000, 0), torch.float32) is None


def test_a_launch_keeps_its_key_and_another_has_its_own():
    found = {
        (name, again): [x.key for x in kernels.launches(ARCHITECTURES[name], BF16, PLAIN)]
        for name in ("sm_80", "sm_90")
        for again in (False, True)
    }
    assert found["sm_80", False] == found["sm_80", True]
    assert not set(found["sm_80", False]) & set(found["sm_90", False])


def test_kernels_load_in_the_interpreter_or_on_a_gpu_only():
    hidden = torch.zeros(2, 16)
    positions = Positions(hidden, torch.arange(2))
    reason = exact_cross_entropy_supported(Head(hidden), positions)
    assert reason is not None
    assert "TRITON_INTERPRET" in reason
