#!/usr/bin/env bash
# What two large-kernel teachers and a Transformer leave in the same small student, on Imagenette
# at 128 px: receptive fields beside untrained controls, similarity to the teacher, curves.
# Table:    none (the paper's question of receptive fields, on photographs without ImageNet)
# GPUs:     none; one process on the CPU
# Cost:     that of imagenette128.sh for three teachers and four students a seed, then about 10
#           minutes of measuring for three seeds on one core
# Expected: the tables of docs/results.md and the image at the top of README.md
#
#     DATA=path/to/imagenette128 SEEDS="0 1 2" bash run_scripts/studies/imagenette128_erf.sh
#
# 480 px are to 128 px of training about what the published 1024 are to 224, and give an odd number
# of cells, so that the squares have the cell that is measured in their middle.
GPUS=${GPUS:-1}
source "$(dirname "$0")/../launch.sh"

SEEDS=${SEEDS:-0}
OUT=${OUT:-$RUNS/imagenette128_erf}
TEACHERS="slak wide swin" bash "$ROOT/run_scripts/studies/imagenette128.sh" "$@"

RUNS=$RUNS/imagenette128
declare -A LABEL=([alone]="student alone" [of_slak]="student of SLaK"
                  [of_wide]="student of wide SLaK" [of_swin]="student of Swin")
folders=("$RUNS/slak" "$RUNS/wide" "$RUNS/swin")
teachers=("SLaK teacher" "wide SLaK teacher" "Swin teacher")
labels=() names=()
for student in alone of_slak of_wide of_swin; do
    for seed in $SEEDS; do
        folders+=("$RUNS/$student-seed$seed")
        labels+=("${LABEL[$student]}") names+=("${LABEL[$student]}, seed $seed")
    done
done
checkpoints=("${folders[@]/%//checkpoint-last.pth}")
common=(--data-path "$DATA" --num-workers 0 --overwrite)

analyse erf --checkpoint "${checkpoints[@]}" \
    --labels "${teachers[@]}" "${labels[@]}" --size 480 --spread --out "$OUT/erf" "${common[@]}"
for number in 0 1 2; do
    analyse similarity --checkpoint "${checkpoints[number]}" "${checkpoints[@]:3}" \
        --labels "${teachers[number]}" "${labels[@]}" --out "$OUT/similarity-$number" \
        "${common[@]}"
done
analyse curves "${folders[@]}" \
    --labels "${teachers[@]}" "${names[@]}" --out "$OUT/curves" --overwrite
