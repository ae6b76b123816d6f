# Sourced by demo.sh and test.sh: makes .venv in the repository and activates it.
#
# torch comes first, and its CPU build where no NVIDIA driver is found, since the ordinary one
# brings gigabytes of CUDA. Nothing is done where the environment already fits pyproject.toml.

say() { printf '\n== %s\n' "$*"; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "sce_lm needs Python 3.11 or newer, and none was found; install one." >&2
    return 1
}

make_environment() {
    local stamp=.venv/.installed wanted python
    wanted=$(cat pyproject.toml scripts/environment.sh | cksum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        say "The environment .venv is ready."
    else
        say "Making the environment .venv (once, a few minutes at most)"
        python=$(find_python)
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
            if command -v nvidia-smi >/dev/null; then
                .venv/bin/python -m pip install --quiet 'torch==2.13.0'
            else
                # What it needs comes with the rest, from the ordinary index alone.
                .venv/bin/python -m pip install --quiet --no-deps 'torch==2.13.0+cpu' \
                    --extra-index-url https://download.pytorch.org/whl/cpu
            fi
        fi
        .venv/bin/python -m pip install --quiet --editable '.[test,plots]'
        echo "$wanted" > "$stamp"
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
}
