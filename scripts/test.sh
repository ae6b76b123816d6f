#!/usr/bin/env bash
# Lint, types and tests.
#
#     bash scripts/test.sh           everything but the tests marked slow
#     bash scripts/test.sh --ci      these, then the slow ones of what matters most
#     bash scripts/test.sh --slow    everything
#     bash scripts/test.sh --gpu     the tests marked gpu alone, where there is a GPU
#
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment

# Kernels in the interpreter and compiled, ranks, and comparisons of real trainings.
important=(
    tests/ops/triton/test_interpreted.py
    tests/ops/triton/test_compile.py::test_each_kernel_compiles
    tests/hf/test_distributed.py
    tests/test_distributed.py::test_its_estimator_is_unbiased
    tests/benchmarks/test_commands.py
    tests/benchmarks/test_comparison.py
    tests/test_requirements.py
)

# A file of tests is one worker's, as its fixtures are: some start several processes.
run_tests() {
    python -m pytest -q --durations=10 -n logical --maxprocesses 4 --dist loadfile "$@"
}

which=fast
case "${1:-}" in
    --ci | --slow | --gpu) which=${1#--}; shift ;;
esac
if [ "$which" = gpu ]; then
    if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "test.sh --gpu: torch finds no GPU here, so there is nothing to run." >&2
        exit 1
    fi
    exec python -m pytest -q --durations=10 -m gpu tests/ops/triton/test_gpu.py "$@"
fi
say "ruff and pyright"
ruff check .
ruff format --check .
pyright
say "pytest"
if [ "$which" = slow ]; then
    run_tests "$@"
else
    run_tests -m "not slow" "$@"
fi
say "Passed in $((SECONDS / 60)) min $((SECONDS % 60)) s."
if [ "$which" = ci ]; then
    say "The slow tests of what matters most"
    run_tests -m slow "${important[@]}" "$@"
    say "All passed in $((SECONDS / 60)) min $((SECONDS % 60)) s."
fi
