#!/usr/bin/env bash
# The students of the 120-epoch distillations without a teacher, by the same recipe: the baseline
# of every gain. 3 trainings.
# Table:    the supervised rows of the comparisons (their numbers are not known to this project)
# GPUs:     any number; 8 x 64 images x 2 accumulated = 1024 per update, as those
# Cost:     3 x 4.1 G (ResNet-50), 4.5 (ConvNeXt-T), 0.2 (MobileNetV3) MACs per image; hours not
#           measured
# Expected: unknown
#
#     DATA=IMAGENET bash run_scripts/studies/supervised-120ep.sh
#     STUDENTS="convnext_t:drop_path=0.1" ...                        # others, see launch.sh
source "$(dirname "$0")/../launch.sh"

TEACHERS=none LOSSES=ce
STUDENTS=${STUDENTS:-resnet50 convnext_t_bn:drop_path=0.1 mobilenetv3_l}
train_cells 120 --effective-batch 1024 "$@"
