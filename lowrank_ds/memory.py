"""Counting the bytes of optimizer state and of weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ds import engines
from lowrank_ds.int8_tensor import Int8Weight


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of memory the optimizer's state holds on this rank (whole storages, each counted once).

    Works for any torch optimizer; for a DeepSpeed engine pass `engine.basic_optimizer`.
    """
    parts = (engines.local(t) for t in _tensors(dict(optimizer.state)))
    storages = {s._cdata: s.nbytes() for t in parts for s in [t.untyped_storage()]}
    return sum(storages.values())


def state_bytes_by_kind(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """`state_bytes` divided into {"moments", "projectors", "other"}, by the names of the state tensors.

    moments: exp_avg and what begins so (Adafactor's means, 8-bit codes and scales with them). projectors: bases. other:
    counters, limiter norms, sums of micro-batches, master weights, and what other optimizers call otherwise.
    """
    totals, seen = {"moments": 0, "projectors": 0, "other": 0}, set()
    for name, tensor in _named(dict(optimizer.state)):
        storage = engines.local(tensor).untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            totals[_kind(name)] += storage.nbytes()
    return totals


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(innermost string key, tensor) of all tensors in nested state."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _named(part, key if isinstance(key, str) else name)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _named(part, name)


def _kind(name: str) -> str:
    own = name.rpartition("::")[2]  # several parameters in one tensor of an engine: "name::exp_avg"
    if own.startswith(("exp_avg", "max_exp_avg", "momentum_buffer")):
        return "moments"
    return "projectors" if own.startswith("projector") else "other"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters' entries held on this rank, each parameter once; of int8 weights codes and scales."""
    return sum(_weight_bytes(p) for p in model.parameters())


def _weight_bytes(param: Tensor) -> int:
    held = engines.local(param)
    return held.held_bytes if isinstance(held, Int8Weight) else held.nbytes
