"""Parts that go well, raise, crash and hang, for :mod:`sce_lm.benchmarks.parts`."""

import ctypes
import subprocess
import sys
import time


def good(value):
    print("said by a part")
    return {"value": value}


def raising():
    raise ValueError("this part raises\nand says more")


def crashing():
    ctypes.string_at(0)


def silent():
    sys.exit(3)


def hanging(path):
    """With a child that would outlive it."""
    code = "import sys, time; time.sleep(5); open(sys.argv[1], 'w').close()"
    subprocess.Popen([sys.executable, "-c", code, path])
    time.sleep(60)
