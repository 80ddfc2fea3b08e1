#!/usr/bin/env bash
# KD at temperatures 1, 3 and 20 and two weights of the teacher, and hard KD: 7 trainings.
# Paper table: none known. The published commands type temperature 3, a name of a run says 20, the
#              default is 1; the weight alpha is 0.1 by default and was 0.9 in an earlier version
# Hardware:    any number of GPUs; 8 x 64 images x 2 accumulated = 1024 per update, as published for
#              ResNet-50
# Cost:        teacher 8.6 G + 3 x 4.1 G multiply-accumulates per image; hours not measured
# Weights:     published, or $WEIGHTS/<teacher>.pth
# Expected:    unknown; gains are over supervised-120ep.sh: python -m analysis.report runs/*
#
#     DATA=path/to/imagenet bash run_scripts/temperatures-120ep.sh
#     LOSSES="kd:temperature=5:alpha=0.5 nkd:gamma=1.5" ...          # others, see launch.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs}
TEACHERS=${TEACHERS:-slak_t}
STUDENTS=${STUDENTS:-resnet50}
LOSSES=${LOSSES:-$(echo kd:temperature={1,3,20}:alpha={0.1,0.9} kd:hard=true)}

for teacher in $TEACHERS; do
    for student in $STUDENTS; do
        for loss in $LOSSES; do
            launch train_kd.py --config run_scripts/recipes/imagenet.yaml \
                --data-path "$DATA" --output-dir "$RUNS" \
                --teacher $teacher --teacher-weights "$(weights_of $teacher)" \
                --student ${student//:/ } $(loss_flags "$loss") \
                --effective-batch 1024 --epochs 120 "$@"
        done
    done
done
