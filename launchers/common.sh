# shellcheck shell=bash
# Sourced by the .sbatch files inside a job. Gives them `run_ranks` (one process a GPU on every node) and `run_one`.
# shellcheck source=launchers/cluster.env
source "$(dirname "${BASH_SOURCE[0]}")/cluster.env"
if [ -f "$PECO_VENV/bin/activate" ]; then
    # shellcheck disable=SC1091
    source "$PECO_VENV/bin/activate"
fi
export PYTHONPATH="$PECO_HOME${PYTHONPATH:+:$PYTHONPATH}"  # `python -m peco_ds...` from any folder, installed or not
export PYTHONUNBUFFERED=1  # a log that stops in mid-line hides where a job died
if ! [[ "$PECO_FAULT_RESTARTS" =~ ^[0-9]+$ ]]; then
    echo "error: PECO_FAULT_RESTARTS '$PECO_FAULT_RESTARTS': a count; correct it in launchers/cluster.env" >&2
    exit 2
fi
set -u  # not earlier: what a cluster's module and conda commands are made of does not bear it

# _count_gpus TEXT   8 for "8", "h100:8" and "a100:4,h100:4"; a type without a number is one GPU.
_count_gpus() {
    local total=0 part
    for part in ${1//,/ }; do
        part="${part##*:}"
        [[ "$part" =~ ^[0-9]+$ ]] || part=1
        total=$((total + 10#$part))
    done
    echo "$total"
}

# GPUs asked for come before GPUs found: on a node taken whole (--exclusive) the job finds more than it asked for.
_gpus="$(_count_gpus "${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}")"
[ "$_gpus" -gt 0 ] || _gpus=1
TASKS_PER_NODE="${TASKS_PER_NODE:-$_gpus}"
if ! [[ "$TASKS_PER_NODE" =~ ^[1-9][0-9]{0,4}$ ]]; then
    echo "error: TASKS_PER_NODE '$TASKS_PER_NODE': ranks a node, at least 1; correct it, or leave it empty for one a GPU" >&2
    exit 2
fi

# An array's tasks have job ids of their own, but one of them is that of the whole array: `scontrol requeue` would put all back.
_job="$SLURM_JOB_ID"
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || _job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"

# A node's name need not resolve on the other nodes; the address Slurm itself reaches it by does.
_first_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
_address="$(scontrol show node "$_first_node" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)"
export MASTER_ADDR="${_address:-$_first_node}"
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))  # below the ports the system hands out; differs between jobs that share a node

# run_ranks STAGE ARGUMENT...   one process a GPU on all nodes of the job
run_ranks() {
    _step "$SLURM_JOB_NUM_NODES" "$TASKS_PER_NODE" "$@"
}

# run_one STAGE ARGUMENT...   one process with all CPUs of the job's first node
run_one() {
    _step 1 1 "$@"
}

# _step NODES TASKS_A_NODE STAGE ARGUMENT...   does not return.
# Exits with 0 (done), with the code of the task that failed first, or, after putting the job back into the queue, where the
# stage stopped in good order (75) or a machine failed it (76: lost its other ranks or hung; 128 and more: ended by a signal).
# srun's own code cannot tell: it ends the other tasks when one fails and then reports the signal that ended them. Hence each
# task leaves its code in a file, the first one wins, and 75 does not count as failure for srun. A task that cannot leave its
# code gives srun 75 itself: without the file the answer is less exact, never 0.
_step() {
    local nodes="$1" tasks="$2" code first cancelled="" overcommit=() container=() srun_args=()
    shift 2
    local cpus=$((SLURM_CPUS_ON_NODE / tasks))
    if [ "$cpus" -lt 1 ]; then
        cpus=1
        overcommit=(--overcommit)
    fi
    read -r -a container <<< "$PECO_CONTAINER"
    read -r -a srun_args <<< "$PECO_SRUN_ARGS"
    _open_status
    trap 'cancelled=yes' TERM  # scancel, time limit: bash would die of it before the tasks write their codes, and the file would stay

    # --signal=USR2@120 without "B:" makes Slurm signal the processes of this step, not this script. It signals all of them,
    # also the small shell around python, which therefore must outlive it.
    srun --kill-on-bad-exit=1 --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" --cpus-per-task="$cpus" \
        "${overcommit[@]}" "${srun_args[@]}" bash "$PECO_HOME/launchers/task.sh" "${container[@]}" python "$@"
    code=$?
    _read_status "$code"
    _close_status

    if [ -z "$cancelled" ]; then  # else Slurm has ended the job; whether it runs again is not ours to say
        if [ "$first" = 76 ] || [ "$first" -ge 128 ]; then
            _requeue_after_fault "$first"
        elif [ "$first" = 75 ]; then
            rm -f "$_faults_file" 2> /dev/null  # it came as far as its time allowed
            _requeue "stopped in good order"
            exit 75  # seen only where the cluster refuses to requeue
        fi
    fi
    rm -f "$_faults_file" 2> /dev/null
    exit "$first"
}

# _open_status   makes PECO_EXIT_DIR, the folder in which tasks leave their code; "" where no folder can be written. All nodes must
# see it, or a task's code is lost: each compares the word in it with the one that it was given, and relies on nothing else.
_open_status() {
    local folder
    export PECO_EXIT_DIR="" PECO_EXIT_WORD="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$RANDOM$RANDOM"
    _faults_file=""
    for folder in "$SLURM_SUBMIT_DIR" "${PECO_RUNS_ROOT:-}" "$PECO_HOME"; do
        [ -d "$folder" ] || continue
        PECO_EXIT_DIR="$folder/.peco_exit_$SLURM_JOB_ID"
        _close_status  # what a start that was killed has left
        if { mkdir "$PECO_EXIT_DIR" && echo "$PECO_EXIT_WORD" > "$PECO_EXIT_DIR/word" && sync "$PECO_EXIT_DIR/word"; } 2> /dev/null; then
            _faults_file="$folder/.peco_faults_$SLURM_JOB_ID"
            return
        fi
        _close_status
    done
    PECO_EXIT_DIR=""
    echo "$SLURM_SUBMIT_DIR cannot be written: faults of job $_job cannot be counted, the first one ends it" >&2
}

_close_status() {
    [ -z "$PECO_EXIT_DIR" ] || { rm -f "$PECO_EXIT_DIR/word" "$PECO_EXIT_DIR/code" && rmdir "$PECO_EXIT_DIR"; } 2> /dev/null
}

# _read_status CODE   sets `first` to the code that the step ended with, where srun ended with CODE.
_read_status() {
    first=""
    [ -z "$PECO_EXIT_DIR" ] || first="$(cat "$PECO_EXIT_DIR/code" 2> /dev/null)"
    if [[ "$first" =~ ^[0-9]+$ ]]; then
        [ "$first" != 75 ] || [ "$1" = 0 ] || first="$1"  # a rank failed while the others stopped in good order
    elif [ "$1" != 0 ] || [ -z "$PECO_EXIT_DIR" ]; then
        first="$1"
    elif [ "$(cat "$PECO_EXIT_DIR/word" 2> /dev/null)" = "$PECO_EXIT_WORD" ] && ! [ -e "$PECO_EXIT_DIR/code" ]; then
        first=0
    else
        echo "error: $PECO_EXIT_DIR was written and cannot be read any more, so whether job $_job is done is not known; submit it again" >&2
        first=1
    fi
}

_requeue() {
    echo "$1; job $_job goes back into the queue"
    (trap '' TERM && exec scontrol requeue "$_job")  # Slurm ends everything in the job while it answers
}

# _requeue_after_fault CODE   puts the job back, at most PECO_FAULT_RESTARTS times between two ends in good order; returns where
# that is used up. Counted in a file: SLURM_RESTART_COUNT counts the stops in good order too, and a job's comment is its owner's.
_requeue_after_fault() {
    local faults
    faults="$(cat "$_faults_file" 2> /dev/null)"
    [ "$SECONDS" -lt 3600 ] || faults=0  # it ran for an hour: not a fault that stops it at once every time
    [[ "$faults" =~ ^[0-9]+$ ]] || faults=0
    if [ "$faults" -ge "$PECO_FAULT_RESTARTS" ]; then
        echo "ended with code $1, put back $faults times before (PECO_FAULT_RESTARTS=$PECO_FAULT_RESTARTS); job $_job fails"
    elif ! { echo $((faults + 1)) > "$_faults_file"; } 2> /dev/null; then
        echo "ended with code $1, and no file can be written to count it (${_faults_file:-none}); job $_job fails"
    else
        _requeue "ended with code $1, restart $((faults + 1)) of $PECO_FAULT_RESTARTS after a fault"
        # It also is on its way where Slurm itself found the node lost and was first. Else the cluster refuses to requeue.
        [ $? != 0 ] && [ -z "$cancelled" ] || exit "$1"
    fi
}
