#!/usr/bin/env bash
# From nothing to green: makes a virtual environment, installs what the tests need, runs them all.
#
#   bash tests/run.sh [pytest arguments]
#
# Environment: TEST_VENV          where the virtual environment goes (.venv-test)
#              TEST_PYTHON        Python 3.10 or newer to start from (python3)
#              TEST_WORKERS       test files run side by side when all are (2)
#              TEST_SKIP_INSTALL  1: use TEST_PYTHON as it is, install nothing
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${TEST_PYTHON:-python3}
if [ "${TEST_SKIP_INSTALL:-0}" != 1 ]; then
    venv=${TEST_VENV:-$root/.venv-test}
    bash launch/install.sh "$python" "$venv" deepspeed,hf,peers,test "$venv.log"
    python=$venv/bin/python
fi
# The environment's own ninja and launchers must come first on PATH.
PATH=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH
export PATH DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# Without arguments: all tests, two files at a time. With some, as they say: their tables are printed then.
[ $# -gt 0 ] || set -- -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder
exec python -m pytest "$@"
