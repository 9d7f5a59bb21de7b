"""Scaling factors of Adam at low and at full rank (Fira, arXiv:2410.01623, "similarity of scaling factors").

    phi_i(R) = |N_i| / |R_i|      line i of the coordinates R and of Adam's direction N for them
    phi_i(G) = |D_i| / |G_i|      the same line of the gradient G and of the direction D that Adam has with moments of
                                  G's own size

Fira scales the residual by phi(R) in place of phi(G), which it does not have. Whether that is right is what
`lowrank-ds similarity` measures, from one run in which both are computed from the same gradients (`observe`), or from
two runs as the paper does it, one of them by torch's AdamW (`AdamFactors`). Directions are those before the bias
correction, as in the package. What is recorded and how: docs/similarity.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ds import linalg
from lowrank_ds.job import Job, pieces, where_live
from lowrank_ds.layout import Layout
from lowrank_ds.projection import Right
from lowrank_ds.recipe import Recipe
from lowrank_ds.requests import Steps, Sum
from lowrank_ds.rules import Adam

TINY = 1e-8  # added to the norms that divide, as in the package


class Factors:
    """What is kept of one matrix on this rank: sums of both factors over steps, and moments of full size.

    sums (2, max(m, n)): of phi(R) and phi(G), fp64, whole on every rank that shares the matrix; behind the last line
    (a matrix may have fewer) zeros. steps (): how many, fp64.
    moments: {"exp_avg", "exp_avg_sq"} (numel,), fp32, of the entries held here: as much memory as Adam's own.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.sums = torch.zeros(2, max(layout.shape), dtype=torch.float64, device=device)
        self.steps = torch.zeros((), dtype=torch.float64, device=device)
        self.moments = {name: torch.zeros(layout.numel, device=device) for name in ("exp_avg", "exp_avg_sq")}

    def flat(self) -> Tensor:
        """(2 max(m, n) + 1,): the sums, and the number of steps."""
        return torch.cat([self.sums.view(-1), self.steps.view(1)])

    def clear(self) -> None:
        """Begin a new interval; the moments go on."""
        self.sums.zero_()
        self.steps.zero_()


def check(recipe: Recipe) -> None:
    """Raise ValueError unless the recipe has scaling factors, and whole gradients to compare with."""
    side = recipe.subspace.proj_type if recipe.subspace else None
    if not isinstance(recipe.rule, Adam) or recipe.momentum or recipe.correction or side in (None, "full"):
        raise ValueError(
            "compare_scaling=True compares Adam on coordinates with Adam on whole gradients; it is for GaLoreAdamW, "
            'FiraAdamW, ApolloAdamW and ApolloMini, with any proj_type but "full".'
        )
    if recipe.accumulation is not None:
        raise ValueError(
            "compare_scaling=True needs whole gradients at every step; with compress_accumulation there are none. "
            "Leave one of them out."
        )


def observe(job: Job, side, coords: Tensor, direction: Tensor, live: Tensor) -> Steps:
    """Add this step's factors of one matrix; one sum over the ranks. The step itself reads nothing of it.

    Args:
        coords, direction: (kept lines, r), zeros when not live.
    """
    factors, axis = job.observe.scaling, side.lines_axis
    if job.grad is None or job.micro_batches:
        raise RuntimeError(
            f"{job.name}: Diagnostics(compare_scaling=True) needs whole gradients, and this step has only their "
            "coordinates (reduce_in_subspace). Train without it to compare scaling factors."
        )
    squares = coords.new_zeros(4, axis.total)
    first = axis.kept[axis.rank][0]
    counted = slice(first + axis.owned.start, first + axis.owned.stop)
    squares[0, counted] = coords[axis.owned].square().sum(1)
    squares[1, counted] = direction[axis.owned].square().sum(1)
    for piece in pieces(job):
        grad = where_live(live, job.grad[piece.entries].float())
        moments = {name: values[piece.entries] for name, values in factors.moments.items()}
        full = job.recipe.rule.update_by_entry(grad, moments, live)
        lines, sums = _by_lines(side, piece)
        squares[2, lines] += sums(grad.view(piece.of(job.grad).shape))
        squares[3, lines] += sums(full.view(piece.of(job.grad).shape))
    norms = (yield Sum(squares)).sqrt()
    factors.sums[:, : axis.total] += torch.stack([_factor(norms[1], norms[0]), _factor(norms[3], norms[2])])
    factors.steps.add_(live)


def _by_lines(side, piece):
    """(the matrix' lines that a block has entries of, what sums the squares of each of them)."""
    right = isinstance(side, Right)
    within, start = (piece.rows if right else piece.cols), side.lines_axis.window.start
    sums = linalg.row_square_sums if right else linalg.column_square_sums
    return slice(start + within.start, start + within.stop), sums


def _factor(direction: Tensor, gradient: Tensor) -> Tensor:
    return direction / (gradient + TINY)


class AdamFactors:
    """The factors phi(G) of a run that trains at full rank by torch.optim.Adam or AdamW, read after each step.

    Args:
        optimizer: torch's own. It must hold plain tensors: one process, or DDP.
        named: (name, parameter) of the matrices to watch, each 2-D.

    Raises:
        TypeError: another optimizer, or sharded parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]]) -> None:
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise TypeError(f"scaling factors are Adam's: got {type(optimizer).__name__}, which is not torch's Adam(W)")
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.matrices = {name: p for name, p in named if p.dim() == 2 and id(p) in groups}
        if not self.matrices or any(hasattr(p, "placements") for p in self.matrices.values()):
            raise TypeError(
                "scaling factors of torch's AdamW need whole matrices: one process or DDP (FSDP and ZeRO leave "
                "pieces). Sharded runs: one low-rank run records both factors, see docs/similarity.md."
            )
        self.groups, self.steps = groups, 0
        self.sums = {name: p.new_zeros(max(p.shape), dtype=torch.float64) for name, p in self.matrices.items()}
        self.hook = optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.steps += 1
        for name, p in self.matrices.items():
            state, along = optimizer.state[p], 1 if p.shape[0] >= p.shape[1] else 0
            direction = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + self.groups[id(p)]["eps"])
            norms = (torch.linalg.vector_norm(x.float(), dim=along) for x in (direction, p.grad))
            self.sums[name] += _factor(*norms)

    def scaling_factors(self) -> dict[str, dict[str, Tensor]]:
        """{name: {"full": mean factor of each line (lines,)}} since the last time."""
        found = {name: {"full": sums / self.steps} for name, sums in self.sums.items()} if self.steps else {}
        self.sums, self.steps = {name: torch.zeros_like(sums) for name, sums in self.sums.items()}, 0
        return found


def append(path: str | Path, step: int, factors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Append {"step", "matrices": {name: {"low": [...], "full": [...]}}} as a line of JSON, six digits a number."""
    matrices = {
        name: {which: [float(f"{value:.6g}") for value in values.tolist()] for which, values in both.items()}
        for name, both in factors.items()
    }
    with Path(path).open("a") as file:
        file.write(json.dumps({"step": step, "matrices": matrices}) + "\n")
