#!/usr/bin/env bash
# The trade of the SLaK paper on Imagenette at 128 px: a network 1.3 times as wide with 40 % of its
# weights masked, beside the dense one of width 1.0 with about as many weights.
# Paper table: none (a check on real pictures without ImageNet)
# Hardware:    CPU; about 15 minutes for each of the two networks and seeds on one free core
# Expected:    the table in README.md
#
#     DATA=path/to/imagenette128 SEEDS="0 1 2" bash run_scripts/imagenette128_sparse.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
DATA=${DATA:?set DATA to a folder that holds train/ and val/}
RUNS=${RUNS:-runs/imagenette128_sparse}
SEEDS=${SEEDS:-0}
NPROC=${NPROC:-1}

STUDENT=(slak_nano kernel_size=31,15,7,3,5 layer_scale_init=0)
EPOCHS=8
# The masks change 47 times in 1,176 updates, as often as in the published SLaK-T (2000 of 93,600).
SPARSE=(--sparsity 0.4 --sparse-init snip --prune-rate 0.5 --prune-every 25 --growth random)

train() {
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" train_kd.py \
        --config run_scripts/recipes/imagenette128.yaml --data-path "$DATA" \
        --output-dir "$RUNS" --teacher none --epochs $EPOCHS "$@"
}

for seed in $SEEDS; do
    train --student "${STUDENT[@]}" width_factor=1.0 --seed "$seed" "$@"
    train --student "${STUDENT[@]}" width_factor=1.3 "${SPARSE[@]}" --seed "$seed" "$@"
done
"$PYTHON" -m analysis.report "$RUNS"/*
