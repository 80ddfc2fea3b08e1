#!/usr/bin/env bash
# Who teaches best at equal accuracy: large-kernel ConvNets, small-kernel ones and Transformers of
# one size, trained until they are equally accurate, then students alone and of each, in one report.
# Table:    none (the paper's main claim, tested in small); full: the comparison of teachers
# GPUs:     hours: none, two cores. minutes: one. full: any number; 8 x 64 images x 2 accumulated
#           = 1024 per update
# Cost:     hours: 107 minutes of processor time, 54 on two cores (64 went by, with other work beside
#           it). minutes and full: not measured
# Expected: hours: the tables of docs/results.md. minutes and full: unknown
#
#     DATA=path/to/imagenette128 bash run_scripts/studies/equal_teachers.sh hours
#     DATA=path/to/imagenette128 bash run_scripts/studies/equal_teachers.sh minutes
#     DATA=IMAGENET WEIGHTS=FOLDER bash run_scripts/studies/equal_teachers.sh full
#
# The teachers of minutes and hours are trained here: run_scripts/equalise.py states the rule that
# makes them equal. Those of full are published, as accurate as they are; analysis.report compares
# only those within half a point. Started again, the command goes on where it was stopped.
#
# TEACHERS, STUDENTS, LOSSES, SEEDS
#           which cells: teachers slak, convnext_bn, resnet, swin, deit, the weakest first; students
#           convnext_bn, resnet; losses as in launch.sh. A teacher of the student's own family is
#           its control
# TEACHER_EPOCHS, TRIES, SPREAD
#           of the rule: the longest schedule, most trainings of a family, and by how many points
#           of top-1 teachers may differ in their own logs
# TOLERANCE the same in the report, which measures them once more, folded, as the students see them
# EPOCHS, LONGER
#           of the students; and of the supervised ones with the longer schedule
# JOBS      trainings at a time, each with a log in OUT/logs
# OUT       folder of everything (default: runs/equal_teachers-SIZE); the report is OUT/report.md
source "$(dirname "$0")/../launch.sh"

size=${1:-}
[[ "$size" =~ ^(minutes|hours|full)$ ]] ||
    die "say how large: bash run_scripts/studies/equal_teachers.sh minutes, hours or full."
shift
OUT=${OUT:-$RUNS/equal_teachers-$size}

