"""Engines answer one question: for each tensor the optimizer is handed, which entries of which parameters is it?

An engine never guesses from a tensor's shape: it reads the engine's own records, or refuses by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lowrank_ds.engines import deepspeed, fsdp1, plain
from lowrank_ds.engines.deepspeed import allow, name_of
from lowrank_ds.engines.fsdp1 import check, record
from lowrank_ds.engines.placement import Placement

__all__ = ["Placement", "allow", "check", "full_shape", "locate", "name_of", "record"]


def full_shape(param: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, however an engine keeps it now."""
    recorded = fsdp1.full_shape(param)
    return deepspeed.full_shape(param) if recorded is None else recorded


def locate(host: Tensor, hosts: Sequence[Tensor], members: Sequence[tuple[str, Tensor | None]]) -> list[Placement]:
    """Where the parameters of a group are in one of its tensors.

    Args:
        host: the tensor in question. hosts: all tensors that the group holds now.
        members: (name, tensor) the group was built with; None for a tensor that is gone.

    Raises:
        RuntimeError: the tensor belongs to an engine this release does not support, naming the parameter.
    """
    own = next((name for name, param in members if param is host), None)
    partitioned = any(deepspeed.is_partitioned(param) for _, param in members if param is not None)
    if own is None and not partitioned and len(hosts) == len(members):  # an engine swapped the tensors one by one
        name, param = next(member for p, member in zip(hosts, members, strict=True) if p is host)
        own = name if param is not None and full_shape(param) == tuple(host.shape) else None
    if own is not None:
        return fsdp1.locate(host, own) if fsdp1.is_flattened(host) else plain.locate(host, own)
    return deepspeed.locate(host, members)
