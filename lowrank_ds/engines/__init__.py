"""Engines answer one question: for each tensor the optimizer is handed, which entries of which parameters is it?

An engine never guesses from a tensor's shape: it reads the engine's own records, or refuses by name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from lowrank_ds.engines import deepspeed, fsdp1, plain, zero3
from lowrank_ds.engines.accelerate import refuse_replacement
from lowrank_ds.engines.deepspeed import allow, is_partitioned, model, name_of
from lowrank_ds.engines.fsdp1 import check, record
from lowrank_ds.engines.placement import Placement
from lowrank_ds.engines.replicas import Averaged
from lowrank_ds.engines.replicas import attach as attach_averager
from lowrank_ds.engines.replicas import check as check_replicas
from lowrank_ds.engines.zero3 import expect as expect_layerwise
from lowrank_ds.engines.zero3 import wants as wants_layerwise
from lowrank_ds.layout import Layout

__all__ = [
    "Averaged",
    "BEFORE_REDUCTION",
    "NOT_REDUCED",
    "Placement",
    "Sharers",
    "allow",
    "attach",
    "attach_averager",
    "before_reduction",
    "check",
    "check_averaged",
    "check_replicas",
    "current_backward",
    "drop_grad",
    "expect_layerwise",
    "frees",
    "full_shape",
    "has_grad",
    "holders",
    "is_dtensor",
    "is_partitioned",
    "local",
    "local_grad",
    "locate",
    "model",
    "name_of",
    "on_gradient",
    "part",
    "record",
    "refuse_replacement",
    "sharers",
    "wants_layerwise",
    "version",
]


def full_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, however an engine keeps it now."""
    recorded = fsdp1.full_shape(param)
    return deepspeed.full_shape(param) if recorded is None else recorded


BEFORE_REDUCTION = (
    "step() was called inside a backward pass on whole, plain tensors in a job of several processes. Under DDP such a "
    "hook fires before gradients are averaged and at every micro-batch: the ranks' weights drift apart. Use "
    "replicate() (torch.distributed._composable.replicate_with_fsdp) or fully_shard, or step after the backward."
)


def current_backward() -> int:
    """A number for the backward pass we are in, -1 outside of any."""
    return getattr(torch._C, "_current_graph_task_id", lambda: -1)()


def before_reduction(whole: Iterable[Tensor]) -> bool:
    """Whether this is a step inside the backward of a job of several processes, on plain tensors held `whole`."""
    several = current_backward() != -1 and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return several and any(not is_dtensor(tensor) and not zero3.is_host(tensor) for tensor in whole)


NOT_REDUCED = (
    "layerwise: {name} is a whole, plain tensor in a job of several processes. Its gradient is complete on this "
    "process only: nothing has averaged it yet (DDP does so later, and does not free it), so updating now would let "
    "the processes drift apart. Use replicate() (torch.distributed._composable.replicate_with_fsdp), or fully_shard "
    "with a mesh of (world, 1): the same training, and gradients are freed."
)


def attach(model: Any, optimizer: Any, accumulation_steps: int) -> int:
    """Prepare a model for updates inside the backward. Answers how many micro-batches make a step.

    Raises:
        RuntimeError: an engine under which that is wrong or saves nothing: DDP, FSDP1, ZeRO-1/2; or settings of
            ZeRO-3 that cannot be honoured.
    """
    if hasattr(model, "zero_optimization_stage") or any(map(deepspeed.is_partitioned, model.parameters())):
        return zero3.attach(model, optimizer, accumulation_steps)
    for part in model.modules():
        kind = type(part).__name__
        if isinstance(part, torch.nn.parallel.DistributedDataParallel):
            raise RuntimeError(
                "layerwise: the model is wrapped in DistributedDataParallel, which averages gradients after the hooks "
                "and keeps them all in its buckets. Use replicate() (torch.distributed._composable."
                "replicate_with_fsdp), or fully_shard with a mesh of (world, 1): the same training, gradients freed."
            )
        if kind == "FullyShardedDataParallel":
            raise RuntimeError(
                "layerwise: the model is wrapped in FSDP1, which fires no hook with the reduced gradient. Use FSDP2: "
                "torch.distributed.fsdp.fully_shard."
            )
    return accumulation_steps


def on_gradient(host: Tensor, callback: Callable[[Tensor], None]) -> Any:
    """Call `callback(host)` whenever a backward has completed the gradient of `host`. Answers a removable handle."""
    return (zero3.on_gradient if zero3.is_host(host) else plain.on_gradient)(host, callback)


def has_grad(host: Tensor) -> bool:
    """Whether there is a gradient for `host`."""
    return zero3.has_grad(host) if zero3.is_host(host) else host.grad is not None


