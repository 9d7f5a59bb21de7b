"""What an engine keeps, gathers and sends around a model's forward and backward: the events a plan is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from lowrank_ds.plan.ledger import Ledger
from lowrank_ds.plan.ours import Traffic, Update
from lowrank_ds.plan.settings import Settings

ROOT = "root"  # the unit of everything that is in no decoder layer


def unit_of(name: str) -> str:
    """The unit that `fully_shard` on each decoder layer and on the model puts a parameter in."""
    return ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else ROOT


class Engine:
    """One rank. Subclasses write to `ledger` and `traffic` what happens at each event; here nothing does.

    update: answers what updating some parameters takes (None: all).
    """

    def __init__(self, settings: Settings, ledger: Ledger, update: Callable[[Iterable[str] | None], Update]) -> None:
        self.settings, self.ledger, self.traffic, self.ours = settings, ledger, Traffic(), Traffic()
        self._update = update
        self.item = settings.itemsize
        self.numel = {name: math.prod(shape) for name, shape in settings.shapes.items()}
        self.members: dict[str, list[str]] = {}
        for name in settings.shapes:
            self.members.setdefault(unit_of(name), []).append(name)

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes of whole parameters in the model's dtype."""
        return self.item * sum(self.numel[name] for name in names)

    def update(self, names: Iterable[str] | None = None) -> None:
        """Update these parameters: temporaries, and what our optimizer sends."""
        found = self._update(names)
        self.ledger.touch("buffers", found.temporaries)
        self.ours.join(found.traffic)

    # -- events -----------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """What is alive between steps."""

    def open(self, unit: str, backward: bool) -> None:
        """A unit's forward or backward begins."""

    def close(self, unit: str, backward: bool) -> None:
        """It has ended."""

    def need(self, name: str) -> None:
        """A module uses its weight `name`."""

    def release(self, name: str) -> None:
        """It no longer does."""

    def forward_done(self) -> None:
        """The model has returned its loss."""

    def gradient(self, name: str) -> None:
        """The backward has computed the whole gradient of a parameter."""

    def backward_done(self) -> None:
        """All gradients are there."""

    def step(self) -> None:
        """Update the weights and free the gradients."""


class Waiting:
    """Layer-wise updates: gradients wait until they are together larger than the largest parameter (`backward.py`).

    free: called with the names whose gradients are freed.
    """

    def __init__(self, engine: Engine, free: Callable[[list[str]], None]) -> None:
        self.engine, self.free = engine, free
        self.names: list[str] = []
        self.size, self.largest = 0, max(engine.numel.values())

    def arrived(self, name: str) -> None:
        """A gradient is complete."""
        if self.names and self.size + self.engine.numel[name] > self.largest:
            self.flush()
        self.names.append(name)
        self.size += self.engine.numel[name]
        if self.size >= self.largest:
            self.flush()

    def flush(self) -> None:
        """Update what waits and free its gradients."""
        names, self.names, self.size = self.names, [], 0
        if names:
            self.engine.update(names)
            self.free(names)
