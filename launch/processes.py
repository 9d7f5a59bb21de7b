"""Who this process is among all of them."""

import datetime
import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist


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


def find_processes() -> Processes:
    """Read the launcher's environment; a process started by hand becomes a world of one."""
    if "RANK" not in os.environ:
        for variable in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if int(os.environ.get(variable, "1")) > 1:
                raise SystemExit(
                    f"{variable} is {os.environ[variable]} but RANK is not set: each process would train alone. "
                    "Start with deepspeed or torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"
                )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    return Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, device)


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
    """The `timeout` argument of init_process_group and deepspeed.init_distributed; nothing for their defaults."""
    return {} if seconds is None else {"timeout": datetime.timedelta(seconds=seconds)}