def drop_grad(host: Tensor) -> None:
    """Free the gradient of `host`."""
    if zero3.is_host(host):
        zero3.drop_grad(host)
    host.grad = None


def check_averaged(model: Any, hosts: Iterable[Tensor]) -> None:
    """Raise RuntimeError unless gradients are known to be averaged over the processes after each backward."""
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if not several or all(is_dtensor(host) for host in hosts):
        return
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError(
            "accumulate(): whole, plain tensors in a job of several processes; are their gradients averaged after each "
            "backward? Pass the DDP-wrapped model, accumulate(model), so that this can be checked."
        )
    if not model.require_backward_grad_sync:
        raise RuntimeError(
            "accumulate(): called inside DDP's no_sync(): the gradients of this micro-batch are not averaged. Leave "
            "no_sync() out, what is summed here is averaged at each micro-batch."
        )


class Sharers(NamedTuple):
    """The ranks that together hold one tensor's entries, each once: what a sum over the whole tensor goes over."""

    group: Any

    @property
    def shared(self) -> bool:
        """Whether there is more than this rank."""
        return self.group is not None


def sharers(host: Tensor) -> Sharers:
    """Who shares the entries of `host` (a tensor `on_gradient` works for)."""
    if zero3.is_host(host):
        return Sharers(host.ds_process_group)
    if not is_dtensor(host):
        return Sharers(None)
    from lowrank_ds.engines import dtensor

    return Sharers(dtensor.sharing_group(host))


def holders(host: Tensor | None, original: Tensor | None) -> Sharers:
    """Who shares the entries of a parameter, also where this rank holds nothing of it.

    Args:
        host: the tensor it is in, None where an engine keeps it with others. original: the parameter that the optimizer
            was built with, if it is alive.
    """
    if host is not None and (is_dtensor(host) or zero3.is_host(host)):
        return sharers(host)
    if original is None:
        return Sharers(None)
    if host is original and fsdp1.is_flattened(host):
        return Sharers(fsdp1.sharing_group(host))
    return Sharers(deepspeed.sharing_group(original))


def frees(host: Tensor, original: bool) -> bool:
    """Whether dropping the gradient of `host` frees it: FSDP1 and ZeRO keep and sum gradients of their own.

    original: whether `host` is a parameter that the optimizer was built with.
    """
    return is_dtensor(host) or (original and not fsdp1.is_flattened(host))


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor (there is none unless its module was imported)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The plain tensor with this rank's entries."""
    if zero3.is_host(tensor):
        return zero3.local(tensor)
    if not is_dtensor(tensor):
        return tensor
    from lowrank_ds.engines import dtensor

    return dtensor.local(tensor)


def local_grad(host: Tensor) -> Tensor:
    """The plain tensor with this rank's entries of the gradient."""
    if zero3.is_host(host):
        return zero3.local_grad(host)
    if not is_dtensor(host):
        return host.grad
    from lowrank_ds.engines import dtensor

    return dtensor.local_grad(host)


def locate(
    host: Tensor,
    hosts: Sequence[Tensor],
    members: Sequence[tuple[str, Tensor | None]],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Placement]:
    """Where the parameters of a group are in one of its tensors.

    Args:
        host: the tensor in question. hosts: all tensors that the group holds now.
        members: (name, tensor) the group was built with; None for a tensor that is gone.
        shapes: {name: full shape} of the members.

    Raises:
        RuntimeError: the tensor belongs to an engine this release does not support, naming the parameter.
    """
    own = next((name for name, param in members if param is host), None)
    partitioned = any(deepspeed.is_partitioned(param) for _, param in members if param is not None)
    if own is None and not partitioned and len(hosts) == len(members):  # an engine swapped the tensors one by one
        name = next(name for p, (name, _) in zip(hosts, members, strict=True) if p is host)
        own = name if shapes[name] == tuple(host.shape) else None
    if own is None:
        return deepspeed.locate(host, members)
    if zero3.is_host(host):
        return zero3.locate(host, own)
    if not is_dtensor(host):
        return fsdp1.locate(host, own) if fsdp1.is_flattened(host) else plain.locate(host, own)
    from lowrank_ds.engines import dtensor

    return dtensor.locate(host, own)


def part(name: str, param: Tensor) -> tuple[Layout, Tensor]:
    """(layout, entries held here (numel,)) of a frozen parameter, as a matrix (d0, rest).

    Raises:
        RuntimeError: an engine keeps the parameter where it cannot be read, naming it.
    """
    shape = full_shape(param)
    (at,) = locate(param, [param], [(name, param)], {name: shape})
    return at.layout(shape[0], math.prod(shape[1:])), local(param).detach().reshape(-1)


def version(param: Tensor) -> int:
    """How often what is held here of a frozen parameter was changed in place."""
    return zero3.version(param) if zero3.is_host(param) else local(param)._version
