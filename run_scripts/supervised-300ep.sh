#!/usr/bin/env bash
# The students of the 300-epoch distillations without a teacher, by the same recipe: the baseline of
# every gain. 4 trainings.
# Paper table: none known: the paper's baselines have the recipe of train_convnext_{t,s}_300ep.sh
# Hardware:    any number of GPUs; 4 x 64 images x 8 accumulated = 2048 per update for the tiny
#              students, x 16 = 4096 for the small ones, as when they are taught
# Cost:        3 x 4.5 G (tiny), 8.7 G (small) multiply-accumulates per image; hours not measured
# Expected:    unknown
#
#     DATA=path/to/imagenet bash run_scripts/supervised-300ep.sh
#     STUDENTS="convnext_t_bn:drop_path=0.1" ...                     # some, see launch.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs}
STUDENTS=${STUDENTS:-$(echo convnext{_t_bn,_s_bn,v2_t,v2_s}:drop_path=0.1)}

for student in $STUDENTS; do
    case $student in *_s*) batch=4096 ;; *) batch=2048 ;; esac
    launch train_kd.py --config run_scripts/recipes/imagenet.yaml \
        --data-path "$DATA" --output-dir "$RUNS" \
        --teacher none --student ${student//:/ } --loss ce \
        --effective-batch $batch --epochs 300 "$@"
done
