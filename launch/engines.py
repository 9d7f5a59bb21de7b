"""The two ways to train: a DeepSpeed engine built from a ds_config, or plain torch (DDP for several processes).

Both offer `module`, `optimizer`, `watch`, `train_step(batches)`, `logits(ids)` and `save(directory, state)`.
This is the only file here that knows lowrank_ds.
"""

import math
import os
import socket
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import lowrank_ds  # makes the optimizers known by name to torch.optim and DeepSpeed
from launch.model import weight_groups
from launch.progress import StopWatch


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
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
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


def warmup_cosine(steps: int, warmup: int, floor: float):
    """Factor on the learning rate at a 0-based step: linear up to 1, then half a cosine down to `floor`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


class Trainer:
    """What both engines share."""

    optimizer: torch.optim.Optimizer

    def lr(self) -> float:
        """Learning rate of the first parameter group for the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def state_bytes(self) -> int:
        """Bytes of optimizer state this process holds."""
        return lowrank_ds.state_bytes(self.optimizer)


class DeepSpeedTrainer(Trainer):
    """A DeepSpeed engine; the ds_config names the optimizer, which `import lowrank_ds` has made known."""

    def __init__(self, model: nn.Module, config: dict, factor, embed_lr: float | None, processes: Processes):
        import deepspeed

        # A "scheduler" section in the ds_config is the user's wish: then ours stays out.
        schedule = None if "scheduler" in config else lambda base: torch.optim.lr_scheduler.LambdaLR(base, factor)
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=weight_groups(model, embed_lr), config=config, lr_scheduler=schedule
        )
        self.module, self.optimizer = self.engine.module, self.engine.basic_optimizer
        self.device = processes.device
        self.watch = StopWatch(self.device)

    def train_step(self, batches: list[torch.Tensor]) -> torch.Tensor:
        """One optimizer step; returns the mean loss of this process's micro-batches, on the device."""
        self.engine.train()
        total, start = 0.0, self.watch.mark()
        for ids in batches:
            ids = ids.to(self.device, non_blocking=True)
            loss = self.engine(input_ids=ids, labels=ids).loss
            self.engine.backward(loss)
            total = total + loss.detach()
            middle = self.watch.mark()
            self.engine.step()  # does nothing before the last micro-batch
        self.watch.add(start, middle, self.watch.mark())
        return total / len(batches)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Model output in evaluation mode."""
        self.engine.eval()
        return self.engine(input_ids=ids).logits

    def save(self, directory: Path, state: dict) -> None:
        """A DeepSpeed checkpoint; `state` comes back as client_state on load."""
        self.engine.save_checkpoint(str(directory), tag=f"step{state['step']}", client_state=state)


class TorchTrainer(Trainer):
    """Plain torch: one process, or DistributedDataParallel."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, factor, clip: float, processes: Processes):
        self.module, self.optimizer, self.clip = model, optimizer, clip
        self.rank, self.device = processes.rank, processes.device
        ids = [processes.local_rank] if self.device.type == "cuda" else None
        self.model = nn.parallel.DistributedDataParallel(model, device_ids=ids) if processes.world > 1 else model
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.watch = StopWatch(self.device)

    def train_step(self, batches: list[torch.Tensor]) -> torch.Tensor:
        """One optimizer step; returns the mean loss of this process's micro-batches, on the device."""
        self.model.train()
        total, start = 0.0, self.watch.mark()
        for number, ids in enumerate(batches, 1):
            ids = ids.to(self.device, non_blocking=True)
            # Gradients are summed over processes once a step, not once a micro-batch.
            wait = number < len(batches) and self.model is not self.module
            with self.model.no_sync() if wait else nullcontext():
                loss = self.model(input_ids=ids, labels=ids).loss
                (loss / len(batches)).backward()
            total = total + loss.detach()
        if self.clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        middle = self.watch.mark()
        self.optimizer.step()
        self.watch.add(start, middle, self.watch.mark())
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return total / len(batches)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Model output in evaluation mode."""
        self.module.eval()
        return self.module(input_ids=ids).logits

    def save(self, directory: Path, state: dict) -> None:
        """Weights and schedule from the main process, optimizer state from each process (it may differ)."""
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(self.optimizer.state_dict(), directory / f"optimizer_rank{self.rank}.pt")
        if self.rank == 0:
            content = {"model": self.module.state_dict(), "schedule": self.schedule.state_dict(), **state}
            torch.save(content, directory / "model.pt")


def torch_optimizer(name: str, model: nn.Module, overrides: dict, embed_lr: float | None) -> torch.optim.Optimizer:
    """Optimizer by class name: lowrank_ds's get their named, projected groups, torch's get plain ones."""
    if "lr" not in overrides:
        raise SystemExit(f"--optimizer {name} needs --lr")
    low_rank, options = getattr(lowrank_ds, name, None), dict(overrides)
    if low_rank is None:
        if not isinstance(getattr(torch.optim, name, None), type):
            raise SystemExit(f"--optimizer {name}: neither lowrank_ds nor torch.optim has it")
        return _construct(getattr(torch.optim, name), weight_groups(model, embed_lr), options)
    selection = {key: options.pop(key) for key in ("rank", "target_modules") if key in options}
    groups = lowrank_ds.param_groups(model, **selection)
    for group in groups:
        if embed_lr is not None and "rank" not in group:
            group["lr"] = embed_lr
    return _construct(low_rank, groups, options)


def _construct(kind: type, groups: list[dict], options: dict) -> torch.optim.Optimizer:
    try:
        return kind(groups, **options)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--optimizer {kind.__name__} refuses --optimizer-args: {error}") from None
