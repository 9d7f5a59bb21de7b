"""FSDP2 and HSDP: `fully_shard` on each decoder layer and on the model (torch 2.13, _fully_shard/).

Sizes are those of equal parts: FSDP2 pads each parameter's rows to a multiple of the ranks.
"""

from __future__ import annotations

import math
from typing import Any

from lowrank_ds.plan.engine import ROOT, Engine, Waiting, unit_of
from lowrank_ds.plan.holding import ceil_div


class FullyShard(Engine):
    """One rank of FSDP2 or, where `settings.shards` are fewer than all ranks, HSDP.

    Gathered for a unit: a buffer, and out of it the parameters. In the forward the buffer lives until the next unit has
    copied out of its own; in the backward the next unit is gathered while this one computes. The root stays gathered
    from its forward to the end of the backward, and so do its gradients. Gradients are copied into the buffer that is
    reduce-scattered, which lives until the next unit's. Under HSDP torch holds what was all-reduced until the backward
    is over (`_all_reduce_state`), so that layer-wise updates free gradients only then.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        ranks = self.settings.shards
        self.mine = {name: self.item * ceil_div(s[0], ranks) * math.prod(s[1:])
                     for name, s in self.settings.shapes.items()}  # fmt: skip
        self.part = {unit: sum(self.mine[n] for n in names) for unit, names in self.members.items()}
        self.whole = {unit: size * ranks for unit, size in self.part.items()}
        self.layers = [unit for unit in self.members if unit != ROOT]
        self.gathered: dict[str, int] = {}  # bytes of a buffer that is gathered into, by unit
        self.scattered = 0  # bytes of the last buffer that was reduce-scattered
        self.unreduced = dict.fromkeys(self.members, 0)
        self.left: dict[str, set[str]] = {}  # parameters whose sharded gradients are alive, by unit
        self.reducing, self.held = False, 0  # HSDP: bytes of gradients that are used, and kept all the same
        self.waiting = Waiting(self, self._free)

    def start(self) -> None:
        """The sharded parameters."""
        self.ledger.add("weights", sum(self.part.values()))

    # -- gathering --------------------------------------------------------------------------------------------------
    def _gather(self, unit: str) -> None:
        if unit not in self.gathered:
            size = self.whole[unit] if self.settings.shards > 1 else 0  # one rank copies its weights at once
            self.gathered[unit] = size
            self.ledger.add("buffers", size)
            self.traffic.add("all-gather", size)

    def _free_buffer(self, unit: str) -> None:
        self.ledger.drop("buffers", self.gathered.pop(unit))

    def open(self, unit: str, backward: bool) -> None:
        """Gather it; copy the parameters out."""
        if backward and unit == ROOT:
            self.reducing = True
            self._gather(self.layers[-1])  # nothing else: it is still there
            return
        before = [other for other in self.gathered if other != unit]
        self._gather(unit)
        if not backward:
            for other in before:
                self._free_buffer(other)
        self.ledger.add("buffers", self.whole[unit])
        if backward:
            self._free_buffer(unit)
            index = self.layers.index(unit)
            if index:
                self._gather(self.layers[index - 1])

    def close(self, unit: str, backward: bool) -> None:
        """Free the parameters; in the backward, reduce the gradients."""
        if backward:
            self._reduce(unit)
        elif unit != ROOT:
            self.ledger.drop("buffers", self.whole[unit])

    def forward_done(self) -> None:
        """The root's forward frees the last unit's buffer."""
        for unit in list(self.gathered):
            self._free_buffer(unit)

    # -- gradients --------------------------------------------------------------------------------------------------
    def gradient(self, name: str) -> None:
        """Whole, until its unit is through."""
        unit = unit_of(name)
        self.unreduced[unit] += self.bytes_of([name])
        self.ledger.add("gradients", self.bytes_of([name]))

    def _reduce(self, unit: str) -> None:
        self.ledger.drop("buffers", self.whole[unit])
        self.ledger.drop("buffers", self.scattered)
        self.scattered = self.whole[unit]
        self.ledger.add("buffers", self.scattered)
        self.ledger.drop("gradients", self.unreduced[unit])
        self.ledger.add("gradients", self.part[unit])
        self.traffic.add("reduce-scatter", self.whole[unit] if self.settings.shards > 1 else 0)
        if self.settings.shards < self.settings.world:
            self.traffic.add("all-reduce", self.part[unit])
        self.unreduced[unit] = 0
        self.left[unit] = set(self.members[unit])
        if self.settings.layerwise:
            for name in self.members[unit]:
                self.waiting.arrived(name)

    def _free(self, names: list[str]) -> None:
        """Gradients of a unit are views of one buffer: it goes with the last of them."""
        for name in names:
            unit = unit_of(name)
            self.left[unit].discard(name)
            if not self.left[unit]:
                del self.left[unit]
                if self.reducing and self.settings.shards < self.settings.world:
                    self.held += self.part[unit]
                else:
                    self.ledger.drop("gradients", self.part[unit])

    def backward_done(self) -> None:
        """The root comes last."""
        self._reduce(ROOT)
        self.ledger.drop("buffers", self.scattered)
        self.scattered, self.reducing = 0, False
        self.ledger.drop("gradients", self.held)
        self.held = 0
        self.waiting.flush()

    def step(self) -> None:
        """Update what is left; gradients are set to None."""
        if self.left:
            self.update()
            self._free(list(self.numel))
