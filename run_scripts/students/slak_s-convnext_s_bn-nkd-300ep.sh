#!/usr/bin/env bash
# ConvNeXt L2S-S: SLaK-S teaches ConvNeXt-S (with BatchNorm after the depthwise convolutions), NKD.
# Table:    ImageNet-1K, ConvNeXt L2S-S
# GPUs:     any number; published on 4 x 64 images x 16 accumulated = 4096 per update
# Cost:     teacher 16.5 G + 3 x 8.7 G MACs per image; hours not measured
# Expected: top-1 84.3 % (published; not repeated here); the gain is over
#           studies/supervised-300ep.sh
#
#     DATA=IMAGENET bash run_scripts/students/slak_s-convnext_s_bn-nkd-300ep.sh
source "$(dirname "$0")/../launch.sh"

train --teacher slak_s --student convnext_s_bn drop_path=0.1 \
    --loss nkd temperature=1 gamma=1 --effective-batch 4096 --epochs 300 "$@"
