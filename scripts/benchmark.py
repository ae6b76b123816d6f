"""`sce-lm benchmark` from a checkout: python scripts/benchmark.py SUBCOMMAND [options]"""

import sys

from sce_lm.commands import run

if __name__ == "__main__":
    sys.exit(run("benchmark", "benchmark.py", sys.argv[1:]))
