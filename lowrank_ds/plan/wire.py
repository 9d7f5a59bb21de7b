"""In place of `torch.distributed` for one planned rank: every collective is answered at once, with what has the right
size. `bench.counting` counts them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed

from lowrank_ds import collectives
from lowrank_ds.bench.counting import Counting


@dataclass(frozen=True)
class Group:
    """A process group that exists on paper: its size, this rank in it, and a name."""

    size: int
    rank: int
    name: str = "planned"


class Arrived:
    """The handle of a collective that is over."""

    def wait(self) -> None:
        """Nothing to wait for."""


class Wire:
    """The part of `torch.distributed` that a step uses. Tensors have no contents, so nothing is moved."""

    DistError = torch.distributed.DistError

    def __init__(self, world: int, rank: int) -> None:
        self._world, self._rank = world, rank

    def is_initialized(self) -> bool:
        """Whether there are several ranks."""
        return self._world > 1

    def get_world_size(self, group: Any = None) -> int:
        """Ranks in a planned group."""
        return self._world if group is None else group.size

    def get_rank(self, group: Any = None) -> int:
        """The planned rank."""
        return self._rank if group is None else group.rank

    def get_backend(self, group: Any = None) -> str:
        """Not NCCL: tensors stay where they are."""
        return "planned"

    def get_process_group_ranks(self, group: Any) -> list[int]:
        """The ranks of a planned group, for messages."""
        return list(range(group.size))

    def _answer(self, *tensors: Any, **keywords: Any) -> Arrived:
        return Arrived()

    all_reduce = all_gather_single = all_gather_into_tensor = all_to_all_single = _answer
    reduce_scatter_single = reduce_scatter_tensor = _answer


@contextlib.contextmanager
def planned(world: int, rank: int) -> Iterator[Counting]:
    """Steps inside talk to a `Wire`. Yields what counts their collectives."""
    counter = Counting(Wire(world, rank))
    before, collectives.dist = collectives.dist, counter
    try:
        yield counter
    finally:
        collectives.dist = before
