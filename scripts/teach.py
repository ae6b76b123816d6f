"""`sce-lm teach` from a checkout: python scripts/teach.py CONFIG.yaml FOLDER --teacher MODEL"""

import sys

from sce_lm.commands import run

if __name__ == "__main__":
    sys.exit(run("teach", "teach.py", sys.argv[1:]))
