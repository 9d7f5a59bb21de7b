"""Counting optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


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
    storages = {s.data_ptr(): s.nbytes() for t in _tensors(dict(optimizer.state)) for s in [t.untyped_storage()]}
    return sum(storages.values())
