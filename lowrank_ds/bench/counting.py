"""Count the collectives that our optimizers issue: they all go through `lowrank_ds.collectives`."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_KINDS = {
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
    "all_gather_single": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
}


class Counting:
    """torch.distributed with its collectives counted: put it in place of `collectives.dist`.

    calls, bytes: of all; kinds, bytes_of: of each kind. Bytes are those of the buffer that a rank ends up with.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.calls, self.bytes = module, 0, 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.bytes_of: collections.Counter[str] = collections.Counter()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.module, name)
        if name not in _KINDS:
            return attribute

        def counted(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            self.kinds[_KINDS[name]] += 1
            self.bytes_of[_KINDS[name]] += tensor.nbytes
            self.bytes += tensor.nbytes
            return attribute(tensor, *arguments, **keywords)

        return counted


@contextlib.contextmanager
def counting() -> Iterator[Counting]:
    """Count what our optimizers send while this is entered."""
    from lowrank_ds import collectives

    counter = collectives.dist = Counting(torch.distributed)
    try:
        yield counter
    finally:
        collectives.dist = torch.distributed
