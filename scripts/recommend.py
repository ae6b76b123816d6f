"""`sce-lm recommend` from a checkout: python scripts/recommend.py RUN_DIR [options]"""

import sys

from sce_lm.commands import run

if __name__ == "__main__":
    sys.exit(run("recommend", "recommend.py", sys.argv[1:]))
