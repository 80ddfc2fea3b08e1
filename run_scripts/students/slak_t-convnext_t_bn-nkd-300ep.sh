#!/usr/bin/env bash
# ConvNeXt L2S-T: SLaK-T teaches ConvNeXt-T (with BatchNorm after the depthwise convolutions), NKD.
# Table:    ImageNet-1K, ConvNeXt L2S-T
# GPUs:     any number; published on 4 x 64 images x 8 accumulated = 2048 per update
# Cost:     teacher 8.6 G + 3 x 4.5 G MACs per image; hours not measured
# Expected: top-1 83.1 % (published; not repeated here); the gain is over
#           studies/supervised-300ep.sh
#
#     DATA=IMAGENET bash run_scripts/students/slak_t-convnext_t_bn-nkd-300ep.sh
source "$(dirname "$0")/../launch.sh"

train --teacher slak_t --student convnext_t_bn drop_path=0.1 \
    --loss nkd temperature=1 gamma=1 --effective-batch 2048 --epochs 300 "$@"
