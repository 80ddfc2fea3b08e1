#!/usr/bin/env bash
# SLaK-T teaches ResNet-50 for 120 epochs, KD. The published script types temperature 3 and leaves
# alpha, the weight of the teacher, at 0.1; its drop path does not reach ResNet-50.
# Paper table: the comparison of teachers for ResNet-50 (its figures are not known to this project)
# Hardware:    any number of GPUs; published on 2 x 64 images x 8 accumulated = 1024 per update
# Cost:        teacher 8.6 G + 3 x 4.1 G multiply-accumulates per image; hours not measured
# Expected:    unknown; the gain is over supervised-120ep.sh
#
#     DATA=path/to/imagenet bash run_scripts/slak_t-resnet50-kd-120ep.sh
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
    --student resnet50 \
    --loss kd temperature=3 alpha=0.1 --effective-batch 1024 --epochs 120 "$@"
