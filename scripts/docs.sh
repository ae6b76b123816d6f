#!/usr/bin/env bash
# Build the manual from docs/ into build/site; a warning is an error.
#
#     bash scripts/docs.sh [serve]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment
python -c 'import mkdocs, mkdocstrings' 2>/dev/null || python -m pip install --quiet --editable '.[docs]'
if [ "${1:-}" = "serve" ]; then
    exec python -m mkdocs serve
fi
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --quiet
say "The manual is in build/site/index.html"
