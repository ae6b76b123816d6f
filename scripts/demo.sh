#!/usr/bin/env bash
# Train a language model and a recommender with exact cross-entropy, published SCE and SCE as it
# comes, on data made from the installed Python packages, and compare them.
#
#     bash scripts/demo.sh
#
# Under five minutes on two CPU cores behind the installation. What is already there is kept:
# delete runs/demo to train again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment plots
python scripts/demo.py
say "The demo took $((SECONDS / 60)) min $((SECONDS % 60)) s, installation included."
