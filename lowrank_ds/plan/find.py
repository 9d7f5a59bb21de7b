"""The cheapest configurations that fit: engine x rank x layer-wise x activation checkpointing x codes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lowrank_ds.plan.calculate import Plan, Planner
from lowrank_ds.plan.settings import ENGINES, Settings

RECOMPUTED = 1 / 3  # activation checkpointing: one forward more beside a forward and a backward of twice its work


@dataclass(frozen=True)
class Found:
    """A configuration that fits.

    traffic: bytes of a step, the engine's and ours. compute: work of forwards and backwards, 1 without checkpointing.
    codes: how much state is kept in fewer bits than fp32: 0 (none), 1 (moments or projectors), 2 (both).
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
    """The rank that was asked for, or a quarter, an eighth and a sixteenth of the width.

    With few key and value heads some of these are too large; where all are, parts of the smallest side instead.
    """
    if not settings.projects:
        return [0]
    if settings.rank is not None:
        return [settings.rank]
    smallest = min(min(settings.shapes[name]) for name in settings.matrices)
    for width in (settings.config["hidden_size"], smallest):
        ranks = {max(1, width // part) for part in (4, 8, 16)}
        if min(ranks) < smallest:
            break
    return sorted((rank for rank in ranks if rank < smallest), reverse=True)


def _codes(settings: Settings) -> list[dict[str, str]]:
    """Options that keep state in fewer bits, the exact ones first."""
    known = {**settings.algorithm.OPTIONS, **settings.options} if settings.algorithm else {}
    coded: list[dict[str, str]] = [{}]
    stored = settings.projects and known.get("subspace") != "gaussian"
    for option, code in (("moments", "8bit"), ("projector_dtype", "4bit"))[: 1 + stored]:
        if known.get(option) == "fp32" and option not in settings.options:
            coded.append({**coded[-1], option: code})
    return coded


def candidates(settings: Settings, engine: str, rank: int) -> Iterator[Settings]:
    """What `Settings` accepts of an engine and a rank, what costs least first."""
    for kept, layerwise in itertools.product(_codes(settings), (False, True)):
        try:
            yield dataclasses.replace(
                settings, engine=engine, rank=rank if settings.projects else settings.rank, layerwise=layerwise,
                options={**settings.options, **kept}, shard=settings.shard if engine == "hsdp" else 0,
            )  # fmt: skip
        except ValueError:
            continue  # an engine that cannot


def find(
    settings: Settings, memory: int, progress: Callable[[str], None], engines: Sequence[str] = ENGINES
) -> tuple[list[Found], Plan | None]:
    """(what fits `memory` bytes, the cheapest first; the smallest of all where nothing does).

    Of an engine and a rank only what is needed: checkpointing, layer-wise updates and codes are tried where it does not
    fit without. Checkpointing comes first (it costs time, codes cost exactness), then both.
    """
    found: list[Found] = []
    smallest: Plan | None = None
    for engine, rank in itertools.product(engines, ranks_of(settings)):
        for candidate in candidates(settings, engine, rank):
            progress(f"{engine}, rank {rank} {dict(candidate.options)}")
            plans = _both(Planner(candidate))
            smallest = min([*plans, *([smallest] if smallest else [])], key=lambda plan: plan.total)
            fitting = [plan for plan in plans if plan.total <= memory]
            found += [_found(plan) for plan in fitting[:1]]
            if fitting and not fitting[0].settings.checkpointing:
                break
    return sorted(found, key=lambda one: one.cost), smallest


def _both(planner: Planner) -> list[Plan]:
    """Without and with activation checkpointing."""
    plans = []
    for planner.settings in [dataclasses.replace(planner.settings, checkpointing=on) for on in (False, True)]:
        plans.append(planner.plan(refresh=False))
    return plans


def _found(plan: Plan) -> Found:
    codes = sum(dtype.endswith("bit") for dtype in plan.settings.stored)
    traffic = plan.engine.sizes.total() + plan.ours.sizes.total()
    return Found(plan, traffic, 1 + RECOMPUTED * plan.settings.checkpointing, codes)
