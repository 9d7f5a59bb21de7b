"""One matrix in one step: what the pipeline is given, and how the result is written to the weights, in place."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_ds import linalg
from lowrank_ds.draws import Draws
from lowrank_ds.int8_tensor import Int8Weight
from lowrank_ds.layout import Block, Layout
from lowrank_ds.recipe import Recipe

_PIECE, _PIECE_CPU = 1 << 24, 1 << 18  # entries of an element-wise update at a time: a few kernels of 64 MiB, of 1 MiB


@dataclass
class Job:
    """One matrix in one step.

    grad, weight: this rank's entries (numel,), views of what the optimizer was handed. grad is None when all of this
    step's gradient is in state["accumulated"], where `micro_batches` were summed (`accumulate.py`), or in `arrived`,
    the coordinates (kept lines, r) that replicas averaged in its place (`replicas.py`). An int8 weight is this rank's
    rows (l, n), read and written a piece at a time.
    state: the matrix's state tensors. step: 1, 2, ...; moment_step: the same since moments were last reset.
    lr, weight_decay: of this step. refresh: whether a new basis is due; refresh_count: bases drawn before this step;
    cold: whether "power" forgets the basis before; owner: the rank that computes an exact SVD; replica: the one it does
    so in (`Layout.mirror`); fresh: the basis from another replica. key: (run seed, parameter name), the source of all
    randomness. live: 1.0, or 0.0 (0-d) when the gradient turned out not to be usable. observe: where diagnostics leave
    what they see. draws: by key, the groups that draw this step's random bases; None: each draws its own.
    """

    layout: Layout
    recipe: Recipe
    grad: Tensor | None
    weight: Tensor
    state: MutableMapping[str, Tensor]
    key: tuple[int, str]
    step: int
    moment_step: int
    lr: float
    weight_decay: float
    refresh: bool = False
    refresh_count: int = 0
    owner: int = 0
    stochastic_rounding: bool = True
    replica: int = 0
    live: Tensor | None = None
    fresh: dict[str, Tensor] | None = None
    micro_batches: int = 0
    observe: Any = None  # an observe.Sink
    cold: bool = False
    arrived: Tensor | None = None
    draws: Mapping[tuple, Draws] | None = None

    @property
    def name(self) -> str:
        """The matrix' name."""
        return self.key[1]

    @property
    def size(self) -> int:
        """About how many numbers are alive for this matrix beside what is stored: bases, directions, a G to factorise.

        The same on every rank.
        """
        m, n = self.layout.shape
        how = self.recipe.subspace
        if how is None or self.recipe.momentum is not None:  # sums of rows and columns; coordinates
            formed = self.micro_batches or not self.recipe.storage.exact  # the sum of a sketch, decoded moments
            return (m + n) * (4 if how is None else how.rank) + (3 * m * n // self.layout.takers if formed else 0)
        if self.refresh and how.method != "gaussian" and self.fresh is None:
            return m * n if how.method == "svd" else 2 * (m + n) * (how.rank + how.oversample)
        return (m + n) * how.rank * (1 if self.recipe.storage.exact else 2)


def where_live(live: Tensor, x: Tensor) -> Tensor:
    """x itself or a copy of it; zeros of its shape when the gradient was not finite (live == 0)."""
    known = getattr(live, "known", None)
    if known is not None:
        return x if known else torch.zeros_like(x)
    return torch.where(live > 0, x, torch.zeros((), dtype=x.dtype, device=x.device))


def look(live: Tensor) -> Tensor:
    """`live` (0-d), with what the host knows of it as `live.known`; on a GPU it does not look, and skips nothing."""
    if _host_sees(live):
        live.known = bool(live)
    return live


def _host_sees(live: Tensor) -> bool:
    """Whether looking at `live` makes nobody wait: on CPU, unless it is a fake tensor."""
    return type(live) is Tensor and live.device.type == "cpu"


def kept(job: Job, scale: Tensor | None) -> float | Tensor:
    """1 - lr * weight_decay, the decoupled decay (torch.optim.AdamW's order: before the update)."""
    return 1 - job.lr * job.weight_decay * (1.0 if scale is None else scale)


_EXACT = (torch.float32, torch.float64)  # dtypes updated in place; narrower ones through fp32


def pieces(job: Job) -> Iterator[Block]:
    """The blocks of this rank's entries, cut so that fp32 temporaries stay far smaller than a large parameter."""
    return job.layout.pieces(_PIECE_CPU if job.weight.device.type == "cpu" else _PIECE)


def subtract_elementwise(job: Job, piece: Block, state: dict[str, Tensor], live: Tensor) -> None:
    """An element-wise rule's whole step on `piece`: its moments there (entries,) and its weights, in place.

    With `Recipe.decay_last` the update is decayed too.
    """
    rule, weight, grad = job.recipe.rule, loaded(job, piece), job.grad[piece.entries].float()
    size, last = job.lr * rule.correction(job.step), job.recipe.decay_last
    if job.weight_decay and not last:
        weight.mul_(kept(job, None))
    rule.subtract(weight.view(-1), grad, state, live, size)
    if job.weight_decay and last:
        weight.mul_(kept(job, None))
    round_back(job, weight, piece)


def write_entries(job: Job, update: Tensor, step_size: float, scale: Tensor | None) -> None:
    """W <- (1 - lr scale wd) W - step_size * update, for entries (numel,), in place.

    With `Recipe.decay_last` the update is decayed too.
    """
    for piece in pieces(job):
        write_piece(job, piece, update[piece.entries], step_size, scale)


def write_piece(job: Job, piece: Block, update: Tensor, step_size: float, scale: Tensor | None) -> None:
    """The same for the entries of `piece` only; update: theirs, 1-D."""
    weight = loaded(job, piece)
    step_size = step_size * kept(job, scale) if job.recipe.decay_last else step_size
    if job.weight_decay:
        weight.mul_(kept(job, scale))
    weight.sub_(update.view_as(weight), alpha=step_size)
    round_back(job, weight, piece)


def write(job: Job, side, basis, source: Tensor, factor, direction, step_size: float, scale, live: Tensor) -> None:
    """W <- (1 - lr scale wd) W - step_size * (factor o source + direction B^T), block by block, in place."""
    for block in to_write(job):
        weight = loaded(job, block)
        lines, left, right = side.terms(block, basis, factor, direction)
        keep = kept(job, scale) if job.weight_decay else 1.0
        if isinstance(keep, Tensor) or left is None:
            weight.mul_(keep)
            keep = 1.0
        if left is not None:
            weight.addmm_(left.to(weight.dtype), right.T.to(weight.dtype), beta=keep, alpha=-step_size)
        if lines is not None:
            _subtract_scaled(weight, block.of(source), lines, step_size, live)
        round_back(job, weight, block)


def to_write(job: Job) -> Iterable[Block]:
    """The blocks that are written in one go: whole ones in place; else fp32 copies, small beside int8 weights."""
    if in_place(job):
        return job.layout.blocks
    return pieces(job) if isinstance(job.weight, Int8Weight) else job.layout.narrow_pieces(job.weight.device)


def _subtract_scaled(weight: Tensor, source: Tensor, lines: Tensor, step_size: float, live: Tensor) -> None:
    """weight -= step_size * lines o source; lines (rows, 1) or (columns,). Nothing when not live.

    A source that has to be masked or converted is so some rows at a time: a copy of all of it would be the largest
    temporary of a step.
    """
    lines = lines.to(weight.dtype)
    if getattr(live, "known", False) and source.dtype == weight.dtype:
        weight.addcmul_(source, lines, value=-step_size)
        return
    height = max(1, _PIECE // weight.shape[1])
    each = lines.split(height) if lines.dim() == 2 else itertools.repeat(lines)
    for some, of_source, by in zip(weight.split(height), source.split(height), each, strict=False):
        some.addcmul_(where_live(live, of_source).to(weight.dtype), by, value=-step_size)


def weight_square_sum(job: Job) -> Tensor:
    """The sum of squares of the weights held here, 0-d fp32."""
    if not isinstance(job.weight, Int8Weight):
        return linalg.square_sum(job.weight)
    parts = [linalg.square_sum(loaded(job, piece)) for piece in pieces(job)]
    return torch.stack(parts).sum() if parts else torch.zeros((), device=job.weight.device)


def in_place(job: Job) -> bool:
    """Whether the weights are updated where they are stored."""
    return job.weight.dtype in _EXACT and not isinstance(job.weight, Int8Weight)


def loaded(job: Job, block: Block) -> Tensor:
    """The weights of a block, 2-D, to be changed: a view of them, or fp32 numbers that `round_back` stores."""
    if isinstance(job.weight, Int8Weight):
        return job.weight.read_rows(block.rows)
    stored = block.of(job.weight)
    return stored if stored.dtype in _EXACT else stored.float()


def round_back(job: Job, weight: Tensor, block: Block) -> None:
    """Store fp32 results in bf16 and int8 weights, rounded stochastically: small updates would be lost for ever."""
    if in_place(job):
        return
    key, place = (*job.key, "round", job.step), job.layout.position(block)
    if isinstance(job.weight, Int8Weight):
        job.weight.write_rows(block.rows, weight, key if job.stochastic_rounding else None, *place)
        return
    stored = block.of(job.weight)
    if stored.dtype == torch.bfloat16 and job.stochastic_rounding:
        linalg.stochastic_round(weight, key, *place, out=stored)
    else:
        stored.copy_(weight)
