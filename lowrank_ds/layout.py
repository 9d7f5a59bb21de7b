"""How ranks share a matrix. Pure geometry: no tensor is moved here, moves are asked for (`requests.py`).

Every engine we meet does one of two things to a matrix W (m x n):

`Flat`   it cuts the row-major string of entries; cuts may fall inside a row (ZeRO-1/2/3, FSDP1)::

    rank 0 |0 0 0 0 0 0 0|      m = 4, n = 7, cuts = (0, 10, 21, 28)
           |0 0 0|1 1 1 1|      rank 0 touches rows 0-1, rank 1 rows 1-2, rank 2 row 3
    rank 1 |1 1 1 1 1 1 1|      row 1 is *cut*: sums over its columns need ranks 0 and 1
    rank 2 |2 2 2 2 2 2 2|

`Tiled`  it gives each rank a rectangle, in any order (FSDP2, tensor parallelism, both)::

    |0 0 0|1 1 1|               rows over one mesh dimension, columns over another;
    |2 2 2|3 3 3|               with one of them alone: blocks of rows, or of columns

Legend: m rows, n columns, l rows this rank touches, w columns it touches, k holders (ranks with >= 1 entry).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_ds.axis import Axis, Span, part_of
from lowrank_ds.requests import Exchange, Steps

_COPY, _COPY_CPU = 1 << 24, 1 << 20  # entries of an fp32 copy: 64 MiB, 4 MiB (fewer make the products slow)


class Block(NamedTuple):
    """A rectangle of the matrix that is contiguous in a rank's entries.

    rows, cols: counted from the first row and column the rank touches
    entries: where the rectangle lies in the rank's 1-D entries
    """

    rows: slice
    cols: slice
    entries: slice

    def of(self, entries: Tensor) -> Tensor:
        """The rectangle as a 2-D view of 1-D `entries`."""
        held = part_of(entries, self.entries)
        return held.view(self.rows.stop - self.rows.start, self.cols.stop - self.cols.start)

    def split(self, size: int) -> Iterator[Block]:
        """Blocks of whole rows of this one, with at most `size` entries (or one row)."""
        width = self.cols.stop - self.cols.start
        step = max(1, size // max(1, width))
        for first in range(self.rows.start, self.rows.stop, step):
            last = min(first + step, self.rows.stop)
            start = self.entries.start + (first - self.rows.start) * width
            yield Block(slice(first, last), self.cols, slice(start, start + (last - first) * width))


@dataclass(frozen=True, eq=False)
class Mirror:
    """The ranks that hold the very same entries: replicas, on which everything but an exact SVD is computed again.

    rank: which replica this process belongs to, the same for all ranks of a layout's group.
    members: the rank in `group` of each replica's process.
    """

    group: Any
    rank: int
    members: tuple[int, ...]
    shared = True

    @property
    def world(self) -> int:
        """How many replicas there are."""
        return len(self.members)

    def even(self, total: int) -> Axis:
        """An axis of `total` that every process of `group` needs whole and keeps an even part of."""
        return _even_axis(total, ((0, total),) * self.world, torch_chunks(total, self.world), self.members[self.rank])


class Layout:
    """Which entries of an m x n matrix each rank of `group` holds.

    Attributes:
        shape: (m, n). rank: this process in `group`. group: the process group, None when the matrix is whole.
        world: ranks in the group. numel: entries held here. shared: whether more than one rank takes part.
        blocks: this rank's entries as rectangles. takers: how many ranks take part (keep even parts of things).
        owned_rows, owned_cols: touched rows and columns, counted from the first, that are counted here.
        rows_axis, cols_axis: how the ranks divide the matrix (`Axis`).
        mirror: the replicas of what is held here, where the engine knows of some.
    """

    shape: tuple[int, int]
    rank: int
    group: Any
    world: int
    numel: int
    shared: bool
    blocks: tuple[Block, ...]
    takers: int
    owned_rows: slice
    owned_cols: slice
    rows_axis: Axis
    cols_axis: Axis
    mirror: Mirror | None

    def even(self, total: int) -> Axis:
        """An axis of `total` that every rank that takes part needs whole and keeps an even part of."""
        known = self.__dict__.setdefault("_even_axes", {})  # asked for at every step
        if total not in known:
            known[total] = self._even(total)
        return known[total]

    def _even(self, total: int) -> Axis:
        raise NotImplementedError

    def count_of(self, rank: int) -> int:
        """Entries that `rank` holds."""
        raise NotImplementedError

    def assemble(self, pieces: Mapping[int, Tensor]) -> Tensor:
        """The matrix (m, n) from the entries of every rank that holds some."""
        raise NotImplementedError

    @cached_property
    def rows(self) -> int:
        """l, the rows this rank touches."""
        return self.rows_axis.window.stop - self.rows_axis.window.start

    @cached_property
    def cols(self) -> int:
        """w, the columns this rank touches."""
        return self.cols_axis.window.stop - self.cols_axis.window.start

    def pieces(self, size: int) -> Iterator[Block]:
        """The blocks of this rank's entries, cut to at most `size` entries (or one row)."""
        return itertools.chain.from_iterable(block.split(size) for block in self.blocks)

    def fp32_pieces(self, entries: Tensor) -> Iterable[Block]:
        """Blocks to take products with, cut so that fp32 copies of bf16 entries stay small; whole if they are fp32."""
        return self.blocks if entries.dtype == torch.float32 else self.narrow_pieces(entries.device)

    def narrow_pieces(self, device: torch.device) -> Iterator[Block]:
        """Blocks to take products with, cut so that fp32 copies stay small."""
        return self.pieces(_COPY_CPU if device.type == "cpu" else _COPY)

    @cached_property
    def dense(self) -> bool:
        """Whether this rank's entries are all of the rows and columns it touches."""
        return self.numel == self.rows * self.cols

    def pad(self, entries: Tensor) -> Tensor:
        """Entries (numel,) as (l, w) rows, zeros where another rank holds the entry. A view when `dense`."""
        if self.dense:
            return entries.view(self.rows, self.cols)
        rows = entries.new_zeros(self.rows, self.cols)
        for block in self.blocks:
            rows[block.rows, block.cols] = block.of(entries)
        return rows

    def unpad(self, rows: Tensor) -> Tensor:
        """The inverse of `pad`: this rank's entries (numel,) out of (l, w) rows."""
        if self.dense:
            return rows.reshape(-1)
        return torch.cat([rows[block.rows, block.cols].reshape(-1) for block in self.blocks])

    def position(self, block: Block) -> tuple[int, int]:
        """(place of the block's first entry in the row-major matrix, entries between the starts of its rows)."""
        n = self.shape[1]
        first = (self.rows_axis.window.start + block.rows.start) * n + self.cols_axis.window.start + block.cols.start
        return first, n

    def send_to_all(self, entries: Tensor) -> Steps:
        """Bring the whole matrix (m, n) to every rank, also to those that hold nothing. entries (numel,)."""
        others = [j for j in range(self.world) if j != self.rank]
        sends = {j: entries for j in others} if self.numel else {}
        answer = yield Exchange(sends, {j: self.count_of(j) for j in others if self.count_of(j)})
        return self.assemble({**answer, self.rank: entries} if self.numel else answer)

    def send_to(self, owner: int, entries: Tensor) -> Steps:
        """Bring the whole matrix to rank `owner`. Answers (m, n) there, None elsewhere."""
        if not self.shared:
            return entries.view(self.shape)
        if self.rank != owner:
            yield Exchange({owner: entries} if self.numel else {}, {})
            return None
        sizes = {j: self.count_of(j) for j in range(self.world) if j != owner and self.count_of(j)}
        answer = dict((yield Exchange({}, sizes)))
        return self.assemble(answer | ({owner: entries} if self.numel else {}))


