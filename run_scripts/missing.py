"""Prints the packages of a requirements file that this Python lacks. Looks for them without
importing: torch alone would take seconds.

    python run_scripts/missing.py requirements.txt
"""
import importlib.util
import re
import sys
from pathlib import Path

MODULES = {"pillow": "PIL", "pyyaml": "yaml", "pytest-xdist": "xdist"}  # imported by other names


def required(path: Path) -> list[str]:
    """Lower-case names of the packages, those of files included with -r first."""
    names = []
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            names += required(path.parent / line.split()[1])
        elif match := re.match(r"[A-Za-z0-9_-]+", line):
            names.append(match.group().lower())
    return names


if __name__ == "__main__":
    print(*[name for name in required(Path(sys.argv[1]))
            if importlib.util.find_spec(MODULES.get(name, name)) is None])
