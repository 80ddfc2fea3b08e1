#!/usr/bin/env bash
# The students of the 120-epoch distillations without a teacher, by the same recipe: the baseline of
# every gain. 3 trainings.
# Paper table: the supervised rows of the comparisons (its figures are not known to this project)
# Hardware:    any number of GPUs; 8 x 64 images x 2 accumulated = 1024 per update, as those
# Cost:        3 x 4.1 G (ResNet-50), 4.5 (ConvNeXt-T), 0.2 (MobileNetV3) multiply-accumulates per
#              image; hours not measured
# Expected:    unknown
#
#     DATA=path/to/imagenet bash run_scripts/supervised-120ep.sh
#     STUDENTS="convnext_t:drop_path=0.1" ...                        # others, see launch.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs}
STUDENTS=${STUDENTS:-resnet50 convnext_t_bn:drop_path=0.1 mobilenetv3_l}

for student in $STUDENTS; do
    launch train_kd.py --config run_scripts/recipes/imagenet.yaml \
        --data-path "$DATA" --output-dir "$RUNS" \
        --teacher none --student ${student//:/ } --loss ce \
        --effective-batch 1024 --epochs 120 "$@"
done
