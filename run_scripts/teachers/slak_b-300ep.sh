#!/usr/bin/env bash
# SLaK-B, kernels 51x5 and 5x51, 40 % of its weights masked and moving all the time.
# Table:    ImageNet-1K, SLaK-B, 300 epochs (158.0 M weights, 94.9 M of them live)
# GPUs:     any number; published on 16 x 32 images x 8 accumulated = 4096, float32 (--amp none)
# Cost:     3 x 28.5 G MACs per image (masking saves none); hours not measured
# Expected: top-1 84.0 % (published; not repeated here)
#
#     DATA=IMAGENET bash run_scripts/teachers/slak_b-300ep.sh
source "$(dirname "$0")/../launch.sh"

train --output-dir "$RUNS/teachers/slak_b-300ep" --teacher none --student slak_b drop_path=0.5 \
    --sparsity 0.4 --sparse-init snip --growth random --prune-every 100 --prune-rate 0.3 \
    --model-ema --epochs 300 --batch-size 32 --effective-batch 4096 "$@"
