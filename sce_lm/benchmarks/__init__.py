"""What `sce-lm benchmark` measures: one module a subcommand.

Such a module has ``add_arguments(parser)``, ``measure(arguments)``, which returns comparisons of
:mod:`sce_lm.benchmarks.results`, and ``TABLES`` and ``PLOTS`` that show them; its docstring is the
subcommand's help. Naming it in ``SUBCOMMANDS`` is all that it takes.
"""

SUBCOMMANDS = (
    *("loss", "estimators", "step", "train", "scale", "kernels", "reductions", "index"),
    "papers",
)
