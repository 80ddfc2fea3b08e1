#!/usr/bin/env bash
# ConvNeXt-S, kernels of 7: the supervised baseline, and a small-kernel teacher.
# Table:    ImageNet-1K, ConvNeXt-S, 300 epochs
# GPUs:     any number; 8 x 128 images x 4 accumulated = 4096 per update
# Cost:     3 x 8.7 G MACs per image; hours not measured
# Expected: top-1 83.1 % (published; not repeated here)
#
#     DATA=IMAGENET bash run_scripts/teachers/convnext_s-300ep.sh
#
# With a BatchNorm after each depthwise convolution, as L2S-S has: add
# --student convnext_s_bn drop_path=0.4 --output-dir runs/teachers/convnext_s_bn-300ep
source "$(dirname "$0")/../launch.sh"

train --output-dir "$RUNS/teachers/convnext_s-300ep" --teacher none \
    --student convnext_s drop_path=0.4 \
    --model-ema --epochs 300 --batch-size 128 --effective-batch 4096 "$@"
