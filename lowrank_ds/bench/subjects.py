"""A contender at work: its optimizer, the weights it updates and the gradients it is given before every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ds.bench import held
from lowrank_ds.bench.contenders import Contender
from lowrank_ds.bench.tracking import Tracker

Shapes = Mapping[str, Sequence[int]]


def parameters(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Parameter]:
    """Random weights of these shapes, std 0.02 as a LLaMA's, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    make = lambda shape: torch.randn(tuple(shape), generator=generator).mul_(0.02).to(device, dtype)
    return {name: nn.Parameter(make(shape)) for name, shape in shapes.items()}


def gradients(shapes: Shapes, dtype: torch.dtype, device: torch.device, seed: int = 1) -> dict[str, Tensor]:
    """Random gradients of these shapes, the same at every call with a seed."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda shape: torch.randn(tuple(shape), generator=generator).mul_(1e-2).to(device, dtype)
    return {name: make(shape) for name, shape in shapes.items()}


class Subject:
    """A contender on some weights.

    Args:
        contender: who.
        params: {name: weight}; may be shared by subjects.
        grads: {name: gradient}; may be shared by subjects: no contender writes to them (`untouched`).
        projected: names of those to project.
        rank, gap: of its subspaces, and steps between their refreshes.
    """

    def __init__(
        self,
        contender: Contender,
        params: dict[str, nn.Parameter],
        grads: dict[str, Tensor],
        projected: Sequence[str],
        rank: int,
        gap: int,
    ) -> None:
        self.contender, self.params, self.grads = contender, params, grads
        inside = [(name, params[name]) for name in projected]
        beside = [(name, p) for name, p in params.items() if name not in set(projected)]
        self.optimizer = contender.build(inside, beside, rank, gap)

    def prepare(self) -> None:
        """Hand over the gradients. Before every step: flora-opt drops them, and then its next step would do nothing."""
        for name, p in self.params.items():
            p.grad = self.grads[name]

    def step(self) -> None:
        """One step of the optimizer."""
        self.optimizer.step()

    def release(self) -> None:
        """Take the gradients away again."""
        for p in self.params.values():
            p.grad = None

    def first_step(self, run: Callable[[Callable[[], None]], Any] = lambda step: step()) -> Any:
        """The first step, done by `run`, whose answer is returned.

        Raises:
            RuntimeError: it leaves every weight as it was: there would be nothing to time.
        """
        before = {name: p.detach().clone() for name, p in self.params.items()}
        self.prepare()
        found = run(self.step)
        if all(torch.equal(before[name], p.detach()) for name, p in self.params.items()):
            raise RuntimeError(f"{self.contender.name}: a step changed no weight; it cannot be measured")
        return found

    def peak(self) -> int:
        """Bytes of temporaries alive at the worst moment of one step, beside weights, gradients and state."""
        self.prepare()
        tracker = Tracker()
        self._name(tracker)
        with tracker:
            self.step()
        self._name(tracker)  # state that this step made
        return tracker.peak().own["other"]

    def _name(self, tracker: Tracker) -> None:
        tracker.name("weights", (p.detach() for p in self.params.values()))
        tracker.name("gradients", self.grads.values())
        tracker.name("state", held.tensors(self.optimizer))


def fingerprint(grads: Mapping[str, Tensor]) -> list[float]:
    """What changes when a gradient does."""
    return [g.double().sum().item() for g in grads.values()]
