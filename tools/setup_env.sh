#!/usr/bin/env bash
# Make .venv in the repository's root: the package (editable), its development tools, at the versions in constraints.txt.
# usage: bash tools/setup_env.sh        (PYTHON=/path/to/python3.12 chooses the interpreter of a new .venv)
# Does nothing where .venv is up to date. pip's output goes to .venv/install.log.
set -euo pipefail
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
root=$(cd "$here/.." && pwd -P)
venv=$root/.venv
stamp=$venv/up_to_date

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

# What was installed from what, and where: a changed list of packages or a moved repository is seen here.
fingerprint() {
    "$venv/bin/python" - "$root" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
print(root, hashlib.sha256(b"".join((root / name).read_bytes() for name in ("setup.py", "constraints.txt"))).hexdigest())
PY
}

find_python() {
    local folder candidate candidates=(python3.12)
    for folder in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null || true)" "${HOME:-}/.pyenv"; do
        candidates+=("$folder"/versions/3.12*/bin/python)
    done
    for candidate in "${candidates[@]}" python3; do
        if is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# The scripts in a venv's bin/ name its folder: one copied or moved from elsewhere does not work as a whole.
is_usable() { is_recent "$venv/bin/python" && grep -qsF "$venv/bin/" "$venv/bin/pip"; }

if is_usable && [ -f "$stamp" ] && [ "$(<"$stamp")" = "$(fingerprint)" ]; then
    echo "environment: $venv is up to date"
    exit 0
fi

if ! is_usable; then
    if [ -n "${PYTHON:-}" ]; then
        is_recent "$PYTHON" || { echo "error: PYTHON=$PYTHON does not run, or is older than Python 3.12" >&2; exit 2; }
        python=$PYTHON
    elif ! python=$(find_python); then
        echo "error: Python 3.12 or newer is needed and was not found: install it (apt-get install python3.12-venv," \
            "pyenv install 3.12, or uv python install 3.12), or set PYTHON=/path/to/python3.12" >&2
        exit 2
    fi
    [ ! -e "$venv" ] || echo "environment: $venv does not work here, making it anew"
    [ ! -L "$venv" ] || rm "$venv" # what a link points to is somebody else's
    echo "environment: making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || { echo "error: $python could not make a venv (see above)" >&2; exit 1; }
fi

# Copies pip's output and says on descriptor 3 when it gets somewhere.
watch_pip() {
    local line
    while IFS= read -r line; do
        printf '%s\n' "$line"
        case $line in
            "Collecting torch"[=\>]*) echo "environment: downloading" >&3 ;;
            "Installing collected packages"*) echo "environment: everything is downloaded, unpacking" >&3 ;;
        esac
    done
}

rm -f "$stamp"
cd "$root"
log=.venv/install.log
echo "environment: installing the package and its tools (the first time: several minutes, 6 GB; log: $log)"
if ! "$venv/bin/python" -m pip install -c constraints.txt -e '.[dev]' 2>&1 | watch_pip 3>&1 >"$log"; then
    echo "error: pip failed; the last lines of $log:" >&2
    tail -n 20 "$log" >&2
    exit 1
fi
fingerprint >"$stamp"
echo "environment: $venv is ready"
