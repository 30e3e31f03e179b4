#!/usr/bin/env bash
# The whole path on a real 135M model, from nothing to a table and a picture; about 12 minutes on 2 CPU cores.
# usage: bash examples/quickstart.sh [OUT]        OUT: folder for everything it makes (default quickstart_out)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
exec .venv/bin/python examples/quickstart.py "${1:-quickstart_out}"
