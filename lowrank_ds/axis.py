"""One axis of a matrix and how ranks divide it. Pure geometry: moves are asked for (`requests.py`).

A rank *touches* the part of an axis that its entries have a say in, and *keeps* (stores results and state for) a part
that is its own. Two moves connect them:

    complete   touched -> kept     partial sums are added up where they are kept       (a reduce-scatter)
    spread     kept -> touched     what is kept is brought to all who need it          (an all-gather)

An axis is *settled* when every rank keeps just what it touches: then nothing is spread, and `complete` only adds up
the lines that two ranks touch (rows that a flat cut splits).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from lowrank_ds.requests import Exchange, Gather, Steps

Span = tuple[int, int]  # [start, stop)


def common(a: Span, b: Span) -> Span:
    """The intersection of two intervals; stop <= start when empty."""
    return max(a[0], b[0]), min(a[1], b[1])


def within(part: Span, whole: Span) -> slice:
    """`part` counted from the beginning of `whole`."""
    return slice(part[0] - whole[0], part[1] - whole[0])


def part_of(x: Tensor, lines: slice) -> Tensor:
    """x[lines]; x itself where that is all of it (a view costs as much as a small product)."""
    return x if lines.start == 0 and lines.stop == x.shape[0] else x[lines]


@dataclass(frozen=True, eq=False)
class Axis:
    """`total` lines divided among ranks.

    Args:
        total: length of the axis.
        touched: the interval each rank works with (same on every rank). Empty intervals are (x, x).
        kept: the interval each rank stores; pass the same object as `touched` for a settled axis.
        rank: this process.
        owned: the kept lines, counted from the first kept one, that are counted here in sums over all lines.
        kind: how the kept parts lie: "rows" or "columns" (as the matrix itself is divided), "even", "whole" (each
            rank everything).
        along: the kind the axis would have if every rank kept what it touches.
        idle: ranks that take no part: they touch and keep nothing of any axis.
    """

    total: int
    touched: tuple[Span, ...]
    kept: tuple[Span, ...]
    rank: int
    owned: slice
    kind: str
    along: str = "whole"
    idle: frozenset[int] = frozenset()

    @cached_property
    def settled(self) -> bool:
        """Whether every rank keeps just what it touches."""
        return self.kept is self.touched

    @cached_property
    def everywhere(self) -> bool:
        """Whether every rank touches everything. The same answer on every rank."""
        return all(b - a == self.total for a, b in self.touched)

    @cached_property
    def undivided(self) -> bool:
        """Whether every rank that takes part touches everything. The same answer on every rank."""
        return all(b - a == self.total for rank, (a, b) in enumerate(self.touched) if rank not in self.idle)

    @cached_property
    def crossed(self) -> bool:
        """Whether some line is touched by a rank that another keeps it on. The same answer on every rank."""
        if not self.settled:
            return len(self.touched) > 1
        spans = sorted(span for span in self.touched if span[1] > span[0])
        return self.kind != "whole" and any(b[0] < a[1] for a, b in zip(spans, spans[1:], strict=False))

    @cached_property
    def window(self) -> slice:
        """The lines touched here."""
        return slice(*self.touched[self.rank])

    @cached_property
    def count(self) -> int:
        """Lines kept here."""
        start, stop = self.kept[self.rank]
        return stop - start

    def wide(self) -> Axis:
        """The same keepers, every rank touching everything."""
        everything = ((0, self.total),) * len(self.touched)
        return Axis(self.total, everything, self.kept, self.rank, self.owned, self.kind, self.along, self.idle)

    def replicated(self) -> Axis:
        """The same axis with every rank keeping all that it touches."""
        kind = "whole" if self.undivided else self.along
        return Axis(self.total, self.touched, self.touched, self.rank, self.owned, kind, self.along, self.idle)

    # -- moves --------------------------------------------------------------------------------------------------------
    @cached_property
    def outgoing(self) -> Mapping[int, slice]:
        """{other rank: the touched lines, counted from the first touched one, that it keeps}."""
        return self._shared(self.touched[self.rank], self.kept)

    @cached_property
    def incoming(self) -> Mapping[int, slice]:
        """{other rank: the kept lines, counted from the first kept one, that it touches}."""
        return self._shared(self.kept[self.rank], self.touched)

    def _shared(self, mine: Span, theirs: tuple[Span, ...]) -> dict[int, slice]:
        pairs = ((j, common(mine, span)) for j, span in enumerate(theirs) if j != self.rank)
        return {j: within(part, mine) for j, part in pairs if part[1] > part[0]}

    @cached_property
    def here(self) -> tuple[slice, slice]:
        """Lines that are touched and kept here, (counted from the first touched, from the first kept)."""
        touched, kept = self.touched[self.rank], self.kept[self.rank]
        part = common(touched, kept)
        return (within(part, touched), within(part, kept)) if part[1] > part[0] else (slice(0, 0), slice(0, 0))

    def complete(self, partial: Tensor, combine: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Steps:
        """Add up partial per-line values (touched, w) of all ranks. Answers (kept, w).

        Contributions are added in rank order, so ranks that keep the same line get bit-identical values.
        combine: what two contributions become; torch.maximum, say, of values >= 0.
        """
        if not self.crossed:
            return partial
        width = partial.shape[1]
        sends = {j: partial[lines] for j, lines in self.outgoing.items()}
        sizes = {j: (lines.stop - lines.start) * width for j, lines in self.incoming.items()}
        answer = yield Exchange(sends, sizes)
        pieces = {j: (lines, answer[j].view(-1, width)) for j, lines in self.incoming.items()}
        if self.settled:
            return self._combine_shared_lines(partial, pieces, combine)
        pieces[self.rank] = (self.here[1], partial[self.here[0]])
        total = partial.new_zeros(self.count, width)
        for j in sorted(pieces):
            lines, values = pieces[j]
            total[lines] = combine(total[lines], values)
        return total

    def _combine_shared_lines(self, partial: Tensor, pieces: dict[int, tuple[slice, Tensor]], combine) -> Tensor:
        """Replace the lines that others touch too by the sums, in place; all other lines stay where they are."""
        alone = {i: partial[i].clone() for lines, _ in pieces.values() for i in range(lines.start, lines.stop)}
        for i, mine in alone.items():
            parts = {
                j: values[i - lines.start] for j, (lines, values) in pieces.items() if lines.start <= i < lines.stop
            }
            parts[self.rank] = mine
            partial[i] = reduce(combine, (parts[j] for j in sorted(parts)))
        return partial

    def spread_requests(self, kept: Tensor) -> tuple[Gather, ...]:
        """What to ask for to bring (kept, ...) to all who touch it: nothing on a settled axis."""
        return () if self.settled else (Gather(kept, self),)

    def spread(self, kept: Tensor) -> Steps:
        """Bring (kept, ...) to all who touch it. Answers (touched, ...)."""
        if self.settled:
            return kept
        return (yield Gather(kept, self))[: self.window.stop - self.window.start]

    def deal(self, owner: int, full: Tensor | None, width: int, like: Tensor) -> Steps:
        """Rank `owner` deals the rows of `full` (total, width) to those who keep them. Answers (kept, width)."""
        start, stop = self.kept[self.rank]
        if self.rank == owner:
            yield Exchange({j: full[a:b] for j, (a, b) in enumerate(self.kept) if j != owner and b > a}, {})
            return full[start:stop].clone()
        answer = yield Exchange({}, {owner: (stop - start) * width} if stop > start else {})
        return answer[owner].view(-1, width) if stop > start else like.new_zeros(0, width)


@dataclass(frozen=True, eq=False)
class Stored:
    """The shape and type of one state tensor: (lines kept here, *rest), (*rest) without an axis, or the entries' own.

    entries: the state has one value per entry of the parameter that is held here, and its shape.
    code: how the numbers are coded (`lowbit.py`), None for numbers as they are.
    """

    axis: Axis | None = None
    rest: tuple[int, ...] = ()
    entries: bool = False
    dtype: torch.dtype = torch.float32
    code: Any = None

    @property
    def local(self) -> tuple[int, ...]:
        """The shape of this rank's part (not for `entries`)."""
        return self.rest if self.axis is None else (self.axis.count, *self.rest)

    @property
    def full(self) -> tuple[int, ...]:
        """The shape over all ranks (not for `entries`)."""
        return self.rest if self.axis is None else (self.axis.total, *self.rest)


SCALAR = Stored()
ENTRIES = Stored(entries=True)
