"""What of a model and its optimizer this process holds, and where it lies in the whole.

This is the only part that knows engines; what it answers (`Part`, `records`) is geometry and plain tensors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_ds import engines
from lowrank_ds import params as selection
from lowrank_ds.axis import Stored
from lowrank_ds.checkpoint import runs
from lowrank_ds.checkpoint.agree import CheckpointError
from lowrank_ds.checkpoint.format import Key
from lowrank_ds.checkpoint.runs import Run
from lowrank_ds.engines import deepspeed_checkpoint
from lowrank_ds.layout import Layout
from lowrank_ds.optimizer import LowRankOptimizer
from lowrank_ds.slots import Slot, stored


class Part(NamedTuple):
    """A piece of one tensor that this process holds.

    key: the tensor. shape: its full shape. run: which entries. get: the entries (run.size,), a 1-D tensor that shares
    memory with what is trained, or (strided weights) a copy that `put` writes back. put: called after writing to it.
    optional: a checkpoint need not have it. idle: what it holds says nothing (scalars where no entry is held).
    """

    key: Key
    shape: tuple[int, ...]
    run: Run
    dtype: torch.dtype
    get: Callable[[], Tensor]
    put: Callable[[Tensor], None]
    optional: bool = False
    idle: bool = False


class Target(NamedTuple):
    """A model and its optimizer (None: weights only), unwrapped. engine: DeepSpeed's, None elsewhere."""

    model: nn.Module
    optimizer: LowRankOptimizer | None
    engine: Any


def target_of(model: Any, optimizer: Any) -> Target:
    """Unwrap what the caller has.

    Raises:
        CheckpointError: an optimizer that is not ours, or ZeRO partitions without the engine.
    """
    engine = model if deepspeed_checkpoint.is_engine(model) else None
    if engine is not None:
        deepspeed_checkpoint.check(engine)
        optimizer = deepspeed_checkpoint.optimizer_of(engine) if optimizer is None else optimizer
        model = engine.module
    while optimizer is not None and not isinstance(optimizer, LowRankOptimizer):
        inner = getattr(optimizer, "optimizer", None)  # AcceleratedOptimizer, DeepSpeed's wrappers
        if inner is None:
            raise CheckpointError(
                f"{type(optimizer).__name__} is no optimizer of lowrank_ds: where its state lies is not known. Save "
                "the weights with optimizer=None and its state with its own tools."
            )
        optimizer = inner
    if engine is None and any(engines.is_partitioned(p) for p in model.parameters()):
        raise CheckpointError(
            "the model's parameters belong to a DeepSpeed engine: pass the engine that deepspeed.initialize returned "
            "instead of the model."
        )
    engines.record(model)
    for part in model.modules():
        if hasattr(part, "reshard") and hasattr(part, "unshard"):
            part.reshard()  # FSDP2 after a forward without backward: weights may be gathered copies
    return Target(model, optimizer, engine)


# -- the optimizer's --------------------------------------------------------------------------------------------------
def hosts(optimizer: LowRankOptimizer) -> Iterator[tuple[dict[str, Any], Tensor, list[Slot]]]:
    """(param group, tensor, the matrices in it) of every tensor that is trained, in the order of `state_dict()`.

    State that does not exist yet is made (zeros), by all ranks together.
    """
    with deepspeed_checkpoint.all_hosts(optimizer):
        found = []
        for group in optimizer.param_groups:
            for index, host in enumerate(group["params"]):
                if host.requires_grad:
                    found.append((group, host, optimizer._bind(group, index)))
    yield from found


def optimizer_parts(target: Target) -> Iterator[Part]:
    """Weights and state of everything the optimizer trains."""
    names = _model_names(target)
    for group, host, slots in hosts(target.optimizer):
        recipe = target.optimizer.recipe(group)
        for slot in slots:
            shape = target.optimizer._shapes[slot.parameter]
            key = Key("weights", names(slot, host))
            local = lambda host=host: engines.local(host)
            yield from _pieces(key, shape, local, slot.start, slot.layout, first_entry(slot))
            for part, how in stored(slot, recipe).items():
                yield state_part(slot, part, how, shape)


def gradient_parts(target: Target, wanted: Callable[[str, Tensor], bool]) -> Iterator[Part]:
    """Whole gradients, which a step that sums micro-batches in a subspace needs of all else; zeros where there is none.

    wanted(name in the model, tensor): whether to answer one.
    """
    names = _model_names(target)
    for _, host, slots in hosts(target.optimizer):
        for slot in slots:
            name, shape = names(slot, host), target.optimizer._shapes[slot.parameter]
            if wanted(name, host):
                local = lambda host=host: _gradient(host)
                yield from _pieces(Key("gradients", name), shape, local, slot.start, slot.layout, first_entry(slot))


def _gradient(host: Tensor) -> Tensor:
    if host.grad is None:
        host.grad = torch.zeros_like(host)
    return engines.local_grad(host)


def sums_now(target: Target) -> bool:
    """Whether micro-batches were summed in a subspace since the last step."""
    slots = target.optimizer._slots.values() if target.optimizer is not None else ()
    return any(slot.micro_batches for own in slots for slot in own)


def first_entry(slot: Slot) -> int:
    """Where the matrix begins in its parameter's entries."""
    return slot.index * slot.layout.shape[0] * slot.layout.shape[1]


