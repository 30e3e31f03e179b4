#!/usr/bin/env bash
# Every check of this repository: lint, format, types, and the tests that need no GPU.
# usage: bash tools/test.sh [pytest's arguments]      e.g.  bash tools/test.sh -k partial_rope -x
# Without arguments each test file runs in a process of its own (tests/run_files.py); with some, pytest runs once.
# All steps run even where one fails; the exit code is 0 only if all passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh

failed=()
step() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

python=.venv/bin/python
step "ruff check" "$python" -m ruff check .
step "ruff format" "$python" -m ruff format --check .
step "pyright" "$python" -m pyright
# One thread a process: tiny models gain nothing from more.
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
    step "tests" "$python" -m tests.run_files -m "not gpu" -q --durations=3
else
    step "tests" "$python" -m pytest -m "not gpu" "$@"
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED:'
    printf ' %s;' "${failed[@]}"
    echo
    exit 1
fi
echo "all checks passed"
