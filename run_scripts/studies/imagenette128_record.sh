#!/usr/bin/env bash
# The highest accuracy on Imagenette at 128 px that a small-kernel network of at most 30 M parameters
# reaches from random weights in 80 epochs: a ResNet-50-D alone, and taught by a deeper one.
# Table:    none (to set beside the leaderboard of fastai/imagenette: 93.55 after 80 epochs, one run)
# GPUs:     one; it was not trained, for CPUs are too slow
# Cost:     80 epochs of 1.4 G MACs an image six times and 200 of 2.6 G once, and the teacher's
#           forward pass; hours not measured
# Expected: unknown; the aim is 95
#
#     DATA=path/to/imagenette128 bash run_scripts/studies/imagenette128_record.sh
#     SEEDS="0" ...                                                  # default: 0 1 2
#
# A ResNet, for its stem of overlapping convolutions suits so few images better than one that cuts
# them into patches. The teacher is of the same kind, deeper and trained longer, and asked about the
# student's own crops and mixtures throughout ("Knowledge distillation: A good teacher is patient and
# consistent", arXiv 2106.05237). The leaderboard's images were resized and cropped; squashed ones are
# compared only with that remark.
GPUS=${GPUS:-1}
source "$(dirname "$0")/../launch.sh"

RECIPE=imagenette128_record
RUNS=$RUNS/imagenette128_record
STUDENT="resnet50d drop_path=0.05"  # 23.5 M parameters
TEACHER="resnet101 deep_stem=true avg_down=true drop_path=0.1"

train --output-dir "$RUNS/teacher" --teacher none --student $TEACHER --epochs 200 --seed 100 "$@"
for seed in ${SEEDS:-0 1 2}; do
    train --output-dir "$RUNS/alone-seed$seed" --teacher none --student $STUDENT \
        --seed "$seed" "$@"
    train --output-dir "$RUNS/taught-seed$seed" --teacher $TEACHER \
        --teacher-weights "$(weights_in "$RUNS/teacher")" --teacher-weights-key model_ema \
        --student $STUDENT --loss kd temperature=2 alpha=0.9 --seed "$seed" "$@"
done
analyse report "$RUNS"/*
