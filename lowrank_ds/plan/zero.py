"""DeepSpeed ZeRO-1 and ZeRO-2 (0.19, runtime/zero/stage_1_and_2.py)."""

from __future__ import annotations

from typing import Any

from lowrank_ds.plan.engine import Engine
from lowrank_ds.plan.holding import flat_size


class Partitioned(Engine):
    """One rank of ZeRO-1 or ZeRO-2.

    Weights stay whole, in one flat buffer; an fp32 copy of this rank's part is what the optimizer is handed. Gradients
    are copied into one or two buckets (overlap_comm), which live during the backward, and reduced when one is full;
    those of parameters that begin in this rank's part are then kept, whole. ZeRO-1 without overlap_comm reduces after
    the backward, so that all gradients are alive at its end.
    """

    def __init__(self, *arguments: Any, rank: int) -> None:
        super().__init__(*arguments)
        zero, world = self.settings.zero, self.settings.shards
        self.flat, self.rank = flat_size(self.settings), rank
        self.part = self.flat // world
        self.eager = zero.overlap_comm or self.settings.engine == "zero2"
        self.buckets = zero.reduce_bucket_size * self.item * (2 if zero.overlap_comm else 1)
        starts, start = {}, 0
        for name, numel in self.numel.items():
            starts[name], start = (start, start + numel), start + numel
        first = rank * self.part
        self.kept = {name for name, (a, b) in starts.items() if first <= a < first + self.part or a < first < b}
        self.filled: list[str] = []
        self.late: list[str] = []
        self.begun = False
        self.own = 0  # bytes of gradients kept for this rank's part

    def start(self) -> None:
        """The flat buffer, and the fp32 copy of this rank's part."""
        self.ledger.add("weights", self.flat * self.item)
        self.ledger.add("master weights", 4 * self.part)

    # -- gradients --------------------------------------------------------------------------------------------------
    def gradient(self, name: str) -> None:
        """Into the bucket, which the first one makes, or kept until the backward is over."""
        self.ledger.add("gradients", self.bytes_of([name]))
        if not self.begun:
            self.ledger.add("buffers", self.buckets)
            self.begun = True
        if self.eager:
            self._reduce_one(name)
        else:
            self.late.append(name)

    def _reduce_one(self, name: str) -> None:
        size = self.settings.zero.reduce_bucket_size
        if self.filled and sum(self.numel[n] for n in self.filled) + self.numel[name] > size:
            self._reduce()
        if self.numel[name] <= size:
            self.ledger.drop("gradients", self.bytes_of([name]))
        self.filled.append(name)

    def _reduce(self) -> None:
        """All-reduce a copy of what is in the bucket; keep what is this rank's."""
        names, self.filled = self.filled, []
        if not names:
            return
        size = self.bytes_of(names)
        self.ledger.touch("buffers", size)
        self.traffic.add("all-reduce", size)
        mine = [name for name in names if name in self.kept]
        if mine and not self.own:
            self.own = self.bytes_of(self.kept)
            self.ledger.add("gradients", self.own)
        for name in names:
            if self.numel[name] > self.settings.zero.reduce_bucket_size:
                self.ledger.drop("gradients", self.bytes_of([name]))

    def backward_done(self) -> None:
        """Reduce what is left; the buckets are freed."""
        for name in self.late:
            self._reduce_one(name)
        self.late.clear()
        self._reduce()
        self.ledger.drop("buffers", self.buckets)
        self.begun = False

    # -- the step ---------------------------------------------------------------------------------------------------
    def step(self) -> None:
        """The gradients of this rank's part, joined and then in fp32; the update; all parts are gathered."""
        joined, exact = self.part * self.item, 4 * self.part
        self.ledger.add("gradients", joined)
        if self.item < 4:
            self.ledger.add("gradients", exact)
            self.ledger.drop("gradients", joined)
        self.ledger.drop("gradients", self.own)
        self.own = 0
        self.update()
        self.ledger.drop("gradients", exact)
        self.traffic.add("all-gather", self.flat * self.item)
