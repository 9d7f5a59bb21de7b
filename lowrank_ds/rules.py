"""Rules: what turns coordinates into a direction. Pure arithmetic; no parameter, no rank, no learning rate.

A rule declares its state (`state_shapes`) and works on a (lines x width) fp32 array: the coordinates of a projected
matrix, or the entries of a parameter that is not projected. `live` is 1.0, or 0.0 when this step's gradient is not
finite: then the state must come out unchanged. Reductions over lines go through `Lines`, which totals over ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ds.axis import Axis, Stored
from lowrank_ds.lines import Lines
from lowrank_ds.requests import Steps, Sum


@dataclass(frozen=True)
class Adam:
    """AdamW's direction as in galore-torch, fira and apollo-torch (the old Hugging Face AdamW).

    N = M / (sqrt(V) + eps) with *uncorrected* moments; the bias correction sqrt(1 - b2^t) / (1 - b1^t) is returned
    beside it, because Fira's and APOLLO's limiters act on the uncorrected direction.

    compiled: move the moments in one kernel made by torch.compile.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    correct_bias: bool = True
    compiled: bool = False

    def state_shapes(self, array: Stored, lines: Axis, columns: Axis) -> dict[str, Stored]:
        """{state name: shape} for an array of shape `array`."""
        return {"exp_avg": array, "exp_avg_sq": array}

    def update(self, x: Tensor, state: dict[str, Tensor], live: Tensor) -> Tensor:
        """Direction N of x (lines, width), and the moments moved in place. Zeros when not live."""
        target = torch.zeros_like(x)
        self.subtract(target, x, state, live, -1.0)
        return target

    def subtract(self, target: Tensor, x: Tensor, state: dict[str, Tensor], live: Tensor, size: float) -> None:
        """target <- target - size N, both of x's shape, and the moments moved, all in place. Nothing when not live."""
        if self.makes_no_copies(target, x):
            dead = None if getattr(live, "known", False) else 1 - live
            torch._fused_adam_(
                [target], [x], [state["exp_avg"].view_as(x)], [state["exp_avg_sq"].view_as(x)], [], [_long_ago(x)],
                lr=size, beta1=self.betas[0], beta2=self.betas[1], weight_decay=0.0, eps=self.eps, amsgrad=False,
                maximize=False, found_inf=dead,
            )  # fmt: skip
            return
        target.sub_(self.update_by_entry(x, state, live), alpha=size)

    def makes_no_copies(self, target: Tensor, x: Tensor) -> bool:
        """Whether `subtract` makes nothing of their size, however large they are."""
        return not self.compiled and _has_fused_kernel(target, x)

    def update_by_entry(self, x: Tensor, state: dict[str, Tensor], live: Tensor) -> Tensor:
        """As `update`, in operations that round an entry alike wherever it lies.

        (The one kernel's vector body and its remainder do not: enough to turn a code of 8 bits.)
        """
        move = _compiled_moments() if self.compiled else _moments
        x = torch.where(live > 0, x, 0.0)
        direction = move(x, state["exp_avg"].view_as(x), state["exp_avg_sq"].view_as(x), live, *self.betas, self.eps)
        return torch.where(live > 0, direction, 0.0)

    def correction(self, step: int) -> float:
        """The factor of the step size at step 1, 2, ..."""
        if not self.correct_bias:
            return 1.0
        return math.sqrt(1 - self.betas[1] ** step) / (1 - self.betas[0] ** step)


def _has_fused_kernel(target: Tensor, x: Tensor) -> bool:
    """Whether torch's kernel takes them: it reads and writes everything once (the formula below: about ten times)."""
    known = x.device.type in ("cpu", "cuda") and hasattr(torch, "_fused_adam_")
    return known and x.dtype == target.dtype == torch.float32 and x.is_contiguous() and target.is_contiguous()


def _long_ago(x: Tensor) -> Tensor:
    """After so many steps (0-d) the kernel's own bias correction is 1, and eps is added where ours is."""
    if type(x) is not Tensor:  # a planner's fake tensors
        return x.new_full((), 1e12)
    if x.device not in _STEPS:
        _STEPS[x.device] = x.new_full((), 1e12)
    return _STEPS[x.device]


_STEPS: dict[torch.device, Tensor] = {}


def _moments(
    x: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, live: Tensor, beta1: float, beta2: float, eps: float
) -> Tensor:
    """Adam's moments moved in place, and M / (sqrt(V) + eps)."""
    exp_avg.lerp_(x, live * (1 - beta1))
    exp_avg_sq.lerp_(x.square(), live * (1 - beta2))
    return exp_avg / exp_avg_sq.sqrt().add_(eps)


