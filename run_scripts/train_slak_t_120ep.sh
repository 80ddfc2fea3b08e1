#!/usr/bin/env bash
# SLaK-T for 120 epochs with kernels of 31, 51 or 61: the teachers of the study of kernel sizes.
# Paper table: ImageNet-1K, SLaK-T, 120 epochs
# Hardware:    any number of GPUs; 4 x 128 images x 8 accumulated = 4096 per update
# Cost:        3 x 8.2 G (31), 8.7 (51), 9.0 (61) multiply-accumulates per image (masking saves
#              none); hours not measured
# Expected:    top-1 81.5 % (31), 81.6 % (51), 81.5 % (61) (published; not repeated here)
#
#     DATA=path/to/imagenet GPUS=4 bash run_scripts/train_slak_t_120ep.sh 31
set -euo pipefail
case ${1:-} in
    31) KERNELS=31,29,27,13,5 ;;
    51) KERNELS=51,49,47,13,5 ;;
    61) KERNELS=61,59,57,13,5 ;;
    *) echo "train_slak_t_120ep.sh: the first argument is the kernel, 31, 51 or 61; got '${1:-}'." >&2
       exit 2 ;;
esac
shift
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-4}
RUNS=${RUNS:-runs/teachers}

launch train_kd.py --config run_scripts/recipes/imagenet.yaml \
    --data-path "$DATA" --output-dir "$RUNS" \
    --teacher none --student slak_t drop_path=0.1 kernel_size=$KERNELS --model-ema --epochs 120 \
    --batch-size 128 --effective-batch 4096 \
    --sparsity 0.4 --sparse-init snip --growth random --prune-every 2000 --prune-rate 0.5 "$@"
