#!/usr/bin/env bash
# SLaK-T teaches a ConvNeXt-T that starts from weights pretrained elsewhere, say on ImageNet-22k.
# Table:    none known; the published code has the option, its recipe is not known. This is that of
#           ConvNeXt for fine-tuning its B from ImageNet-22k (30 epochs, 5e-5, layer decay 0.8,
#           nothing mixed) but for its head_init_scale, at the drop path of L2S-T
# GPUs:     any number; 8 x 64 images = 512 per update
# Cost:     teacher 8.6 G + 3 x 4.5 G MACs per image; hours not measured
# Expected: unknown; the gain is over the same without a teacher: add --teacher none --loss ce and
#           another --output-dir
#
#     DATA=IMAGENET STUDENT_WEIGHTS=FILE bash run_scripts/students/slak_t-convnext_t_22k-nkd-30ep.sh
#
# FILE is a ConvNeXt-T with a head of the 1,000 classes; one of 21,841 is refused.
source "$(dirname "$0")/../launch.sh"

needs STUDENT_WEIGHTS "a file of a pretrained ConvNeXt-T"
train --output-dir "$RUNS/slak_t-convnext_t_22k-nkd-30ep" --teacher slak_t \
    --student convnext_t drop_path=0.1 --student-weights "$STUDENT_WEIGHTS" --loss nkd \
    --effective-batch 512 --epochs 30 --warmup-epochs 0 --lr 5e-5 --weight-decay 1e-8 \
    --layer-decay 0.8 --mixup 0 --cutmix 0 "$@"
