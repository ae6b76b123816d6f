#!/usr/bin/env bash
# Lint, types and tests.
#
#     bash scripts/test.sh           everything but the tests marked slow
#     bash scripts/test.sh --slow    everything
#     bash scripts/test.sh --gpu     the tests marked gpu alone, where there is a GPU
#
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment
if [ "${1:-}" = "--gpu" ]; then
    shift
    if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "test.sh --gpu: torch finds no GPU here, so there is nothing to run." >&2
        exit 1
    fi
    exec python -m pytest -q --durations=10 -m gpu tests/ops/triton/test_gpu.py "$@"
fi
marked=(-m "not slow")
if [ "${1:-}" = "--slow" ]; then
    marked=()
    shift
fi
say "ruff and pyright"
ruff check .
ruff format --check .
pyright
say "pytest"
# A file of tests is one worker's, as its fixtures are: some start several processes.
python -m pytest -q --durations=10 -n logical --maxprocesses 4 --dist loadfile "${marked[@]}" "$@"
say "All passed in $((SECONDS / 60)) min $((SECONDS % 60)) s."
