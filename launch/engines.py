"""The ways to train: a DeepSpeed engine built from a ds_config, or plain torch under DDP, FSDP2, HSDP or FSDP1.

All offer `optimizer`, `watch`, `train_step(batches)`, `logits(batch)`, `weights(keep)` and `save(directory, state)`.
`module` has the parameters and Hugging Face's methods; `parameters` is how many weights the whole model has; `wrapped`
is what the engine made of the model, and `schedule` the learning rates, ours or those of a ds_config's section.
"""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import lowrank_ds
from launch.losses import Batch, forward_loss, model_inputs
from launch.model import parameter_count, whole_weights
from launch.optimizers import end_names, weight_groups
from launch.processes import Processes
from launch.progress import StopWatch


class Trainer(ABC):
    """What all engines share."""

    module: nn.Module
    wrapped: nn.Module
    schedule: torch.optim.lr_scheduler.LRScheduler
    optimizer: torch.optim.Optimizer

    def __init__(self, model: nn.Module, processes: Processes):
        self.parameters = parameter_count(model)
        self.rank, self.world, self.device = processes.rank, processes.world, processes.device
        self.watch = StopWatch(self.device)

    def lr(self) -> float:
        """Learning rate of the first parameter group for the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def state_bytes(self) -> int:
        """Bytes of optimizer state this process holds."""
        return lowrank_ds.state_bytes(self.optimizer)

    @abstractmethod
    def train_step(self, batches: list[Batch]) -> torch.Tensor:
        """One optimizer step; returns the mean loss of this process's micro-batches, on the device."""

    @abstractmethod
    def logits(self, batch: Batch) -> torch.Tensor:
        """Model output in evaluation mode."""

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """Whole weights on the CPU of the main process, {} elsewhere; call it on every process."""

    @abstractmethod
    def save(self, directory: Path, state: dict) -> None:
        """Write a checkpoint with everything needed to go on, and `state`; call it on every process."""


class DeepSpeedTrainer(Trainer):
    """A DeepSpeed engine; the ds_config names the optimizer, which `import lowrank_ds` has made known."""

    def __init__(self, model: nn.Module, config: dict, factor, embed_lr: float | None, processes: Processes):
        import deepspeed

        super().__init__(model, processes)
        # A "scheduler" section in the ds_config is the user's wish: then ours stays out.
        schedule = None if "scheduler" in config else lambda base: torch.optim.lr_scheduler.LambdaLR(base, factor)
        groups = weight_groups(model, embed_lr, end_names(model))
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=groups, config=config, lr_scheduler=schedule
        )
        self.module, self.optimizer = self.engine.module, self.engine.basic_optimizer
        self.wrapped, self.schedule = self.engine, self.engine.lr_scheduler

    def train_step(self, batches: list[Batch]) -> torch.Tensor:
        self.engine.train()
        total, start = 0.0, self.watch.mark()
        for batch in batches:
            loss = forward_loss(self.engine, batch, self.device)
            self.engine.backward(loss)
            total = total + loss.detach()
            middle = self.watch.mark()
            self.engine.step()  # does nothing before the last micro-batch
        self.watch.add(start, middle, self.watch.mark())
        return total / len(batches)

    def logits(self, batch: Batch) -> torch.Tensor:
        self.engine.eval()
        return self.engine(**model_inputs(batch, self.device)).logits

    def weights(self) -> dict[str, torch.Tensor]:
        return whole_weights(self.module, keep=self.rank == 0)

    def save(self, directory: Path, state: dict) -> None:
        """A DeepSpeed checkpoint; `state` comes back as client_state on load."""
        self.engine.save_checkpoint(str(directory), tag=f"step{state['step']}", client_state=state)


class TorchTrainer(Trainer):
    """The training loop of plain torch; a subclass says how its engine wraps, accumulates, clips and saves."""

    def __init__(
        self,
        model: nn.Module,
        optimizer_of: Callable[[nn.Module, set[str]], torch.optim.Optimizer],
        factor: Callable[[int], float],
        clip: float,
        processes: Processes,
        layerwise: dict | None = None,
        in_subspace: dict | None = None,
    ):
        """optimizer_of: makes the optimizer from the wrapped model and the names of its embeddings, head and norms.

        layerwise: update inside the backward, with these arguments for `lowrank_ds.layerwise`; `clip` must be 0 then.
        in_subspace: replicas exchange coordinates, with these for `lowrank_ds.reduce_in_subspace`; the same.
        """
        super().__init__(model, processes)
        self.clip, ends = clip, end_names(model)
        self.module, self.model = self.wrap(model)
        self.wrapped = self.model
        self.optimizer = optimizer_of(self.module, ends)
        self.in_backward = lowrank_ds.layerwise(self.model, self.optimizer, **layerwise) if layerwise else None
        self.replicas = None if in_subspace is None else self.reduce_in_subspace(in_subspace)
        self.two_passes = bool(layerwise) and layerwise.get("clip") == "two_pass"
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def reduce_in_subspace(self, arguments: dict):
        """The handle of `lowrank_ds.reduce_in_subspace`."""
        try:
            return lowrank_ds.reduce_in_subspace(self.model, self.optimizer, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SystemExit(f"--reduce-in-subspace: {error}") from None

    @abstractmethod
    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """(what holds the parameters to optimize and has Hugging Face's methods, what is called)."""

    @abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager:
        """Context of one micro-batch: gradients are summed over processes after the `last` one, once a step."""

    @abstractmethod
    def clip_gradients(self, norm: float) -> None:
        """Scale gradients down to this global norm."""

    def train_step(self, batches: list[Batch]) -> torch.Tensor:
        self.model.train()
        start = self.watch.mark()
        if self.two_passes:
            with self.in_backward.measuring():
                self.backward(batches)
        mean = self.backward(batches)
        if self.clip:
            self.clip_gradients(self.clip)
        middle = self.watch.mark()
        self.optimizer.step()
        self.watch.add(start, middle, self.watch.mark())
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return mean

    def backward(self, batches: list[Batch]) -> torch.Tensor:
        """Forward and backward of all micro-batches; returns their mean loss."""
        total = 0.0
        for number, batch in enumerate(batches, 1):
            # layer-wise: each micro-batch's gradients are summed over processes, to be kept sharded or compressed
            with self.accumulating(last=number == len(batches) or self.in_backward is not None):
                loss = forward_loss(self.model, batch, self.device)
                (loss / len(batches)).backward()
            total = total + loss.detach()
        return total / len(batches)

    def logits(self, batch: Batch) -> torch.Tensor:
        self.model.eval()
        return self.model(**model_inputs(batch, self.device)).logits

    def weights(self) -> dict[str, torch.Tensor]:
        # Weights that are on the CPU already FSDP1 would "offload" without a copy, and free: a crash (torch 2.13).
        options = StateDictOptions(full_state_dict=True, cpu_offload=self.device.type != "cpu")
        whole = get_model_state_dict(self.model, options=options)
        return whole if self.rank == 0 else {}


class DdpTrainer(TorchTrainer):
    """One process, or DistributedDataParallel: every process holds the model and all of the optimizer's state."""

    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        model = model.to(self.device)
        ids = [self.device] if self.device.type == "cuda" else None
        return model, nn.parallel.DistributedDataParallel(model, device_ids=ids) if self.world > 1 else model

    def accumulating(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last or self.world == 1 else self.model.no_sync()

    def clip_gradients(self, norm: float) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), norm)

    def save(self, directory: Path, state: dict) -> None:
        """See `save_distributed`."""
        save_distributed(directory, self, state)


