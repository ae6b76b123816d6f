#!/usr/bin/env bash
# Build the manual from docs/ into build/site; a warning is an error.
#
#     bash scripts/docs.sh [serve]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment docs
if [ "${1:-}" = "serve" ]; then
    exec python -m mkdocs serve
fi
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --quiet
say "The manual is in build/site/index.html"
