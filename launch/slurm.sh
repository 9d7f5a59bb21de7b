#!/bin/bash
# Pre-train under SLURM: a torchrun on each node. From the repository's root, with the virtual environment activated:
#
#   sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sh --engine fsdp2 --save-every 1000 ... (pretrain.py's arguments)
#
# RANKS_PER_HOST  processes on a node (default: its GPUs)
# MASTER_PORT     free port on the first node (default: from the job's number)
# INTERFACE, MAX_RESTARTS, PYTHON, PROGRAM: see torchrun.sh
# With --save-every the job saves when SLURM is about to end it (SIGTERM to torchrun, five minutes before), and is queued
# again; torchrun gives its ranks 240 seconds for the step they are in and the save (TORCH_ELASTIC_SHUTDOWN_TIMEOUT).
# That needs --output and --save-every on the command line: this script does not read the FILE of --config.
#SBATCH --job-name pretrain
#SBATCH --ntasks-per-node 1
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --signal TERM@300
set -euo pipefail
root=${SLURM_SUBMIT_DIR:-$PWD} # SLURM runs a copy of this file from another directory
[ -r "$root/launch/common.sh" ] || { echo "slurm.sh: $root has no launch/common.sh; submit from the repository's root" >&2; exit 2; }
source "$root/launch/common.sh"
way=slurm.sh

[ $# -gt 0 ] || fail "give $(basename "$program")'s arguments after launch/slurm.sh"
[ -n "${SLURM_JOB_NODELIST:-}" ] || fail "SLURM_JOB_NODELIST is not set: start with sbatch launch/slurm.sh ..., or inside salloc"
need_program srun "install SLURM's client programs"
need_program scontrol "install SLURM's client programs"
need_python
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ ${#hosts[@]} -gt 0 ] || fail "scontrol finds no host in SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
RANKS_PER_HOST=${RANKS_PER_HOST:-${SLURM_GPUS_ON_NODE:-}}
[ -n "$RANKS_PER_HOST" ] || unset RANKS_PER_HOST
ranks_per_host
port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # below the ports of outgoing connections
export NNODES=${#hosts[@]} RANKS_PER_HOST RDZV_ENDPOINT=${hosts[0]}:$port JOB_ID=${SLURM_JOB_ID:-pretrain}
export PYTHON=$python PROGRAM=$program
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
say "${#hosts[@]} hosts (${hosts[*]}), $RANKS_PER_HOST ranks on each, meeting at $RDZV_ENDPOINT; devices here: $(devices)"

output="" previous=""
for argument in "$@"; do
    [ "$previous" != --output ] || output=$argument
    [[ $argument != --output=* ]] || output=${argument#--output=}
    previous=$argument
done
if [[ " $* " == *" --config"* ]]; then
    missing=()
    [ -n "$output" ] || missing+=(output)
    [[ " $* " == *" --save-every"* ]] || missing+=(save_every)
    [ ${#missing[@]} = 0 ] || say "WARNING: $(unseen "${missing[@]}"), so this job is NOT queued again when SLURM ends it"
fi
# left by the run before: a start that fails early must not be queued again because of it
[ -z "$output" ] || rm -f "$output/preempted"
again=()
[[ " $* " == *" --resume"* || " $* " != *" --save-every"* ]] || again=(--resume auto) # when it is queued again
cores=()
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || cores=(--cpus-per-task "$SLURM_CPUS_PER_TASK") # srun does not take it from sbatch
code=0
srun --nodes "${#hosts[@]}" --ntasks-per-node 1 "${cores[@]}" --kill-on-bad-exit=0 \
    bash "$launch/torchrun.sh" "$@" "${again[@]}" || code=$?
# torchrun hides the ranks' exit code 75; the file says that they saved and want to go on
if [ -n "$output" ] && [ -e "$output/preempted" ]; then
    say "saved after step $(cat "$output/preempted"); queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
