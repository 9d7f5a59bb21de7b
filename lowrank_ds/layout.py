"""How ranks share a matrix. Pure geometry: no tensor is moved here, moves are asked for (`requests.py`).

A matrix W (m x n) is a row-major string of m*n entries. Every sharding this package meets cuts that string:
rank i of the group holds the entries ``[cuts[i], cuts[i + 1])``. Cuts may fall inside a row::

    rank 0 |0 0 0 0 0 0 0|      m = 4, n = 7, cuts = (0, 10, 21, 28)
           |0 0 0|1 1 1 1|      rank 0 touches rows 0-1, rank 1 rows 1-2, rank 2 row 3
    rank 1 |1 1 1 1 1 1 1|      row 1 is *cut*: sums over its columns need ranks 0 and 1
    rank 2 |2 2 2 2 2 2 2|

Legend: m rows, n columns, l rows this rank touches, k holders (ranks with >= 1 entry), w any width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_ds.requests import Exchange, Steps, Sum


class Block(NamedTuple):
    """A rectangle of the matrix that is contiguous in a rank's entries.

    rows: rows of the matrix, counted from the first row the rank touches
    cols: columns of the matrix
    entries: where the rectangle lies in the rank's 1-D entries
    """

    rows: slice
    cols: slice
    entries: slice

    def of(self, entries: Tensor) -> Tensor:
        """The rectangle as a 2-D view of 1-D `entries`."""
        return entries[self.entries].view(self.rows.stop - self.rows.start, self.cols.stop - self.cols.start)


@dataclass(frozen=True)
class Layout:
    """Which row-major entries of an m x n matrix each rank of `group` holds.

    Args:
        shape: (m, n).
        cuts: world + 1 non-decreasing offsets; rank i holds entries [cuts[i], cuts[i + 1]). Known to every rank.
        rank: this process's rank in `group`.
        group: the process group, None when the matrix is whole.
    """

    shape: tuple[int, int]
    cuts: tuple[int, ...]
    rank: int = 0
    group: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        m, n = self.shape
        if self.cuts[0] != 0 or self.cuts[-1] != m * n or any(a > b for a, b in itertools.pairwise(self.cuts)):
            raise ValueError(f"cuts {self.cuts} do not partition the {m * n} entries of a {m}x{n} matrix")

    @classmethod
    def whole(cls, shape: tuple[int, int]) -> Layout:
        """The layout of a matrix that one process holds completely."""
        return cls(shape, (0, shape[0] * shape[1]))

    # -- ranges ---------------------------------------------------------------------------------------------------
    def span(self, rank: int) -> tuple[int, int]:
        """The entries [start, stop) that `rank` holds."""
        return self.cuts[rank], self.cuts[rank + 1]

    def touched(self, rank: int) -> range:
        """The rows of which `rank` holds at least one entry."""
        start, stop = self.span(rank)
        n = self.shape[1]
        return range(start // n, -(-stop // n)) if stop > start else range(0)

    @cached_property
    def numel(self) -> int:
        """Entries this rank holds."""
        return self.cuts[self.rank + 1] - self.cuts[self.rank]

    @cached_property
    def rows(self) -> int:
        """l, the number of rows this rank touches."""
        return len(self.touched(self.rank))

    @cached_property
    def owned_rows(self) -> slice:
        """The touched rows whose first entry is held here: each row of the matrix is owned by exactly one rank."""
        start, stop = self.span(self.rank)
        return slice(1 if stop > start and start % self.shape[1] else 0, self.rows)

    @cached_property
    def holders(self) -> tuple[int, ...]:
        """Ranks that hold at least one entry, in order."""
        return tuple(i for i, (a, b) in enumerate(itertools.pairwise(self.cuts)) if b > a)

    @cached_property
    def shared(self) -> bool:
        """Whether more than one rank holds entries."""
        return len(self.holders) > 1

    @cached_property
    def cut_inside_row(self) -> bool:
        """Whether some row is split between ranks. The same answer on every rank."""
        return any(cut % self.shape[1] for cut in self.cuts)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """This rank's entries as at most three rectangles: end of a row, whole rows, beginning of a row."""
        (start, stop), n, blocks = self.span(self.rank), self.shape[1], []
        position = start
        while position < stop:
            row, column = divmod(position, n)
            count = (stop - position) // n if column == 0 and stop - position >= n else 0
            end = position + count * n if count else min(stop, (row + 1) * n)
            first = row - start // n
            width = n if count else column + end - position
            blocks.append(
                Block(slice(first, first + max(count, 1)), slice(column, width), slice(position - start, end - start))
            )
            position = end
        return tuple(blocks)

    def chunk(self, total: int, rank: int | None = None) -> slice:
        """The part of `total` rows (of a basis, of coordinates) that `rank` stores: equal parts among holders."""
        i, k = self._places.get(self.rank if rank is None else rank), len(self.holders)
        return slice(0, 0) if i is None else slice(total * i // k, total * (i + 1) // k)

    @cached_property
    def _places(self) -> dict[int, int]:
        """{holder: its place among the holders}."""
        return {rank: i for i, rank in enumerate(self.holders)}

    @cached_property
    def held_by_all(self) -> bool:
        """Whether every rank of the group holds entries (FSDP, ZeRO-3)."""
        return len(self.holders) == len(self.cuts) - 1

    # -- dense rows -----------------------------------------------------------------------------------------------
    def pad(self, entries: Tensor) -> Tensor:
        """Entries (numel,) as (l, n) rows, zeros where another rank holds the entry. A view when no row is cut."""
        if not self.blocks or (len(self.blocks) == 1 and self.numel == self.rows * self.shape[1]):
            return entries.view(self.rows, self.shape[1])
        rows = entries.new_zeros(self.rows, self.shape[1])
        for block in self.blocks:
            rows[block.rows, block.cols] = block.of(entries)
        return rows

    def unpad(self, rows: Tensor) -> Tensor:
        """The inverse of `pad`: this rank's entries (numel,) out of (l, n) rows."""
        if not self.blocks or (len(self.blocks) == 1 and self.numel == rows.numel()):
            return rows.reshape(-1)
        return torch.cat([rows[block.rows, block.cols].reshape(-1) for block in self.blocks])

    # -- sums over the ranks that share a row, or all rows ----------------------------------------------------------
    @cached_property
    def cut_rows(self) -> dict[int, int]:
        """{other rank: the local index of the one row that it and this rank both touch}."""
        mine = self.touched(self.rank)
        return {
            j: row - mine.start
            for j in self.holders
            if j != self.rank and mine
            for row in range(max(mine.start, self.touched(j).start), min(mine.stop, self.touched(j).stop))
        }

    def complete_rows(self, partial: Tensor) -> Steps:
        """Sum per-row quantities (l, w) over the ranks that hold pieces of a row. Answers (l, w).

        Contributions are added in rank order, so all holders of a row get bit-identical values.
        """
        if not self.cut_inside_row:
            return partial
        width = partial.shape[1]
        answer = yield Exchange({j: partial[i] for j, i in self.cut_rows.items()}, dict.fromkeys(self.cut_rows, width))
        pieces: dict[int, dict[int, Tensor]] = {}
        for j, i in self.cut_rows.items():
            pieces.setdefault(i, {self.rank: partial[i].clone()})[j] = answer[j]
        for i, by_rank in pieces.items():
            partial[i] = sum(by_rank[j] for j in sorted(by_rank))
        return partial

    def reduce_chunks(self, partial: Tensor) -> Steps:
        """Sum (total, w) over the holders; each keeps its `chunk`. Answers (chunk, w)."""
        if not self.shared:
            return partial
        (total, width), mine = partial.shape, self.chunk(partial.shape[0])
        others = [j for j in self.holders if j != self.rank]
        holds = self.numel > 0
        sends = {j: partial[self.chunk(total, j)].reshape(-1) for j in others} if holds else {}
        size = (mine.stop - mine.start) * width
        answer = yield Exchange(sends, dict.fromkeys(others, size) if holds else {})
        if not holds:
            return partial[mine]
        answer[self.rank] = partial[mine].reshape(-1)
        return sum(answer[j] for j in self.holders).view(-1, width)

    def send_to(self, owner: int, entries: Tensor) -> Steps:
        """Bring the whole matrix to rank `owner`. Answers (m, n) there, None elsewhere."""
        if not self.shared:
            return entries.view(self.shape)
        receives = {j: self.cuts[j + 1] - self.cuts[j] for j in self.holders if j != owner}
        sends = {owner: entries} if self.rank != owner and self.numel else {}
        answer = yield Exchange(sends, receives if self.rank == owner else {})
        if self.rank != owner:
            return None
        answer[owner] = entries
        return torch.cat([answer[j] for j in self.holders]).view(self.shape)

    def deal_rows(self, owner: int, full: Tensor | None, rows: Mapping[int, slice], width: int, like: Tensor) -> Steps:
        """Rank `owner` deals `full[rows[j]]` to each rank j in `rows`. Answers this rank's (len, width) rows."""
        mine = rows.get(self.rank, slice(0, 0))
        if not self.shared:
            return full[mine].clone()
        sends = {j: full[s].reshape(-1) for j, s in rows.items() if j != owner} if self.rank == owner else {}
        size = (mine.stop - mine.start) * width
        answer = yield Exchange(sends, {owner: size} if self.rank != owner and self.rank in rows else {})
        if self.rank == owner:
            return full[mine].clone()
        return answer[owner].view(-1, width) if owner in answer else like.new_zeros(0, width)


@dataclass(frozen=True)
class Lines:
    """What a rule may know of the (lines x width) array it works on: which lines count, and how to total them.

    complete lines (`partial=False`): every line held here is whole, some are held by two ranks (cut rows);
    partial lines (`partial=True`): dense rows of this rank's entries, zeros elsewhere.
    """

    layout: Layout
    owned: slice
    total: int
    partial: bool = False

    def complete(self, per_line: Tensor) -> Steps:
        """A per-line quantity (lines,) that was summed over the entries held here, summed over all entries."""
        if not self.partial:
            return per_line
        return (yield from self.layout.complete_rows(per_line.unsqueeze(1))).squeeze(1)

    def square_sum(self, array: Tensor) -> Steps:
        """The sum of squares over the whole (total x width) array, a 0-d tensor."""
        mine = array if self.partial else array[self.owned]
        return (yield Sum(mine.square().sum()))

    def sum_over_lines(self, per_line: Tensor) -> Steps:
        """Sum a complete per-line quantity (lines, ...) over all lines, each counted once."""
        return (yield Sum(per_line[self.owned].sum(0)))
