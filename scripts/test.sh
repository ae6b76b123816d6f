#!/usr/bin/env bash
# Lint, types and tests.
#
#     bash scripts/test.sh           everything but the tests marked slow
#     bash scripts/test.sh --ci      these, then the slow ones of what matters most, and the manual
#     bash scripts/test.sh --slow    everything
#     bash scripts/test.sh --gpu     the tests marked gpu alone, where there is a GPU
#     bash scripts/test.sh --all     the tests that skip without optional packages, with these, in
#                                    an environment of its own (.versions/all, gigabytes)
#
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

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

# What skips without a package that is no part of the installation for tests.
optional=(bitsandbytes deepspeed lightning optuna torchao)
with_optional=(
    tests/hf/test_quantised.py
    tests/hf/test_trainer.py
    tests/hf/test_distributed.py
    tests/hf/test_trl.py
    tests/hf/test_trl_trainers.py
    tests/recsys/test_item_index.py
    tests/benchmarks/test_reductions.py
    tests/test_examples.py
    tests/test_serve.py
)

# A file of tests is one worker's, as its fixtures are: some start several processes.
run_tests() {
    python -m pytest -q --durations=10 -n logical --maxprocesses 4 --dist loadfile "$@"
}

which=fast
case "${1:-}" in
    --ci | --slow | --gpu | --all) which=${1#--}; shift ;;
esac
if [ "$which" = all ]; then
    make_environment_in .versions/all test plots
    for package in "${optional[@]}"; do
        python -m pip install --quiet "$package" || say "$package cannot be installed here."
    done
    run_tests -m "" "${with_optional[@]}" "$@"
    say "All passed in $((SECONDS / 60)) min $((SECONDS % 60)) s."
    exit
fi
make_environment test plots
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
    bash scripts/docs.sh
    say "All passed in $((SECONDS / 60)) min $((SECONDS % 60)) s."
fi
