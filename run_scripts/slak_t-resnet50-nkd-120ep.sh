#!/usr/bin/env bash
# SLaK-T teaches ResNet-50 for 120 epochs, NKD.
# Paper table: the comparison of teachers for ResNet-50 (its figures are not known to this project)
# Hardware:    any number of GPUs; the published script asks for 2 x 64 x 8 = 1024 images per update
# Expected:    unknown: compare with none-resnet50-ce-120ep (TEACHER=none LOSS=ce)
#
#     DATA=path/to/imagenet GPUS=8 TEACHER_WEIGHTS=slak_t.pth bash run_scripts/slak_t-resnet50-nkd-120ep.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs}
TEACHER=${TEACHER:-slak_t}
TEACHER_WEIGHTS=${TEACHER_WEIGHTS:-published}
LOSS=${LOSS:-nkd}

launch train_kd.py \
    --config run_scripts/recipes/imagenet.yaml --data-path "$DATA" --output-dir "$RUNS" \
    --teacher $TEACHER --teacher-weights "$TEACHER_WEIGHTS" \
    --student resnet50 --loss $LOSS --effective-batch 1024 --epochs 120 "$@"
