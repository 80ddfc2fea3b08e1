# Starts the trainings of the experiment scripts; to be sourced after setup.sh:
#     source run_scripts/launch.sh
# Afterwards `launch train_kd.py ...` is one training on $GPUS processes of each machine.
#
# NNODES, HOST, RUN_ID  Several machines: how many, the name of the first, any word that they share
#     (default: l2s). Started on each of them, with L2S_PYTHON, so that they do not make the
#     environment at once; RUNS on storage that all see. Under Slurm the job script of README.md,
#     with these lines for its last ones (not run under Slurm):
#         export NNODES=$SLURM_NNODES RUN_ID=$SLURM_JOB_ID GPUS=8
#         export HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
#         srun --cpus-per-task=96 bash run_scripts/NAME.sh \
#             || { [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ] && scontrol requeue "$SLURM_JOB_ID"; }
# WEIGHTS  Loops over teachers: a folder that may hold <teacher>.pth; the others are published ones.
# TEACHERS, STUDENTS, LOSSES Loops: which cells; a word is NAME[:option=value...]; losses are joined
#     with +, so that LOSSES="nkd ce+fd:weight=3e-5" is --loss nkd, then --loss ce --loss fd
#     weight=3e-5. A cell that is complete is not trained again.
#
# Words after a script's name reach every training, last: --dry-run shows what each one would cost.

# Paths are the caller's, whose folder setup.sh has left.
for name in WEIGHTS STUDENT_WEIGHTS SETS OUT; do
    value=${!name:-}
    if [[ -n "$value" && "$value" != /* && "$value" != *://* &&
          ( "$value" == */* || -e "$OLDPWD/$value" ) ]]; then
        export "$name=$OLDPWD/$value"
    fi
done
if [[ -n "${WEIGHTS:-}" && ! -d "$WEIGHTS" ]]; then
    echo "launch: WEIGHTS=$WEIGHTS is no folder." >&2
    exit 2
fi

launches=0

launch() {
    local rendezvous=(--standalone) child status=0 stopped=0
    if [[ -n "${NNODES:-}" ]]; then
        # A port each: the first machine may be closing the last training's when another goes on.
        local endpoint=${HOST:?set HOST to the name of the first of the NNODES machines}
        rendezvous=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-id="${RUN_ID:-l2s}"
                    --rdzv-endpoint="$endpoint:$((29500 + launches))")
    fi
    launches=$((launches + 1))
    # Without a trap a signal would end this shell, and leave the training behind.
    "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="$GPUS" "$@" &
    child=$!
    trap 'stopped=143; kill -TERM $child 2>/dev/null || true' INT TERM
    wait $child || status=$?
    while kill -0 $child 2>/dev/null; do wait $child || status=$?; done  # a signal ends only `wait`
    trap - INT TERM
    return $((stopped ? stopped : status))
}

# Where the weights of a teacher are: NAME.pth in the folder WEIGHTS, else the second word.
weights_of() {
    if [[ -n "${WEIGHTS:-}" && -e "$WEIGHTS/$1.pth" ]]; then echo "$WEIGHTS/$1.pth"; else echo "${2:-published}"; fi
}

# Stops, before anything is trained, if one of TEACHERS is named and has no file.
needs_file() {
    if [[ " $TEACHERS " == *" $1 "* && ! -e "${WEIGHTS:-}/$1.pth" ]]; then
        echo "launch: no address of weights for $1 is known. Set WEIGHTS to a folder that holds" \
             "$1.pth, or leave it out: TEACHERS=\"$(tr -s ' ' <<< "${TEACHERS//$1/}")\"." >&2
        exit 2
    fi
}

loss_flags() {
    local flags="--loss ${1//+/ --loss }"
    echo "${flags//:/ }"
}

# The last checkpoints of trainings below $RUNS, a line each: teacher, student, loss (a name and its
# options in one word), epochs, seeds.
checkpoints_of() {
    "$PYTHON" -m utils.run_name "$@" |
        while read -r name; do echo "$RUNS/$name/checkpoint-last.pth"; done
}
