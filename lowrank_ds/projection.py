"""Projections: G to coordinates and directions back to W, on any layout, from either side.

One word makes left and right the same: a *line* is a row of G when columns are compressed (right, R = G Q) and a
column of G when rows are (left, R = G^T P). Coordinates, moments and norms are always (lines x r) arrays, the basis
has one row for each entry of a line. So a side is two axes (`axis.py`):

    side    lines                     basis rows         under row sharding
    right   rows                      columns            lines are settled; each rank keeps a part of Q
    left    columns                   rows               each rank keeps a part of the lines, and P's rows with G's
    full    the r columns of G Q      both               as left

Legend: m x n matrix, r rank, B basis (d x r). "touched" and "kept" are those of the axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowrank_ds import linalg
from lowrank_ds.axis import Axis, part_of
from lowrank_ds.draws import Draws
from lowrank_ds.layout import Block, Layout
from lowrank_ds.lines import Lines
from lowrank_ds.requests import Gather, Steps, Sum

Basis = dict[str, Tensor]


@dataclass(frozen=True)
class OneSided:
    """What left and right share.

    Args:
        replicated: every rank keeps the whole basis, where it needs the whole (`projector_storage`).
    """

    layout: Layout
    rank: int
    replicated: bool = False

    @cached_property
    def lines_axis(self) -> Axis:
        """Of the lines."""
        raise NotImplementedError

    @cached_property
    def basis_axis(self) -> Axis:
        """Of the basis' rows."""
        raise NotImplementedError

    @property
    def lines(self) -> Lines:
        """The lines kept here."""
        return Lines(self.lines_axis, self.layout)

    def basis_axes(self) -> dict[str, Axis]:
        """{state name: axis of its rows}."""
        return {"projector": self.basis_axis}

    def random(self, key: tuple, device: torch.device, draws: Mapping[tuple, Draws] | None = None) -> Basis:
        """The touched rows of the seeded Gaussian basis. draws: by key, the groups of bases that are drawn together."""
        if draws is not None:
            return {"projector": draws[key].take(key)}
        axis = self.basis_axis
        return {"projector": linalg.gaussian(key, axis.total, self.rank, axis.window, device)}

    def requests(self, stored: Basis) -> tuple[Gather, ...]:
        """What must be gathered before `down`."""
        return self.basis_axis.spread_requests(stored["projector"])

    def gathered(self, stored: Basis, answers: tuple[Tensor, ...]) -> Basis:
        """The basis (touched, r) as `down` and `terms` need it."""
        return {"projector": answers[0] if answers else stored["projector"]}

    def spread(self, factor: Tensor | None, direction: Tensor | None) -> Steps:
        """Bring per-line results (kept, ...) to all who write: (touched, ...)."""
        if self.lines_axis.settled or not self.layout.shared:
            return factor, direction
        parts = [factor.unsqueeze(1)] if factor is not None else []
        parts += [direction] if direction is not None else []
        joined = yield from self.lines_axis.spread(torch.cat(parts, 1))
        column = joined[:, 0] if factor is not None else None
        return column, joined[:, len(parts) - 1 :] if direction is not None else None

    def overlap(self, old: Basis, new: Basis) -> Steps:
        """B_old^T B_new (r_old x r_new) of two gathered bases."""
        if self.basis_axis.undivided:
            return old["projector"].T @ new["projector"]
        own = self._counted_rows()
        return (yield Sum(old["projector"][own].T @ new["projector"][own]))

    def _counted_rows(self) -> slice:
        """The touched rows of the basis that are counted here."""
        raise NotImplementedError

    def _parts(self, block: Block) -> tuple[slice, slice]:
        """The lines of a block and the rows of the basis that go with it."""
        raise NotImplementedError

    def _by_lines(self, g: Tensor) -> Tensor:
        """A block of G with a line in each row."""
        raise NotImplementedError

    def _squares(self, g: Tensor) -> Tensor:
        """Sums of squares of the lines of a block."""
        raise NotImplementedError

    def down(self, source: Tensor, basis: Basis, squares: bool, known: Tensor | None = None) -> Steps:
        """Entries (numel,) to coordinates (kept, r) and, if asked, squared norms of the lines (kept,).

        known: `square_sums` of the same entries.
        """
        pieces, stored = tuple(self.layout.fp32_pieces(source)), basis["projector"]
        if len(pieces) == 1 and self.layout.dense:
            g = pieces[0].of(source).float()
            coords, norms = torch.mm(self._by_lines(g), stored), known
            if squares and known is None:
                norms = self._squares(g)
        else:
            coords = source.new_zeros(self._touched, self.rank, dtype=torch.float32)
            norms = coords.new_zeros(self._touched) if squares and known is None else known
            for piece in pieces:
                g, (lines, across) = piece.of(source).float(), self._parts(piece)
                coords[lines].addmm_(self._by_lines(g), stored[across])
                if squares and known is None:
                    norms[lines] += self._squares(g)
        return (yield from self._complete(coords, norms))

    def square_sums(self, source: Tensor) -> Tensor:
        """Sums of squares of the lines of fp32 entries (numel,), as far as they are held here: (touched,)."""
        if len(self.layout.blocks) == 1 and self.layout.dense:
            return self._squares(self.layout.blocks[0].of(source))
        sums = source.new_zeros(self._touched)
        for block in self.layout.blocks:
            sums[self._parts(block)[0]] += self._squares(block.of(source))
        return sums

    @property
    def _touched(self) -> int:
        """Lines touched here."""
        return self.lines_axis.window.stop - self.lines_axis.window.start

    def _complete(self, coords: Tensor, norms: Tensor | None) -> Steps:
        """Total coordinates (touched, r) and, if given, norms (touched,) over the ranks, in one message."""
        if norms is None:
            return (yield from self.lines_axis.complete(coords)), None
        if not self.lines_axis.crossed:
            return coords, norms
        joined = yield from self.lines_axis.complete(torch.cat([coords, norms.unsqueeze(1)], 1))
        return joined[:, :-1].contiguous(), joined[:, -1]


