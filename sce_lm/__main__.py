"""`python -m sce_lm` is the command `sce-lm`."""

import sys

from sce_lm.commands import main

if __name__ == "__main__":
    sys.exit(main())
