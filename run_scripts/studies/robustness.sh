#!/usr/bin/env bash
# A student of a large-kernel teacher, the same student alone, and the teacher, on ImageNet's
# further test sets: -A, -R, -Sketch, -V2, ReaL and -C.
# Table:    robustness; the published numbers are not known here
# GPUs:     any number
# Cost:     ImageNet-C alone has 75 x 50,000 images; hours not measured
# Weights:  published, or $WEIGHTS/<model>.pth
# Expected: unknown
#
#     SETS=FOLDER bash run_scripts/studies/robustness.sh       # imagenet_a/, imagenet_r/, ... in it
#     SETS=FOLDER NAMES="imagenet_a imagenet_c" MODELS=resnet50 ...
#
# Each folder of SETS is a set as it was unpacked, or a link to it; imagenet_real/ holds val/ and
# real.json.
source "$(dirname "$0")/../launch.sh"

needs SETS "a folder that holds imagenet_a/ and the other sets"
ALL_SETS="imagenet_a imagenet_r imagenet_sketch imagenet_v2 imagenet_real imagenet_c"

for model in ${MODELS:-slak_t convnext_t_bn convnext_t}; do
    for name in ${NAMES:-$ALL_SETS}; do
        launch eval.py --model $model --weights "$(weights_of $model)" --data-set $name \
            --data-path "$SETS/$name" "$@"
    done
done
