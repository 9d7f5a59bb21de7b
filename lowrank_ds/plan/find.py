"""The cheapest configurations that fit: engine x rank x layer-wise x activation checkpointing x codes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lowrank_ds.plan.calculate import Plan, Planner
from lowrank_ds.plan.settings import ENGINES, Settings

RECOMPUTED = 1 / 3  # activation checkpointing: one forward more beside a forward and a backward of twice its work


@dataclass(frozen=True)
class Found:
    """A configuration that fits.

    traffic: bytes of a step, the engine's and ours. compute: work of forwards and backwards, 1 without checkpointing.
    codes: how much state is kept in fewer bits: 0 (none), 1 (moments), 2 (the projector too).
    """

    plan: Plan
    traffic: int
    compute: float
    codes: int

    @property
    def cost(self) -> tuple[float, int, int, int]:
        """What is cheaper comes first: no recomputation, exact state, less traffic, the larger rank."""
        return self.compute, self.codes, self.traffic, -(self.plan.settings.subspace_rank or 0)


def ranks_of(settings: Settings) -> list[int]:
    """The rank that was asked for, or a quarter, an eighth and a sixteenth of the width."""
    if not settings.projects:
        return [0]
    if settings.rank is not None:
        return [settings.rank]
    width = settings.config["hidden_size"]
    return sorted({max(1, width // part) for part in (4, 8, 16)}, reverse=True)


def candidates(settings: Settings) -> Iterator[Settings]:
    """All combinations that `Settings` accepts."""
    coded = [{}]
    known = settings.algorithm.OPTIONS if settings.algorithm else {}
    if "moments" in known:
        coded += [{"moments": "8bit"}]
    if "projector_dtype" in known and known.get("subspace") != "gaussian" and settings.projects:
        coded += [{"moments": "8bit", "projector_dtype": "4bit"}]
    for engine, rank, layerwise, kept in itertools.product(ENGINES, ranks_of(settings), (False, True), coded):
        options = {**settings.options, **kept}
        try:
            yield dataclasses.replace(
                settings, engine=engine, rank=rank or None, layerwise=layerwise, options=options,
                shard=settings.shard if engine == "hsdp" else 0,
            )  # fmt: skip
        except ValueError:
            continue  # an engine that cannot


def find(settings: Settings, memory: int, progress: Callable[[str], None]) -> tuple[list[Found], Plan | None]:
    """(what fits `memory` bytes, the cheapest first; the smallest of all where nothing does)."""
    found: list[Found] = []
    smallest: Plan | None = None
    for candidate in candidates(settings):
        progress(f"{candidate.engine} rank {candidate.subspace_rank} {dict(candidate.options)}")
        planner = Planner(candidate)
        for checkpointing in (False, True):
            planner.settings = dataclasses.replace(candidate, checkpointing=checkpointing)
            plan = planner.plan(refresh=False)
            if smallest is None or plan.total < smallest.total:
                smallest = plan
            if plan.total <= memory:
                found.append(_found(plan))
                break  # recomputing would only cost more
    return sorted(found, key=lambda one: one.cost), smallest


def _found(plan: Plan) -> Found:
    options = plan.settings.options
    codes = (options.get("moments") == "8bit") + (options.get("projector_dtype", "fp32") != "fp32")
    traffic = plan.engine.sizes.total() + plan.ours.sizes.total()
    return Found(plan, traffic, 1 + RECOMPUTED * plan.settings.checkpointing, codes)
