#!/usr/bin/env bash
# All that is to be known of this machine's GPU, in under nine minutes and from the checkout:
#
#     bash scripts/gpu.sh [--json DIR]      results of every part, and a table at the end
#     bash scripts/gpu.sh --rehearse        every part on the CPU, at toy sizes
#
# The Python is .venv's, if that is there, and else the one of the machine, with what it has: torch,
# transformers, safetensors and triton are needed; whatever else is missing is skipped by name.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
elif command -v python >/dev/null; then
    python=python
else
    python=python3
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m sce_lm.benchmarks.gpu "$@"
