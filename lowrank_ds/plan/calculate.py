"""A plan: memory by category at the worst moment, traffic of a step, the micro-batch that fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

from lowrank_ds.plan import ours
from lowrank_ds.plan.adamw import AdamW
from lowrank_ds.plan.engine import Engine
from lowrank_ds.plan.fsdp import FullyShard
from lowrank_ds.plan.ledger import Ledger, Moment
from lowrank_ds.plan.ours import Ours, Traffic, Update
from lowrank_ds.plan.replicated import Replicated
from lowrank_ds.plan.settings import ADAMW, Settings
from lowrank_ds.plan.timeline import Step
from lowrank_ds.plan.zero import Partitioned
from lowrank_ds.plan.zero3 import Gathering, Uses

GIB = 1 << 30
_MOST = 4096  # sequences a rank: where the search for a micro-batch ends


@dataclass(frozen=True)
class Plan:
    """What one configuration takes on the rank that needs most.

    Attributes:
        settings: the configuration.
        rank: that one, among those that share the model.
        phase: of the step, in which its worst moment is.
        peak: the worst moment, bytes by category.
        phases: the worst moment of each phase.
        state: {"moments", "projectors"} bytes.
        engine: the engine's traffic in an ordinary step.
        ours: the optimizer's.
        refresh: our part of a step that renews all bases, its traffic and what it needs meanwhile; None: there are
            none, or nobody asked.
    """

    settings: Settings
    rank: int
    phase: str
    peak: Moment
    phases: dict[str, Moment]
    state: dict[str, int]
    engine: Traffic
    ours: Traffic
    refresh: Update | None

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        return self.peak.total


class Planner:
    """Plans one configuration, and the same with other micro-batches: the optimizer is looked at once.

    Raises ValueError, from `Settings` or from the optimizer's own checks of its options.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        ranks = {0}
        if settings.recipe != ADAMW:
            built, _alive = ours.build(settings)
            ranks = {ours.largest_rank(settings, built)}
        if settings.engine in ("zero1", "zero2"):
            ranks.add(settings.shards - 1)  # its gradients come first, while all activations are there
        kind: Any = AdamW if settings.recipe == ADAMW else Ours
        self.optimizers = {rank: kind(settings, rank) for rank in sorted(ranks)}

    def plan(self, micro_batch: int | None = None, refresh: bool = True) -> Plan:
        """The plan.

        Args:
            micro_batch: sequences of a rank, in place of the settings'.
            refresh: look at a step that renews bases too.
        """
        settings = self.settings
        if micro_batch is not None:
            settings = dataclasses.replace(settings, micro_batch=micro_batch)
        found = [self._of(settings, rank, refresh) for rank in self.optimizers]
        return max(found, key=lambda plan: plan.total)

    def _of(self, settings: Settings, rank: int, refresh: bool) -> Plan:
        """The plan of one rank."""
        ledger, optimizer = Ledger(), self.optimizers[rank]
        engine = self._engine(settings, ledger, rank)
        engine.start()
        ledger.add("moments", optimizer.moments)
        ledger.add("projectors", optimizer.projectors)
        ledger.add("buffers", optimizer.table)
        Step(engine, ledger).run()
        phase, peak = ledger.peak
        state = {"moments": optimizer.moments, "projectors": optimizer.projectors}
        renewed = optimizer.refresh() if refresh and settings.projects else None
        return Plan(settings, rank, phase, peak, ledger.peaks, state, engine.traffic, engine.ours, renewed)

    def _engine(self, settings: Settings, ledger: Ledger, rank: int) -> Engine:
        update = self.optimizers[rank].update
        kinds = {"ddp": Replicated, "fsdp2": FullyShard, "hsdp": FullyShard}
        kinds |= dict.fromkeys(("zero1", "zero2"), partial(Partitioned, rank=rank))
        if settings.engine == "zero3":
            scratch = Ledger()
            uses = Uses(settings, scratch, update)
            Step(uses, scratch).run()
            kinds["zero3"] = partial(Gathering, order=uses.order)
        return kinds[settings.engine](settings, ledger, update)

    def largest_micro_batch(self, memory: int) -> int:
        """How many sequences fit `memory` bytes; 0 if not even one does."""
        fits = lambda size: self.plan(size, refresh=False).total <= memory
        if not fits(1):
            return 0
        low, high = 1, 2
        while high <= _MOST and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low
