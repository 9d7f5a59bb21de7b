"""Which whole parameters are on a rank under ZeRO-3 (0.19, runtime/zero/partitioned_param_coordinator.py)."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_ds.plan.holding import ceil_div
from lowrank_ds.plan.ledger import Ledger
from lowrank_ds.plan.settings import Settings

if TYPE_CHECKING:
    from lowrank_ds.plan.ours import Traffic


@dataclass
class Batch:
    """Parameters that are gathered together: through a buffer, out of which all are copied when one is needed.

    waiting: those that no module has asked for; the buffer lives until there are none. One alone is not copied.
    """

    waiting: set[str]
    size: int
    alone: bool
    copied: bool = False


class Coordinator:
    """Gathers a parameter when a module uses it, and with it some of those to come; frees it after the use.

    order: all uses of a step, forward and backward. Not freed: small parameters, those used again within
    stage3_max_reuse_distance entries, and those whose next use a prefetch has passed already.
    """

    def __init__(self, settings: Settings, ledger: Ledger, traffic: Traffic, order: list[str]) -> None:
        self.zero, self.ledger, self.traffic, item = settings.zero, ledger, traffic, settings.itemsize
        self.numel = {name: math.prod(shape) for name, shape in settings.shapes.items()}
        self.pieces = {name: ceil_div(numel, settings.shards) for name, numel in self.numel.items()}
        self.padded = {name: item * size * settings.shards for name, size in self.pieces.items()}
        self.copy = {name: item * numel for name, numel in self.numel.items()}
        self.small = [n for n, numel in self.numel.items() if numel <= self.zero.stage3_param_persistence_threshold]
        self.order, self.now, self.queue = order, 0, deque(enumerate(order))
        self.before = [0, *itertools.accumulate(self.numel[name] for name in order)]  # entries used before each use
        self.uses: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(order):
            self.uses[name].append(index)
        self.seen = dict.fromkeys(self.numel, -1)  # the last use that the queue has passed
        self.batches: dict[str, Batch] = {}  # of parameters on their way
        self.here: dict[str, int] = {}  # bytes of whole parameters

    def _gather(self, names: list[str]) -> None:
        if not names:
            return
        size = sum(self.padded[name] for name in names)
        self.traffic.add("all-gather", size)
        self.ledger.add("buffers", size)
        batch = Batch(set(names), size, len(names) == 1)
        self.batches |= dict.fromkeys(names, batch)

    def _land(self, name: str) -> None:
        batch = self.batches.pop(name, None)
        if batch is None:
            return
        if batch.alone:
            self.here[name] = batch.size
            return
        if not batch.copied:
            batch.copied = True
            self.ledger.add("buffers", sum(self.copy[n] for n in batch.waiting))
            self.here |= {n: self.copy[n] for n in batch.waiting}
        batch.waiting.discard(name)
        if not batch.waiting:
            self.ledger.drop("buffers", batch.size)

    def _away(self, name: str) -> bool:
        return name not in self.here and name not in self.batches

    def fetch(self, name: str) -> None:
        """A module is about to use the parameter."""
        if self._away(name):
            self._gather([name])
        self._land(name)
        if self.seen[name] < self.now:
            index, name = self.queue.popleft()
            self.seen[name] = index
        self._prefetch()
        self.now += 1

    def _prefetch(self) -> None:
        alive = sum(self.numel[n] for n in {**self.here, **self.batches})
        limit = min(self.zero.stage3_max_live_parameters - alive, self.zero.stage3_prefetch_bucket_size)
        found: list[str] = []
        size = 0
        while self.queue and size < limit:
            index, name = self.queue.popleft()
            if self._away(name) and name not in found:
                found.append(name)
                size += self.numel[name]
            self.seen[name] = index
        self._gather(found)

    def release(self, name: str) -> None:
        """A module has used the parameter."""
        if name in self.small or name not in self.here or self.seen[name] >= self.now:
            return
        uses = self.uses[name]
        following = bisect.bisect_left(uses, self.now)
        if following < len(uses):
            distance = self.before[uses[following]] - self.before[self.now]
            if distance < self.zero.stage3_max_reuse_distance:
                return
        self._free(name)

    def _free(self, name: str) -> None:
        self.ledger.drop("buffers", self.here.pop(name))

    def gather_small(self) -> None:
        """Parameters below the persistence threshold are gathered once a step."""
        for name in self.small:
            self.traffic.add("all-gather", self.padded[name], 0)
            self.ledger.add("buffers", self.padded[name])
            self.here[name] = self.padded[name]
        self.traffic.calls["all-gather"] += bool(self.small)

    def free_all(self) -> None:
        """Before the weights are updated, and after the last use of a step."""
        for name in list(self.batches):
            self._land(name)
        for name in list(self.here):
            self._free(name)
        self.now, self.queue = 0, deque(enumerate(self.order))
        self.seen = dict.fromkeys(self.numel, -1)
