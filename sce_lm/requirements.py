"""What only some parts of the package need, and one sentence where it is missing.

The losses, objectives and ``apply_sce``, and the benchmarks of the loss, run with torch,
transformers, safetensors and, on a GPU, triton. The rest is a dependency of the package all the
same, but may be missing where it runs from a checkout.
"""

from __future__ import annotations

import importlib.util

PACKAGES = {"yaml": "pyyaml", "faiss": "faiss-cpu"}
"""What pip calls a module, where it is not the module's own name."""


def require(user: str, *modules: str) -> None:
    """Raise one sentence if a module is missing.

    Args:
        user: who needs it.
        modules: what is imported, by name.

    Raises:
        ImportError: it names what is missing and how to install it.
    """
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        packages = [PACKAGES.get(module, module) for module in missing]
        raise ImportError(
            f"{user} needs {', '.join(packages)}, which this Python does not have: pip install "
            f"{' '.join(packages)}"
        )
