"""Clipping gradients that are never all there at once: what `layerwise` does instead of `clip_grad_norm_`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_ds import engines, linalg
from lowrank_ds.collectives import Task, run_all
from lowrank_ds.requests import Sum, ask


class Clip:
    """Scales gradients so that a norm is at most `largest`; the subclass says which norm.

    norm: the last global norm (0-d), None before there is one. factor: what gradients are multiplied by now.
    """

    two_passes: ClassVar[bool] = False

    def __init__(self, largest: float, optimizer: Any) -> None:
        self.largest, self.optimizer = largest, optimizer
        self.norm: Tensor | None = None
        self.factor: Tensor | float | None = None
        self._squares: dict[Any, Tensor] = {}  # by the group of ranks that share the entries

    @property
    def measured(self) -> bool:
        """Whether a measuring pass is over whose step has not come yet."""
        return self.two_passes and self.factor is not None

    def restart(self) -> None:
        """Forget what was measured of a step that was given up."""
        self._squares.clear()

    def measure(self, host: Tensor) -> None:
        """Take the gradient of a tensor into the norm."""
        grad = engines.local_grad(host)
        square = linalg.square_sum(grad.reshape(-1))
        sharers = engines.sharers(host)
        before = self._squares.get(sharers)
        self._squares[sharers] = square if before is None else before.add_(square.to(before.device))

    def total(self) -> Tensor:
        """The global norm (0-d) of what was measured, over all ranks; the next measurement starts at zero."""
        parts = []
        for sharers, square in self._squares.items():
            (whole,) = run_all([Task(sharers, ask(Sum(square.view(1))), 1, "the gradient norm")], square.device, 1)
            parts.append(whole.view(()).to(next(iter(self._squares.values())).device))
        self._squares.clear()
        self.norm = torch.stack(parts).sum().sqrt() if parts else torch.zeros(())
        return self.norm

    def conclude(self) -> None:
        """The measuring pass is over."""

    def conclude_step(self) -> None:
        """The step is over."""

    def scale(self, work: list) -> None:
        """Scale the gradients in a list of (slot, group, gradient entries, weight entries), in place."""
        if self.factor is not None:
            for _, _, grad, _ in work:
                grad.mul_(self.factor if isinstance(self.factor, float) else self.factor.to(grad.device))


class TwoPass(Clip):
    """By the global norm of these very gradients, which a first backward pass measures (LOMO's way)."""

    two_passes = True

    def conclude(self) -> None:
        """As torch's clip_grad_norm_: the factor is max_norm / (norm + 1e-6), at most 1."""
        self.factor = (self.largest / (self.total() + 1e-6)).clamp_max(1.0)

    def conclude_step(self) -> None:
        """The factor belonged to this step."""
        self.factor = None


class Previous(Clip):
    """By the global norm of the step before: nothing is run twice, and a spike passes once.

    The norm is kept in the param groups ("previous_grad_norm", 0 before the first step), hence in state dicts.
    """

    KEY = "previous_grad_norm"

    def __init__(self, largest: float, optimizer: Any) -> None:
        super().__init__(largest, optimizer)
        for group in optimizer.param_groups:
            group.setdefault(self.KEY, 0.0)

    def scale(self, work: list) -> None:
        """See `Clip.scale`."""
        norm = self.optimizer.param_groups[0][self.KEY]
        self.factor = min(1.0, self.largest / (norm + 1e-6)) if norm else None
        super().scale(work)

    def conclude_step(self) -> None:
        """Remember this step's norm (one read from the device), unless it is not finite or nothing had a gradient."""
        if not self._squares:
            return
        norm = float(self.total())
        if norm < linalg.LARGEST_GRADIENT:
            for group in self.optimizer.param_groups:
                group[self.KEY] = norm


class PerTensor(Clip):
    """Each matrix' gradient by its own norm."""

    def measure(self, host: Tensor) -> None:
        """Nothing is summed over tensors."""

    def scale(self, work: list) -> None:
        """See `Clip.scale`; one collective for all matrices in `work`."""
        for device in dict.fromkeys(weight.device for *_, weight in work):
            here = [(slot, grad) for slot, _, grad, weight in work if weight.device == device]
            squares = [linalg.square_sum(grad).view(1) for _, grad in here]
            tasks = [Task(slot.layout, ask(Sum(s)), 1, slot.name) for (slot, _), s in zip(here, squares, strict=True)]
            for (_, grad), square in zip(here, run_all(tasks, device, len(tasks)), strict=True):
                grad.mul_((self.largest / (square.sqrt() + 1e-6)).clamp_max(1.0))


CLIPS: dict[str, type[Clip]] = {"two_pass": TwoPass, "per_tensor": PerTensor, "previous": Previous}


def make_clip(name: str | None, largest: float | None, optimizer: Any) -> Clip | None:
    """The clip called `name`, None for none."""
    return None if name is None else CLIPS[name](float(largest), optimizer)
