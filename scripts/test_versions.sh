#!/usr/bin/env bash
# The fast tests with the oldest and with the newest versions of what the package stands on.
#
#     bash scripts/test_versions.sh [oldest|newest ...] [-- further arguments of pytest]
#
# Each has an environment of its own in .versions/, made once from the package index (gigabytes: its
# torch may bring CUDA). docs/versions.md says what was run and what each version lacks.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

# The lower bounds of pyproject.toml, with peers of their time.
oldest=('torch==2.8.0' 'transformers==4.57.1' 'accelerate==1.11.0' 'peft==0.21.0' 'datasets==5.0.1'
    'numpy==2.2.6')
newest=('torch' 'transformers' 'accelerate' 'peft' 'datasets' 'numpy')
others=('polars>=2.1' 'matplotlib>=3.9' 'pytest>=8.2' hypothesis psutil pytest-xdist pyyaml
    rich safetensors tensorboard tqdm)

which=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    case "$1" in
        oldest | newest) which+=("$1") ;;
        *) echo "test_versions.sh: it is oldest or newest, and not $1; pytest's come after --." >&2
           exit 1 ;;
    esac
    shift
done
[ $# -eq 0 ] || shift
[ ${#which[@]} -gt 0 ] || which=(oldest newest)

python=$(find_python)
failed=()
for name in "${which[@]}"; do
    folder=.versions/$name
    declare -n packages=$name
    wanted=$(printf '%s\n' "${packages[@]}" "${others[@]}" | cksum)
    if [ "$(cat "$folder/.installed" 2>/dev/null)" != "$wanted" ]; then
        say "Making the environment $folder"
        "$python" -m venv --clear "$folder"
        # torch first: it decides what the others may bring.
        "$folder/bin/python" -m pip install --quiet "${packages[0]}"
        "$folder/bin/python" -m pip install --quiet "${packages[@]}" "${others[@]}"
        echo "$wanted" > "$folder/.installed"
    fi
    say "$name"
    "$folder/bin/python" - torch triton transformers peft accelerate <<'PYTHON'
import platform, sys
from importlib.metadata import version
print("python", platform.python_version(), *(f"{name} {version(name)}" for name in sys.argv[1:]))
PYTHON
    PYTHONPATH=$PWD "$folder/bin/python" -m pytest -q -n logical --maxprocesses 4 --dist loadfile \
        -m "not slow" -p no:cacheprovider "$@" || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "test_versions.sh: tests failed with ${failed[*]}." >&2
    exit 1
fi
say "All passed with ${which[*]}."
