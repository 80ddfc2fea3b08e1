#!/usr/bin/env bash
# SLaK-S, kernels 51x5 and 5x51, 40 % of its weights masked and moving all the time.
# Table:    ImageNet-1K, SLaK-S, 300 epochs (91.1 M weights, 54.8 M of them live)
# GPUs:     any number; published on 8 x 64 images x 8 accumulated = 4096, float32 (--amp none)
# Cost:     3 x 16.6 G MACs per image (masking saves none); hours not measured
# Expected: top-1 83.8 % (published; not repeated here)
#
#     DATA=IMAGENET bash run_scripts/teachers/slak_s-300ep.sh
source "$(dirname "$0")/../launch.sh"

train --output-dir "$RUNS/teachers/slak_s-300ep" --teacher none --student slak_s drop_path=0.4 \
    --sparsity 0.4 --sparse-init snip --growth random --prune-every 100 --prune-rate 0.3 \
    --model-ema --epochs 300 --batch-size 64 --effective-batch 4096 "$@"
