#!/usr/bin/env bash
# From naive large kernels to SLaK-T in five steps, for kernels of 7, 31, 51 and 61: 20 trainings.
#   naive       k x k, width 1
#   small       k x k and 5 x 5, width 1
#   decomposed  k x 5, 5 x k and 5 x 5, width 1
#   sparse      the same with 40 % of the weights masked
#   wide        the same at width 1.3: SLaK-T
# Table:    SLaK, steps to large kernels, 120 epochs; this project knows only its last step
# GPUs:     any number; 4 x 128 images x 8 accumulated = 4096 per update
# Cost:     from 3 x 4.5 G (naive, 7) to 3 x 9.4 G (naive, 51) and more (61) MACs per image;
#           not measured. KERNELS and STEPS choose
# Expected: wide: top-1 81.5 % (31), 81.6 % (51), 81.5 % (61) (published; not repeated here)
#
#     DATA=IMAGENET bash run_scripts/studies/slak_t_kernels-120ep.sh
#     KERNELS=51 STEPS="naive decomposed" ...
source "$(dirname "$0")/../launch.sh"

ALL_STEPS="naive small decomposed sparse wide"
declare -A SIZES=([7]=7,7,7,7 [31]=31,29,27,13 [51]=51,49,47,13 [61]=61,59,57,13)
SPARSE="--sparsity 0.4 --sparse-init snip --growth random --prune-every 2000 --prune-rate 0.5"

for kernel in ${KERNELS:-7 31 51 61}; do
    sizes=${SIZES[$kernel]-}
    [[ -n "$sizes" ]] || die "no such kernel: '$kernel'; KERNELS are 7 31 51 61."
    for step in ${STEPS:-$ALL_STEPS}; do
        flags=""
        case $step in  # the last size is the short edge and the small kernel; 100 means neither
            naive) options="kernel_size=$sizes,100 decomposed=false width_factor=1.0" ;;
            small) options="kernel_size=$sizes,5 decomposed=false width_factor=1.0" ;;
            decomposed) options="kernel_size=$sizes,5 width_factor=1.0" ;;
            sparse) options="kernel_size=$sizes,5 width_factor=1.0" flags=$SPARSE ;;
            wide) options="kernel_size=$sizes,5" flags=$SPARSE ;;
            *) die "no such step: '$step'; STEPS are $ALL_STEPS." ;;
        esac
        train --output-dir "$RUNS/slak_t_kernels/$step-$kernel" --teacher none \
            --student slak_t drop_path=0.1 $options $flags \
            --model-ema --epochs 120 --batch-size 128 --effective-batch 4096 "$@"
    done
done
