"""Residuals: what happens to the part of the gradient outside the subspace. Pure arithmetic on lines.

Every residual answers the same question: with what per-line factor does the gradient itself enter the update, and
what is added inside the subspace? The update is always

    U = factor o G + direction B^T        (factor: one number per line, or None when G does not enter)

so that no residual matrix is ever formed. Legend: B (d x r) basis, R = G B (lines x r) coordinates, N (lines x r)
the rule's direction, squares (lines,) the squared norms of G's lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ds.axis import SCALAR, Stored
from lowrank_ds.lines import Lines
from lowrank_ds.requests import Steps


def _norm(lines: Tensor) -> Tensor:
    return torch.linalg.vector_norm(lines, dim=1)


def limit_growth(norm: Tensor, previous: Tensor, growth: float, live: Tensor) -> Tensor:
    """Factor (0-d, <= 1) that keeps `norm` <= growth * `previous`; `previous` becomes the limited norm, in place.

    Fira, Algorithm 1. `previous` starts at infinity (the first step is not limited). A zero or non-finite norm is
    not remembered: a remembered zero would hold every later update at zero.
    """
    factor = (previous + 1e-8).mul_(growth).div_(norm).clamp_max_(1.0)
    limited = norm * factor
    usable = (limited > 0).logical_and_(limited < math.inf).logical_and_(live)
    torch.where(usable, limited, previous, out=previous)
    return factor


@dataclass(frozen=True)
class Drop:
    """GaLore: the residual is dropped. U = scale * N B^T."""

    scale: float = 1.0
    needs_squares = needs_inside = False

    def state_shapes(self) -> dict[str, Stored]:
        """{state name: shape}: none."""
        return {}

    def combine(
        self,
        coords: Tensor,
        direction: Tensor,
        squares: Tensor | None,
        state: dict,
        lines: Lines,
        live: Tensor,
        inside: Tensor | None = None,
    ) -> Steps:
        """(factor, direction, limit) of the update: no factor, no limiter."""
        return None, direction.mul_(self.scale), None
        yield


@dataclass(frozen=True)
class ScaleResidual:
    """Fira (arXiv:2410.01623): the residual S = phi o (G - c R B^T), growth-limited, joins the update.

    Args:
        alpha: the papers' scale.
        form: "code" (package fira 1.0.2): c = alpha, U = alpha N B^T + S;
              "paper" (Algorithm 1): c = 1, U = alpha (N B^T + S).
        scaling: "column": phi_i = |N_i| / |R_i| per line; "matrix": one phi = |N| / |R|.
        growth: the limiter's gamma.
    """

    alpha: float = 0.25
    form: str = "code"
    scaling: str = "column"
    growth: float = 1.01
    needs_squares = needs_inside = True

    def state_shapes(self) -> dict[str, Stored]:
        """{state name: shape}; the limited norm of the previous residual."""
        return {"residual_norm": SCALAR}

    def combine(
        self,
        coords: Tensor,
        direction: Tensor,
        squares: Tensor | None,
        state: dict,
        lines: Lines,
        live: Tensor,
        inside: Tensor | None = None,
    ) -> Steps:
        """(factor, direction, limit) of the update; limit: what the limiter multiplied by (0-d).

        |g - c B r|^2 = |g|^2 - 2c |r|^2 + c^2 |B r|^2, as r = B^T g. inside: |B r|^2 of each line (lines,); None when B
        is orthonormal, then it is |r|^2.
        """
        c = self.alpha if self.form == "code" else 1.0
        norms = _norm(coords)
        phi = yield from _ratio(norms, direction, lines, self.scaling == "column")
        own = norms.square()
        if inside is None:
            residual = torch.sub(squares, own, alpha=2 * c - c * c)
        else:
            residual = squares - 2 * c * own + c * c * inside
        totals = yield from lines.weighted_sums((residual.clamp_min_(0), squares), phi.square())
        total, whole = totals.unbind()
        # A gradient inside the subspace leaves a residual of rounding noise: not a norm to remember.
        total = torch.where(total > 1e-6 * whole, total, 0.0)
        limit = limit_growth(total.sqrt(), state["residual_norm"], self.growth, live)
        phi = phi * (limit if self.form == "code" else self.alpha * limit)
        return phi, direction.mul_(self.alpha).addcmul_(coords, phi.unsqueeze(1), value=-c), limit


@dataclass(frozen=True)
class ScaleGradient:
    """APOLLO (arXiv:2412.05270): the gradient itself, scaled per channel or per tensor. U = sqrt(scale) s o G.

    Args:
        scale: the update is multiplied by sqrt(scale), as in apollo-torch (GaLore's and Fira's scale is linear).
        per_channel: s_i = |N_i| / |R_i| per line; otherwise one s = |N| / |R|  (APOLLO-Mini).
        growth: the limiter's gamma, None for no limiter (`disable_nl`).
        scale_front: apply sqrt(scale) before the limiter.
    """

    scale: float = 1.0
    per_channel: bool = True
    growth: float | None = 1.01
    scale_front: bool = False
    needs_inside = False

    @property
    def needs_squares(self) -> bool:
        """The limiter needs the norms of G's lines."""
        return self.growth is not None

    def state_shapes(self) -> dict[str, Stored]:
        """{state name: shape}; the limited norm of the previous update."""
        return {"residual_norm": SCALAR} if self.growth is not None else {}

    def combine(
        self,
        coords: Tensor,
        direction: Tensor,
        squares: Tensor | None,
        state: dict,
        lines: Lines,
        live: Tensor,
        inside: Tensor | None = None,
    ) -> Steps:
        """(factor, None, limit): nothing is added inside the subspace; limit (0-d): the limiter's, None without it."""
        limit = None
        s = yield from _ratio(_norm(coords), direction, lines, self.per_channel)
        if self.growth is not None:
            total = yield from lines.weighted_sums((squares,), s.square())
            norm = total[0].sqrt() * (math.sqrt(self.scale) if self.scale_front else 1.0)
            limit = limit_growth(norm, state["residual_norm"], self.growth, live)
            s = s * limit
        return math.sqrt(self.scale) * s, None, limit


def _ratio(norms: Tensor, direction: Tensor, lines: Lines, per_line: bool) -> Steps:
    """|N_i| / (|R_i| + 1e-8) per line (lines,), or the whole arrays' ratio repeated. norms (lines,): |R_i|."""
    if per_line:
        return _norm(direction).div_(norms + 1e-8)
    square = yield from lines.sum_over_lines(torch.stack([_norm(direction), norms], 1).square_())
    return (square[0].sqrt() / (square[1].sqrt() + 1e-8)).expand(norms.shape)
