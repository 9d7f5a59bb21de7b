"""DeepSpeed ZeRO-3 (0.19, runtime/zero/stage3.py), ordinary and layer-wise."""

from __future__ import annotations

from typing import Any

from lowrank_ds.plan.coordinator import Coordinator
from lowrank_ds.plan.engine import Engine, Waiting


class Uses(Engine):
    """Writes down in which order parameters are used: what ZeRO-3's coordinator learns in its first step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.order: list[str] = []

    def need(self, name: str) -> None:
        """One use."""
        self.order.append(name)

    def step(self) -> None:
        """Nothing is of interest here."""


class Gathering(Engine):
    """One rank of ZeRO-3.

    Beside its pieces of the weights a rank keeps their fp32 copy, a buffer for its pieces of the gradients and a bucket
    for whole ones; layer-wise neither. A gradient goes into the bucket, and out of it through a copy. order: see
    `Coordinator`.
    """

    def __init__(self, *arguments: Any, order: list[str]) -> None:
        super().__init__(*arguments)
        self.weights = Coordinator(self.settings, self.ledger, self.traffic, order)
        self.part = sum(self.weights.pieces.values())
        self.filled: list[str] = []
        self.whole: list[str] = []  # larger than what the bucket has left: they stay where they are
        self.waiting = Waiting(self, self._free)

    def start(self) -> None:
        """What is kept between steps."""
        self.ledger.add("weights", self.part * self.item)
        if not self.settings.layerwise:
            self.ledger.add("master weights", 4 * self.part)
            self.ledger.add("gradients", self.part * self.item)
            self.ledger.add("buffers", self.settings.zero.reduce_bucket_size * self.item)
        self.weights.gather_small()

    def need(self, name: str) -> None:
        """Gather it, and some of those to come."""
        self.weights.fetch(name)

    def release(self, name: str) -> None:
        """Free it, unless it is used again soon."""
        self.weights.release(name)

    # -- gradients --------------------------------------------------------------------------------------------------
    def gradient(self, name: str) -> None:
        """Whole; layer-wise it is scattered at once."""
        self.ledger.add("gradients", self.bytes_of([name]))
        if self.settings.layerwise:
            self._scatter(name)
            return
        size, alive = self.settings.zero.reduce_bucket_size, sum(self.numel[n] for n in self.filled)
        if self.filled and alive + self.numel[name] > size:
            self._reduce()
            alive = 0
        if alive + self.numel[name] <= size:
            self.ledger.drop("gradients", self.bytes_of([name]))
        else:
            self.whole.append(name)
        self.filled.append(name)

    def _scatter(self, name: str) -> None:
        padded, part = self.weights.padded[name], self.weights.pieces[name] * self.item
        if padded > self.bytes_of([name]):
            self.ledger.add("gradients", padded)
            self.ledger.drop("gradients", self.bytes_of([name]))
        self.ledger.add("gradients", part)
        self.ledger.drop("gradients", padded)
        self.traffic.add("reduce-scatter", padded)
        self.waiting.arrived(name)

    def _free(self, names: list[str]) -> None:
        self.ledger.drop("gradients", sum(self.weights.pieces[n] for n in names) * self.item)

    def _reduce(self) -> None:
        """Reduce-scatter a copy of what is in the bucket into the gradients' buffer."""
        names, self.filled = self.filled, []
        if not names:
            return
        size = sum(self.weights.padded[name] for name in names)
        if len(names) > 1 or size > self.bytes_of(names):
            self.ledger.touch("buffers", size)
        self.traffic.add("reduce-scatter", size)
        self.ledger.drop("gradients", self.bytes_of(self.whole))
        self.whole.clear()

    def backward_done(self) -> None:
        """Reduce what is left."""
        self._reduce()
        self.waiting.flush()

    # -- the step ---------------------------------------------------------------------------------------------------
    def step(self) -> None:
        """All weights are freed; gradients are joined and made fp32; the update; small weights are gathered again."""
        self.weights.free_all()
        if not self.settings.layerwise:
            joined, exact = self.part * self.item, 4 * self.part
            self.ledger.add("gradients", joined)
            if self.item < 4:
                self.ledger.add("gradients", exact)
                self.ledger.drop("gradients", joined)
            self.update()
            self.ledger.drop("gradients", exact)
        self.weights.gather_small()
