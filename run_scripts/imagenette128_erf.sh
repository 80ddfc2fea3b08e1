#!/usr/bin/env bash
# What two large-kernel teachers and a Transformer leave in the same small student, on Imagenette at
# 128 px: receptive fields beside untrained controls, similarity to the teacher, curves.
# Paper table: none (its question of receptive fields, on real pictures without ImageNet)
# Hardware:    CPU; what imagenette128.sh takes for three teachers and four students a seed, then
#              about 10 minutes of measuring for three seeds on one core
# Expected:    the tables and the picture in README.md
#
#     DATA=path/to/imagenette128 SEEDS="0 1 2" bash run_scripts/imagenette128_erf.sh
#
# 480 px are to 128 px of training about what the published 1024 are to 224, and give an odd number of
# cells, so that the squares have the cell that is measured in their middle.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
source run_scripts/launch.sh
DATA=${DATA:?set DATA to a folder that holds train/ and val/}
RUNS=${RUNS:-runs/imagenette128}  # defaults as in imagenette128.sh, which sees the same environment
SEEDS=${SEEDS:-0}
OUT=${OUT:-$RUNS-erf}

SLAK="slak_nano kernel_size=31,15,7,3,5 layer_scale_init=0"
WIDE="slak_nano kernel_size=51,31,15,7,5 layer_scale_init=0"  # large kernels at every stage
SWIN=swin_nano
STUDENT="convnext_bn_nano depths=1,1,2,1 dims=20,40,80,160 layer_scale_init=0"

TEACHERS="${SLAK// /:} ${WIDE// /:} $SWIN" bash run_scripts/imagenette128.sh "$@"

slak=$(checkpoints_of none "$SLAK" ce 12 0)
wide=$(checkpoints_of none "$WIDE" ce 12 0)
swin=$(checkpoints_of none "$SWIN" ce 12 0)
students=()
while read -r checkpoint; do students+=("$checkpoint"); done < <(
    checkpoints_of none "$STUDENT" ce 8 $SEEDS
    checkpoints_of "$SLAK" "$STUDENT" nkd 8 $SEEDS
    checkpoints_of "$WIDE" "$STUDENT" nkd 8 $SEEDS
    checkpoints_of "$SWIN" "$STUDENT" nkd 8 $SEEDS)
labels=() names=()
for label in "student alone" "student of SLaK" "student of wide SLaK" "student of Swin"; do
    for seed in $SEEDS; do labels+=("$label") names+=("$label, seed $seed"); done
done

common=(--data-path "$DATA" --num-workers 0 --overwrite)
teachers=("SLaK teacher" "wide SLaK teacher" "Swin teacher")
"$PYTHON" -m analysis.erf --checkpoint "$slak" "$wide" "$swin" "${students[@]}" \
    --labels "${teachers[@]}" "${labels[@]}" --size 480 --spread --out "$OUT/erf" "${common[@]}"
for teacher in slak wide swin; do
    "$PYTHON" -m analysis.similarity --checkpoint "${!teacher}" "${students[@]}" \
        --labels "$teacher teacher" "${labels[@]}" --out "$OUT/$teacher" "${common[@]}"
done
folders=("$slak" "$wide" "$swin" "${students[@]}")
"$PYTHON" -m analysis.curves "${folders[@]%/checkpoint-last.pth}" \
    --labels "${teachers[@]}" "${names[@]}" --out "$OUT/curves" --overwrite
