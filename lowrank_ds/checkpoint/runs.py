"""Which entries of a tensor a piece of it holds. Pure geometry, the same for weights and state, cut in any way.

A tensor of any shape is its row-major string of entries. Everything an engine does to it is one `Run`::

    interval   |. . 2 3 4 5 6 . .|          start 2, count 1, length 5                  (ZeRO, FSDP1, lines of state)
    tile       |. .|2 3|. . .|              start 2, count 2, length 2, stride 7         (columns 2-3 of 2 rows of 7)
               |. .|9 10|. . .|
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from lowrank_ds.axis import common
from lowrank_ds.layout import Layout


class Run(NamedTuple):
    """`count` strings of `length` entries, `stride` apart, the first at `start`, in the row-major entries of a tensor.

    A piece holds them one after the other: its entry i * length + j is entry start + i * stride + j of the tensor.
    With several strings, length <= stride and no string crosses a multiple of `stride`: they are columns of a matrix
    with rows of `stride` entries.
    """

    start: int
    count: int
    length: int
    stride: int

    @property
    def size(self) -> int:
        """Entries in it."""
        return self.count * self.length

    @classmethod
    def interval(cls, start: int, stop: int) -> Run:
        """Entries [start, stop)."""
        return cls(start, 1, stop - start, stop - start)

    def singles(self) -> Iterator[Run]:
        """Its strings one by one."""
        return (
            Run.interval(self.start + i * self.stride, self.start + i * self.stride + self.length)
            for i in range(self.count)
        )


class Overlap(NamedTuple):
    """A rectangle that two pieces share: entry (i, j), i < rows, j < cols, is number start + i * stride + j in each."""

    source: int
    source_stride: int
    target: int
    target_stride: int
    rows: int
    cols: int

    @property
    def window(self) -> tuple[int, int]:
        """The interval of the source piece's own entries that the rectangle lies in."""
        return self.source, self.source + (self.rows - 1) * self.source_stride + self.cols

    def copy(self, fetched: Tensor, target: Tensor) -> None:
        """Write it. fetched: the source piece's entries `window`, 1-D. target: the target piece's entries, 1-D."""
        shape = (self.rows, self.cols)
        # strides of tensors that are themselves views count from their own beginning
        part = fetched.as_strided(shape, (self.source_stride, 1), fetched.storage_offset())
        target.as_strided(shape, (self.target_stride, 1), target.storage_offset() + self.target).copy_(part)


class _Rectangle(NamedTuple):
    """Rows and columns [.., ..) of a matrix; where its first entry is in the piece, and how far apart rows are."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    place: int
    stride: int


def overlaps(source: Run, target: Run) -> list[Overlap]:
    """What two pieces of the same tensor have in common."""
    if not source.size or not target.size:
        return []
    if source.count == 1 and target.count == 1:
        first, last = common((source.start, source.start + source.length), (target.start, target.start + target.length))
        size = last - first
        return [Overlap(first - source.start, size, first - target.start, size, 1, size)] if size > 0 else []
    if source.count > 1 and target.count > 1 and source.stride != target.stride:  # rows of another length: rare
        found = []
        for i, single in enumerate(source.singles()):
            found += [o._replace(source=o.source + i * source.length) for o in overlaps(single, target)]
        return found
    width = source.stride if source.count > 1 else target.stride
    pairs = ((a, b) for a in _rectangles(source, width) for b in _rectangles(target, width))
    return [shared for a, b in pairs if (shared := _intersection(a, b)) is not None]


def _rectangles(run: Run, width: int) -> Iterator[_Rectangle]:
    """A piece as rectangles of a matrix with `width` columns: one, or for an interval at most three."""
    row, column = divmod(run.start, width)
    if run.count > 1:
        yield _Rectangle((row, row + run.count), (column, column + run.length), 0, run.length)
        return
    place, stop = 0, run.start + run.length
    while place < run.length:
        row, column = divmod(run.start + place, width)
        rows = (stop - run.start - place) // width if column == 0 else 0
        size = rows * width if rows else min(width - column, run.length - place)
        cols = (0, width) if rows else (column, column + size)
        yield _Rectangle((row, row + max(rows, 1)), cols, place, width)
        place += size


def _intersection(a: _Rectangle, b: _Rectangle) -> Overlap | None:
    rows, cols = common(a.rows, b.rows), common(a.cols, b.cols)
    if rows[1] <= rows[0] or cols[1] <= cols[0]:
        return None
    places = [x.place + (rows[0] - x.rows[0]) * x.stride + cols[0] - x.cols[0] for x in (a, b)]
    return Overlap(places[0], a.stride, places[1], b.stride, rows[1] - rows[0], cols[1] - cols[0])


def of_layout(layout: Layout, first: int) -> list[Run]:
    """The entries of an m x n matrix that this rank holds, in the order it holds them; `first`: of the matrix."""
    if not layout.numel:
        return []
    if len(layout.blocks) > 1 or layout.dense and layout.cols == layout.shape[1]:
        start, _ = layout.position(layout.blocks[0])
        return [Run.interval(first + start, first + start + layout.numel)]
    (block,) = layout.blocks
    start, width = layout.position(block)
    rows, cols = block.rows.stop - block.rows.start, block.cols.stop - block.cols.start
    if rows == 1:
        return [Run.interval(first + start, first + start + cols)]
    return [Run(first + start, rows, cols, width)]


class Taken:
    """Which entries of one tensor are already spoken for, while pieces of it are dealt to those who write them."""

    def __init__(self) -> None:
        self.size = 0
        self._intervals: list[tuple[int, int]] = []
        self._tiles: set[Run] = set()

    def claim(self, run: Run) -> list[Run]:
        """The part of `run` that nobody has claimed yet, which is now: replicas and lines kept twice drop out."""
        if run.count > 1:
            new = [] if run in self._tiles else [run]
            self._tiles.add(run)
        else:
            new = [Run.interval(a, b) for a, b in _without((run.start, run.start + run.length), self._intervals)]
            self._intervals += [(r.start, r.start + r.length) for r in new]
        self.size += sum(r.size for r in new)
        return new


def _without(span: tuple[int, int], taken: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    left = [span] if span[1] > span[0] else []
    for a, b in taken:
        left = [part for c, d in left for part in ((c, min(d, a)), (max(c, b), d)) if part[1] > part[0]]
    return left
