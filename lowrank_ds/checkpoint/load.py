"""Loading into any layout: everything is checked first, on all ranks; then each rank reads the slices it holds."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from lowrank_ds.checkpoint import deepspeed_files, format, places
from lowrank_ds.checkpoint.agree import CheckpointError, place, together
from lowrank_ds.checkpoint.format import Key
from lowrank_ds.checkpoint.options import checked_groups, take
from lowrank_ds.checkpoint.places import Part, Target
from lowrank_ds.checkpoint.read import Checkpoint
from lowrank_ds.checkpoint.runs import Run
from lowrank_ds.engines import deepspeed_checkpoint
from lowrank_ds.groups import logger


class _Plan:
    """What one rank is going to do: `parts` to read and `groups` to put in place, in `target`, from `saved`.

    summed: it was saved between the micro-batches of a step, with the whole gradients that belong to it.
    """

    target: Target
    saved: Checkpoint
    parts: list[Part]
    groups: list[dict[str, Any]] | None = None
    summed: bool = False


def load_checkpoint(
    path: str | os.PathLike[str],
    model: Any,
    optimizer: Any = None,
    *,
    optimizer_state: bool = True,
    verify: bool = True,
) -> tuple[Any, dict[str, Tensor] | None]:
    """Load what `save_checkpoint` wrote, whatever the engine and number of ranks now and then.

    Called by all ranks. Files, names, shapes and options are checked on all of them before anything is changed.
    Weights of another dtype are converted (said in the log), state must be the same.

    Args:
        path: the folder.
        model, optimizer: as for `save_checkpoint`, built as they were when it was saved: the same algorithm, parameter
            names and options that give state its meaning (rank, proj_type, subspace, seed, ...).
        optimizer_state: False loads weights and buffers only and lets the optimizer start anew.
        verify: compare checksums (file sizes always are).

    Returns:
        (extra, local): as saved; local is None at another world size, or if none was saved.

    Raises:
        CheckpointError: on every rank: the checkpoint is damaged or does not fit; nothing was changed. (Should a file
            become unreadable between the check and the reading, it says that the model is loaded in part.)
    """
    plan, what = _Plan(), f"loading {path}"

    def prepare() -> None:
        plan.target = places.target_of(model, optimizer)
        plan.saved = deepspeed_files.open_checkpoint(path, verify)
        plan.saved.check_files(verify)

    def check() -> None:
        _check_all(plan, optimizer_state)

    together(what, prepare)
    together(what, check)
    with plan.saved:
        _say(plan, optimizer_state)
        with places.being_loaded(plan.target):
            together(f"{what}: the model is loaded in part, do not train it; reading", lambda: _read(plan))
        _finish(plan)
        return plan.saved.manifest.extra, _local(plan.saved)


# -- before anything is changed ---------------------------------------------------------------------------------------
def _check_all(plan: _Plan, optimizer_state: bool) -> None:
    saved, target = plan.saved, plan.target
    if target.optimizer is not None and optimizer_state:
        plan.groups = checked_groups(saved.manifest, target.optimizer)
        if target.engine is not None:
            deepspeed_checkpoint.check_counters(target.engine, saved.manifest.engine)
    loaded = ("weights", "buffers") if plan.groups is None else ("weights", "buffers", "state")
    parts = [part for part in places.parts(target) if part.key.section in loaded]
    plan.parts = [part for part in parts if _check(saved, part)]
    known = places.names(target)
    for key in saved.manifest.entries:
        if key.section in ("weights", "buffers") and key.name not in known[key.section]:
            raise CheckpointError(
                f"the checkpoint has {key}, which is none of the model's {key.section}. Is it the same model?"
            )
    if plan.groups is not None:
        _check_sums(saved, {part.key for part in parts})
        plan.summed = any(key.section == "gradients" for key in saved.manifest.entries)


def _check(saved: Checkpoint, part: Part) -> bool:
    """Whether there is something to read.

    Raises:
        CheckpointError: the tensor is missing, or has another shape or (state) dtype.
    """
    key, entry = part.key, saved.entry(part.key)
    if entry is None:
        if part.optional:
            return True  # sums of micro-batches that were not asked for then: zeros
        if key.section == "weights" and any(k[:2] == key[:2] for k in saved.manifest.entries):
            here, there = ("int8", "float") if key.part else ("float", "int8")
            raise CheckpointError(
                f"{key.name} is a weight of {there} numbers in the checkpoint and {here} here. Build the model as it "
                "was when it was saved (lowrank_ds.int8_weights)."
            )
        raise CheckpointError(f"{key} is not in the checkpoint. Was it saved from another model, or by other options?")
    if entry.shape != tuple(part.shape):
        raise CheckpointError(
            f"{key} has shape {entry.shape} in the checkpoint and {tuple(part.shape)} here. Build the model and the "
            "optimizer as they were when it was saved (rank, proj_type, ...)."
        )
    if key.section == "state" and entry.dtype != format.name_of(part.dtype):
        raise CheckpointError(
            f"{key} is {entry.dtype} in the checkpoint and {format.name_of(part.dtype)} here: the optimizer keeps its "
            "state in another form. Build it with the same options."
        )
    saved.check_covered(key, part.run)
    return bool(part.run.size)


def _check_sums(saved: Checkpoint, known: set[Key]) -> None:
    """Micro-batches summed in a subspace must not get lost."""
    matrices = {key.name for key in known if key.section == "state"}
    for key in saved.manifest.entries:
        dropped = key.section == "state" and key.part == "micro_batches" and key.name in matrices and key not in known
        if dropped and saved.read(key, Run.interval(0, 1)).item():
            raise CheckpointError(
                f"{key.name} was saved between the micro-batches of a step, with compress_accumulation. Build the "
                "optimizer with it, or the sums so far would be lost."
            )


# -- afterwards -------------------------------------------------------------------------------------------------------
def _say(plan: _Plan, optimizer_state: bool) -> None:
    """What the log should tell (rank 0)."""
    if place()[0]:
        return
    other = [p for p in plan.parts if p.key.section != "state" and _dtype(plan.saved, p) != format.name_of(p.dtype)]
    if other:
        first = other[0]
        logger.warning(
            "%s: %d weights (such as %s) are %s in the checkpoint and %s here: converted.", plan.saved.path, len(other),
            first.key, _dtype(plan.saved, first), format.name_of(first.dtype),
        )  # fmt: skip
    if plan.target.optimizer is not None and not optimizer_state:
        logger.warning("%s: weights only; %s starts anew.", plan.saved.path, type(plan.target.optimizer).__name__)


def _dtype(saved: Checkpoint, part: Part) -> str:
    entry = saved.entry(part.key)
    return format.name_of(part.dtype) if entry is None else entry.dtype


def _read(plan: _Plan) -> None:
    """Fill everything, one tensor at a time."""
    parts, saved = list(plan.parts), plan.saved
    if plan.summed:
        parts += places.gradient_parts(plan.target, lambda name, _: saved.entry(Key("gradients", name)) is not None)
    for part in parts:
        here = part.get()
        if plan.saved.entry(part.key) is None:
            here.zero_()
        else:
            here.copy_(plan.saved.read(part.key, part.run))
        part.put(here)


def _finish(plan: _Plan) -> None:
    """Options, and counters that mirror state; without state, a fresh start."""
    target = plan.target
    if target.engine is not None and plan.groups is not None:
        deepspeed_checkpoint.set_counters(target.engine, plan.saved.manifest.engine)
    if target.optimizer is None:
        return
    target.optimizer._broken = None
    target.optimizer._forget_gradients()
    if plan.groups is None:
        target.optimizer.start_anew()
        return
    take(target.optimizer, plan.groups)
    for slots in target.optimizer._slots.values():
        for slot in slots:
            slot.read_counters()


def _local(saved: Checkpoint) -> dict[str, Tensor] | None:
    """This rank's own tensors."""
    rank, world = place()
    keys = [key for key in saved.manifest.entries if key.section == "local"]
    if world != saved.manifest.world_size or not keys:
        return None
    entries = {key.part: (key, saved.manifest.entries[key]) for key in keys if key.name == str(rank)}
    return {name: saved.read(key, Run.interval(0, e.numel)).view(e.shape) for name, (key, e) in entries.items()}
