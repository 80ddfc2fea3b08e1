#!/usr/bin/env bash
# The main job on the embedded data set: a small SLaK teacher; then, by the same recipe, the same
# small-kernel student alone and distilled from it; then a table of the three.
# Table:    none (a demonstration; the shapes need long-range structure)
# GPUs:     none; two CPU cores
# Cost:     at most 6 minutes after the installation, which this script does on first use
# Expected: the table of docs/results.md
#
#     bash run_scripts/quickstart.sh
#     SEEDS="0 1 2" bash run_scripts/quickstart.sh      # mean and spread over three seeds
source "$(dirname "$0")/setup.sh" requirements.txt
GPUS=1
source "$(dirname "$0")/launch.sh"
RUNS=$RUNS/quickstart
# Waiting threads that spin would take the cores from the loader's process.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

# Two stages each. The teacher's kernels of 15 and 7, on maps of 16x16 and 8x8, reach the whole
# image; the student's kernels of 3 reach 32 of its 64 pixels.
TEACHER=slak_pico
STUDENT=convnext_bn_pico
EPOCHS=${EPOCHS:-5}

train() { launch train_kd.py --config "$ROOT/run_scripts/recipes/outlines.yaml" "$@"; }

for seed in ${SEEDS:-0}; do
    common=(--epochs "$EPOCHS" --seed "$seed")
    teacher=$RUNS/teacher-${EPOCHS}ep-seed$seed
    echo "== teacher alone (seed $seed)"
    train --output-dir "$teacher" --teacher none --student $TEACHER "${common[@]}" "$@"
    echo "== student alone (seed $seed)"
    train --output-dir "$RUNS/alone-${EPOCHS}ep-seed$seed" --teacher none --student $STUDENT \
        "${common[@]}" "$@"
    echo "== student distilled (seed $seed)"
    train --output-dir "$RUNS/distilled-${EPOCHS}ep-seed$seed" --teacher $TEACHER \
        --teacher-weights "$(weights_in "$teacher")" --student $STUDENT --loss nkd \
        "${common[@]}" "$@"
done

echo
analyse report "$RUNS"/{alone,teacher,distilled}-"${EPOCHS}"ep-seed*
echo
echo "Run folders: $RUNS/"
