#!/usr/bin/env bash
# A small SLaK teacher on Imagenette at 128 px, then a small student alone and distilled from it.
# Paper table: none (a check on real pictures without ImageNet)
# Hardware:    CPU; 20 to 30 minutes for the teacher and 5 to 10 for each student run on one core
# Expected:    the table in README.md
#
#     DATA=path/to/imagenette128 bash run_scripts/imagenette128.sh
#     SEEDS="0 1 2" repeats the students with three seeds (each teacher is trained once)
#     TEACHERS="swin_nano slak_nano:layer_scale_init=0" other teachers; a colon before each option
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to a folder that holds train/ and val/}
RUNS=${RUNS:-runs/imagenette128}
SEEDS=${SEEDS:-0}
GPUS=${NPROC:-1}  # processes, on a CPU too

TEACHERS=${TEACHERS:-slak_nano:kernel_size=31,15,7,3,5:layer_scale_init=0}
STUDENT="convnext_bn_nano depths=1,1,2,1 dims=20,40,80,160 layer_scale_init=0"
TEACHER_EPOCHS=12
EPOCHS=8
LOSS=nkd

train() {
    launch train_kd.py --config run_scripts/recipes/imagenette128.yaml --data-path "$DATA" \
        --output-dir "$RUNS" "$@"
}

for seed in $SEEDS; do
    train --teacher none --student $STUDENT --epochs $EPOCHS --seed "$seed" "$@"
done
for teacher in $TEACHERS; do
    teacher=${teacher//:/ }
    train --teacher none --student $teacher --epochs $TEACHER_EPOCHS "$@"
    weights=$(checkpoints_of none "$teacher" ce $TEACHER_EPOCHS 0)
    for seed in $SEEDS; do
        train --teacher $teacher --teacher-weights "$weights" --student $STUDENT --loss $LOSS \
            --epochs $EPOCHS --seed "$seed" "$@"
    done
done
"$PYTHON" -m analysis.report "$RUNS"/*
