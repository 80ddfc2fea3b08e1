#!/usr/bin/env bash
# A student of a large-kernel teacher, the same student alone, and the teacher, on ImageNet's further
# test sets: -A, -R, -Sketch, -V2, ReaL and -C.
# Paper table: robustness, whose published figures this project does not know
# Hardware:    GPUS GPUs of one machine (default: 8); ImageNet-C has 75 x 50,000 pictures; hours not
#              measured
# Weights:     published, or $WEIGHTS/<model>.pth
# Expected:    unknown
#
#     SETS=path/to/sets bash run_scripts/robustness.sh       # imagenet_a/, imagenet_r/, ... in it
#     SETS=path/to/sets NAMES="imagenet_a imagenet_c" MODELS=resnet50 bash run_scripts/robustness.sh
#
# Each folder of SETS is a set as it was unpacked, or a link to it; imagenet_real/ holds val/ and
# real.json.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
SETS=${SETS:?set SETS to a folder that holds imagenet_a/ and the other sets}
GPUS=${GPUS:-8}
NAMES=${NAMES:-imagenet_a imagenet_r imagenet_sketch imagenet_v2 imagenet_real imagenet_c}
MODELS=${MODELS:-slak_t convnext_t_bn convnext_t}

for model in $MODELS; do
    for name in $NAMES; do
        launch eval.py --model $model --weights "$(weights_of $model)" --data-set $name \
            --data-path "$SETS/$name" "$@"
    done
done
