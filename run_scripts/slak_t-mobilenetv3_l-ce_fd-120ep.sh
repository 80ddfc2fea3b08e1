#!/usr/bin/env bash
# SLaK-T teaches MobileNetV3-Large for 120 epochs by its last map, 960 channels projected to 998.
# The weight of FD is the published code's default; what its authors used is not known.
# Paper table: MobileNetV3 as a student (its figures are not known to this project)
# Hardware:    any number of GPUs; 8 x 64 images x 2 accumulated = 1024 per update, as for ResNet-50
# Cost:        teacher 8.6 G + 3 x 0.2 G multiply-accumulates per image, nearly all the teacher's;
#              hours not measured
# Expected:    unknown; the gain is over supervised-120ep.sh
#
#     DATA=path/to/imagenet bash run_scripts/slak_t-mobilenetv3_l-ce_fd-120ep.sh
#     TEACHER_WEIGHTS=path/to/file GPUS=4 ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs}
TEACHER_WEIGHTS=${TEACHER_WEIGHTS:-published}

launch train_kd.py --config run_scripts/recipes/imagenet.yaml \
    --data-path "$DATA" --output-dir "$RUNS" \
    --teacher slak_t --teacher-weights "$TEACHER_WEIGHTS" \
    --student mobilenetv3_l \
    --loss ce --loss fd --effective-batch 1024 --epochs 120 "$@"
