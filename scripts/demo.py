"""`sce-lm demo` from a checkout; scripts/demo.sh makes the environment too."""

import sys

from sce_lm.commands import run

if __name__ == "__main__":
    sys.exit(run("demo", "demo.py", sys.argv[1:]))
