#!/usr/bin/env bash
# The students of the 300-epoch distillations without a teacher, by the same recipe: the baseline
# of every gain. 4 trainings.
# Table:    none known: the paper's baselines have the recipe of teachers/convnext_{t,s}-300ep.sh
# GPUs:     any number; 4 x 64 images x 8 accumulated = 2048 per update for the tiny students, x 16
#           = 4096 for the small ones, as when they are taught
# Cost:     3 x 4.5 G (tiny), 8.7 G (small) MACs per image; hours not measured
# Expected: unknown
#
#     DATA=IMAGENET bash run_scripts/studies/supervised-300ep.sh
#     TINY=convnext_t_bn:drop_path=0.1 SMALL="" ...                  # some, see launch.sh
source "$(dirname "$0")/../launch.sh"

TEACHERS=none LOSSES=ce
STUDENTS=${TINY-convnext_t_bn:drop_path=0.1 convnextv2_t:drop_path=0.1}
train_cells 300 --effective-batch 2048 "$@"
STUDENTS=${SMALL-convnext_s_bn:drop_path=0.1 convnextv2_s:drop_path=0.1}
train_cells 300 --effective-batch 4096 "$@"
