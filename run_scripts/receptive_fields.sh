#!/usr/bin/env bash
# Effective receptive fields of a large-kernel teacher, of the student it taught, of the same student
# without a teacher, and of all of them untrained, side by side.
# Paper table: the receptive fields of distilled students, whose published figures this project does
#              not know
# Hardware:    one GPU or CPU; hours not measured
# Weights:     published, or $WEIGHTS/<model>.pth
# Expected:    unknown
#
#     DATA=path/to/imagenet bash run_scripts/receptive_fields.sh
#     DATA=path/to/imagenet bash run_scripts/receptive_fields.sh --batch-size 8 --device cuda
#
# A run of one's own: add --checkpoint runs/NAME/checkpoint-best.pth.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds val/}
OUT=${OUT:-runs/receptive_fields}

"$PYTHON" -m analysis.erf --data-path "$DATA" --images 50 --size 1024 --out "$OUT" \
    --model slak_t --weights "$(weights_of slak_t)" \
    --model convnext_t_bn --weights "$(weights_of convnext_t_bn)" \
    --model convnext_t --weights "$(weights_of convnext_t)" "$@"
