#!/usr/bin/env bash
# SLaK-L, kernels 51x5 and 5x51, half of its weights masked (346.6 M weights).
# Paper table: none. The settings are those of a script that was removed from the published tree
#              (sparsity 0.5, ERK, moves every 4000 updates, drop path 0.5); how new weights were
#              placed and the share that moves are not known: as for SLaK-B here
# Hardware:    any number of GPUs, several machines as in launch.sh; published for 16 of 32 images
#              x 8 accumulated = 4096
# Cost:        3 x 61.9 G multiply-accumulates per image (masking saves none); hours not measured
# Expected:    unknown
#
#     DATA=path/to/imagenet GPUS=8 bash run_scripts/train_slak_l_300ep.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs/teachers}

launch train_kd.py --config run_scripts/recipes/imagenet.yaml \
    --data-path "$DATA" --output-dir "$RUNS" \
    --teacher none --student slak_l drop_path=0.5 --model-ema --epochs 300 \
    --batch-size 32 --effective-batch 4096 \
    --sparsity 0.5 --sparse-init erk --growth random --prune-every 4000 --prune-rate 0.3 "$@"
