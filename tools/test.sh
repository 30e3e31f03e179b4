#!/usr/bin/env bash
# Every check of this repository: lint, format, types, and the tests that need no GPU.
# usage: bash tools/test.sh [pytest's arguments]      e.g.  bash tools/test.sh -k partial_rope -x
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
# Two test processes of one thread each: tiny models gain nothing from more threads.
export OMP_NUM_THREADS=1
step "pytest" "$python" -m pytest -m "not gpu" -n 2 --dist loadfile --durations=25 "$@"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED:'
    printf ' %s;' "${failed[@]}"
    echo
    exit 1
fi
echo "all checks passed"
