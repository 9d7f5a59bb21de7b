"""Slots: the matrices inside the tensors an optimizer was handed, their state and their clocks."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_ds import accumulate, engines, params, pipeline
from lowrank_ds.axis import SCALAR, Stored, part_of
from lowrank_ds.engines.placement import Placement
from lowrank_ds.int8_tensor import Int8Weight
from lowrank_ds.layout import Flat, Layout
from lowrank_ds.recipe import Recipe
from lowrank_ds.subspace import HISTORY, Subspace

COUNTERS = ("step", "refreshes", "last_refresh", "moment_step", "micro_batches", "doublings", "judged")


@dataclass
class Slot:
    """One matrix (or plain parameter) inside a tensor of `param_groups`, as far as this rank holds it.

    start: offset in the tensor's entries. prefix: of its keys in optimizer.state.
    parameter, index: the parameter it belongs to, and which of its matrices it is.
    state: its state tensors, plain ones that share memory with what `optimizer.state` holds.
    none_is_zero: see `Placement`.
    arrived: coordinates (kept lines, r) of the coming step's gradient, where replicas averaged these in place of it.
    The counters mirror 0-d state tensors, so that no step reads a number back from the device. doublings, judged: how
    often the interval between refreshes was doubled, and after how many refreshes that was last decided.
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
    micro_batches: int = 0
    doublings: int = 0
    judged: int = 0
    none_is_zero: bool = False
    parameter: str = ""
    index: int = 0
    arrived: Tensor | None = None
    _written: dict[str, int] = field(default_factory=dict)  # counters as the state has them

    def read_counters(self) -> None:
        """Take the counters from the state (after loading)."""
        for name in COUNTERS:
            if name in self.state:
                setattr(self, name, int(self.state[name]))
        self._written = {}

    def write_counters(self) -> None:
        """Store the counters that changed into the state."""
        for name in COUNTERS:
            value = getattr(self, name)
            if name in self.state and self._written.get(name) != value:
                self.state[name].fill_(value)
                self._written[name] = value

    def judge(self, how: Subspace, stable: float) -> None:
        """Decide once after each refresh whether the next is due at twice the interval (`Subspace.lazy`)."""
        if how.lazy is None or self.judged == self.refreshes:
            return
        self.judged = self.refreshes
        if self.refreshes > HISTORY and stable >= how.lazy:  # the first basis was compared with none
            self.doublings += 1

    @property
    def summed(self) -> bool:
        """Whether (part of) the coming step's gradient is here as coordinates."""
        return bool(self.micro_batches) or self.arrived is not None

    def drop_sums(self) -> None:
        """Forget micro-batches that no step has used."""
        self.arrived = None
        if self.micro_batches:
            accumulate.clear(self.state)
            self.micro_batches = 0
            self.write_counters()

    def weight_entries(self, weight: Tensor) -> Tensor:
        """What `Job.weight` is, out of the tensor's weights held here (contiguous)."""
        return weight if isinstance(weight, Int8Weight) else self.entries(weight.view(-1))

    def entries(self, flat: Tensor) -> Tensor:
        """This rank's entries (numel,) out of the tensor's flattened entries."""
        return part_of(flat, slice(self.start, self.start + self.layout.numel))


def bind(
    host: Tensor, at: Placement, recipe: Recipe, projected: bool, matricize: str, alone: bool, store: dict[str, Tensor]
) -> list[Slot]:
    """The slots of one parameter inside `host`, their state created in `store` or taken over from it.

    One slot for a plain parameter, one per matrix for a projected one.

    Args:
        alone: whether `at` is the only parameter in `host`.
    """
    if projected or len(at.shape) >= 2:
        count, m, n = params.matrices(at.shape, matricize if projected else "flatten")
    else:
        count, m, n = 1, 1, math.prod(at.shape)
    if isinstance(at, Placement):
        slots = [
            Slot(
                at.name if count == 1 else f"{at.name}[{i}]",
                host,
                start,
                layout,
                projected,
                none_is_zero=at.none_is_zero,
                parameter=at.name,
                index=i,
            )
            for i, start, layout in at.matrices(count, m, n)
        ]
        for slot in slots:
            here = engines.local(host)  # under ZeRO-3 `host` itself may be gathered now, or empty
            single = alone and len(slots) == 1 and slot.layout.numel == here.numel()
            slot.prefix = "" if single else f"{slot.name}::"
            _adopt(slot, recipe, tuple(here.shape) if single else (slot.layout.numel,), store)
        return slots
    at.check(count, m, n)
    return _bind_stack(host, at, recipe, projected, (count, m, n), store)


def _bind_stack(host, at, recipe: Recipe, projected: bool, stack: tuple[int, int, int], store) -> list[Slot]:
    """Slots of a DTensor: each state tensor is one DTensor, with the leading dimensions of a stack of matrices."""
    count, m, n = stack
    layout, lead, device = at.layout(m, n), at.lead_here(m, n), engines.local(host).device
    slots = [
        Slot(at.name if count == 1 else f"{at.name}[{i}]", host, start, layout, projected, parameter=at.name, index=i)
        for i, start, layout in at.matrices(*stack)
    ]
    loaded = bool(store)
    for name, stored in _all_shapes(layout, recipe, projected).items():
        here = at.here if stored.entries else (*lead, *stored.local)
        counter = name in COUNTERS and not lead
        known = loaded and not _new(name, name, store)
        fresh = _fresh(name, here, stored.dtype, "meta" if known else "cpu" if counter else device)
        wrapped = at.wrap(fresh, stored, m, n)
        if known:
            _check_loaded(at.name, name, store, name, wrapped)
        else:
            store[name] = wrapped
        tensor = engines.local(store[name])
        parts = tensor.flatten(0, len(lead) - 1) if lead else [tensor]
        for slot, part in zip(slots, parts, strict=True):
            slot.state[name] = part
    for slot in slots:
        slot.read_counters()
    return slots


