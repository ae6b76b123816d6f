#!/usr/bin/env bash
# Train a language model and a recommender with exact cross-entropy, published SCE and SCE as it
# comes, on data made from the installed Python packages, and compare them in two tables.
#
#     bash scripts/demo.sh
#
# About ten minutes on two CPU cores, installation included. What is already there is kept: delete
# runs/demo to train again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment
python scripts/demo.py
say "The demo took $((SECONDS / 60)) min $((SECONDS % 60)) s, installation included."
