"""torch's AdamW, fused, in the place of our optimizer: what a plan is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lowrank_ds.plan.holding import hosts
from lowrank_ds.plan.ours import Traffic, Update
from lowrank_ds.plan.settings import Settings


class AdamW:
    """One rank's state: two arrays of the dtype of what it is handed, and a step of 4 bytes for each tensor."""

    projectors = table = 0

    def __init__(self, settings: Settings, rank: int) -> None:
        held = hosts(settings, rank)
        self.moments = sum(2 * math.prod(host.shape) * settings.handed.itemsize + 4 for host in held)

    def update(self, names: Iterable[str] | None = None) -> Update:
        """In place, and alone."""
        return Update(0, Traffic())

    def refresh(self) -> None:
        """It has no bases."""
