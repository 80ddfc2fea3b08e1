#!/usr/bin/env bash
# Makes a virtual environment with everything that is needed, once.
#
#     bash run_scripts/setup.sh                          # to train and evaluate
#     bash run_scripts/setup.sh requirements-dev.txt     # and for tests and plots
#
# L2S_VENV    where the environment lives (default: .venv in the repository)
# L2S_PYTHON  a Python that already has the packages: it is checked, nothing is installed
#
# quickstart.sh and test.sh source this file and use the $PYTHON that it sets. An environment is
# left alone as long as the requirement files have not changed.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
requirements=${1:-requirements.txt}

if [[ ! -f "$ROOT/$requirements" ]]; then
    echo "setup: no such file: $requirements (looked in $ROOT)." >&2
    exit 2
fi

if [[ -n "${L2S_PYTHON:-}" ]]; then
    PYTHON=$L2S_PYTHON
    missing=$("$PYTHON" "$ROOT/run_scripts/missing.py" "$ROOT/$requirements") || {
        echo "setup: L2S_PYTHON=$L2S_PYTHON does not run." >&2
        exit 2
    }
    if [[ -n "$missing" ]]; then
        echo "setup: L2S_PYTHON=$L2S_PYTHON lacks: $missing. Install them there, or unset" \
             "L2S_PYTHON to let this script make an environment of its own." >&2
        exit 2
    fi
else
    venv=${L2S_VENV:-$ROOT/.venv}
    PYTHON=$venv/bin/python
    wanted=$(cat "$ROOT"/requirements*.txt | sha256sum)
    is_installed() { [[ "$(cat "$venv/.installed-$1" 2>/dev/null)" == "$wanted" ]]; }
    # What the tests need includes what the programs need.
    if [[ ! -x "$PYTHON" ]] || ! { is_installed "$(basename "$requirements")" ||
            { [[ "$requirements" == requirements.txt ]] && is_installed requirements-dev.txt; }; }
    then
        echo "setup: installing $requirements into $venv (once; PyTorch is several gigabytes)"
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "setup: Python 3.10 or newer is needed; python3 is $(python3 --version)." >&2
            exit 2
        }
        "$PYTHON" -m pip --version >/dev/null 2>&1 || python3 -m venv "$venv" || {
            echo "setup: python3 -m venv failed; on Debian install the package python3-venv." >&2
            exit 2
        }
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$requirements"
        echo "$wanted" > "$venv/.installed-$(basename "$requirements")"
    fi
fi

# The scripts that source this file may leave the folder that a relative path starts in.
if [[ "$PYTHON" == */* ]]; then PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON"); fi
if [[ "${BASH_SOURCE[0]}" == "$0" && -z "${L2S_PYTHON:-}" ]]; then
    echo "setup: ready. Now: source $(dirname "$PYTHON")/activate"
fi
