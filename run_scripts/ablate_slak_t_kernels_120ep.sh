#!/usr/bin/env bash
# From naive large kernels to SLaK-T in five steps, for kernels of 7, 31, 51 and 61: 20 trainings.
#   naive       k x k, width 1
#   small       k x k and 5 x 5, width 1
#   decomposed  k x 5, 5 x k and 5 x 5, width 1
#   sparse      the same with 40 % of the weights masked
#   wide        the same at width 1.3: SLaK-T
# Paper table: SLaK, steps to large kernels, 120 epochs; of its figures this project knows only
#              those of the last step
# Hardware:    any number of GPUs; 4 x 128 images x 8 accumulated = 4096 per update
# Cost:        from 3 x 4.5 G (naive, 7) to 3 x 9.4 G (naive, 51) and more (61) multiply-accumulates
#              per image; hours not measured. KERNELS and STEPS choose
# Expected:    wide: top-1 81.5 % (31), 81.6 % (51), 81.5 % (61) (published; not repeated here)
#
#     DATA=path/to/imagenet GPUS=4 bash run_scripts/ablate_slak_t_kernels_120ep.sh
#     KERNELS=51 STEPS="naive decomposed" ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs/ablate_slak_t_kernels}
KERNELS=${KERNELS:-7 31 51 61}
ALL_STEPS="naive small decomposed sparse wide"
STEPS=${STEPS:-$ALL_STEPS}

# The last number is the short edge and the small kernel; 100 means neither.
declare -A SIZES=([7]=7,7,7,7 [31]=31,29,27,13 [51]=51,49,47,13 [61]=61,59,57,13)
SPARSE="--sparsity 0.4 --sparse-init snip --growth random --prune-every 2000 --prune-rate 0.5"

for kernel in $KERNELS; do
    sizes=${SIZES[$kernel]:?no such kernel}
    for step in $STEPS; do
        flags=""
        case $step in
            naive) options="kernel_size=$sizes,100 decomposed=false width_factor=1.0" ;;
            small) options="kernel_size=$sizes,5 decomposed=false width_factor=1.0" ;;
            decomposed) options="kernel_size=$sizes,5 width_factor=1.0" ;;
            sparse) options="kernel_size=$sizes,5 width_factor=1.0" flags=$SPARSE ;;
            wide) options="kernel_size=$sizes,5" flags=$SPARSE ;;
            *) echo "no such step: '$step'; STEPS are $ALL_STEPS" >&2; exit 2 ;;
        esac
        launch train_kd.py --config run_scripts/recipes/imagenet.yaml \
            --data-path "$DATA" --output-dir "$RUNS" \
            --teacher none --student slak_t drop_path=0.1 $options --model-ema --epochs 120 \
            --batch-size 128 --effective-batch 4096 $flags "$@"
    done
done
