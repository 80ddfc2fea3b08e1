#!/usr/bin/env bash
# ConvNeXt-S, dense, kernels of 7: the supervised baseline, and a small-kernel teacher.
# Paper table: ImageNet-1K, ConvNeXt-S, 300 epochs
# Hardware:    any number of GPUs; 8 x 128 images x 4 accumulated = 4096 per update
# Cost:        3 x 8.7 G multiply-accumulates per image; hours not measured
# Expected:    top-1 83.1 % (published; not repeated here)
#
#     DATA=path/to/imagenet GPUS=8 bash run_scripts/train_convnext_s_300ep.sh
#     STUDENT=convnext_s_bn ...      # with a BatchNorm after each depthwise convolution, as L2S-S
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs/teachers}
STUDENT=${STUDENT:-convnext_s}

launch train_kd.py --config run_scripts/recipes/imagenet.yaml \
    --data-path "$DATA" --output-dir "$RUNS" \
    --teacher none --student $STUDENT drop_path=0.4 --model-ema --epochs 300 \
    --batch-size 128 --effective-batch 4096 "$@"
