"""srun: ranks from SLURM_PROCID and its companions.

Rank 0 is expected on the first host of the step's list, which is so for srun's own distributions (block, cyclic); with
--distribution=arbitrary set MASTER_ADDR.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Mapping

from lowrank_ds.launching.errors import LaunchError, count, number

_RESERVED = 0xFFFFFFF0  # numbers from here on are not of steps that srun was asked for: batch scripts, shells of salloc
_FIRST_PORT, _PORTS = 10000, 20000  # below the ports that Linux gives to outgoing connections
_PART = re.compile(r"([^\[\],]+)|\[([^\[\]]+)\]")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def in_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script and a shell of salloc see SLURM_NTASKS too, but are alone."""
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    return step.isdigit() and int(step) < _RESERVED


def started(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process and others."""
    return in_step(environ) and count(environ, "SLURM_NTASKS") > 1


def discover(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK and the variables that go with it. MASTER_ADDR and MASTER_PORT are kept where given.

    Raises:
        LaunchError: a variable of SLURM's is missing, WORLD_SIZE contradicts it, or the list of hosts cannot be read.
    """
    rank, world, local_rank = (number(environ, f"SLURM_{name}") for name in ("PROCID", "NTASKS", "LOCALID"))
    if environ.get("WORLD_SIZE") not in (None, "", str(world)):
        raise LaunchError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']} but SLURM_NTASKS is {world}. Unset WORLD_SIZE, or set RANK, "
            "LOCAL_RANK, MASTER_ADDR and MASTER_PORT as well"
        )
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    found = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local_rank}
    if tasks:
        node, counts = number(environ, "SLURM_NODEID"), tasks_per_node(tasks)
        if not 0 <= node < len(counts):
            raise LaunchError(f"SLURM_NODEID is {node} but SLURM_STEP_TASKS_PER_NODE={tasks} is of {len(counts)} hosts")
        found["LOCAL_WORLD_SIZE"] = counts[node]
    found["MASTER_ADDR"] = environ.get("MASTER_ADDR") or _first_host(environ)
    found["MASTER_PORT"] = environ.get("MASTER_PORT") or _port(environ)
    return {name: str(value) for name, value in found.items()}


def _port(environ: Mapping[str, str]) -> int:
    """A port from the step's number: the same on all hosts, another for the next job and the next step."""
    job, step = number(environ, "SLURM_JOB_ID"), environ.get("SLURM_STEP_ID") or environ["SLURM_STEPID"]
    return _FIRST_PORT + (31 * job + int(step)) % _PORTS


def _first_host(environ: Mapping[str, str]) -> str:
    names = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not names:
        raise LaunchError("SLURM_JOB_NODELIST is not set: set MASTER_ADDR to the host of rank 0")
    try:
        return expand_hosts(names)[0]
    except ValueError:
        return _ask_scontrol(names)


def _ask_scontrol(names: str) -> str:
    command = ["scontrol", "show", "hostnames", names]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise LaunchError(
            f"the first host of {names!r} cannot be told, and {' '.join(command)!r} failed ({error}): set MASTER_ADDR "
            "to the host of rank 0"
        ) from None


def expand_hosts(names: str) -> list[str]:
    """The hosts of a list such as "node[01-03,07],login1".

    Raises:
        ValueError: it is written in another way.
    """
    hosts = []
    for name in re.split(r",(?![^\[]*\])", names):
        parts = list(_PART.finditer(name))
        if not parts or "".join(part[0] for part in parts) != name:
            raise ValueError(f"{names!r} is not a list of hosts")
        choices = [[part[1]] if part[1] else _numbers(part[2]) for part in parts]
        hosts += ["".join(chosen) for chosen in itertools.product(*choices)]
    return hosts


def _numbers(ranges: str) -> list[str]:
    """["01", "02", "03", "07"] of "01-03,07"."""
    found = []
    for text in ranges.split(","):
        match = _RANGE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a range of numbers")
        first, last = match[1], match[2] or match[1]
        found += [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return found


def tasks_per_node(text: str) -> list[int]:
    """[2, 2, 1] of "2(x2),1"."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LaunchError(f"SLURM_TASKS_PER_NODE is {text!r}: expected numbers such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