def _model_names(target: Target) -> Callable[[Slot, Tensor], str]:
    """The name in the model of the parameter a slot belongs to (the optimizer may only know positions)."""
    names = {id(p): selection.canonical(name) for name, p in target.model.named_parameters()}

    def name_of(slot: Slot, host: Tensor) -> str:
        original = target.optimizer._originals[slot.parameter]()
        return names.get(id(original)) or names.get(id(host)) or slot.parameter

    return name_of


def _pieces(key: Key, shape, local: Callable[[], Tensor], start: int, layout: Layout, first: int) -> Iterator[Part]:
    """What is held of one matrix of a tensor of the parameter's shape; `local()`: the plain tensor that has it."""
    for run in runs.of_layout(layout, first):
        yield Part(key, shape, run, local().dtype, *_access(local, start, run.size))


def _access(
    local: Callable[[], Tensor], start: int, size: int
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """How to get at entries [start, start + size) of a tensor an optimizer or a model has, and to write them back."""

    def get() -> Tensor:
        return local().detach().contiguous().view(-1)[start : start + size]

    def put(entries: Tensor) -> None:
        here = local().detach()
        if not here.is_contiguous():  # then `entries` are of a copy
            whole = here.contiguous()
            whole.view(-1)[start : start + size] = entries
            here.copy_(whole)

    return get, put


def state_part(slot: Slot, part: str, how: Stored, parameter: tuple[int, ...]) -> Part:
    """One state tensor of a matrix."""
    whole = math.prod(slot.layout.shape) == math.prod(parameter)
    tensor = slot.state[part]
    shape, run = _stored_run(slot, how, parameter if whole else slot.layout.shape)
    if run.size != tensor.numel():
        raise CheckpointError(
            f"{slot.name}: its state {part!r} has {tensor.numel()} numbers on this rank, its layout says {run.size}. "
            "Please report this."
        )
    optional = part in ("accumulated", "accumulated_peak", "micro_batches")
    idle = how.axis is None and not how.entries and not slot.layout.numel
    key = Key("state", slot.name, part)
    return Part(key, shape, run, tensor.dtype, lambda: tensor.view(-1), lambda _: None, optional, idle)


def _stored_run(slot: Slot, how: Stored, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Run]:
    """(full shape, the entries kept here) of a state tensor."""
    if how.entries:
        return shape, next(iter(runs.of_layout(slot.layout, 0)), Run.interval(0, 0))
    inner = math.prod(how.rest)
    if how.axis is None:
        return how.full, Run.interval(0, inner)
    start, stop = how.axis.kept[how.axis.rank]
    return how.full, Run.interval(start * inner, stop * inner)


# -- the model's ------------------------------------------------------------------------------------------------------
def model_parts(target: Target, trained: set[str]) -> Iterator[Part]:
    """Parameters that are not trained, and buffers that the model's state dict has; tied ones once.

    Raises:
        CheckpointError: a trained parameter is in no optimizer that was given, and cannot be read by itself.
    """
    for name, p in target.model.named_parameters():
        name = selection.canonical(name)
        if name in trained:
            continue
        if deepspeed_checkpoint.is_handled(p):
            raise CheckpointError(
                f"{name} is trained by ZeRO, but by no optimizer of lowrank_ds: its fp32 partitions cannot be found. "
                "Use engine.save_checkpoint and engine.load_checkpoint."
            )
        yield from _own(Key("weights", name), p)
    for name, buffer in _buffers(target.model):
        yield from _own(Key("buffers", name), buffer)


def _own(key: Key, tensor: Tensor) -> Iterator[Part]:
    """A tensor that only the model knows: pieces of its matrices, as an optimizer would see them."""
    shape = tuple(engines.full_shape(tensor))
    count, m, n = selection.matrices(shape, "auto") if len(shape) > 1 else (1, 1, math.prod(shape))
    for at in engines.locate(tensor, [tensor], [(key.name, tensor)], {key.name: shape}):
        for i, start, layout in at.matrices(count, m, n):
            yield from _pieces(key, shape, lambda: engines.local(tensor), start, layout, i * m * n)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Persistent buffers, each once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in seen and name not in module._non_persistent_buffers_set:
                seen.add(id(buffer))
                yield selection.canonical(f"{prefix}.{name}" if prefix else name), buffer


def parts(target: Target) -> list[Part]:
    """Everything."""
    found = [] if target.optimizer is None else list(optimizer_parts(target))
    trained = {part.key.name for part in found if part.key.section == "weights"}
    trained |= _trained_elsewhere(target)
    if sums_now(target):
        found += gradient_parts(target, lambda _, host: engines.has_grad(host))
    return found + list(model_parts(target, trained))


def names(target: Target) -> dict[str, set[str]]:
    """{"weights", "buffers": what the model has of them, on any rank}."""
    weights = {selection.canonical(name) for name, _ in target.model.named_parameters()}
    if target.optimizer is not None:
        weights |= set(target.optimizer._originals)  # of parameters that are not the model's
    return {"weights": weights, "buffers": {name for name, _ in _buffers(target.model)}}


def _trained_elsewhere(target: Target) -> set[str]:
    """Names of parameters the optimizer trains of which this rank holds nothing."""
    if target.optimizer is None:
        return set()
    given = {id(p): name for name, ref in target.optimizer._originals.items() if (p := ref()) is not None}
    return {
        selection.canonical(name)
        for name, p in target.model.named_parameters()
        if id(p) in given and p.requires_grad and engines.is_partitioned(p)
    }


@contextlib.contextmanager
def being_loaded(target: Target) -> Iterator[None]:
    """While weights are written."""
    with torch.no_grad():
        if target.engine is None:
            yield
            return
        with deepspeed_checkpoint.being_loaded(target.engine):
            yield
