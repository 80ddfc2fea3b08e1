#!/usr/bin/env bash
# ConvNeXt-B, dense, kernels of 7: the supervised baseline, and a small-kernel teacher.
# Paper table: ImageNet-1K, ConvNeXt-B, 300 epochs
# Hardware:    any number of GPUs; 8 x 128 images x 4 accumulated = 4096 per update
# Cost:        3 x 15.4 G multiply-accumulates per image; hours not measured
# Expected:    top-1 83.8 % (published; not repeated here)
#
#     DATA=path/to/imagenet GPUS=8 bash run_scripts/train_convnext_b_300ep.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs/teachers}

launch train_kd.py --config run_scripts/recipes/imagenet.yaml \
    --data-path "$DATA" --output-dir "$RUNS" \
    --teacher none --student convnext_b drop_path=0.5 --model-ema --epochs 300 \
    --batch-size 128 --effective-batch 4096 "$@"
