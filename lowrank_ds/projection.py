"""Projections: G to coordinates and directions back to W, on any layout, from either side.

One word makes left and right the same: a *line* is a row of G when columns are compressed (right, R = G Q) and a
column of G when rows are (left, R = G^T P). Coordinates, moments and norms are always (lines x r) arrays.

    side    lines (state kept here)     basis kept here                    to complete the lines
    right   the rows this rank touches  a chunk of Q's n rows, gathered    rows cut between ranks
    left    a chunk of the n columns    the rows of P that it touches      all partial sums, reduced in chunks
    full    a chunk of r columns of GB  both of the above                  the same as left

Legend: l touched rows, m x n matrix, r rank, B basis (d x r).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ds import linalg
from lowrank_ds.layout import Layout, Lines
from lowrank_ds.requests import Gather, Steps


@dataclass(frozen=True)
class Right:
    """R = G Q with Q (n x r): lines are rows, no communication but for cut rows."""

    layout: Layout
    rank: int
    wants = ("right",)

    @property
    def lines(self) -> Lines:
        """The rows this rank touches."""
        return Lines(self.layout, self.layout.owned_rows, self.layout.shape[0])

    @property
    def line_count(self) -> int:
        """Lines whose state is kept here."""
        return self.layout.rows

    def basis_shapes(self) -> dict[str, tuple[int, int]]:
        """{state name: shape} of what this rank keeps of the basis."""
        part = self.layout.chunk(self.layout.shape[1])
        return {"projector": (part.stop - part.start, self.rank)}

    def random(self, key: tuple, device: torch.device) -> dict[str, Tensor]:
        """The seeded Gaussian basis, whole; nothing where nothing is held."""
        rows = slice(0, self.layout.shape[1] if self.layout.numel else 0)
        return {"projector": linalg.gaussian(key, self.layout.shape[1], self.rank, rows, device)}

    def requests(self, stored: dict[str, Tensor]) -> tuple[Gather, ...]:
        """What must be gathered before `down`."""
        return (Gather(stored["projector"], self.layout.shape[1]),)

    def gathered(self, stored: dict[str, Tensor], answers: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The basis as `down` and `terms` need it."""
        return {"projector": answers[0]}

    def down(self, source: Tensor, basis: dict[str, Tensor], squares: bool) -> Steps:
        """Entries (numel,) to coordinates (l, r) and, if asked, squared norms of the lines (l,)."""
        coords = source.new_zeros(self.layout.rows, self.rank, dtype=torch.float32)
        norms = coords.new_zeros(self.layout.rows, 1) if squares else None
        for block in self.layout.blocks:
            g = block.of(source).float()
            torch.mm(g, basis["projector"][block.cols], out=coords[block.rows])
            if squares:
                norms[block.rows, 0] = linalg.row_square_sums(g)
        return (yield from _complete(self.layout.complete_rows, coords, norms))

    def spread(self, factor: Tensor | None, direction: Tensor | None) -> Steps:
        """Bring per-line results to all who write: rows are already here."""
        return factor, direction
        yield

    def terms(self, block, basis: dict[str, Tensor], factor: Tensor | None, direction: Tensor | None):
        """(row or column factor, left, right) so that the block's update is factor o G + left right^T."""
        scale = None if factor is None else factor[block.rows].unsqueeze(1)
        return (
            (scale, None, None) if direction is None else (scale, direction[block.rows], basis["projector"][block.cols])
        )

    def overlap(self, old: dict[str, Tensor], new: dict[str, Tensor]) -> Steps:
        """B_old^T B_new (r_old x r_new) of two gathered bases."""
        return old["projector"].T @ new["projector"]
        yield


