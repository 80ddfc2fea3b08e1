#!/usr/bin/env bash
# The main job on the embedded data set: a small SLaK teacher; then, by the same recipe, the same
# small-kernel student alone and distilled from it; then a table of the three.
# Paper table: none (a demonstration; the shapes need long-range structure)
# Hardware:    two CPU cores, at most 6 minutes after installation; no data, no GPU
# Expected:    the table in README.md
#
#     bash run_scripts/quickstart.sh
#     SEEDS="0 1 2" bash run_scripts/quickstart.sh      # mean and spread over three seeds
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
RUNS=${RUNS:-runs/quickstart}
# Waiting threads that spin would take the cores from the loader's process.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
SEEDS=${SEEDS:-0}

# Two stages each. The teacher's kernels of 15 and 7, on maps of 16x16 and 8x8, reach the whole
# picture; the student's kernels of 3 reach 32 of its 64 pixels.
TEACHER=slak_pico
STUDENT=convnext_bn_pico
LOSS=(--loss nkd)
EPOCHS=${EPOCHS:-5}

train() {
    "$PYTHON" train_kd.py --config run_scripts/recipes/outlines.yaml --epochs $EPOCHS \
        --output-dir "$RUNS" "$@"
}

for seed in $SEEDS; do
    echo "== teacher alone (seed $seed)"
    train --seed "$seed" --teacher none --student $TEACHER "$@"
    echo "== student alone (seed $seed)"
    train --seed "$seed" --teacher none --student $STUDENT "$@"
    suffix=$([[ $seed == 0 ]] || echo "-seed$seed")
    echo "== student distilled (seed $seed)"
    train --seed "$seed" --teacher $TEACHER \
        --teacher-weights "$RUNS/none-$TEACHER-ce-${EPOCHS}ep$suffix/checkpoint-last.pth" \
        --student $STUDENT "${LOSS[@]}" "$@"
done

echo
"$PYTHON" -m analysis.report "$RUNS"/*
echo
echo "Run folders: $RUNS/"
