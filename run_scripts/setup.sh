# Finds or makes the Python that the other scripts run; to be sourced:
#     source run_scripts/setup.sh requirements.txt
# Afterwards $PYTHON is set and the working directory is the repository.
#
# L2S_PYTHON  a Python that already has what is needed; used as it is, nothing is installed
# L2S_VENV    where the virtual environment lives (default: .venv in the repository)
#
# The environment is left alone as long as the requirement files have not changed.

# Paths are the caller's, whose folder is left here.
for name in DATA RUNS TEACHER_WEIGHTS L2S_PYTHON L2S_VENV; do
    value=${!name:-}
    if [[ "$value" != /* && "$value" != *://* && ( "$value" == */* || -e "$value" ) ]]; then
        export "$name=$PWD/$value"
    fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=${1:-requirements.txt}

if [[ ! -f "$requirements" ]]; then
    echo "setup: no such file: $requirements (looked in $PWD)." >&2
    exit 2
fi

if [[ -n "${L2S_PYTHON:-}" ]]; then
    PYTHON=$L2S_PYTHON
    # find_spec looks without importing: torch alone would take seconds.
    missing=$("$PYTHON" - "$requirements" <<'PY'
import importlib.util, re, sys
modules = {"pillow": "PIL", "pyyaml": "yaml", "pytest-xdist": "xdist"}
names = []
def read(path):
    for line in open(path):
        if line.startswith("-r "):
            read(line.split()[1])
        elif match := re.match(r"[A-Za-z0-9_-]+", line):
            names.append(match.group().lower())
read(sys.argv[1])
print(*[name for name in names if importlib.util.find_spec(modules.get(name, name)) is None])
PY
    ) || { echo "setup: L2S_PYTHON=$L2S_PYTHON does not run." >&2; exit 2; }
    if [[ -n "$missing" ]]; then
        echo "setup: L2S_PYTHON=$L2S_PYTHON lacks: $missing. Install them there, or unset" \
             "L2S_PYTHON to let this script make an environment of its own." >&2
        exit 2
    fi
else
    venv=${L2S_VENV:-.venv}
    PYTHON=$venv/bin/python
    wanted=$(cat requirements*.txt | sha256sum)
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
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements"
        echo "$wanted" > "$venv/.installed-$(basename "$requirements")"
    fi
fi
