"""Which of all processes this is: taken from its launcher, checked, and put where torch and DeepSpeed look for it.

torchrun, the deepspeed launcher and people who export variables set RANK; mpirun and srun set variables of their own,
from which `mpi` and `slurm` make it. A process started by hand is alone. What contradicts itself is refused: a rank
that believes that it is alone trains alone, and ends with exit code 0.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from lowrank_ds.launching import mpi, slurm
from lowrank_ds.launching.errors import LaunchError, count, number

__all__ = ["LaunchError", "Place", "find_place"]


@dataclass(frozen=True)
class Place:
    """One process among all of them.

    rank, world: of the job. local_rank, local_world: on its host; local_world is None where the launcher does not say.
    address, port: where rank 0 is met; None where the launcher does not say. source: who said so.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int | None
    address: str | None
    port: int | None
    source: str

    def __str__(self) -> str:
        here = "?" if self.local_world is None else self.local_world
        return (
            f"rank {self.rank} of {self.world}, local rank {self.local_rank} of {here} on {socket.gethostname()}, "
            f"rank 0 at {self.address}:{self.port} ({self.source})"
        )


def find_place(environ: MutableMapping[str, str] = os.environ) -> Place:
    """The place of this process; collective under mpirun.

    Where RANK is not in `environ`, sets it, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Raises:
        LaunchError: the launcher's variables contradict each other or are incomplete, or mpi4py cannot be used.
    """
    source = "RANK and WORLD_SIZE of the environment"
    if "RANK" not in environ:
        if mpi.started(environ):
            found, source = mpi.discover(environ), "MPI, by mpi4py"
        elif slurm.started(environ):
            found, source = slurm.discover(environ), "SLURM's variables"
        else:
            found, source = _alone(environ), "started by hand"
        environ.update(found)
    return _checked(environ, source)


def _alone(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of a world of one; refused where something says that there are others."""
    if count(environ, "WORLD_SIZE") > 1:
        raise LaunchError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']} but RANK is not set. Set RANK, LOCAL_RANK, MASTER_ADDR and "
            "MASTER_PORT too, or unset WORLD_SIZE to use one process"
        )
    if count(environ, "SLURM_NTASKS") > 1 and not slurm.in_step(environ):
        raise LaunchError(
            f"SLURM_NTASKS is {environ['SLURM_NTASKS']} but this process was not started by srun, and RANK is not set. "
            "Put srun (or srun torchrun) before the command; for one process alone unset SLURM_NTASKS"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _checked(environ: Mapping[str, str], source: str) -> Place:
    """The place that the variables describe."""
    rank, world = number(environ, "RANK"), number(environ, "WORLD_SIZE")
    if not 0 <= rank < world:
        raise LaunchError(f"RANK is {rank} but WORLD_SIZE is {world}: ranks are 0 to WORLD_SIZE - 1")
    if world == 1:
        _check_alone(environ)
    local_world = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")  # torchrun's, deepspeed's
    local_world = None if local_world is None else number({"LOCAL_WORLD_SIZE": local_world}, "LOCAL_WORLD_SIZE")
    local_rank = number(environ, "LOCAL_RANK") if world > 1 else count(environ, "LOCAL_RANK", 0)
    if local_rank < 0 or (local_world is not None and local_rank >= local_world):
        raise LaunchError(f"LOCAL_RANK is {local_rank} but LOCAL_WORLD_SIZE (or LOCAL_SIZE) is {local_world}")
    if local_world is not None and local_world > world:
        raise LaunchError(f"LOCAL_WORLD_SIZE (or LOCAL_SIZE) is {local_world} but WORLD_SIZE is {world}")
    if world > 1 and not environ.get("MASTER_ADDR"):
        raise LaunchError("MASTER_ADDR is not set: set it to the host name or address of rank 0, the same on all ranks")
    port = number(environ, "MASTER_PORT") if world > 1 or environ.get("MASTER_PORT") else None
    if port is not None and not 0 <= port < 1 << 16:
        raise LaunchError(f"MASTER_PORT is {port}: ports are 1 to 65535")
    return Place(rank, world, local_rank, local_world, environ.get("MASTER_ADDR"), port, source)


def _check_alone(environ: Mapping[str, str]) -> None:
    """Refuse a world of one inside a job that started several processes: each would train alone, and say nothing."""
    for variable, started in (
        ("SLURM_NTASKS", slurm.in_step(environ)),
        ("OMPI_COMM_WORLD_SIZE", True),
        ("PMI_SIZE", not slurm.in_step(environ)),
    ):
        if started and count(environ, variable) > 1:
            raise LaunchError(
                f"WORLD_SIZE is 1 but {variable} is {environ[variable]}: each of these processes would train alone. "
                "Under srun or mpirun leave RANK and WORLD_SIZE unset, or start one torchrun per host with --nnodes "
                f"and --rdzv-endpoint; to train alone unset {variable}"
            )
