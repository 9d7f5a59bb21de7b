#!/usr/bin/env bash
# Pre-train with torchrun. Run the same command on every host:
#
#   NNODES=2 RDZV_ENDPOINT=host1:29400 launch/torchrun.sh --engine fsdp2 ...                (pretrain.py's arguments)
#   NNODES=1:4 RDZV_ENDPOINT=host1:29400 launch/torchrun.sh --save-every 100 --timeout 120 ...         (elastic)
#
# NNODES          number of hosts (default 1), or MIN:MAX: the job goes on with fewer when hosts are lost, and takes up
#                 hosts that come (back); --resume auto is added then
# RDZV_ENDPOINT   HOST:PORT where the hosts meet: the host that has this name serves it, and must live as long as the job
# RANKS_PER_HOST  processes on this host (default: its GPUs)
# MAX_RESTARTS    how often the ranks are started again after a failure (default 0; elastic: 3). 1 or more needs
#                 --save-every, and --resume auto is added
# JOB_ID          the same on all hosts, another for each job at the same endpoint (default pretrain)
# RDZV_CONF       more of torchrun's --rdzv-conf, such as last_call_timeout=10
# INTERFACE       network interface between the hosts, if their names do not resolve to the right one
# PYTHON          the virtual environment's Python (default: python on PATH)
# PROGRAM         what is started, with its own arguments, such as launch/finetune.py (default: pretrain.py)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[ $# -gt 0 ] || fail "give $(basename "$program")'s arguments (python $program --help)"
NNODES=${NNODES:-1} JOB_ID=${JOB_ID:-pretrain}
[[ $NNODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NNODES=$NNODES is neither a number of hosts nor MIN:MAX"
elastic=no
[[ $NNODES != *:* ]] || elastic=yes
# torch 2.13: otherwise a host that comes later waits for an address which the first host gave to the first round only
[ $elastic = no ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
MAX_RESTARTS=${MAX_RESTARTS:-$([ $elastic = yes ] && echo 3 || echo 0)}
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS is not a whole number"
need_python
ranks_per_host
use_interface
given=(--nnodes "$NNODES" --nproc-per-node "$RANKS_PER_HOST" --max-restarts "$MAX_RESTARTS")
if [ "$NNODES" = 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
    given+=(--standalone)
else
    [[ ${RDZV_ENDPOINT:-} =~ ^[^:]+:[0-9]+$ ]] || fail "NNODES=$NNODES needs RDZV_ENDPOINT=HOST:PORT, the same on every host"
    getent ahosts "${RDZV_ENDPOINT%:*}" >/dev/null || fail "RDZV_ENDPOINT=$RDZV_ENDPOINT: ${RDZV_ENDPOINT%:*} does not resolve here"
    given+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$JOB_ID")
    [ -z "${RDZV_CONF:-}" ] || given+=(--rdzv-conf "$RDZV_CONF")
fi
arguments=" $* "
if [ $elastic = yes ] || [ "$MAX_RESTARTS" -gt 0 ]; then
    saves=' --save-every[= ]0*[1-9]' # 0 is never
    [[ $arguments =~ $saves || $arguments == *" --config"* ]] \
        || fail "ranks that are started again need a checkpoint: add --save-every N (NNODES=$NNODES, MAX_RESTARTS=$MAX_RESTARTS)"
    [[ $arguments =~ $saves ]] || say "WARNING: $(unseen save_every). Does FILE have it? Without it every restart begins at step 0"
    [[ $arguments == *" --resume"* ]] || set -- "$@" --resume auto
    [[ $arguments == *" --timeout"* ]] || say "no --timeout: a lost link is noticed after 30 minutes only (GPUs: 10)"
fi
say "host $(hostname) of $NNODES, $RANKS_PER_HOST ranks here, meeting at ${RDZV_ENDPOINT:-this host}, job $JOB_ID"
say "elastic: $elastic, restarts: $MAX_RESTARTS; devices here: $(devices)"
exec "$python" -m torch.distributed.run "${given[@]}" "$program" "$@"