class Fsdp2Trainer(TorchTrainer):
    """`fully_shard` of each decoder layer and of the rest; over a two-dimensional mesh that is HSDP."""

    def __init__(self, *arguments, mesh: DeviceMesh, bf16: bool):
        self.mesh, self.bf16 = mesh, bf16
        super().__init__(*arguments)

    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # Weights and their sums stay fp32; each layer is gathered and computed in bf16.
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.bf16 else MixedPrecisionPolicy()
        kinds = layer_classes(model)
        for layer in [part for part in model.modules() if isinstance(part, kinds)]:
            fully_shard(layer, mesh=self.mesh, mp_policy=precision)  # also moves it to the device
        fully_shard(model, mesh=self.mesh, mp_policy=precision)
        return model, model

    def accumulating(self, last: bool) -> AbstractContextManager:
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def clip_gradients(self, norm: float) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), norm)

    def save(self, directory: Path, state: dict) -> None:
        """See `save_distributed`."""
        save_distributed(directory, self, state)


class Fsdp1Trainer(TorchTrainer):
    """FullyShardedDataParallel, one unit a decoder layer; lowrank_ds needs `use_orig_params` and the wrapped model."""

    def __init__(self, *arguments, bf16: bool):
        self.bf16 = bf16
        super().__init__(*arguments)

    def wrap(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        wrapped = FullyShardedDataParallel(
            model,
            use_orig_params=True,
            device_id=self.device,
            auto_wrap_policy=ModuleWrapPolicy(set(layer_classes(model))),
            mixed_precision=MixedPrecision(torch.bfloat16, torch.float32) if self.bf16 else None,
        )
        return wrapped, wrapped  # it passes on what it does not know itself, such as save_pretrained

    def accumulating(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.model.no_sync()

    def clip_gradients(self, norm: float) -> None:
        self.model.clip_grad_norm_(norm)

    def save(self, directory: Path, state: dict) -> None:
        """Weights and schedule in one file, each process's optimizer state in its own.

        FSDP1 gathers only state that has its parameter's shape; these files resume at the same number of processes.
        """
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(self.optimizer.state_dict(), directory / f"optimizer_rank{self.rank}.pt")
        weights = self.weights()
        if self.rank == 0:
            content = {"model": weights, "schedule": self.schedule.state_dict(), **state}
            torch.save(content, directory / "model.pt")


def layer_classes(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """Classes of the decoder layers, the units of sharding: those transformers never splits over devices."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return tuple({type(part) for part in model.modules() if type(part).__name__ in names})


def hybrid_mesh(processes: Processes, copy: int | None) -> DeviceMesh:
    """Mesh of (copies, processes that share one); copy: how many these are, by default the processes of one host."""
    copy = copy or int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", 0))  # torchrun, deepspeed
    if not copy:
        raise SystemExit("--engine hsdp: LOCAL_WORLD_SIZE is not set; give --hsdp-shard N, the processes of one host")
    if processes.world % copy:
        raise SystemExit(f"--hsdp-shard {copy} does not divide the {processes.world} processes")
    names = ("replicate", "shard")
    return init_device_mesh(processes.device.type, (processes.world // copy, copy), mesh_dim_names=names)


def save_distributed(directory: Path, trainer: TorchTrainer, state: dict) -> None:
    """A checkpoint of torch.distributed.checkpoint: every process writes what it holds, any number may load it."""
    content = {
        "model": get_model_state_dict(trainer.model),
        "optimizer": get_optimizer_state_dict(trainer.model, trainer.optimizer),
        "schedule": trainer.schedule.state_dict(),
        "progress": state,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process, as was asked for
        dcp.save(content, checkpoint_id=directory, no_dist=not dist.is_initialized())
