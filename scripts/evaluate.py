"""`sce-lm evaluate` from a checkout: python scripts/evaluate.py RUN_DIR [options]"""

import sys

from sce_lm.commands import run

if __name__ == "__main__":
    sys.exit(run("evaluate", "evaluate.py", sys.argv[1:]))