class Right(OneSided):
    """R = G Q with Q (n x r): lines are rows."""

    bases = {"right": "projector"}

    @cached_property
    def lines_axis(self) -> Axis:
        """The rows."""
        return self.layout.rows_axis

    @cached_property
    def basis_axis(self) -> Axis:
        """The columns."""
        return _replicable(self.layout.cols_axis, self.replicated)

    def whole_requests(self, stored: Basis) -> tuple[Gather, ...]:
        """What must be gathered to start a factorisation from the stored basis: all of Q."""
        axis = self.basis_axis
        return () if axis.kind == "whole" else (Gather(stored["projector"], axis.wide()),)

    def warm(self, stored: Basis, answers: tuple[Tensor, ...]) -> Tensor:
        """What a factorisation starts from: all of Q (n, r), zeros on a rank that takes no part."""
        basis = answers[0] if answers else stored["projector"]
        return basis if basis.shape[0] == self.basis_axis.total else basis.new_zeros(self.basis_axis.total, self.rank)

    def _counted_rows(self) -> slice:
        return self.layout.owned_cols

    def _parts(self, block: Block) -> tuple[slice, slice]:
        return block.rows, block.cols

    def _by_lines(self, g: Tensor) -> Tensor:
        return g

    def _squares(self, g: Tensor) -> Tensor:
        return linalg.row_square_sums(g)

    def terms(self, block: Block, basis: Basis, factor: Tensor | None, direction: Tensor | None):
        """(row or column factor, left, right) so that the block's update is factor o G + left right^T."""
        scale = None if factor is None else part_of(factor, block.rows).unsqueeze(1)
        if direction is None:
            return scale, None, None
        return scale, part_of(direction, block.rows), part_of(basis["projector"], block.cols)


class Left(OneSided):
    """R = G^T P with P (m x r): lines are columns."""

    bases = {"left": "projector"}

    @cached_property
    def lines_axis(self) -> Axis:
        """The columns."""
        return self.layout.cols_axis

    @cached_property
    def basis_axis(self) -> Axis:
        """The rows."""
        return _replicable(self.layout.rows_axis, self.replicated)

    def whole_requests(self, stored: Basis) -> tuple[Gather, ...]:
        """What must be gathered to start a factorisation from the stored basis: the rows of P touched here."""
        return self.requests(stored)

    def warm(self, stored: Basis, answers: tuple[Tensor, ...]) -> Tensor:
        """What a factorisation starts from: the touched rows of P."""
        return self.gathered(stored, answers)["projector"]

    def _counted_rows(self) -> slice:
        return self.layout.owned_rows

    def _parts(self, block: Block) -> tuple[slice, slice]:
        return block.cols, block.rows

    def _by_lines(self, g: Tensor) -> Tensor:
        return g.T

    def _squares(self, g: Tensor) -> Tensor:
        return linalg.column_square_sums(g)

    def terms(self, block: Block, basis: Basis, factor: Tensor | None, direction: Tensor | None):
        """(row or column factor, left, right) so that the block's update is factor o G + left right^T."""
        scale = None if factor is None else part_of(factor, block.cols)
        if direction is None:
            return scale, None, None
        return scale, part_of(basis["projector"], block.rows), part_of(direction, block.cols)


