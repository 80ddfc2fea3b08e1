#!/usr/bin/env bash
# KD at temperatures 1, 3 and 20 and two weights of the teacher, and hard KD: 7 trainings.
# Table:    none known. The published commands type temperature 3, a name of a run says 20, the
#           default is 1; the weight alpha is 0.1 by default and was 0.9 in an earlier version
# GPUs:     any number; 8 x 64 images x 2 accumulated = 1024 per update, as published for ResNet-50
# Cost:     teacher 8.6 G + 3 x 4.1 G MACs per image; hours not measured
# Weights:  published, or $WEIGHTS/slak_t.pth
# Expected: unknown; gains are over supervised-120ep.sh: python -m analysis.report runs/*
#
#     DATA=IMAGENET bash run_scripts/studies/temperatures-120ep.sh
#     LOSSES="kd:temperature=5:alpha=0.5 nkd:gamma=1.5" ...          # others, see launch.sh
source "$(dirname "$0")/../launch.sh"

TEACHERS=${TEACHERS:-slak_t}
STUDENTS=${STUDENTS:-resnet50}
LOSSES=${LOSSES:-$(echo kd:temperature={1,3,20}:alpha={0.1,0.9} kd:hard=true)}
train_cells 120 --effective-batch 1024 "$@"
