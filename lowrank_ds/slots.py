"""Slots: the matrices inside the tensors an optimizer was handed, their state and their clocks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_ds import params, pipeline
from lowrank_ds.engines.placement import Placement
from lowrank_ds.layout import Layout
from lowrank_ds.recipe import Recipe

COUNTERS = ("step", "refreshes", "last_refresh", "moment_step")


@dataclass
class Slot:
    """One matrix (or plain parameter) inside a tensor of `param_groups`, as far as this rank holds it.

    start: offset in the tensor's entries. prefix: of its keys in optimizer.state.
    state: its state tensors, the same objects as in `optimizer.state`. none_is_zero: see `Placement`.
    The counters mirror 0-d state tensors, so that no step reads a number back from the device.
    """

    name: str
    host: Tensor
    start: int
    layout: Layout
    projected: bool
    prefix: str = ""
    state: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    refreshes: int = 0
    last_refresh: int = 0
    moment_step: int = 0
    none_is_zero: bool = False

    def is_current(self, store: Mapping[str, Tensor]) -> bool:
        """Whether `store` (the host's entry in optimizer.state) still holds the tensors this slot works on."""
        return all(store.get(self.prefix + name) is tensor for name, tensor in self.state.items())

    def read_counters(self) -> None:
        """Take the counters from the state (after loading)."""
        for name in COUNTERS:
            if name in self.state:
                setattr(self, name, int(self.state[name]))

    def write_counters(self) -> None:
        """Store the counters into the state."""
        for name in COUNTERS:
            if name in self.state:
                self.state[name].fill_(getattr(self, name))

    def entries(self, flat: Tensor) -> Tensor:
        """This rank's entries (numel,) out of the tensor's flattened entries."""
        return flat[self.start : self.start + self.layout.numel]


def cut(host: Tensor, at: Placement, projected: bool, matricize: str) -> list[Slot]:
    """One slot for a plain parameter, one per matrix for a projected one."""
    if projected or len(at.shape) >= 2:
        count, m, n = params.matrices(at.shape, matricize if projected else "flatten")
    else:
        count, m, n = 1, 1, math.prod(at.shape)
    slots = []
    for i in range(count):
        cuts = tuple(min(max(cut - i * m * n, 0), m * n) for cut in at.cuts)
        start = at.offset + max(0, i * m * n - at.cuts[at.rank])
        layout = Layout((m, n), cuts, at.rank, at.group)
        if layout.numel or layout.shared:  # what another rank holds alone is not our business
            name = at.name if count == 1 else f"{at.name}[{i}]"
            slots.append(Slot(name, host, start, layout, projected, none_is_zero=at.none_is_zero))
    return slots


def adopt_state(slot: Slot, recipe: Recipe, store: dict[str, Tensor], single: bool) -> None:
    """Create the slot's state, or take over what `load_state_dict` put there."""
    plain_shape = tuple(slot.host.shape) if single else (slot.layout.numel,)
    shapes = pipeline.state_shapes(slot.layout, recipe, slot.projected, plain_shape)
    counters = COUNTERS if slot.projected else COUNTERS[:1]
    slot.prefix = prefix = "" if single else f"{slot.name}::"
    loaded = any(key.startswith(prefix) for key in store) if prefix else bool(store)
    for name, shape in {**shapes, **dict.fromkeys(counters, ())}.items():
        key = prefix + name
        if key in store:
            _check_loaded(slot.name, name, store[key], shape)
        elif loaded:
            raise ValueError(
                f"{slot.name}: the loaded state has no {name!r} (it has {', '.join(sorted(store)[:6])} ...). It was "
                "saved by another optimizer, or with other options; load it into the same one."
            )
        else:
            device = torch.device("cpu") if name in counters else slot.host.device
            store[key] = torch.full(shape, math.inf if name == "residual_norm" else 0.0, device=device)
        slot.state[name] = store[key]
    slot.read_counters()


def due(slot: Slot, recipe: Recipe) -> bool:
    """Whether a new basis is due: at the first step, then every T steps (Flora: when step % kappa == 0)."""
    if not slot.projected:
        return False
    if slot.refreshes == 0:
        return True
    if recipe.momentum:
        return (slot.step + 1) // recipe.subspace.every > (slot.last_refresh + 1) // recipe.subspace.every
    return slot.step - slot.last_refresh >= recipe.subspace.every


def offset(name: str, every: int) -> int:
    """How far a staggered matrix' second refresh is moved forward, in [0, every): a hash of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % every


def deal(load: dict[int, float], layout: Layout) -> int:
    """Give the exact SVD of a shared matrix to the rank with the least work so far.

    Matrices that one rank holds are factorised there; they cannot be counted, the other ranks do not see them.
    """
    m, n = layout.shape
    owner = min(range(len(layout.cuts) - 1), key=lambda i: load.get(i, 0.0))
    load[owner] = load.get(owner, 0.0) + m * n * min(m, n)
    return owner


def _check_loaded(parameter: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{parameter}: the loaded {name!r} has shape {tuple(value.shape)}, expected {tuple(shape)}. It was saved "
            "with another rank, proj_type or sharding; resume with the same ones."
        )