@dataclass(frozen=True)
class TwoSided:
    """GaLore's "full": R = (P^T G Q)^T with P (m x r) and Q (n x r). Lines are the r columns of G Q."""

    layout: Layout
    rank: int
    replicated: bool = False
    bases = {"right": "projector", "left": "projector_left"}

    @cached_property
    def lines_axis(self) -> Axis:
        """The r columns of G Q, a part on each rank."""
        return self.layout.even(self.rank)

    @property
    def lines(self) -> Lines:
        """The lines kept here."""
        return Lines(self.lines_axis, self.layout)

    @cached_property
    def _axes(self) -> tuple[Axis, Axis]:
        """Of Q's rows and of P's rows."""
        return tuple(_replicable(a, self.replicated) for a in (self.layout.cols_axis, self.layout.rows_axis))

    def basis_axes(self) -> dict[str, Axis]:
        """{state name: axis of its rows}."""
        return dict(zip(("projector", "projector_left"), self._axes, strict=True))

    def requests(self, stored: Basis) -> tuple[Gather, ...]:
        """What must be gathered before `down`: Q, and P where columns are divided too."""
        return sum((axis.spread_requests(stored[name]) for name, axis in self.basis_axes().items()), ())

    def gathered(self, stored: Basis, answers: tuple[Tensor, ...]) -> Basis:
        """The bases (touched, r) as `down` and `terms` need them."""
        left = iter(answers)
        return {name: stored[name] if axis.settled else next(left) for name, axis in self.basis_axes().items()}

    def down(self, source: Tensor, basis: Basis, squares: bool, known: None = None) -> Steps:
        """Entries (numel,) to coordinates (kept of r, r); line norms have no meaning here."""
        partial = source.new_zeros(self.rank, self.rank, dtype=torch.float32)
        for block in self.layout.fp32_pieces(source):
            compressed = block.of(source).float() @ basis["projector"][block.cols]
            partial += compressed.T @ basis["projector_left"][block.rows]
        start, stop = self.lines_axis.touched[self.layout.rank]
        return (yield from self.lines_axis.complete(partial[start:stop])), None

    def spread(self, factor: Tensor | None, direction: Tensor | None) -> Steps:
        """Gather the direction (kept of r, r) to (r, r)."""
        return None, (yield from self.lines_axis.spread(direction))

    def terms(self, block: Block, basis: Basis, factor: Tensor | None, direction: Tensor | None):
        """(None, left, right) so that the block's update is left right^T."""
        return None, basis["projector_left"][block.rows] @ direction.T, basis["projector"][block.cols]


def _replicable(axis: Axis, replicated: bool) -> Axis:
    """The axis of a basis; on request every rank keeps all that it touches."""
    return axis.replicated() if replicated and not axis.settled else axis


SIDES = {"right": Right, "left": Left, "full": TwoSided}


def choose(proj_type: str, layout: Layout, rank: int, replicated: bool = False) -> Right | Left | TwoSided:
    """The projection GaLore's `proj_type` names for a matrix: "std" compresses the shorter dimension.

    m >= n keeps rows as lines (right), m < n keeps columns (left); "reverse_std" is the opposite. "right" and "left"
    are the same for every shape; under row sharding "right" needs no communication but for cut rows.
    """
    known = layout.__dict__.setdefault("_sides", {})  # asked for several times a step
    key = (proj_type, rank, replicated)
    if key not in known:
        known[key] = _new_side(proj_type, layout, rank, replicated)
    return known[key]


def _new_side(proj_type: str, layout: Layout, rank: int, replicated: bool) -> Right | Left | TwoSided:
    return SIDES[side_name(proj_type, layout.shape)](layout, rank, replicated)


def side_name(proj_type: str, shape: tuple[int, int]) -> str:
    """The side ("right", "left", "full") that `proj_type` names for a matrix of shape (m, n)."""
    tall = shape[0] >= shape[1]
    return {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}.get(proj_type, proj_type)
