#!/usr/bin/env bash
# SLaK-T teaches MobileNetV3-Large for 120 epochs by its last map, 960 channels projected to 998.
# The weight of FD is the published code's default; what its authors used is not known.
# Table:    MobileNetV3 as a student (its numbers are not known to this project)
# GPUs:     any number; 8 x 64 images x 2 accumulated = 1024 per update, as for ResNet-50
# Cost:     teacher 8.6 G + 3 x 0.2 G MACs per image; hours not measured
# Expected: unknown; the gain is over studies/supervised-120ep.sh
#
#     DATA=IMAGENET bash run_scripts/students/slak_t-mobilenetv3_l-ce_fd-120ep.sh
source "$(dirname "$0")/../launch.sh"

train --teacher slak_t --student mobilenetv3_l \
    --loss ce --loss fd --effective-batch 1024 --epochs 120 "$@"
