#!/usr/bin/env bash
# Style check and the whole test suite, on the CPU, without network or downloads.
#
#     bash run_scripts/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt

cd "$ROOT"
"$PYTHON" -m ruff check .
# Tests run on one thread each, two at a time.
"$PYTHON" -m pytest -n 2 --dist worksteal "$@"
