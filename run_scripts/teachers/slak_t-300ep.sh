#!/usr/bin/env bash
# SLaK-T, kernels 51x5 and 5x51, 40 % of its weights masked and moving all the time.
# Table:    ImageNet-1K, SLaK-T, 300 epochs (50.7 M weights, 30.5 M of them live)
# GPUs:     any number; published on 4 x 128 images x 8 accumulated = 4096, float32 (--amp none)
# Cost:     3 x 8.7 G MACs per image (masking saves none); hours not measured
# Expected: top-1 82.5 % (published; not repeated here)
#
#     DATA=IMAGENET bash run_scripts/teachers/slak_t-300ep.sh
source "$(dirname "$0")/../launch.sh"

train --output-dir "$RUNS/teachers/slak_t-300ep" --teacher none --student slak_t drop_path=0.1 \
    --sparsity 0.4 --sparse-init snip --growth random --prune-every 2000 --prune-rate 0.5 \
    --model-ema --epochs 300 --batch-size 128 --effective-batch 4096 "$@"
