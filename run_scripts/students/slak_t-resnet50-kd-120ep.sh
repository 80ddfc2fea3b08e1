#!/usr/bin/env bash
# SLaK-T teaches ResNet-50 for 120 epochs, KD. The published script types temperature 3 and leaves
# alpha, the weight of the teacher, at 0.1; its drop path does not reach ResNet-50.
# Table:    the comparison of teachers for ResNet-50 (its numbers are not known to this project)
# GPUs:     any number; published on 2 x 64 images x 8 accumulated = 1024 per update
# Cost:     teacher 8.6 G + 3 x 4.1 G MACs per image; hours not measured
# Expected: unknown; the gain is over studies/supervised-120ep.sh
#
#     DATA=IMAGENET bash run_scripts/students/slak_t-resnet50-kd-120ep.sh
source "$(dirname "$0")/../launch.sh"

train --teacher slak_t --student resnet50 \
    --loss kd temperature=3 alpha=0.1 --effective-batch 1024 --epochs 120 "$@"
