#!/usr/bin/env bash
# Lint, types and tests.
#
#     bash scripts/test.sh           everything but the tests marked slow
#     bash scripts/test.sh --slow    everything
#
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment
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
python -m pytest -q --durations=10 "${marked[@]}" "$@"
say "All passed in $((SECONDS / 60)) min $((SECONDS % 60)) s."
