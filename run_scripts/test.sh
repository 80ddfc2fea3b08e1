#!/usr/bin/env bash
# Style check and the whole test suite, on the CPU, without network or downloads.
#     bash run_scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt

"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
