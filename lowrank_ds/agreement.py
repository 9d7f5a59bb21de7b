"""Whether ranks that train the same matrix still do the same: asked in the survey that precedes every new basis.

A rank contributes its facts (x) to sums over all who share the matrix, replicas included: n, sum x, sum x^2. All agree
just where n sum x^2 = (sum x)^2. The sums are the same on all ranks, so all of them raise, before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_ds import linalg
from lowrank_ds.collectives import Task, run_all
from lowrank_ds.failures import RankError
from lowrank_ds.requests import Steps, Sum, ask
from lowrank_ds.subspace import CAPTURED

if TYPE_CHECKING:
    from lowrank_ds.slots import Slot

# What ranks must agree on: {name: what it means when they do not}.
_SINCE = "they trained apart for some time, so their weights differ."
FACTS: dict[str, str] = {
    "learning rate": "a scheduler that follows each rank's own loss must be given the mean over ranks.",
    "weight decay": "give every rank the same param groups.",
    "step number": "they did not load the same checkpoint, or some left a step out; " + _SINCE,
    "number of bases": "they did not load the same checkpoint; " + _SINCE,
    "number of Diagnostics that watch": "Diagnostics(optimizer) was built on some ranks only; build it on all of them.",
    "number of skipped updates": (
        "a gradient was not finite on some replicas only (a hardware fault, or a hook that runs on one rank); " + _SINCE
    ),
}
NOTES = 1 + CAPTURED
_ROUNDING = 1e-11  # of sums of equal fp64 numbers over some thousand ranks; sums of whole numbers are exact


def survey(work: Sequence[tuple[Slot, dict, Tensor | None, Tensor]], facts: Sequence) -> list[tuple]:
    """(unusable, non-zero, skipped so far, notes) of each matrix over all ranks: one all-reduce, one read for all.

    notes: (stability, *captured), what the last refreshes left for the next: the mean of `subspace.stability`, and what
    `subspace.remember` keeps; zeros where these are not kept.

    One all-reduce more where there are replicas: they exchange new bases, so all must make one, or none.

    Args:
        work: (slot, group, gradient entries (numel,) or None, weight entries (numel,)) of each matrix. facts: of each,
            all but the last of FACTS.

    Raises:
        RankError: the ranks that share a matrix do not agree.
    """
    found: dict[int, list[float]] = {}
    for device in dict.fromkeys(weight.device for *_, weight in work):
        here = [i for i, (*_, weight) in enumerate(work) if weight.device == device]
        found |= dict(zip(here, _sums([work[i] for i in here], [facts[i] for i in here], device), strict=True))
    for i, (slot, *_) in enumerate(work):
        check(slot.name, found[i][: -1 - NOTES], [*facts[i], found[i][-1]])
    return [
        (sums[0], sums[1], sums[-1], tuple(note / max(sums[2], 1.0) for note in sums[-1 - NOTES : -1]))
        for sums in (found[i] for i in range(len(work)))
    ]


def _sums(work: Sequence, facts: Sequence, device: torch.device) -> list[list[float]]:
    """[*sums over all ranks of `contribution`, sums of notes, updates skipped here] of each matrix on a device."""
    told = torch.tensor(facts, dtype=torch.float64).to(device)
    tasks = [
        Task(slot.layout, _contribute(slot, grad, mine), 1, slot.name)
        for (slot, _, grad, _), mine in zip(work, told, strict=True)
    ]
    sums = run_all(tasks, device, len(tasks))
    layouts = [slot.layout for slot, *_ in work]
    copied = [i for i, layout in enumerate(layouts) if layout.mirror is not None]
    tasks = [Task(layouts[i].mirror, ask(Sum(sums[i])), 1, tasks[i].name) for i in copied]
    for i, total in zip(copied, run_all(tasks, device, len(tasks)), strict=True):
        sums[i] = total
    skipped = torch.stack([slot.state["skipped"].double() for slot, *_ in work])
    return torch.cat([torch.stack(sums), skipped.view(-1, 1)], 1).tolist()


def _contribute(slot: Slot, grad: Tensor | None, facts: Tensor) -> Steps:
    """Ask for the sum of [*`contribution`, *notes] over the ranks that share a matrix.

    grad (numel,): None when all of it is in the sums of micro-batches.
    """
    sums, skipped = slot.state.get("accumulated_peak"), slot.state["skipped"]
    mine = torch.zeros_like(skipped) if grad is None else linalg.peak(grad)
    mine = mine if sums is None else torch.maximum(mine, sums)
    seen = torch.stack([~linalg.is_usable(mine), mine != 0])
    holds = slot.layout.numel > 0  # a rank without entries may not know what the refreshes left
    notes = torch.zeros(NOTES, dtype=torch.float64, device=skipped.device)
    if holds and "stability" in slot.state:
        notes[0] = slot.state["stability"].double().mean()
    if holds and "captured" in slot.state:
        notes[1:] = slot.state["captured"]
    return (yield Sum(torch.cat([contribution(seen, facts, skipped, holds), notes])))


def contribution(seen: Tensor, facts: Tensor, skipped: Tensor, takes_part: bool) -> Tensor:
    """What one rank adds to the sums, fp64 (3 + 2 facts,): [unusable, non-zero, n, facts, squares of facts].

    Args:
        seen: unusable and non-zero, (2,). facts: all but the last of FACTS, fp64. skipped: the last of them, 0-d.
        takes_part: whether this rank holds entries: one that holds none knows nothing.
    """
    own = torch.cat([facts, skipped.double().view(1)])
    told = torch.cat([torch.ones_like(own[:1]), own, own.square()])
    return torch.cat([seen.double(), told if takes_part else torch.zeros_like(told)])


def check(name: str, sums: Sequence[float], own: Sequence[float]) -> None:
    """Raise RankError if the ranks that share the matrix `name` do not agree.

    Args:
        sums: `contribution`s of all of them, added up. own: this rank's facts, for the message.
    """
    count, facts, squares = sums[2], sums[3 : 3 + len(FACTS)], sums[3 + len(FACTS) :]
    for (fact, why), total, square, mine in zip(FACTS.items(), facts, squares, own, strict=True):
        if _differ(count, total, square):
            raise RankError(
                f"{name}: the {count:.0f} ranks that share it have a different {fact}: {mine:g} here, on average "
                f"{total / count:g}. Nothing was updated. Most likely {why} End all ranks, mend that, and start again "
                "from the last checkpoint."
            )


def _differ(count: float, total: float, square: float) -> bool:
    """Whether `count` numbers with this sum and sum of squares are not all the same."""
    if not total.is_integer() or not square.is_integer() or square > 2**53:
        return count * square - total * total > _ROUNDING * total * total
    return int(count) * int(square) != int(total) ** 2  # one of many steps more on one of many ranks is seen
