# Sourced by demo.sh, docs.sh and test.sh: makes .venv in the repository and activates it.
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

# make_environment EXTRA...: those of pyproject.toml that are wanted.
make_environment() { make_environment_in .venv "$@"; }

# make_environment_in FOLDER EXTRA...
make_environment_in() {
    local folder=$1 wanted python extra extras missing=0
    shift
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
    wanted=$(cat pyproject.toml scripts/environment.sh | cksum)
    [ -x "$folder/bin/python" ] || missing=1
    for extra in "$@"; do
        [ "$(cat "$folder/.installed-$extra" 2>/dev/null)" = "$wanted" ] || missing=1
    done
    if [ "$missing" = 0 ]; then
        say "The environment $folder is ready."
    else
        say "Making the environment $folder (once, a few minutes at most)"
        python=$(find_python)
        [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
        if ! "$folder/bin/python" -c 'import torch' 2>/dev/null; then
            if command -v nvidia-smi >/dev/null; then
                "$folder/bin/python" -m pip install --quiet 'torch==2.13.0'
            else
                # What it needs comes with the rest, from the ordinary index alone.
                "$folder/bin/python" -m pip install --quiet --no-deps 'torch==2.13.0+cpu' \
                    --extra-index-url https://download.pytorch.org/whl/cpu
            fi
        fi
        extras=$(IFS=,; echo "$*")
        "$folder/bin/python" -m pip install --quiet --editable ".[$extras]"
        for extra in "$@"; do echo "$wanted" > "$folder/.installed-$extra"; done
    fi
    # shellcheck disable=SC1091
    source "$folder/bin/activate"
}
