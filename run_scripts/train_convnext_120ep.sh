#!/usr/bin/env bash
# ConvNeXt-T, -S or -B for 120 epochs: beside the SLaKs of 120 epochs, and as teachers of kernel 7.
# Paper table: the 120-epoch comparisons; their figures of ConvNeXt are not known to this project
# Hardware:    any number of GPUs; 8 x 128 images x 4 accumulated = 4096 per update
# Cost:        3 x 4.5 (T), 8.7 (S), 15.4 (B) G multiply-accumulates per image; hours not measured
# Expected:    unknown. All but the epochs is as in train_convnext_{t,s,b}_300ep.sh
#
#     DATA=path/to/imagenet GPUS=8 bash run_scripts/train_convnext_120ep.sh t
set -euo pipefail
case ${1:-} in
    t) DROP_PATH=0.1 ;;
    s) DROP_PATH=0.4 ;;
    b) DROP_PATH=0.5 ;;
    *) echo "train_convnext_120ep.sh: the first argument is the size, t, s or b; got '${1:-}'." >&2
       exit 2 ;;
esac
STUDENT=convnext_$1
shift
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs/teachers}

launch train_kd.py --config run_scripts/recipes/imagenet.yaml \
    --data-path "$DATA" --output-dir "$RUNS" \
    --teacher none --student $STUDENT drop_path=$DROP_PATH --model-ema --epochs 120 \
    --batch-size 128 --effective-batch 4096 "$@"
