"""Engines answer one question: for each tensor the optimizer is handed, which entries of which parameters is it?

An engine never guesses from a tensor's shape: it reads the engine's own records, or refuses by name.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed
from torch import Tensor

from lowrank_ds.engines import deepspeed, fsdp1, plain
from lowrank_ds.engines.accelerate import refuse_replacement
from lowrank_ds.engines.deepspeed import allow, modules, name_of
from lowrank_ds.engines.fsdp1 import check, record
from lowrank_ds.engines.placement import Placement
from lowrank_ds.layout import Layout

__all__ = [
    "BEFORE_REDUCTION",
    "Placement",
    "allow",
    "before_reduction",
    "check",
    "full_shape",
    "is_dtensor",
    "local",
    "local_grad",
    "locate",
    "modules",
    "name_of",
    "part",
    "record",
    "refuse_replacement",
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


def before_reduction(whole: Iterable[Tensor]) -> bool:
    """Whether this is a step inside the backward of a job of several processes, on plain tensors held `whole`."""
    inside = getattr(torch._C, "_current_graph_task_id", lambda: -1)() != -1
    several = inside and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return several and any(not is_dtensor(tensor) for tensor in whole)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor (there is none unless its module was imported)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The plain tensor with this rank's entries."""
    if not is_dtensor(tensor):
        return tensor
    from lowrank_ds.engines import dtensor

    return dtensor.local(tensor)


def local_grad(host: Tensor) -> Tensor:
    """The plain tensor with this rank's entries of the gradient."""
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
    if not is_dtensor(host):
        return fsdp1.locate(host, own) if fsdp1.is_flattened(host) else plain.locate(host, own)
    from lowrank_ds.engines import dtensor

    return dtensor.locate(host, own)


def part(name: str, param: Tensor) -> tuple[Layout, Tensor, int]:
    """(layout, entries held here (numel,), version) of a frozen parameter, as a matrix (d0, rest).

    version: counts in-place changes of what is held here.

    Raises:
        RuntimeError: an engine keeps the parameter where it cannot be read, naming it.
    """
    shape = full_shape(param)
    if deepspeed.is_sharded(param):
        at, held = deepspeed.frozen(name, param)
    else:
        (at,), held = locate(param, [param], [(name, param)], {name: shape}), local(param)
    return at.layout(shape[0], math.prod(shape[1:])), held.detach().reshape(-1), held._version
