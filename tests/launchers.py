"""Start processes as launchers do, from an environment that no launcher has written into."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_THEIRS = re.compile(
    r"(SLURM|OMPI|PMI|PMIX|PRTE|TORCHELASTIC|MPI|NCCL|GLOO)_.*|(LOCAL_)?(RANK|WORLD_SIZE|SIZE)|MASTER_.*"
)
MPIRUN = [
    str(Path(sys.executable).with_name("mpirun")), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np",
]  # fmt: skip
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node"]


def clean_environment(**more: str) -> dict[str, str]:
    """This environment without launchers' variables, one thread, on CPUs, with this checkout on PYTHONPATH."""
    kept = {name: value for name, value in os.environ.items() if not _THEIRS.fullmatch(name)}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)} | more


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(command: Sequence[object], environ: Mapping[str, str], timeout: float = 120) -> subprocess.CompletedProcess:
    """One command, in the checkout's root; its output as text."""
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout)


def run_ranks(
    command: Sequence[object], environs: Sequence[Mapping[str, str]], world: int | None = None, timeout: float = 120
) -> list[subprocess.CompletedProcess]:
    """The same command as ranks 0, 1, ... of this host, each with its own environment added; fewer than `world` may be.

    No process outlives the call.
    """
    world, port = world or len(environs), free_port()
    arguments = [str(part) for part in command]
    started = []
    try:
        for rank, more in enumerate(environs):
            place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            environ = clean_environment(**{k: str(v) for k, v in place.items()}, MASTER_PORT=str(port)) | dict(more)
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(subprocess.Popen(arguments, cwd=ROOT, env=environ, text=True, **pipes))
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(arguments, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]
