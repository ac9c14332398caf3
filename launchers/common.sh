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

# GPUs asked for come before GPUs found: on a node taken whole (--exclusive) the job finds more than it asked for.
_gpus="${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
_gpus="${_gpus##*:}"  # "h100:8" -> 8
[ "$_gpus" -gt 0 ] 2> /dev/null || _gpus=1
TASKS_PER_NODE="${TASKS_PER_NODE:-$_gpus}"

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
# task leaves its code in a file, the first one wins, and 75 does not count as failure.
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
    export PECO_EXIT_FILE="$SLURM_SUBMIT_DIR/.peco_exit_$SLURM_JOB_ID"  # must lie where all nodes see it
    _faults_file="$SLURM_SUBMIT_DIR/.peco_faults_$SLURM_JOB_ID"
    rm -f "$PECO_EXIT_FILE"
    trap 'cancelled=yes' TERM  # scancel, time limit: bash would die of it before the tasks write their codes, and the file would stay

    # --signal=USR2@120 without "B:" makes Slurm signal the processes of this step, not this script. It signals all of them,
    # also the small shell around python, which therefore must outlive it.
    srun --kill-on-bad-exit=1 --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" --cpus-per-task="$cpus" \
        "${overcommit[@]}" "${srun_args[@]}" bash "$PECO_HOME/launchers/task.sh" "${container[@]}" python "$@"
    code=$?
    first="$(cat "$PECO_EXIT_FILE" 2> /dev/null)"
    rm -f "$PECO_EXIT_FILE"
    [[ "$first" =~ ^[0-9]+$ ]] || first="$code"
    [ "$first" != 75 ] || [ "$code" = 0 ] || first="$code"  # a rank failed while the others stopped in good order

    if [ -z "$cancelled" ]; then  # else Slurm has ended the job; whether it runs again is not ours to say
        if [ "$first" = 76 ] || [ "$first" -ge 128 ]; then
            _requeue_after_fault "$first"
        elif [ "$first" = 75 ]; then
            rm -f "$_faults_file"  # it came as far as its time allowed
            _requeue "stopped in good order"
            exit 75  # seen only where the cluster refuses to requeue
        fi
    fi
    rm -f "$_faults_file"
    exit "$first"
}

_requeue() {
    echo "$1; job $SLURM_JOB_ID goes back into the queue"
    (trap '' TERM && exec scontrol requeue "$SLURM_JOB_ID")  # Slurm ends everything in the job while it answers
}

# _requeue_after_fault CODE   puts the job back, at most PECO_FAULT_RESTARTS times between two ends in good order; returns where
# that is used up. Counted in a file: SLURM_RESTART_COUNT counts the stops in good order too, and a job's comment is its owner's.
_requeue_after_fault() {
    local faults
    faults="$(cat "$_faults_file" 2> /dev/null)"
    [ "$SECONDS" -lt 3600 ] || faults=0  # it ran for an hour: not a fault that stops it at once every time
    [[ "$faults" =~ ^[0-9]+$ ]] || faults=0
    if [ "$faults" -ge "$PECO_FAULT_RESTARTS" ]; then
        echo "ended with code $1, put back $faults times before (PECO_FAULT_RESTARTS=$PECO_FAULT_RESTARTS); job $SLURM_JOB_ID fails"
    elif ! echo $((faults + 1)) > "$_faults_file"; then
        echo "ended with code $1, and $_faults_file cannot be written to count it; job $SLURM_JOB_ID fails"
    else
        _requeue "ended with code $1, restart $((faults + 1)) of $PECO_FAULT_RESTARTS after a fault"
        # It also is on its way where Slurm itself found the node lost and was first. Else the cluster refuses to requeue.
        [ $? != 0 ] && [ -z "$cancelled" ] || exit "$1"
    fi
}
