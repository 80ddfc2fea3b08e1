#!/usr/bin/env bash
# Teachers that are strong without large kernels: ResNet-50-D, EfficientNet-B3, and ViT-B and
# ConvNeXt-T pretrained on ImageNet-21k or -22k; two students, three losses: 24 trainings.
# Table:    the rebuttal's comparison (its numbers are not known to this project)
# GPUs:     any number; 8 x 64 images x 2 accumulated = 1024 per update, as published for ResNet-50;
#           that of the other students is not known (--effective-batch 4096 is the recipe's)
# Cost:     3 x 4.1 G (ResNet-50) or 4.5 (ConvNeXt-T), and for the teacher 4.3 G (resnet50d), 1.8
#           (efficientnet_b3), 17.6 (vit_b), 61.6 (vit_l), 4.5 (convnext_t_22k) MACs per image;
#           hours not measured
# Weights:  published, or $WEIGHTS/<teacher>.pth. convnext_t_22k, a ConvNeXt-T with the 1,000
#           classes, has to be there; so has vit_l, ViT-L/16, which is left out by default. The
#           published code takes EfficientNet-B3-NS of TensorFlow's padding, this torchvision's
# Expected: unknown; gains are over supervised-120ep.sh: python -m analysis.report runs/*
#
#     DATA=IMAGENET WEIGHTS=FOLDER bash run_scripts/studies/strong_teachers-120ep.sh
#     TEACHERS="resnet50d vit_l" STUDENTS=resnet50 LOSSES=nkd ...    # some cells, see launch.sh
source "$(dirname "$0")/../launch.sh"

TEACHERS=${TEACHERS:-resnet50d efficientnet_b3 vit_b convnext_t_22k}
STUDENTS=${STUDENTS:-resnet50 convnext_t_bn:drop_path=0.1}
LOSSES=${LOSSES:-kd:temperature=3:alpha=0.1 nkd ce+fd}
train_cells 120 --effective-batch 1024 "$@"
