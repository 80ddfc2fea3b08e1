# What the experiment scripts share; sourced by each of them, never run. Nothing is installed here.
#
# PYTHON    the Python that runs everything (default: python, of the active environment,
#           or python3 where there is no python)
# DATA      the folder that holds train/ and val/
# GPUS      processes on this machine (default: its GPUs; 1 without any)
# RUNS      parent of run folders that a script names itself (default: runs)
# WEIGHTS   a folder that may hold <teacher>.pth; the weights of the others are the published ones
# TEACHERS, STUDENTS, LOSSES
#           which cells a study trains. A word is NAME[:option=value...]; + joins losses, so that
#           LOSSES="nkd ce+fd:weight=3e-5" is --loss nkd, then --loss ce --loss fd weight=3e-5
# NNODES, HOST, RUN_ID
#           several machines: how many, the name of the first, any word that they share; the script
#           is started on each of them (docs/jobs.md)
#
# What follows a script's name reaches every training, last, so that it wins: --dry-run, --lr 1e-3.
# Runs are made below the folder that the script is started in. A run that is complete is not
# trained again; one that was stopped goes on.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$(if command -v python > /dev/null; then echo python; else echo python3; fi)}
RUNS=${RUNS:-runs}
RECIPE=${RECIPE:-imagenet}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}  # for python -m analysis.NAME

die() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

needs() {  # NAME WHAT: a variable that has no default
    [[ -n "${!1:-}" ]] || die "set $1 to $2."
}

missing=$("$PYTHON" "$ROOT/run_scripts/missing.py" "$ROOT/requirements.txt" 2>/dev/null) ||
    die "PYTHON=$PYTHON does not run. Activate an environment; run_scripts/setup.sh makes one."
[[ -z "$missing" ]] ||
    die "PYTHON=$PYTHON lacks: $missing. Install them: pip install -r requirements.txt"
[[ -z "${WEIGHTS:-}" || -d "$WEIGHTS" ]] || die "WEIGHTS=$WEIGHTS is no folder."

count_gpus() {
    if [[ -v CUDA_VISIBLE_DEVICES ]]; then tr , '\n' <<< "$CUDA_VISIBLE_DEVICES"
    else nvidia-smi -L 2>/dev/null; fi | grep -c . || true
}
GPUS=${GPUS:-$(count_gpus)}
if [[ "$GPUS" == 0 ]]; then GPUS=1; fi

launches=0
dry_run=no
if [[ " $* " == *" --dry-run "* ]]; then dry_run=yes; fi  # what the script itself was started with

# attend COMMAND...: until it ends or a signal has ended it.
attend() {
    local child status=0 stopped=0
    # Without a trap a signal would end this shell, and leave the command behind.
    "$@" &
    child=$!
    trap 'stopped=143; kill -TERM $child 2>/dev/null || true' INT TERM
    wait $child || status=$?
    while kill -0 $child 2>/dev/null; do wait $child || status=$?; done  # a signal ends only `wait`
    trap - INT TERM
    return $((stopped ? stopped : status))
}

# launch PROGRAM FLAGS...: on all processes.
launch() {
    local command=("$PYTHON")
    if [[ -n "${NNODES:-}" ]]; then
        needs HOST "the name of the first of the $NNODES machines"
        # A port each: the first machine may be closing the last training's when another goes on.
        command+=(-m torch.distributed.run --nnodes="$NNODES" --nproc_per_node="$GPUS"
                  --rdzv-backend=c10d --rdzv-id="${RUN_ID:-l2s}"
                  --rdzv-endpoint="$HOST:$((29500 + launches))")
    elif [[ "$GPUS" != 1 ]]; then
        command+=(-m torch.distributed.run --standalone --nproc_per_node="$GPUS")
    fi
    launches=$((launches + 1))
    attend "${command[@]}" "$ROOT/$1" "${@:2}"
}

# train FLAGS...: one training by the recipe.
train() {
    needs DATA "the folder that holds train/ and val/"
    launch train_kd.py --config "$ROOT/run_scripts/recipes/$RECIPE.yaml" --data-path "$DATA" "$@"
}

# analyse NAME ARGUMENTS...: python -m analysis.NAME, of trainings that a dry run has not made.
analyse() {
    if [[ "$dry_run" == no ]]; then "$PYTHON" -m "analysis.$1" "${@:2}"; fi
}

# The weights that a training leaves in FOLDER, to teach with; in a dry run it has left none.
weights_in() {
    if [[ "$dry_run" == no ]]; then echo "$1/checkpoint-last.pth"; else echo random; fi
}

# Teachers that are more than a name of models/: the network, and the address of its weights where
# the folder WEIGHTS has no <teacher>.pth; an empty one means that none is known.
SHARE=https://surfdrive.surf.nl/files/index.php/s
declare -A NETWORK=(
    [convnext_t_120ep]="convnext_t"
    [slak_t_31_120ep]="slak_t kernel_size=31,29,27,13,5"
    [slak_t_51_120ep]="slak_t kernel_size=51,49,47,13,5"
    [slak_t_61_120ep]="slak_t kernel_size=61,59,57,13,5"
    [convnext_t_22k]="convnext_t"
    [vit_l]="vit_b dim=1024 depth=24 num_heads=16")
declare -A ADDRESS=(
    [slak_t_31_120ep]=$SHARE/VXzBxFXQdlAQ7h8/download
    [slak_t_51_120ep]=$SHARE/WiQYWNclJ9bW5XV/download
    [slak_t_61_120ep]=$SHARE/VpR1te71NmVImJb/download
    [cswin_t]="" [convnext_t_22k]="" [vit_l]="")

network_of() { echo "${NETWORK[$1]-${1//:/ }}"; }  # TEACHER -> NAME key=value...

weights_of() {  # TEACHER -> a file, an address or `published`; empty: not known
    if [[ -n "${WEIGHTS:-}" && -e "$WEIGHTS/$1.pth" ]]; then echo "$WEIGHTS/$1.pth"
    else echo "${ADDRESS[$1]-published}"; fi
}

# train_cells EPOCHS FLAGS...: every one of TEACHERS with every one of STUDENTS and LOSSES.
train_cells() {
    local epochs=$1 teacher student loss losses flags name
    shift
    for teacher in $TEACHERS; do
        [[ -n "$(weights_of "$teacher")" ]] ||
            die "no address of weights for $teacher is known. Set WEIGHTS to a folder that holds" \
                "$teacher.pth, or leave it out: TEACHERS=\"$(xargs <<< "${TEACHERS//$teacher/}")\"."
    done
    for teacher in $TEACHERS; do for student in $STUDENTS; do for loss in $LOSSES; do
        losses="--loss ${loss//+/ --loss }"
        flags=(--teacher $(network_of "$teacher") --student ${student//:/ } ${losses//:/ })
        if [[ "$teacher" != none ]]; then flags+=(--teacher-weights "$(weights_of "$teacher")"); fi
        if [[ -n "${NETWORK[$teacher]:-}" ]]; then
            # Two such teachers may be one network, so the folder gets the teacher's own name.
            name=$(sed 's/=//g; s/[^A-Za-z0-9_.-]/_/g' <<< "$teacher-$student-$loss-${epochs}ep")
            flags+=(--output-dir "$RUNS/$name")
        fi
        train "${flags[@]}" --epochs "$epochs" "$@"
    done; done; done
}
