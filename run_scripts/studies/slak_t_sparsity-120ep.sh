#!/usr/bin/env bash
# What sparse training of SLaK-T depends on, one axis at a time from the published settings: 20
# trainings. AXES chooses among
#   base    SLaK-T: sparsity 0.4, width 1.3, N = 5, moves of 0.5 every 2000 updates, snip, random
#   width   pairs of width and sparsity with as many live weights (30.5 M); and 1.3 dense (50.7 M)
#   edge    N, the short edge of the decomposed kernels
#   moves   how often and how many weights move
#   bn      no BatchNorm in the branches
#   layers  masks in the large kernels only
#   init    where the densities of the layers come from
#   growth  where pruned weights move to
# Table:    SLaK, ablations of sparse groups, 120 epochs; this project knows only the base. The
#           values of width, edge and growth follow the published code and notes, those of moves its
#           history
# GPUs:     any number; 4 x 128 images x 8 accumulated = 4096 per update
# Cost:     3 x 8.7 G MACs per image, less or more with the width (masking saves none); hours not
#           measured
# Expected: base: top-1 81.6 % (published; not repeated here)
#
#     DATA=IMAGENET bash run_scripts/studies/slak_t_sparsity-120ep.sh
#     AXES="base growth" ...
#     python -m analysis.report runs/slak_t_sparsity/*               # its rows name the run folders
source "$(dirname "$0")/../launch.sh"

ALL_AXES="base width edge moves bn layers init growth"

# change NAME "STUDENT OPTIONS" FLAGS...: the published settings but for these.
change() {
    train --output-dir "$RUNS/slak_t_sparsity/$1" --teacher none \
        --student slak_t drop_path=0.1 $2 \
        --model-ema --epochs 120 --batch-size 128 --effective-batch 4096 \
        --sparsity 0.4 --sparse-init snip --growth random --prune-every 2000 --prune-rate 0.5 \
        "${@:3}"
}

for axis in ${AXES:-$ALL_AXES}; do
    case $axis in
    base)
        change base "" "$@"
        ;;
    width)
        for pair in 1.0-0 1.2-0.3 1.5-0.55 1.7-0.64 1.3-0; do
            change "width-$pair" "width_factor=${pair%-*}" --sparsity "${pair#*-}" "$@"
        done
        ;;
    edge)
        for edge in 3 7; do
            change "edge-$edge" "kernel_size=51,49,47,13,$edge" "$@"
        done
        ;;
    moves)
        for pair in 2000-0.3 100-0.3 100-0.5 4000-0.3 4000-0.5; do
            change "moves-$pair" "" --prune-every "${pair%-*}" --prune-rate "${pair#*-}" "$@"
        done
        change moves-never "" --prune-every 0 "$@"
        ;;
    bn)
        change bn-false bn=false "$@"
        ;;
    layers)
        change layers-large-kernel "" --sparse-layers large-kernel "$@"
        ;;
    init)
        for init in erk uniform; do
            change "init-$init" "" --sparse-init "$init" "$@"
        done
        ;;
    growth)
        for growth in gradient momentum; do
            change "growth-$growth" "" --growth "$growth" "$@"
        done
        ;;
    *)
        die "no such axis: '$axis'; AXES are $ALL_AXES."
        ;;
    esac
done