@dataclass(frozen=True)
class Left:
    """R = G^T P with P (m x r): lines are columns; partial sums are reduced so that each rank keeps a chunk."""

    layout: Layout
    rank: int
    wants = ("left",)

    @property
    def lines(self) -> Lines:
        """This rank's chunk of the columns."""
        return Lines(self.layout, slice(0, self.line_count), self.layout.shape[1])

    @property
    def line_count(self) -> int:
        """Lines whose state is kept here."""
        part = self.layout.chunk(self.layout.shape[1])
        return part.stop - part.start

    def basis_shapes(self) -> dict[str, tuple[int, int]]:
        """{state name: shape} of what this rank keeps of the basis."""
        return {"projector": (self.layout.rows, self.rank)}

    def random(self, key: tuple, device: torch.device) -> dict[str, Tensor]:
        """This rank's rows of the seeded Gaussian basis."""
        rows = self.layout.touched(self.layout.rank)
        part = slice(rows.start, rows.stop)
        return {"projector": linalg.gaussian(key, self.layout.shape[0], self.rank, part, device)}

    def requests(self, stored: dict[str, Tensor]) -> tuple[Gather, ...]:
        """What must be gathered before `down`: nothing."""
        return ()

    def gathered(self, stored: dict[str, Tensor], answers: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The basis as `down` and `terms` need it."""
        return {"projector": stored["projector"]}

    def down(self, source: Tensor, basis: dict[str, Tensor], squares: bool) -> Steps:
        """Entries (numel,) to coordinates (chunk, r) and, if asked, squared norms of the lines (chunk,)."""
        coords = source.new_zeros(self.layout.shape[1], self.rank, dtype=torch.float32)
        norms = coords.new_zeros(self.layout.shape[1], 1) if squares else None
        for block in self.layout.blocks:
            g = block.of(source).float()
            coords[block.cols].addmm_(g.T, basis["projector"][block.rows])
            if squares:
                norms[block.cols, 0] += linalg.column_square_sums(g)
        return (yield from _complete(self.layout.reduce_chunks, coords, norms))

    def spread(self, factor: Tensor | None, direction: Tensor | None) -> Steps:
        """Gather per-line results (chunk, ...) to all n lines, for every rank that holds rows."""
        parts = [factor.unsqueeze(1)] if factor is not None else []
        parts += [direction] if direction is not None else []
        joined = yield Gather(torch.cat(parts, 1), self.layout.shape[1])
        column = joined[:, 0] if factor is not None else None
        return column, joined[:, len(parts) - 1 :] if direction is not None else None

    def terms(self, block, basis: dict[str, Tensor], factor: Tensor | None, direction: Tensor | None):
        """(row or column factor, left, right) so that the block's update is factor o G + left right^T."""
        scale = None if factor is None else factor[block.cols]
        return (
            (scale, None, None) if direction is None else (scale, basis["projector"][block.rows], direction[block.cols])
        )

    def overlap(self, old: dict[str, Tensor], new: dict[str, Tensor]) -> Steps:
        """B_old^T B_new (r_old x r_new): the rows are spread over the ranks, each owned once."""
        owned = self.layout.owned_rows
        lines = Lines(self.layout, slice(0, 1), 1)
        return (yield from lines.sum_over_lines((old["projector"][owned].T @ new["projector"][owned]).unsqueeze(0)))


@dataclass(frozen=True)
class TwoSided:
    """GaLore's "full": R = (P^T G Q)^T with P (m x r) and Q (n x r). Lines are the r columns of G Q."""

    layout: Layout
    rank: int
    wants = ("left", "right")

    @property
    def lines(self) -> Lines:
        """This rank's chunk of the r lines."""
        return Lines(self.layout, slice(0, self.line_count), self.rank)

    @property
    def line_count(self) -> int:
        """Lines whose state is kept here."""
        part = self.layout.chunk(self.rank)
        return part.stop - part.start

    def basis_shapes(self) -> dict[str, tuple[int, int]]:
        """{state name: shape} of what this rank keeps of the two bases."""
        part = self.layout.chunk(self.layout.shape[1])
        return {"projector": (part.stop - part.start, self.rank), "projector_left": (self.layout.rows, self.rank)}

    def requests(self, stored: dict[str, Tensor]) -> tuple[Gather, ...]:
        """What must be gathered before `down`: Q."""
        return (Gather(stored["projector"], self.layout.shape[1]),)

    def gathered(self, stored: dict[str, Tensor], answers: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The bases as `down` and `terms` need them."""
        return {"projector": answers[0], "projector_left": stored["projector_left"]}

    def down(self, source: Tensor, basis: dict[str, Tensor], squares: bool) -> Steps:
        """Entries (numel,) to coordinates (chunk of r, r); line norms have no meaning here."""
        partial = source.new_zeros(self.rank, self.rank, dtype=torch.float32)
        for block in self.layout.blocks:
            compressed = block.of(source).float() @ basis["projector"][block.cols]
            partial += compressed.T @ basis["projector_left"][block.rows]
        return (yield from self.layout.reduce_chunks(partial)), None

    def spread(self, factor: Tensor | None, direction: Tensor | None) -> Steps:
        """Gather the direction (chunk, r) to (r, r)."""
        return None, (yield Gather(direction, self.rank))

    def terms(self, block, basis: dict[str, Tensor], factor: Tensor | None, direction: Tensor | None):
        """(None, left, right) so that the block's update is left right^T."""
        return None, basis["projector_left"][block.rows] @ direction.T, basis["projector"][block.cols]


def _complete(total, coords: Tensor, norms: Tensor | None) -> Steps:
    """Total coordinates (lines, r) and, if given, norms (lines, 1) over the ranks, in one message."""
    if norms is None:
        return (yield from total(coords)), None
    joined = yield from total(torch.cat([coords, norms], 1))
    return joined[:, :-1].contiguous(), joined[:, -1]


SIDES = {"right": Right, "left": Left, "full": TwoSided}


def choose(proj_type: str, layout: Layout, rank: int) -> Right | Left | TwoSided:
    """The projection GaLore's `proj_type` names for a matrix: "std" compresses the shorter dimension.

    m >= n keeps rows as lines (right), m < n keeps columns (left); "reverse_std" is the opposite. "right" and "left"
    are the same for every shape; under row sharding "right" needs no communication but for cut rows.
    """
    tall = layout.shape[0] >= layout.shape[1]
    side = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}.get(proj_type, proj_type)
    return SIDES[side](layout, rank)
