#!/usr/bin/env bash
# SLaK-S, kernels 51x5 and 5x51, 40 % of its weights masked and moving all the time.
# Paper table: ImageNet-1K, SLaK-S, 300 epochs (91.1 M weights, 54.8 M of them live)
# Hardware:    any number of GPUs; published on 8 of 64 images x 8 accumulated
#              = 4096 in float32 (add --amp none)
# Cost:        3 x 16.6 G multiply-accumulates per image (masking saves none); hours not measured
# Expected:    top-1 83.8 % (published; not repeated here)
#
#     DATA=path/to/imagenet GPUS=8 bash run_scripts/train_slak_s_300ep.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs/teachers}

launch train_kd.py --config run_scripts/recipes/imagenet.yaml \
    --data-path "$DATA" --output-dir "$RUNS" \
    --teacher none --student slak_s drop_path=0.4 --model-ema --epochs 300 \
    --batch-size 64 --effective-batch 4096 \
    --sparsity 0.4 --sparse-init snip --growth random --prune-every 100 --prune-rate 0.3 "$@"
