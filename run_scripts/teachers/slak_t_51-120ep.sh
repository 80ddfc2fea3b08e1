#!/usr/bin/env bash
# SLaK-T with kernels of 51 for 120 epochs: a teacher of studies/kernel_sizes-120ep.sh.
# Table:    ImageNet-1K, SLaK-T, kernel 51, 120 epochs
# GPUs:     any number; 4 x 128 images x 8 accumulated = 4096 per update
# Cost:     3 x 8.7 G MACs per image (masking saves none); hours not measured
# Expected: top-1 81.6 % (published; not repeated here)
#
#     DATA=IMAGENET bash run_scripts/teachers/slak_t_51-120ep.sh
source "$(dirname "$0")/../launch.sh"

train --output-dir "$RUNS/teachers/slak_t_51-120ep" --teacher none \
    --student slak_t drop_path=0.1 kernel_size=51,49,47,13,5 \
    --sparsity 0.4 --sparse-init snip --growth random --prune-every 2000 --prune-rate 0.5 \
    --model-ema --epochs 120 --batch-size 128 --effective-batch 4096 "$@"
