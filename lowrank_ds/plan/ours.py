"""The optimizer of one planned rank: the real class on tensors without contents, so that its own code says what it
keeps, sends and needs meanwhile. A new algorithm is planned for without a change here."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ds import noise, slots
from lowrank_ds.bench.tracking import Tracker
from lowrank_ds.job import Job
from lowrank_ds.plan.holding import Host, Rows, hosts
from lowrank_ds.plan.settings import DTYPES, Settings
from lowrank_ds.plan.sizes import Sizes
from lowrank_ds.plan.wire import planned

META = torch.device("meta")


@dataclass
class Traffic:
    """Collectives: {kind: how many}, {kind: bytes}. Bytes: of the whole tensor (all-gather: what comes out;
    reduce-scatter: what goes in; all-reduce: the tensor; all-to-all: what this rank receives)."""

    calls: collections.Counter[str] = field(default_factory=collections.Counter)
    sizes: collections.Counter[str] = field(default_factory=collections.Counter)

    def add(self, kind: str, size: int, calls: int = 1) -> None:
        """`calls` collectives that move `size` bytes together."""
        if size:
            self.calls[kind] += calls
            self.sizes[kind] += size

    def join(self, other: Traffic) -> None:
        """Those of `other` too."""
        self.calls.update(other.calls)
        self.sizes.update(other.sizes)


@dataclass(frozen=True)
class Update:
    """What updating some tensors takes beside weights, gradients and state: bytes at its worst moment, and traffic."""

    temporaries: int
    traffic: Traffic


def build(settings: Settings) -> tuple[Any, list]:
    """(the optimizer as a script would build it, the parameters of the whole model that it is built on)."""
    named = [(n, nn.Parameter(torch.empty(s, dtype=DTYPES[settings.dtype], device=META)))
             for n, s in settings.shapes.items()]  # fmt: skip
    return settings.algorithm(named, **settings.arguments), named


def state_sizes(settings: Settings, held: Sequence[Host], optimizer: Any) -> dict[str, int]:
    """Bytes of {"moments", "projectors"} that the optimizer keeps for these tensors, without making them.

    "projectors": bases and what codes of them need; "moments": everything else, counters too.
    """
    group, found = optimizer.param_groups[0], dict.fromkeys(("moments", "projectors"), 0)
    recipe = optimizer.recipe(group)
    for host in held:
        for at in host.placements:
            if not isinstance(at, Rows) and at.cuts[at.rank + 1] == at.cuts[at.rank]:
                continue  # nothing of it is here; what is kept all the same are counters
            for name, kept, numel in _kept(at, recipe, at.name in optimizer._projected):
                size = numel if kept.entries else math.prod(kept.local)
                found["projectors" if name.startswith("projector") else "moments"] += size * kept.dtype.itemsize
    return found


def _kept(at: Any, recipe: Any, projected: bool) -> Iterable[tuple[str, Any, int]]:
    """(name, how it is stored, entries here) of the state of one parameter."""
    m, n = (1, at.shape[0]) if len(at.shape) == 1 else (at.shape[0], math.prod(at.shape[1:]))
    for _, _, layout in at.matrices(1, m, n):
        for name, kept in slots._all_shapes(layout, recipe, projected).items():
            yield name, kept, layout.numel


class Ours:
    """One rank's optimizer, state made, on gradients that are all there.

    moments, projectors: bytes of state. table: of what random numbers are made of (`noise.py`), kept once it is needed.
    """

    def __init__(self, settings: Settings, rank: int) -> None:
        self.settings, self.rank = settings, rank
        self.held = hosts(settings, rank)
        self.optimizer, self._named = build(settings)
        self._places: dict[str, tuple[dict[str, Any], int]] = {}
        self._sizes, self._known = Sizes(), {}
        self.table = noise._columns(META).nbytes  # made now: a step must not count it among what comes and goes
        self._bind()
        state = [(key, t) for store in self.optimizer.state.values() for key, t in store.items()]
        self.projectors = sum(t.nbytes for key, t in state if key.split("::")[-1].startswith("projector"))
        self.moments = sum(t.nbytes for _, t in state) - self.projectors

    def _bind(self) -> None:
        """Hand the optimizer this rank's tensors, as an engine does, and let it make its state."""
        optimizer, (group,) = self.optimizer, self.optimizer.param_groups
        recipe = optimizer.recipe(group)
        group["params"] = [self._tensor(host) for host in self.held]
        for index, (tensor, host) in enumerate(zip(group["params"], self.held, strict=True)):
            store: dict[str, Tensor] = {}
            found = []
            for at in host.placements:
                projected = at.name in optimizer._projected
                alone = len(host.placements) == 1
                found += slots.bind(tensor, at, recipe, projected, group["matricize"], alone, store)
                self._places[at.name] = group, index
            optimizer.state[tensor] = store
            optimizer._slots[tensor], optimizer._bound[tensor] = found, dict(store)

    def _tensor(self, host: Host) -> Tensor:
        tensor = torch.empty(host.shape, dtype=self.settings.handed, device=META, requires_grad=True)
        tensor.grad = torch.empty_like(tensor)
        return tensor

    def update(self, names: Iterable[str] | None = None) -> Update:
        """An ordinary step on the tensors with these parameters (None: all)."""
        names = None if names is None else tuple(names)
        if names not in self._known:
            self._known[names] = self._track(lambda places: self.optimizer._update(places), names)
        return self._known[names]

    def refresh(self) -> Update:
        """A step that renews all bases. The survey before it (a few numbers a matrix) is left out."""
        return self._track(self._renew, None)

    def _track(self, step: Any, names: Iterable[str] | None) -> Update:
        wanted = self._places.values() if names is None else [self._places[name] for name in names]
        places = [(self.optimizer.param_groups[0], index) for index in dict.fromkeys(index for _, index in wanted)]
        for slot in (slot for found in self.optimizer._slots.values() for slot in found):
            slot.step = slot.last_refresh = slot.moment_step = slot.refreshes = 1  # bases are made, none is due
        tracker, traffic = Tracker(), Traffic()
        with torch.no_grad(), planned(self.settings.world, self.rank) as counter, self._sizes, tracker:
            step(places)
        for kind, calls in counter.kinds.items():
            traffic.add(kind.replace("_", "-"), counter.bytes_of[kind], calls)
        return Update(self._temporaries(tracker), traffic)

    def _temporaries(self, tracker: Tracker) -> int:
        """What was alive beside weights, gradients and state, at the worst moment."""
        tracker.name("state", [noise._columns(META)])
        for tensor, store in self.optimizer.state.items():
            tracker.name("state", store.values())
            tracker.name("weights", [tensor])
            tracker.name("gradients", [tensor.grad])
        return tracker.peak().own["other"]

    def _renew(self, places: Iterable[tuple[dict[str, Any], int]]) -> None:
        optimizer, jobs = self.optimizer, []
        for group, index in places:
            recipe = optimizer.recipe(group)
            for slot, _, grad, weight in optimizer._work(group, index):
                renews = slot.projected and recipe.subspace is not None
                job: Job = optimizer._job(slot, group, recipe, grad, weight, renews)
                if renews and recipe.subspace.method == "svd":
                    optimizer._deal(job, optimizer._loads)
                jobs.append((slot, job))
        optimizer._run(jobs)


def largest_rank(settings: Settings, optimizer: Any) -> int:
    """The shard whose state is largest. Engines that cut between rows give the first ranks most."""
    if not settings.engine.startswith("zero"):
        return 0
    sizes = [sum(state_sizes(settings, hosts(settings, rank), optimizer).values()) for rank in range(settings.shards)]
    return max(range(settings.shards), key=lambda rank: sizes[rank])
