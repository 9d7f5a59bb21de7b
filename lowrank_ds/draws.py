"""Random bases of a step, drawn for several matrices at once.

A basis takes some forty small kernels, and for a small matrix these take longer than the numbers. So the matrices of a
step are taken in groups of about a cache's size; the first that needs its basis draws for all of its group, and each
lets go of its own when it is done. A large matrix is a group by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lowrank_ds import linalg

_TOGETHER, _TOGETHER_CPU = 1 << 22, 1 << 18  # numbers of a group: 16 MiB; 1 MiB


class Draws:
    """The random bases of a group, all of one rank and on one device."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank, self.device, self.numbers = rank, device, 0
        self._wanted: list[tuple[tuple, slice]] = []
        self._drawn: dict[tuple, Tensor] | None = None

    def want(self, key: tuple, rows: slice) -> None:
        """These rows of the basis `key` will be taken."""
        self._wanted.append((key, rows))
        self.numbers += (rows.stop - rows.start) * self.rank

    def take(self, key: tuple) -> Tensor:
        """The rows (rows, rank) of a basis; once."""
        if self._drawn is None:
            keys = [key for key, _ in self._wanted]
            self._drawn = dict(zip(keys, linalg.gaussians(self._wanted, self.rank, self.device), strict=True))
        return self._drawn.pop(key)


def grouped(wanted: Iterable[tuple[tuple, slice, int, torch.device]]) -> dict[tuple, Draws]:
    """{key: the group that draws it} of bases (key, rows, rank, device), in the order in which they will be taken."""
    groups: dict[tuple, Draws] = {}
    open_groups: dict[tuple[int, torch.device], Draws] = {}
    for key, rows, rank, device in wanted:
        most = _TOGETHER_CPU if device.type == "cpu" else _TOGETHER
        found = open_groups.get((rank, device))
        if found is None or found.numbers + (rows.stop - rows.start) * rank > most:
            found = open_groups[rank, device] = Draws(rank, device)
        found.want(key, rows)
        groups[key] = found
    return groups