def _adopt(slot: Slot, recipe: Recipe, plain_shape: tuple[int, ...], store: dict[str, Tensor]) -> None:
    """Create the slot's state, or take over what `load_state_dict` put there."""
    prefix = slot.prefix
    loaded = any(key.startswith(prefix) for key in store) if prefix else bool(store)
    for name, stored in _all_shapes(slot.layout, recipe, slot.projected).items():
        known = loaded and not _new(name, prefix + name, store)
        device = "meta" if known else "cpu" if name in COUNTERS else slot.host.device
        fresh = _fresh(name, plain_shape if stored.entries else stored.local, stored.dtype, device)
        if known:
            _check_loaded(slot.name, name, store, prefix + name, fresh)
        else:
            store[prefix + name] = fresh
        slot.state[name] = store[prefix + name]
    slot.read_counters()


def stored(slot: Slot, recipe: Recipe) -> dict[str, Stored]:
    """{state name: how it is divided among the ranks} of one matrix, counters included."""
    return _all_shapes(slot.layout, recipe, slot.projected)


def state_names(recipe: Recipe) -> frozenset[tuple[bool, str]]:
    """{(of a projected matrix, name)} of a recipe's state tensors; sums of micro-batches are left out."""
    recipe = dataclasses.replace(recipe, accumulation=None)
    layout = Flat.whole((2**16, 2**16))
    inside = recipe.subspace is not None or recipe.correction is not None
    kinds = ([True] if inside else []) + [False]
    return frozenset((projected, name) for projected in kinds for name in _all_shapes(layout, recipe, projected))


def _all_shapes(layout: Layout, recipe: Recipe, projected: bool) -> dict[str, Stored]:
    if not projected or recipe.subspace is None:
        counters = COUNTERS[:1]
    else:
        counters = COUNTERS[:4] + COUNTERS[4:5] * bool(recipe.accumulation) + COUNTERS[5:] * bool(recipe.subspace.lazy)
    return {**pipeline.state_shapes(layout, recipe, projected), **dict.fromkeys(counters, SCALAR)}


MAY_BE_NEW = ("accumulated", "accumulated_peak", "micro_batches", "stability", "captured", "doublings", "judged")


def _new(name: str, key: str, store: Mapping[str, Tensor]) -> bool:
    """Whether loaded state may lack this: what belongs to options that may be switched on after it was saved."""
    return key not in store and name in MAY_BE_NEW


def _fresh(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.full(shape, math.inf if name == "residual_norm" else 0, dtype=dtype, device=device)


def due(slot: Slot, recipe: Recipe) -> bool:
    """Whether a new basis is due: at the first step, then every T steps, 2T, 4T ... once the matrix was found stable
    (Flora: when step % kappa == 0)."""
    if not slot.projected or recipe.subspace is None:
        return False
    if slot.refreshes == 0:
        return True
    if recipe.momentum:
        return (slot.step + 1) // recipe.subspace.every > (slot.last_refresh + 1) // recipe.subspace.every
    return slot.step - slot.last_refresh >= recipe.subspace.every << slot.doublings


def offset(name: str, every: int) -> int:
    """How far a staggered matrix' second refresh is moved forward, in [0, every): a hash of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % every


def deal(load: dict[int, float], layout: Layout, world: int) -> int:
    """Give the exact SVD of a shared matrix to the one of `world` ranks with the least work so far.

    Matrices that one rank holds are factorised there; they cannot be counted, the other ranks do not see them.
    """
    m, n = layout.shape
    owner = min(range(world), key=lambda i: load.get(i, 0.0))
    load[owner] = load.get(owner, 0.0) + m * n * min(m, n)
    return owner


def _check_loaded(parameter: str, name: str, store: Mapping[str, Tensor], key: str, expected: Tensor) -> None:
    """Raise ValueError unless the loaded state has what is expected, in shape and in how it is divided."""
    if key not in store:
        raise ValueError(
            f"{parameter}: the loaded state has no {name!r} (it has {', '.join(sorted(store)[:6])} ...). It was "
            "saved by another optimizer, or with other options; load it into the same one."
        )
    value = store[key]
    if torch.uint8 in (value.dtype, expected.dtype) and value.dtype != expected.dtype:
        raise ValueError(
            f"{parameter}: the loaded {name!r} is {value.dtype}, expected {expected.dtype}: it was saved by an "
            "optimizer with other moments=, projector_dtype= or min_8bit_size= (Flora: quantization=). Build this one "
            "with the same."
        )
    if tuple(value.shape) != tuple(expected.shape):
        raise ValueError(
            f"{parameter}: the loaded {name!r} has shape {tuple(value.shape)}, expected {tuple(expected.shape)}. It "
            "was saved with another rank, proj_type or sharding; resume with the same ones, or save and load with "
            "lowrank_ds.save_checkpoint and load_checkpoint, for any engine and world size (FSDP2: or with "
            "torch.distributed.checkpoint)."
        )
    if value.dtype != expected.dtype:
        raise ValueError(
            f"{parameter}: the loaded {name!r} is {value.dtype}, expected {expected.dtype}. Something cast it on the "
            "way; load what optimizer.state_dict() gave."
        )
    found, wanted = (getattr(t, "placements", None) for t in (value, expected))
    if found != wanted:
        raise ValueError(
            f"{parameter}: the loaded {name!r} is {found or 'a plain tensor'}, expected {wanted or 'a plain tensor'}. "
            "Load FSDP2 state with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
        )