@dataclass(frozen=True, eq=False)
class Flat(Layout):
    """Cuts of the row-major entries: rank i holds entries [cuts[i], cuts[i + 1]).

    Args:
        cuts: world + 1 non-decreasing offsets, known to every rank.

    Only the ranks that hold entries take part; a rank that holds none keeps nothing.
    """

    shape: tuple[int, int]
    cuts: tuple[int, ...]
    rank: int = 0
    group: Any = None
    mirror: Mirror | None = None

    def __post_init__(self) -> None:
        m, n = self.shape
        if self.cuts[0] != 0 or self.cuts[-1] != m * n or any(a > b for a, b in itertools.pairwise(self.cuts)):
            raise ValueError(f"cuts {self.cuts} do not partition the {m * n} entries of a {m}x{n} matrix")

    @classmethod
    def whole(cls, shape: tuple[int, int], mirror: Mirror | None = None) -> Flat:
        """The layout of a matrix that one process holds completely."""
        return cls(shape, (0, shape[0] * shape[1]), mirror=mirror)

    def span(self, rank: int) -> Span:
        """The entries [start, stop) that `rank` holds."""
        return self.cuts[rank], self.cuts[rank + 1]

    def count_of(self, rank: int) -> int:
        """Entries that `rank` holds."""
        return self.cuts[rank + 1] - self.cuts[rank]

    def assemble(self, pieces: Mapping[int, Tensor]) -> Tensor:
        """The matrix (m, n) from the entries of every rank that holds some."""
        return torch.cat([pieces[j] for j in sorted(pieces)]).view(self.shape)

    @cached_property
    def world(self) -> int:
        """Ranks in the group."""
        return len(self.cuts) - 1

    @cached_property
    def numel(self) -> int:
        """Entries held here."""
        return self.count_of(self.rank)

    @cached_property
    def holders(self) -> tuple[int, ...]:
        """Ranks that hold at least one entry, in order."""
        return tuple(i for i, (a, b) in enumerate(itertools.pairwise(self.cuts)) if b > a)

    @cached_property
    def takers(self) -> int:
        """Ranks that take part: the holders."""
        return len(self.holders)

    @cached_property
    def shared(self) -> bool:
        """Whether more than one rank holds entries."""
        return len(self.holders) > 1

    @cached_property
    def cut_inside_row(self) -> bool:
        """Whether some row is split between ranks. The same answer on every rank."""
        return any(cut % self.shape[1] for cut in self.cuts)

    @cached_property
    def owned_rows(self) -> slice:
        """The touched rows whose first entry is held here: each row of the matrix is owned by exactly one rank."""
        return self.rows_axis.owned

    @cached_property
    def owned_cols(self) -> slice:
        """Every toucher touches all columns; the first holder counts them."""
        return slice(0, self.shape[1] if self.holders and self.rank == self.holders[0] else 0)

    @cached_property
    def rows_axis(self) -> Axis:
        """Settled: a rank keeps the rows it touches; a cut row is kept by each rank with a piece of it."""
        n = self.shape[1]
        spans = itertools.pairwise(self.cuts)
        touched = tuple((a // n, -(-b // n)) if b > a else (0, 0) for a, b in spans)
        start, stop = self.span(self.rank)
        owned = slice(1 if stop > start and start % n else 0, touched[self.rank][1] - touched[self.rank][0])
        return Axis(self.shape[0], touched, touched, self.rank, owned, "rows", idle=self._idle)

    @cached_property
    def cols_axis(self) -> Axis:
        """Every holder needs all columns and keeps an even part."""
        return self.even(self.shape[1])

    def _even(self, total: int) -> Axis:
        k, kept = len(self.holders), [(0, 0)] * self.world
        for i, rank in enumerate(self.holders):
            kept[rank] = total * i // k, total * (i + 1) // k
        touched = tuple((0, total) if self.count_of(j) else (0, 0) for j in range(self.world))
        return _even_axis(total, touched, tuple(kept), self.rank, idle=self._idle)

    @cached_property
    def _idle(self) -> frozenset[int]:
        return frozenset(range(self.world)) - frozenset(self.holders)

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


def torch_chunks(total: int, world: int) -> tuple[Span, ...]:
    """torch.chunk's intervals: ceil(total / world) each, the last ones smaller or empty (DTensor's Shard)."""
    size = -(-total // world)
    return tuple((min(i * size, total), min((i + 1) * size, total)) for i in range(world))


@dataclass(frozen=True, eq=False)
class Tiled(Layout):
    """A rectangle for each rank.

    Args:
        tiles: (rows, columns) that each rank touches; an empty rectangle still names the other axis' interval.
        deal: total -> the even parts of an axis that the ranks keep (the engine's rule, for resharding).

    Every rank of the group takes part, also with an empty rectangle.
    """

    shape: tuple[int, int]
    tiles: tuple[tuple[Span, Span], ...]
    rank: int = 0
    group: Any = None
    deal: Callable[[int], tuple[Span, ...]] | None = field(default=None, repr=False)
    mirror: Mirror | None = None

    def __post_init__(self) -> None:
        m, n = self.shape
        covered = sum((a[1] - a[0]) * (b[1] - b[0]) for a, b in self.tiles)
        if covered != m * n or any(_overlap({tile[i] for tile in self.tiles}) for i in (0, 1)):
            raise ValueError(f"tiles {self.tiles} do not partition a {m}x{n} matrix")

    def count_of(self, rank: int) -> int:
        """Entries that `rank` holds."""
        rows, cols = self.tiles[rank]
        return (rows[1] - rows[0]) * (cols[1] - cols[0])

    def assemble(self, pieces: Mapping[int, Tensor]) -> Tensor:
        """The matrix (m, n) from the entries of every rank that holds some."""
        matrix = next(iter(pieces.values())).new_empty(self.shape)
        for j, entries in pieces.items():
            (top, bottom), (left, right) = self.tiles[j]
            matrix[top:bottom, left:right] = entries.view(bottom - top, right - left)
        return matrix

    @cached_property
    def world(self) -> int:
        """Ranks in the group."""
        return len(self.tiles)

    @cached_property
    def takers(self) -> int:
        """Ranks that take part: all."""
        return self.world

    @cached_property
    def shared(self) -> bool:
        """Whether there are several ranks."""
        return self.world > 1

    @cached_property
    def numel(self) -> int:
        """Entries held here."""
        return self.count_of(self.rank)

    @cached_property
    def owned_rows(self) -> slice:
        """A row is counted by the rank with its first column."""
        return slice(0, self.rows if self.cols_axis.window.start == 0 and self.numel else 0)

    @cached_property
    def owned_cols(self) -> slice:
        """A column is counted by the rank with its first row."""
        return slice(0, self.cols if self.rows_axis.window.start == 0 and self.numel else 0)

    @cached_property
    def rows_axis(self) -> Axis:
        """Settled unless columns are divided too: then a row's sum is kept by one of the ranks that touch it."""
        return self._axis(0, "rows")

    @cached_property
    def cols_axis(self) -> Axis:
        """Settled when only columns are divided; otherwise every rank keeps an even part."""
        return self._axis(1, "columns")

    def _axis(self, which: int, kind: str) -> Axis:
        touched = tuple(tile[which] for tile in self.tiles)
        other = self.shape[1 - which]
        if all(b - a == other for a, b in (tile[1 - which] for tile in self.tiles)):
            start, stop = touched[self.rank]
            return Axis(self.shape[which], touched, touched, self.rank, slice(0, stop - start), kind)
        return _even_axis(self.shape[which], touched, self._deal(self.shape[which]), self.rank, kind)

    def _even(self, total: int) -> Axis:
        return _even_axis(total, ((0, total),) * self.world, self._deal(total), self.rank)

    def _deal(self, total: int) -> tuple[Span, ...]:
        return self.deal(total) if self.deal else torch_chunks(total, self.world)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The rectangle, if it is not empty."""
        return (Block(slice(0, self.rows), slice(0, self.cols), slice(0, self.numel)),) if self.numel else ()


def _even_axis(
    total: int,
    touched: tuple[Span, ...],
    kept: tuple[Span, ...],
    rank: int,
    along: str = "whole",
    idle: frozenset[int] = frozenset(),
) -> Axis:
    return Axis(total, touched, kept, rank, slice(0, kept[rank][1] - kept[rank][0]), "even", along, idle)


def _overlap(spans: set[Span]) -> bool:
    """Whether two different intervals share a line."""
    filled = sorted(span for span in spans if span[1] > span[0])
    return any(b[0] < a[1] for a, b in itertools.pairwise(filled))
