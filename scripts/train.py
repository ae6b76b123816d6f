"""`sce-lm train` from a checkout: python scripts/train.py CONFIG.yaml [--field value ...]"""

import sys

from sce_lm.commands import run

if __name__ == "__main__":
    sys.exit(run("train", "train.py", sys.argv[1:]))
