#!/usr/bin/env bash
# SLaK-L, kernels 51x5 and 5x51, half of its weights masked (346.6 M weights).
# Table:    none; a script that was removed from the published tree has these settings. How new
#           weights were placed and which share moves is not known: as for SLaK-B
# GPUs:     any number; published for 16 x 32 images x 8 accumulated = 4096
# Cost:     3 x 61.9 G MACs per image (masking saves none); hours not measured
# Expected: unknown
#
#     DATA=IMAGENET bash run_scripts/teachers/slak_l-300ep.sh
source "$(dirname "$0")/../launch.sh"

train --output-dir "$RUNS/teachers/slak_l-300ep" --teacher none --student slak_l drop_path=0.5 \
    --sparsity 0.5 --sparse-init erk --growth random --prune-every 4000 --prune-rate 0.3 \
    --model-ema --epochs 300 --batch-size 32 --effective-batch 4096 "$@"
