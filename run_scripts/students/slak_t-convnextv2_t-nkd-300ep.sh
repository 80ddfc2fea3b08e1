#!/usr/bin/env bash
# SLaK-T teaches ConvNeXt-V2-T (global response normalisation, no BatchNorm), NKD.
# Table:    ConvNeXt-V2 as a student (its numbers are not known to this project)
# GPUs:     any number; 4 x 64 images x 8 accumulated = 2048 per update, as for L2S-T
# Cost:     teacher 8.6 G + 3 x 4.5 G MACs per image; hours not measured
# Expected: unknown; the gain is over studies/supervised-300ep.sh
#
#     DATA=IMAGENET bash run_scripts/students/slak_t-convnextv2_t-nkd-300ep.sh
source "$(dirname "$0")/../launch.sh"

train --teacher slak_t --student convnextv2_t drop_path=0.1 \
    --loss nkd temperature=1 gamma=1 --effective-batch 2048 --epochs 300 "$@"
