#!/usr/bin/env bash
# install.sh PYTHON VENV EXTRAS LOG: a virtual environment with this package and its extras, in the one order that works.
set -euo pipefail

python=$1 venv=$2 extras=$3 log=$4
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() { printf 'install: %s\n' "$*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || fail "$python is not Python 3.10 or newer"
: >"$log"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" >>"$log" 2>&1 \
    || fail "$python cannot make a virtual environment (on Debian: apt install python3-venv); see $log"
# An unreachable pytorch.org is skipped with a warning; its CPU build saves 3 GB of CUDA libraries.
torch="torch==2.13.0"
nvidia-smi -L >/dev/null 2>&1 || torch+=" --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15"
# deepspeed's setup.py imports torch, hence torch first and no build isolation.
for stage in "-U pip setuptools wheel ninja packaging numpy" "$torch" "deepspeed>=0.19,<0.20 --no-build-isolation" \
    "-e $root[$extras]"; do
    printf 'pip install %s\n' "$stage"
    # shellcheck disable=SC2086  # a stage is several words
    "$venv/bin/python" -m pip install -q $stage >>"$log" 2>&1 || { tail -n 20 "$log" >&2; fail "pip failed; all of it is in $log"; }
done
