#!/usr/bin/env bash
# Six teachers teach ConvNeXt-T by logits and the last map together: 12 trainings of 120 epochs.
# Table:    combined losses (its numbers are not known to this project)
# GPUs:     any number; 8 x 64 images x 2 accumulated = 1024 per update, as published for ResNet-50;
#           that of the other students is not known (--effective-batch 4096 is the recipe's)
# Cost:     3 x 4.5 G, and for the teacher 8.6 G (slak_t), 4.5
#           (swin_t), 9.9 (vit_s), 4.6 (deit_s), 4.3 (cswin_t), 4.5 (convnext_t) MACs per image;
#           hours not measured
# Weights:  published, or $WEIGHTS/<teacher>.pth; of cswin_t no address is known, so that
#           $WEIGHTS/cswin_t.pth is needed
# Expected: unknown; to be read beside all_teachers-120ep.sh and supervised-120ep.sh
#
#     DATA=IMAGENET WEIGHTS=FOLDER bash run_scripts/studies/combined_losses-120ep.sh
#     TEACHERS=slak_t LOSSES="nkd+fd:weight=0.1 nkd+mgd" ...         # other cells, see launch.sh
source "$(dirname "$0")/../launch.sh"

TEACHERS=${TEACHERS:-slak_t swin_t vit_s deit_s cswin_t convnext_t}
STUDENTS=${STUDENTS:-convnext_t_bn:drop_path=0.1}
LOSSES=${LOSSES:-kd:temperature=3:alpha=0.1+fd nkd+fd}
train_cells 120 --effective-batch 1024 "$@"
