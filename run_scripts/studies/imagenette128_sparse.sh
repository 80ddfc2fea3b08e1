#!/usr/bin/env bash
# The trade of the SLaK paper on Imagenette at 128 px: a network 1.3 times as wide with 40 % of its
# weights masked, beside the dense one of width 1.0 with about as many weights.
# Table:    none (a check on real photographs without ImageNet)
# GPUs:     none; one process on the CPU (GPUS=2: two)
# Cost:     about 15 minutes for each of the two networks and seeds on one free core
# Expected: the table of docs/results.md
#
#     DATA=path/to/imagenette128 SEEDS="0 1 2" bash run_scripts/studies/imagenette128_sparse.sh
GPUS=${GPUS:-1}
source "$(dirname "$0")/../launch.sh"

RECIPE=imagenette128
RUNS=$RUNS/imagenette128_sparse
STUDENT="slak_nano kernel_size=31,15,7,3,5 layer_scale_init=0"
# The masks change 47 times in 1,176 updates, as often as in the published SLaK-T (2000 of 93,600).
SPARSE="--sparsity 0.4 --sparse-init snip --prune-rate 0.5 --prune-every 25 --growth random"

for seed in ${SEEDS:-0}; do
    train --output-dir "$RUNS/dense-seed$seed" --teacher none --student $STUDENT width_factor=1.0 \
        --epochs 8 --seed "$seed" "$@"
    train --output-dir "$RUNS/sparse-seed$seed" --teacher none --student $STUDENT width_factor=1.3 \
        $SPARSE --epochs 8 --seed "$seed" "$@"
done
analyse report "$RUNS"/*