@dataclass(frozen=True)
class SGD:
    """Plain gradient descent: the direction is x itself, nothing is remembered (LOMO, arXiv:2306.09782)."""

    def state_shapes(self, array: Stored, lines: Axis, columns: Axis) -> dict[str, Stored]:
        """{state name: shape}: none."""
        return {}

    def update(self, x: Tensor, state: dict[str, Tensor], live: Tensor) -> Tensor:
        """Direction of x (lines, width): x."""
        return x

    def makes_no_copies(self, target: Tensor, x: Tensor) -> bool:
        """Whether `subtract` makes nothing of their size: no, where it masks."""
        return False

    def subtract(self, target: Tensor, x: Tensor, state: dict[str, Tensor], live: Tensor, size: float) -> None:
        """target <- target - size x, in place. Nothing when not live."""
        target.sub_(x if getattr(live, "known", False) else torch.where(live > 0, x, 0.0), alpha=size)

    def correction(self, step: int) -> float:
        """The factor of the step size at step 1, 2, ...: none."""
        return 1.0


@functools.cache
def _compiled_moments() -> Callable[..., Tensor]:
    """The same as one kernel. It sees plain local tensors, also under FSDP2 (dynamo cannot take changing DTensors)."""
    return torch.compile(_moments, dynamic=True)


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (arXiv:1804.04235, Algorithms 4-6) as in galore-torch and flora-opt.

    Args:
        eps: (added to squared gradients, smallest parameter RMS that scales the step).
        clip_threshold: largest RMS of an update.
        decay_rate: second-moment decay is 1 - step ** decay_rate.
        beta1: momentum, None for none.
        momentum_first: True as flora-opt (momentum of the raw update, clipped afterwards); False as galore-torch.
        factored: keep row and column means of the second moment instead of all of it.
        scale_parameter: multiply the update by max(eps[1], RMS(W)).
    """

    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    momentum_first: bool = False
    factored: bool = True
    scale_parameter: bool = True

    def is_factored(self, lines_total: int, width: int) -> bool:
        """Vectors (one line, or one column) keep the full second moment, as the packages do."""
        return self.factored and lines_total > 1 and width > 1

    def state_shapes(self, array: Stored, lines: Axis, columns: Axis) -> dict[str, Stored]:
        """{state name: shape} for an array of shape `array`, whose lines and columns are divided as given."""
        factored = self.is_factored(lines.total, columns.total)
        means = {"exp_avg_sq_row": Stored(lines), "exp_avg_sq_col": Stored(columns)}
        return (means if factored else {"exp_avg_sq": array}) | ({"exp_avg": array} if self.beta1 else {})

    def decay(self, step: int) -> float:
        """beta2 of step 1, 2, ..."""
        return 1.0 - math.pow(step, self.decay_rate)

    def precondition(self, x: Tensor, state: dict[str, Tensor], lines: Lines, live: Tensor, step: int) -> Steps:
        """x / sqrt(second moment), the moment moved in place. x (lines, width): complete lines."""
        weight = live * (1 - self.decay(step))
        if "exp_avg_sq" in state:
            square = x.square().add_(self.eps[0])
            yield ()  # for the round in which others ask for their columns
            return state["exp_avg_sq"].lerp_(square, weight).rsqrt().mul_(x)
        square, columns = x.square(), lines.layout.even(x.shape[1])
        means = yield self.ask_columns(square[lines.axis.owned].sum(0), state, columns)
        rows, across = self.factors(square.sum(1), means, state, lines.total, columns, weight)
        return (x * rows.unsqueeze(1)).mul_(across)

    def ask_columns(self, sums: Tensor, state: dict[str, Tensor], columns: Axis, window: slice = slice(None)) -> Sum:
        """Ask for (2, width): the sums of squares of all columns, and their old means, of which each rank keeps a part.

        sums: of the columns `window`, over the lines counted here.
        """
        both = sums.new_zeros(2, columns.total)
        both[0, window] = sums
        both[1, slice(*columns.kept[columns.rank])] = state["exp_avg_sq_col"]
        return Sum(both)

    def factors(
        self, rows: Tensor, means: Tensor, state: dict[str, Tensor], total: int, columns: Axis, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(r (lines,), c (width,)) such that the update is r o x o c; the moments are moved in place.

        rows (lines,): sums of squares of the lines kept here. means (2, width): what `ask_columns` was answered.
        total: lines over all ranks. weight: of this step, 0 when the gradient is not usable.
        """
        row_mean = state["exp_avg_sq_row"].lerp_(rows / columns.total + self.eps[0], weight)
        column_mean = torch.lerp(means[1], means[0] / total + self.eps[0], weight)
        state["exp_avg_sq_col"].copy_(column_mean[slice(*columns.kept[columns.rank])])
        # The mean of the row means, which the formula asks for, is the mean of the column means: no further sum.
        # (Each root by itself: the quotient of a large mean and an empty row's 1e-30 would overflow.)
        return row_mean.rsqrt() * column_mean.mean().sqrt(), column_mean.rsqrt()

    def shrink(self, square_sum: Tensor, numel: int) -> Tensor:
        """What an update is multiplied by so that its RMS, sqrt(square_sum / numel), is at most `clip_threshold`."""
        return ((square_sum / numel).sqrt() / self.clip_threshold).clamp_min(1.0).reciprocal()

    def parameter_scale(self, weight_square_sum: Tensor, numel: int) -> Tensor:
        """max(eps[1], RMS(W)), 0-d; 1 when `scale_parameter` is off."""
        if not self.scale_parameter:
            return torch.ones_like(weight_square_sum)
        return (weight_square_sum / numel).sqrt().clamp_min(self.eps[1])
