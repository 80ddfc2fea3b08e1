#!/usr/bin/env bash
# A small SLaK teacher on Imagenette at 128 px, then a small student alone and distilled from it.
# Table:    none (a check on real photographs without ImageNet)
# GPUs:     none; one process on the CPU (GPUS=2: two)
# Cost:     20 to 30 minutes for the teacher and 5 to 10 for each student on one core
# Expected: the table of docs/results.md
#
#     DATA=path/to/imagenette128 bash run_scripts/studies/imagenette128.sh
#     SEEDS="0 1 2" repeats the students with three seeds (each teacher is trained once)
#     TEACHERS="swin slak" other teachers: slak, wide, swin or NAME[:option=value...]
GPUS=${GPUS:-1}
source "$(dirname "$0")/../launch.sh"

RECIPE=imagenette128
RUNS=$RUNS/imagenette128
NETWORK[slak]="slak_nano kernel_size=31,15,7,3,5 layer_scale_init=0"
NETWORK[wide]="slak_nano kernel_size=51,31,15,7,5 layer_scale_init=0"  # large at every stage
NETWORK[swin]="swin_nano"
STUDENT="convnext_bn_nano depths=1,1,2,1 dims=20,40,80,160 layer_scale_init=0"
SEEDS=${SEEDS:-0}

for seed in $SEEDS; do
    train --output-dir "$RUNS/alone-seed$seed" --teacher none --student $STUDENT \
        --epochs 8 --seed "$seed" "$@"
done
for teacher in ${TEACHERS:-slak}; do
    network=$(network_of "$teacher")
    name=${teacher//[:=]/_}
    train --output-dir "$RUNS/$name" --teacher none --student $network --epochs 12 "$@"
    for seed in $SEEDS; do
        train --output-dir "$RUNS/of_$name-seed$seed" --teacher $network \
            --teacher-weights "$(weights_in "$RUNS/$name")" --student $STUDENT --loss nkd \
            --epochs 8 --seed "$seed" "$@"
    done
done
analyse report "$RUNS"/*
