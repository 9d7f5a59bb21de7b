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


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters' entries held on this rank, each parameter once; of int8 weights codes and scales."""
    return sum(_weight_bytes(p) for p in model.parameters())


def _weight_bytes(param: Tensor) -> int:
    held = engines.local(param)
    return held.held_bytes if isinstance(held, Int8Weight) else held.nbytes
