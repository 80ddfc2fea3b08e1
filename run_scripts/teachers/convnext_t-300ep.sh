#!/usr/bin/env bash
# ConvNeXt-T, kernels of 7: the supervised baseline, and a small-kernel teacher.
# Table:    ImageNet-1K, ConvNeXt-T, 300 epochs
# GPUs:     any number; 8 x 128 images x 4 accumulated = 4096 per update
# Cost:     3 x 4.5 G MACs per image; hours not measured
# Expected: top-1 82.1 % (published; not repeated here)
#
#     DATA=IMAGENET bash run_scripts/teachers/convnext_t-300ep.sh
#
# With a BatchNorm after each depthwise convolution, as L2S-T has: add
# --student convnext_t_bn drop_path=0.1 --output-dir runs/teachers/convnext_t_bn-300ep
source "$(dirname "$0")/../launch.sh"

train --output-dir "$RUNS/teachers/convnext_t-300ep" --teacher none \
    --student convnext_t drop_path=0.1 \
    --model-ema --epochs 300 --batch-size 128 --effective-batch 4096 "$@"
