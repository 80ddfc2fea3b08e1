#!/usr/bin/env bash
# A small SLaK teacher on Imagenette at 128 px, then a small student alone and distilled from it.
# Paper table: none (a check on real pictures without ImageNet)
# Hardware:    CPU; 20 to 30 minutes for the teacher and 5 to 10 for each student run on one core
# Expected:    the table in README.md
#
#     DATA=path/to/imagenette128 bash run_scripts/imagenette128.sh
#     SEEDS="0 1 2" repeats both students with three seeds (the teacher is trained once)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
DATA=${DATA:?set DATA to a folder that holds train/ and val/}
RUNS=${RUNS:-runs/imagenette128}
SEEDS=${SEEDS:-0}
NPROC=${NPROC:-1}

TEACHER=(slak_nano kernel_size=31,15,7,3,5 layer_scale_init=0)
STUDENT=(convnext_bn_nano depths=1,1,2,1 dims=20,40,80,160 layer_scale_init=0)
TEACHER_EPOCHS=12
EPOCHS=8
LOSS=(--loss nkd)

train() {
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" train_kd.py \
        --config run_scripts/recipes/imagenette128.yaml --data-path "$DATA" \
        --output-dir "$RUNS" "$@"
}

train --teacher none --student "${TEACHER[@]}" --epochs $TEACHER_EPOCHS "$@"
teacher_folder=$RUNS/$("$PYTHON" -c 'import sys; from utils.run_folder import run_name
print(run_name(["none"], sys.argv[2:], [["ce"]], int(sys.argv[1]), 0))' "$TEACHER_EPOCHS" "${TEACHER[@]}")
for seed in $SEEDS; do
    train --teacher none --student "${STUDENT[@]}" --epochs $EPOCHS --seed "$seed" "$@"
    train --teacher "${TEACHER[@]}" --teacher-weights "$teacher_folder/checkpoint-last.pth" \
        --student "${STUDENT[@]}" "${LOSS[@]}" --epochs $EPOCHS --seed "$seed" "$@"
done
"$PYTHON" -m analysis.report "$RUNS"/*
