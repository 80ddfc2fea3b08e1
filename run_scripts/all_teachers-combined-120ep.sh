#!/usr/bin/env bash
# Six teachers teach ConvNeXt-T by logits and the last map together: 12 trainings of 120 epochs.
# Paper table: combined losses (its figures are not known to this project)
# Hardware:    any number of GPUs; 8 x 64 images x 2 accumulated = 1024 per update, as published for
#              ResNet-50; the other students' is not known. --effective-batch 4096 is the recipe's
# Cost:        multiply-accumulates per image: 3 x 4.5 G, and for the teacher 8.6 G (slak_t), 4.5
#              (swin_t), 9.9 (vit_s), 4.6 (deit_s), 4.3 (cswin_t), 4.5 (convnext_t); hours not
#              measured
# Weights:     published, or $WEIGHTS/<teacher>.pth; of cswin_t no address is known, so
#              $WEIGHTS/cswin_t.pth is needed
# Expected:    unknown; to be read beside all_teachers-120ep.sh and supervised-120ep.sh
#
#     DATA=path/to/imagenet WEIGHTS=path/to/weights bash run_scripts/all_teachers-combined-120ep.sh
#     TEACHERS=slak_t LOSSES="nkd+fd:weight=0.1 nkd+mgd" ...         # other cells, see launch.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs}
TEACHERS=${TEACHERS:-slak_t swin_t vit_s deit_s cswin_t convnext_t}
STUDENTS=${STUDENTS:-convnext_t_bn:drop_path=0.1}
LOSSES=${LOSSES:-kd:temperature=3:alpha=0.1+fd nkd+fd}
needs_file cswin_t

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
