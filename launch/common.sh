# Sourced by deepspeed.sh, torchrun.sh, slurm.sh and mpirun.sh: checks whose messages name what is missing.
# shellcheck shell=bash

way=$(basename "$0")
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() { printf '%s: %s\n' "$way" "$*" >&2; exit 2; }
say() { printf '%s: %s\n' "$way" "$*"; }

# The program that trains: PROGRAM, such as launch/finetune.py, else pretrain.py; as a full path, the same on all hosts.
program=${PROGRAM:-$launch/pretrain.py}
[[ $program == /* ]] || program=$PWD/$program
[ -r "$program" ] || fail "PROGRAM=$PROGRAM: there is no such file; give one such as launch/finetune.py"

# need_program PROGRAM WHERE_FROM
need_program() { command -v "$1" >/dev/null || fail "there is no program $1 on PATH; $2"; }

# need_number VARIABLE: its value must be a whole number above 0
need_number() { [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "$1=${!1} is not a whole number above 0"; }

# The Python that trains: PYTHON, else the first python on PATH, as a full path, which is the same on all hosts.
need_python() {
    local given=${PYTHON:-python}
    python=$(command -v "$given") || fail "there is no Python $given; activate the virtual environment, or set PYTHON"
    [[ $python == /* ]] || python=$PWD/$python
    "$python" -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' \
        || fail "$python has no torch; activate the virtual environment, or set PYTHON"
    [ -z "${PYTHON:-}" ] || export PATH="$(dirname "$python"):$PATH" # its own ninja, deepspeed and mpirun come first
}

# unseen KEY...: what to do about keys of the FILE of --config that a script would have to know
unseen() {
    local flags=("${@//_/-}")
    echo "$way does not read the FILE of --config; give ${flags[*]/#/--} on the command line (the same values as in FILE)"
}

# GPUs of this host, of those that CUDA_VISIBLE_DEVICES leaves if it is set
gpus() {
    local found shown
    found=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        shown=$(tr , "\n" <<<"$CUDA_VISIBLE_DEVICES" | grep -c "^[^-]" || true)
        [ "$shown" -ge "$found" ] || found=$shown
    fi
    echo "$found"
}

devices() {
    local count
    count=$(gpus)
    if [ "$count" -gt 0 ]; then echo "$count GPUs"; else echo "no GPU (CPU)"; fi
}

# RANKS_PER_HOST, else a rank for each GPU
ranks_per_host() {
    RANKS_PER_HOST=${RANKS_PER_HOST:-$(gpus)}
    [ "$RANKS_PER_HOST" != 0 ] || fail "this host has no GPU, so set RANKS_PER_HOST, the number of processes on each host"
    need_number RANKS_PER_HOST
}

# read_hostfile: HOSTFILE's lines "NAME slots=RANKS" into hosts=(NAME ...) and slots=(RANKS ...)
read_hostfile() {
    local line
    [ -n "${HOSTFILE:-}" ] || fail 'set HOSTFILE to a file with a line "NAME slots=RANKS" for each host'
    [ -r "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE: no such file"
    hosts=() slots=()
    while read -r line || [ -n "$line" ]; do
        line=${line%%#*}
        [[ $line =~ [^[:space:]] ]] || continue
        [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] \
            || fail "HOSTFILE=$HOSTFILE: \"$line\" is not of the form NAME slots=RANKS"
        hosts+=("${BASH_REMATCH[1]}") slots+=("${BASH_REMATCH[2]}")
    done <"$HOSTFILE"
    [ ${#hosts[@]} -gt 0 ] || fail "HOSTFILE=$HOSTFILE names no host"
    world=0
    for line in "${slots[@]}"; do world=$((world + line)); done
}

# Every host must answer to ssh without a password and have this Python and this repository at the same place.
check_hosts() {
    local host
    for host in "${hosts[@]}"; do
        ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" "test -x '$python'" </dev/null || case $? in
            255) fail "$host does not answer to ssh without a password; try: ssh $host hostname" ;;
            *) fail "$host has no $python; the virtual environment must be at the same place on every host" ;;
        esac
        ssh -o BatchMode=yes "$host" "test -r '$program' && cd '$PWD'" </dev/null \
            || fail "$host has no $program or no $PWD; the repository must be at the same place on every host"
    done
}

# The network interface to the other hosts: INTERFACE, else the one towards the first host that is not this one (all hosts
# must agree on it). The way to this host itself is lo, which serves only where there is no other host.
find_interface() {
    local host address device
    [ -z "${INTERFACE:-}" ] || return 0
    for host in "${hosts[@]}"; do # a name that only ssh knows has no address
        address=$(getent ahostsv4 "$host" | awk 'NR == 1 {print $1}') || continue
        device=$(ip -o route get "$address" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p') || continue
        [ "$device" != lo ] || [ ${#hosts[@]} = 1 ] || continue
        INTERFACE=$device
        [ -z "$INTERFACE" ] || return 0
    done
    fail "no route to another of the hosts (${hosts[*]}) was found; set INTERFACE to the network interface between the hosts"
}

# What every rank's environment needs, one name a line: launchers over ssh hand on next to nothing by themselves.
variables() {
    compgen -e | grep -E -e '^(PATH|PYTHONPATH|PYTHONHASHSEED|LD_LIBRARY_PATH|VIRTUAL_ENV|CUDA_HOME|CUDA_DEVICE_MAX_CONNECTIONS|NVIDIA_TF32_OVERRIDE)$' \
        -e '^(OMP|MKL)_NUM_THREADS$|^(NCCL|GLOO|TORCH|PYTORCH|CUBLAS|DS|HF|TOKENIZERS|TRITON|LOWRANK|UCX)_'
}

# use_interface: INTERFACE, if it is set, is the one that gloo and NCCL use
use_interface() {
    [ -n "${INTERFACE:-}" ] || return 0
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE}
}
