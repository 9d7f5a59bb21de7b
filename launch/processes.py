"""Who this process is among all of them."""

import datetime
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lowrank_ds.launching import LaunchError, Place, find_place

START = 300  # seconds that processes wait for each other at least, until all have started


@dataclass(frozen=True)
class Processes:
    """This process among all of them, and its device."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def mean(self, value: torch.Tensor) -> float:
        """Mean over processes of a scalar tensor."""
        if self.world > 1:
            dist.all_reduce(value)
        return value.item() / self.world

    def gather(self, value: int) -> list[int]:
        """One number from each process, on every process."""
        numbers = [value]
        if self.world > 1:
            numbers = [None] * self.world
            dist.all_gather_object(numbers, value)
        return numbers

    def same(self, value: object) -> object:
        """The main process's value, on every process."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier()

    def meet(self, timeout: float | None) -> None:
        """Wait for all as long as at the start, since hosts build at different speeds; from then on `limit_waits`."""
        self.barrier()
        limit_waits(timeout)


def find_processes() -> Processes:
    """Ask the launcher's environment (torchrun, deepspeed, mpirun, srun); a process started by hand is alone."""
    try:
        place = find_place()
    except LaunchError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    if place.local_rank == 0 and place.world > 1:
        print(place, flush=True)
    if torch.cuda.is_available():
        return Processes(place.rank, place.world, place.local_rank, _gpu(place))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // (place.local_world or place.world)))
    return Processes(place.rank, place.world, place.local_rank, torch.device("cpu"))


def _gpu(place: Place) -> torch.device:
    """The GPU of this process, made its current one."""
    visible, chosen = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if place.local_rank >= visible:
        raise SystemExit(
            f"LOCAL_RANK is {place.local_rank} but only {visible} GPU(s) can be seen here ({place}; "
            f"CUDA_VISIBLE_DEVICES is {chosen!r}). Start at most {visible} processes on this host; where the scheduler "
            "shows each process its own GPU (srun --gpus-per-task), let it show all (--gpus-per-node)"
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def limit_waits(seconds: float | None) -> None:
    """Let no collective wait longer than this for another rank, in any group there is now. None: torch's own limits.

    Groups that an engine makes (DeepSpeed's, those of an HSDP mesh) have torch's default, 30 minutes for gloo and 10
    for NCCL, whatever `init_process_group` was told.
    """
    if seconds is None or not dist.is_initialized():
        return
    known = dist.distributed_c10d  # torch has no public name for either
    for group in list(known._world.pg_map):
        known._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def timeout_of(seconds: float | None) -> dict[str, datetime.timedelta]:
    """The `timeout` argument of init_process_group and deepspeed.init_distributed; nothing for their defaults.

    Hosts that start at different speeds (imports from a busy file system) must not lose each other before they have
    met: `Processes.meet` sets what was asked for once all have built the model.
    """
    return {} if seconds is None else {"timeout": datetime.timedelta(seconds=max(seconds, START))}
