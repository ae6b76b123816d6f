"""What `scripts/benchmark.py` measures: one module a subcommand.

Such a module has ``add_arguments(parser)`` and ``run(arguments)``; its docstring is the
subcommand's help. Naming it in ``SUBCOMMANDS`` is all that it takes.
"""

SUBCOMMANDS = ("loss", "estimators", "step", "train", "scale", "ranks", "kernels")
