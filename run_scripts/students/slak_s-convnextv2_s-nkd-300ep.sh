#!/usr/bin/env bash
# SLaK-S teaches ConvNeXt-V2-S (global response normalisation, no BatchNorm), NKD.
# Table:    ConvNeXt-V2 as a student (its numbers are not known to this project)
# GPUs:     any number; 4 x 64 images x 16 accumulated = 4096 per update, as for L2S-S
# Cost:     teacher 16.5 G + 3 x 8.7 G MACs per image; hours not measured
# Expected: unknown; the gain is over studies/supervised-300ep.sh
#
#     DATA=IMAGENET bash run_scripts/students/slak_s-convnextv2_s-nkd-300ep.sh
source "$(dirname "$0")/../launch.sh"

train --teacher slak_s --student convnextv2_s drop_path=0.1 \
    --loss nkd temperature=1 gamma=1 --effective-batch 4096 --epochs 300 "$@"
