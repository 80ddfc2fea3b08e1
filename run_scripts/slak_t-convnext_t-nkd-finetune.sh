#!/usr/bin/env bash
# SLaK-T teaches a ConvNeXt-T that starts from weights pretrained elsewhere, say on ImageNet-22k.
# Paper table: none known; the published code has the option, the recipe is not known. This is
#              ConvNeXt's for fine-tuning its B from ImageNet-22k (30 epochs, 5e-5, layer decay 0.8,
#              nothing mixed) but for its head_init_scale, at the drop path of L2S-T
# Hardware:    any number of GPUs; 8 x 64 images = 512 per update
# Cost:        teacher 8.6 G + 3 x 4.5 G multiply-accumulates per image; hours not measured
# Expected:    unknown; the gain is over the same without a teacher: TEACHER=none LOSS=ce
#
# STUDENT_WEIGHTS is a ConvNeXt-T with a head of the 1,000 classes; one of 21,841 is refused.
#
#     DATA=path/to/imagenet STUDENT_WEIGHTS=convnext_t_22k.pth \
#         bash run_scripts/slak_t-convnext_t-nkd-finetune.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to the folder that holds train/ and val/}
GPUS=${GPUS:-8}
RUNS=${RUNS:-runs/finetune}
STUDENT_WEIGHTS=${STUDENT_WEIGHTS:?set STUDENT_WEIGHTS to a file of a pretrained ConvNeXt-T}
TEACHER=${TEACHER:-slak_t}
TEACHER_WEIGHTS=${TEACHER_WEIGHTS:-published}
LOSS=${LOSS:-nkd}

launch train_kd.py --config run_scripts/recipes/imagenet.yaml \
    --data-path "$DATA" --output-dir "$RUNS" \
    --teacher $TEACHER --teacher-weights "$TEACHER_WEIGHTS" \
    --student convnext_t drop_path=0.1 --student-weights "$STUDENT_WEIGHTS" \
    $(loss_flags "$LOSS") --effective-batch 512 --epochs 30 --warmup-epochs 0 --lr 5e-5 \
    --weight-decay 1e-8 --layer-decay 0.8 --mixup 0 --cutmix 0 "$@"
