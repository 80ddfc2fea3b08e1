#!/usr/bin/env bash
# Three students of one small SLaK on the drawn shapes, with the teacher itself and from its kept
# logits, whose losses must be equal in all digits; then students of one and of two kept epochs.
# Table:    none (a check of --teacher-cache)
# GPUs:     none; one process on the CPU (GPUS=2: two)
# Cost:     8 minutes of processor time for the first six students of a seed; the others not measured
# Expected: the tables of docs/teacher_cache.md
#
#     SEEDS="0 1 2" LOSSES="nkd kd dkd" bash run_scripts/studies/teacher_cache.sh
#     KEPT="" leaves the students of few epochs out
#     The times printed are those of folders that were not there before.
GPUS=${GPUS:-1}
source "$(dirname "$0")/../launch.sh"

RUNS=$RUNS/teacher_cache
LOSSES=${LOSSES:-nkd kd dkd}
TEACHER=slak_pico

# shapes FLAGS...: a training on small images of the shapes, drawn once.
shapes() {
    launch train_kd.py --config "$ROOT/run_scripts/recipes/outlines.yaml" \
        --batch-size 64 --effective-batch 64 --num-workers 0 "$@"
}

# learn FOLDER SEED FLAGS...: a student, with mixing.
learn() {
    shapes --output-dir "$RUNS/$1-seed$2" --seed "$2" --teacher $TEACHER \
        --teacher-weights "$(weights_in "$RUNS/teacher-seed$2")" --student convnext_bn_pico \
        --data-set outlines train_size=3000 val_size=1000 cache=ram --epochs 6 \
        --mixup 0.2 "${@:3}"
}

# figures FOLDER: the losses and accuracies of a run's epochs.
figures() { grep -oE '"(train_loss|test_loss|test_acc1)": [^,]*' "$RUNS/$1/log.txt"; }

for seed in ${SEEDS:-0}; do
    shapes --output-dir "$RUNS/teacher-seed$seed" --seed "$seed" --teacher none \
        --student $TEACHER --epochs 6 \
        --data-set outlines train_size=6000 val_size=1000 cache=ram "$@"
    TIMEFORMAT="seed $seed: with the teacher %0R s, of which the processor worked %0U s"
    time for loss in $LOSSES; do
        learn "live-$loss" "$seed" --loss "$loss" "$@"
    done
    TIMEFORMAT="seed $seed: with its kept logits %0R s, of which the processor worked %0U s"
    only=
    time for loss in $LOSSES; do  # the first one asks the teacher, and keeps what it says
        learn "cached-$loss" "$seed" --loss "$loss" --teacher-cache "$RUNS/logits-seed$seed" $only \
            "$@"
        if [[ "$dry_run" == no ]]; then only=--teacher-cache-only; fi
    done
    for loss in $LOSSES; do
        if [[ "$(figures "live-$loss-seed$seed")" == "$(figures "cached-$loss-seed$seed")" ]]
        then echo "seed $seed: losses and accuracies of $loss are equal in all digits"
        else echo "seed $seed: losses and accuracies of $loss differ"
        fi
    done
    for kept in ${KEPT-1 2}; do
        learn "kept$kept" "$seed" --loss nkd --teacher-cache "$RUNS/logits$kept-seed$seed" \
            --teacher-cache-epochs "$kept" "$@"
    done
done
analyse report "$RUNS"/{teacher,live,cached,kept}*-seed*
