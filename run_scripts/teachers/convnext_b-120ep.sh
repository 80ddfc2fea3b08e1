#!/usr/bin/env bash
# ConvNeXt-B for 120 epochs, beside the SLaKs of 120 epochs; as convnext_b-300ep.sh otherwise.
# Table:    the 120-epoch comparisons, whose numbers of ConvNeXt are not known here
# GPUs:     any number; 8 x 128 images x 4 accumulated = 4096 per update
# Cost:     3 x 15.4 G MACs per image; hours not measured
# Expected: unknown
#
#     DATA=IMAGENET bash run_scripts/teachers/convnext_b-120ep.sh
source "$(dirname "$0")/../launch.sh"

train --output-dir "$RUNS/teachers/convnext_b-120ep" --teacher none \
    --student convnext_b drop_path=0.5 \
    --model-ema --epochs 120 --batch-size 128 --effective-batch 4096 "$@"
