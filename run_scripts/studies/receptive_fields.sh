#!/usr/bin/env bash
# Effective receptive fields of a large-kernel teacher, of the student it taught, of the same
# student without a teacher, and of all of them untrained, side by side.
# Table:    the receptive fields of distilled students; the published numbers are not known here
# GPUs:     one, or the CPU (--device cpu)
# Cost:     50 images of 1024 px for each network; hours not measured
# Weights:  published, or $WEIGHTS/<model>.pth
# Expected: unknown
#
#     DATA=IMAGENET bash run_scripts/studies/receptive_fields.sh
#     DATA=IMAGENET bash run_scripts/studies/receptive_fields.sh --batch-size 8 --device cuda
#
# A run of your own: add --checkpoint runs/NAME/checkpoint-best.pth.
source "$(dirname "$0")/../launch.sh"

needs DATA "the folder that holds val/"
"$PYTHON" -m analysis.erf --data-path "$DATA" --images 50 --size 1024 \
    --out "${OUT:-$RUNS/receptive_fields}" \
    --model slak_t --weights "$(weights_of slak_t)" \
    --model convnext_t_bn --weights "$(weights_of convnext_t_bn)" \
    --model convnext_t --weights "$(weights_of convnext_t)" "$@"