if [[ "$size" == full ]]; then
    for seed in ${SEEDS:-0}; do
        for study in all_teachers combined_losses supervised; do
            attend bash "$ROOT/run_scripts/studies/$study-120ep.sh" --seed "$seed" "$@"
        done
        # The same students alone, 2.5 times as long.
        (TEACHERS=none LOSSES=ce STUDENTS=${STUDENTS:-resnet50 convnext_t_bn:drop_path=0.1}
         train_cells 300 --effective-batch 1024 --seed "$seed" "$@")
    done
    if [[ "$dry_run" == yes ]]; then exit; fi
    mkdir -p "$OUT"
    trained=(runs/*-120ep* runs/none-*-300ep*)
    analyse report "${trained[@]}" --versus all --out "$OUT/report"
    analyse curves "${trained[@]}" --also agreement --out "$OUT/curves" --overwrite
    analyse erf --checkpoint "${trained[@]/%//checkpoint-last.pth}" --model slak_t \
        --weights "$(weights_of slak_t)" --model swin_t --weights "$(weights_of swin_t)" \
        --data-path "$DATA" --spread --out "$OUT/erf" --overwrite
    exit
fi

# Networks, and epochs of each size.
RECIPE=equal_teachers_$size
# The published start of the layer scale, 1e-6, keeps blocks out of so short a training.
BN="convnext_bn_nano layer_scale_init=0"
SLAK="slak_nano layer_scale_init=0 width_factor=1"  # dense, so no wider than the others
declare -A STUDENT
if [[ "$size" == minutes ]]; then
    PIXELS=128 ERF_PIXELS=480 IMAGES_OF_ERF=50
    # Kernels from about the width of each stage's map, 32, 16, 8 and 4, to twice that.
    NETWORK[slak]="$SLAK kernel_size=51,31,15,7,5 depths=1,1,3,1 dims=32,64,128,256"
    NETWORK[convnext_bn]="$BN dims=32,64,128,256"
    NETWORK[resnet]="resnet_d_nano dims=32,64,128,256"
    NETWORK[swin]="swin_nano dim=32 window=4"
    NETWORK[deit]="vit_nano image_size=128 dim=144"
    STUDENT[convnext_bn]="$BN depths=1,1,2,1 dims=20,40,80,160"
    STUDENT[resnet]="resnet_nano"
    TEACHERS=${TEACHERS:-deit swin slak convnext_bn resnet}
    STUDENTS=${STUDENTS:-convnext_bn resnet} LOSSES=${LOSSES:-nkd}
    TEACHER_EPOCHS=${TEACHER_EPOCHS:-40} EPOCHS=${EPOCHS:-12} LONGER=${LONGER:-30}
    JOBS=${JOBS:-8} TRIES=${TRIES:-3}
else
    PIXELS=64 ERF_PIXELS=224 IMAGES_OF_ERF=50
    # Kernels that reach the whole map from each of its places: 16, 8, 4 and 2 wide.
    NETWORK[slak]="$SLAK kernel_size=31,15,7,3,5"
    NETWORK[convnext_bn]="$BN depths=1,1,2,1 dims=24,48,96,192"
    NETWORK[resnet]="resnet_nano dims=24,48,96,192"
    NETWORK[swin]="swin_nano window=4"
    NETWORK[deit]="vit_nano image_size=64"
    STUDENT[convnext_bn]="$BN depths=1,1,1,1 dims=16,32,64,128"
    STUDENT[resnet]="resnet_nano"
    TEACHERS=${TEACHERS:-swin slak convnext_bn}
    STUDENTS=${STUDENTS:-convnext_bn} LOSSES=${LOSSES:-nkd}
    TEACHER_EPOCHS=${TEACHER_EPOCHS:-20} EPOCHS=${EPOCHS:-4} LONGER=${LONGER:-8}
    JOBS=${JOBS:-2}
fi
SEEDS=${SEEDS:-0 1 2 3 4} TRIES=${TRIES:-4} SPREAD=${SPREAD:-0.4} TOLERANCE=${TOLERANCE:-0.5}

needs DATA "the folder that holds train/ and val/"
for teacher in $TEACHERS; do
    [[ -n "${NETWORK[$teacher]:-}" ]] || die "no such teacher: '$teacher'; known: slak," \
        "convnext_bn, resnet, swin, deit."
done
for student in $STUDENTS; do
    [[ -n "${STUDENT[$student]:-}" ]] || die "no such student: '$student'; known: convnext_bn," \
        "resnet."
done
[[ "$JOBS" =~ ^[1-9][0-9]*$ ]] || die "JOBS is '$JOBS'; it must be a whole number, 1 or more."
cores=$(getconf _NPROCESSORS_ONLN)
if (( JOBS > cores )); then JOBS=$cores; fi
export OMP_NUM_THREADS=$((cores / JOBS))
mkdir -p "$OUT/logs" "$OUT/parts"
more=("$@")  # words for every training

# Processes beside one another: the first that fails ends all, with its last sentence.
declare -A running=()

stop_all() {
    trap '' INT TERM
    (( ${#running[@]} == 0 )) || kill -TERM "${!running[@]}" 2>/dev/null || true
    wait
}
trap 'stop_all; exit 143' INT TERM

wait_for_fewer_than() {  # NUMBER
    local pid name status
    while (( ${#running[@]} >= $1 )); do
        for pid in "${!running[@]}"; do
            if kill -0 "$pid" 2>/dev/null; then continue; fi
            name=${running[$pid]} status=0
            wait "$pid" || status=$?
            unset "running[$pid]"
            if (( status == 0 )); then continue; fi
            stop_all
            tr '\r' '\n' < "$OUT/logs/$name.log" | grep . | tail -n 1 >&2 || true
            echo "$(basename "$0"): $name ended with $status; its log is $OUT/logs/$name.log" >&2
            exit "$status"
        done
        sleep 0.2
    done
}

start() {  # NAME WORDS...: a process of Python
    wait_for_fewer_than "$JOBS"
    echo "$(date +%T) $1"
    "$PYTHON" "${@:2}" > "$OUT/logs/$1.log" 2>&1 &
    running[$!]=$1
}

finish() { wait_for_fewer_than 1; }

start_training() {  # FOLDER FLAGS...
    start "$(basename "$1")" "$ROOT/train_kd.py" \
        --config "$ROOT/run_scripts/recipes/$RECIPE.yaml" --data-path "$DATA" \
        --output-dir "$1" "${@:2}" "${more[@]}"
}

# Teachers, until they are equally accurate or their tries are used up.
declare -A CHOSEN=()
asked=""
while true; do
    if [[ "$dry_run" == yes ]]; then  # which leaves nothing to choose from
        plan=""
        for teacher in $TEACHERS; do
            CHOSEN[$teacher]=$OUT/teachers/$teacher-seed100
            plan+="train $teacher $TEACHER_EPOCHS 100 ${CHOSEN[$teacher]}"$'\n'
        done
        plan=${plan%$'\n'}
    else
        plan=$("$PYTHON" "$ROOT/run_scripts/equalise.py" "$OUT/teachers" --families $TEACHERS \
               --longest "$TEACHER_EPOCHS" --tolerance "$SPREAD" --tries "$TRIES" --seed 100)
    fi
    if [[ "$plan" != train* ]]; then break; fi
    [[ "$plan" != "$asked" ]] || die "no training has left what was asked for: $plan"
    asked=$plan
    while read -r _ teacher epochs seed folder; do
        start_training "$folder" --teacher none --student ${NETWORK[$teacher]} \
            --epochs "$epochs" --seed "$seed"
    done <<< "$plan"
    finish
    if [[ "$dry_run" == yes ]]; then break; fi
done
if [[ "$dry_run" == no ]]; then
    echo "$plan" | tee "$OUT/parts/teachers.txt"
    while read -r word teacher _ _ folder; do  # and the accuracy behind the folder
        if [[ "$word" == take ]]; then CHOSEN[$teacher]=${folder% *}; fi
    done <<< "$plan"
fi

# Students, a seed after the other.
folders=() labels=()
for seed in $SEEDS; do for student in $STUDENTS; do
    base="--student ${STUDENT[$student]} --seed $seed"
    for schedule in "alone $EPOCHS" "longer $LONGER"; do
        read -r name epochs <<< "$schedule"
        folders+=("$OUT/students/$student-$name-seed$seed") labels+=("$student $name")
        start_training "${folders[-1]}" --teacher none $base --epochs "$epochs"
    done
    for teacher in $TEACHERS; do for loss in $LOSSES; do
        flags="--loss ${loss//+/ --loss }"
        name=${loss//[:=]/_}
        folders+=("$OUT/students/$student-$name-of_$teacher-seed$seed")
        labels+=("$student $loss of $teacher")
        start_training "${folders[-1]}" --teacher ${NETWORK[$teacher]} \
            --teacher-weights "$(weights_in "${CHOSEN[$teacher]}")" $base ${flags//:/ } \
            --epochs "$EPOCHS"
    done; done
done; done
finish
if [[ "$dry_run" == yes ]]; then exit; fi

# What came out. Parts first, several at a time, then the report.
versus=()
for teacher in $TEACHERS; do
    if [[ "$teacher" != slak && " $TEACHERS " == *" slak "* ]]; then
        versus+=(--versus "${NETWORK[slak]}" "${NETWORK[$teacher]}")
    fi
done
parts=$OUT/parts
common=(--data-path "$DATA" --num-workers 0 --overwrite)
students=("${folders[@]/%//checkpoint-last.pth}")
teachers=() teacher_labels=()
for teacher in $TEACHERS; do
    start "similarity-$teacher" -m analysis.similarity \
        --checkpoint "${CHOSEN[$teacher]}/checkpoint-last.pth" "${students[@]}" \
        --labels "teacher $teacher" "${labels[@]}" --out "$parts/similarity-$teacher" "${common[@]}"
    if [[ "$teacher" != deit ]]; then  # which takes images of one size only
        teachers+=("${CHOSEN[$teacher]}/checkpoint-last.pth") teacher_labels+=("teacher $teacher")
    fi
done
start erf -m analysis.erf --checkpoint "${teachers[@]}" "${students[@]}" \
    --labels "${teacher_labels[@]}" "${labels[@]}" --size "$ERF_PIXELS" \
    --images "$IMAGES_OF_ERF" --spread --out "$parts/erf" "${common[@]}"
number=$(( ${#folders[@]} / $(wc -w <<< "$SEEDS") ))  # those of the first seed
start curves -m analysis.curves "${folders[@]:0:number}" --labels "${labels[@]:0:number}" \
    --out "$parts/curves" --overwrite
finish
if (( ${#versus[@]} == 0 )); then versus=(--versus all); fi
analyse report "${folders[@]}" "${versus[@]}" --tolerance "$TOLERANCE" --out "$parts/table" \
    > /dev/null

tables() { grep -v '^<!--' "$1"; }
show() { if [[ -e "$OUT/$1.png" ]]; then echo; echo "![$1]($1.png)"; fi; }
for image in "$parts/erf/erf.png" "$parts/curves.png"; do  # without Matplotlib there are none
    if [[ -e "$image" ]]; then cp "$image" "$OUT"; fi
done
{
    echo "# Who teaches best at equal accuracy ($size)"
    echo
    echo "Images of $PIXELS px, seeds $SEEDS; students $EPOCHS epochs, $LONGER where longer."
    echo
    echo "## Teachers"
    echo
    echo "Chosen by run_scripts/equalise.py, from at most $TRIES trainings of a family and" \
         "$TEACHER_EPOCHS epochs, on seeds from 100: family, epochs, seed, folder, top-1."
    echo
    grep '^take' "$parts/teachers.txt" | sed 's/^take/   /'
    echo
    grep '^teachers' "$parts/teachers.txt" | sed 's/^teachers:/The teachers are/; s/$/./'
    echo
    echo "One teacher of each family teaches all seeds: the intervals below are of these" \
         "teachers, and say nothing of what another training of a teacher would change."
    echo
    echo "## Accuracy, gains, and the large-kernel teacher beside the others"
    echo
    tables "$parts/table.md"
    echo
    echo "## Similarity of students and teachers"
    for teacher in $TEACHERS; do
        echo
        tables "$parts/similarity-$teacher/similarity.md"
    done
    echo
    echo "## Effective receptive fields, trained and untrained, at $ERF_PIXELS px"
    echo
    tables "$parts/erf/erf.md"
    show erf
    echo
    echo "## Curves of the first seed"
    show curves
} > "$OUT/report.md.part"
mv "$OUT/report.md.part" "$OUT/report.md"
echo "The report: $OUT/report.md"
tables "$parts/table.md"
