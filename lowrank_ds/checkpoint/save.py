"""Writing: every rank its own pieces, nothing gathered but where they lie; the folder appears when it is complete."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ds.checkpoint import format, places
from lowrank_ds.checkpoint.agree import CheckpointError, place, together
from lowrank_ds.checkpoint.format import MANIFEST, Blob, Entry, Key, Manifest, Piece
from lowrank_ds.checkpoint.options import trained_names
from lowrank_ds.checkpoint.places import Part, Target
from lowrank_ds.checkpoint.runs import Run, Taken
from lowrank_ds.engines import deepspeed_checkpoint
from lowrank_ds.optimizer import LowRankOptimizer
from lowrank_ds.version import __version__

_Claim = tuple[Key, tuple[int, ...], str, Run]  # what a rank tells the others about a piece


def save_checkpoint(
    path: str | os.PathLike[str],
    model: Any,
    optimizer: Any = None,
    *,
    extra: Any = None,
    local: Mapping[str, Tensor] | None = None,
) -> None:
    """Save weights, buffers and optimizer state to a folder that any engine and any number of ranks can load.

    Called by all ranks, on a file system that all of them see. Each writes what it holds (what several hold, the first
    of them); nothing is gathered. The folder appears under its name when it is complete; one that is there already is
    replaced then, and left alone if saving fails.

    Args:
        path: the folder; its parent is created.
        model: a DeepSpeed engine, a DDP, FSDP1 or FSDP2 model, or a plain module. Under ZeRO, the fp32 master weights
            are saved.
        optimizer: one of lowrank_ds, or what an engine wrapped around it; default: a DeepSpeed engine's. None: only
            weights and buffers.
        extra: anything JSON-able, the same on all ranks (scheduler state, position in the data).
        local: {name: tensor} of this rank alone (states of random generators).

    Raises:
        CheckpointError: on every rank, if any of them could not write, the layout is not supported, or a DeepSpeed
            engine is between the micro-batches of a step.
    """
    final, what = Path(path), f"saving to {path}"
    targets: list[Target] = []
    mine: dict[int, Part] = {}

    def survey() -> tuple[list[_Claim], str]:
        targets.append(places.target_of(model, optimizer))
        target = targets[0]
        _check_whole(target)
        mine.update(enumerate(part for part in _all_parts(target, local) if part.run.size and not part.idle))
        claims = [(part.key, part.shape, format.name_of(part.dtype), part.run) for part in mine.values()]
        return claims, _json(extra)

    told = together(what, survey)
    dealt: list = []  # the same on every rank: not to be sent around
    together(what, lambda: dealt.extend(_deal([claims for claims, _ in told], [text for _, text in told])))
    entries, own = dealt
    folder = together(what, lambda: _begin(final))[0]
    try:
        _write(what, final, folder, targets[0], [(mine[i], run, name) for i, run, name in own], entries, extra)
    except BaseException:
        if place()[0] == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(what: str, final: Path, folder: Path, target: Target, own: list, entries: dict, extra: Any) -> None:
    """Write everything into `folder` and give it its name."""
    rank, world = place()
    name = file_name(rank)

    def files() -> tuple[int, str]:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} was made by rank 0 and is not seen here: save to a shared file system")
        blobs = [Blob(name, *_shape(part, run), _getter(part, run)) for part, run, name in own]
        return format.write_file(folder / name, blobs)

    written = together(what, files)

    def finish() -> None:
        if rank == 0:
            manifest = _manifest(target, world, extra)
            manifest.files = {file_name(i): found for i, found in enumerate(written)}
            manifest.entries = entries
            manifest.write(folder)
            publish(folder, final)

    together(what, finish)


def _check_whole(target: Target) -> None:
    """Raise CheckpointError for weights of which a failed step updated only some; tell what cannot be saved."""
    optimizer = target.optimizer
    if optimizer is None:
        return
    if optimizer._broken is not None:
        raise CheckpointError(
            f"a step of {type(optimizer).__name__} failed midway ({optimizer._broken}): some weights are updated and "
            "others not. Load the last checkpoint instead of saving this."
        )
    if optimizer._in_backward is not None:
        optimizer._in_backward.before_saving()


def _all_parts(target: Target, local: Mapping[str, Tensor] | None) -> list[Part]:
    """What this rank holds, `local` tensors included."""
    parts = places.parts(target)
    for name, tensor in (local or {}).items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"local must be {{name: tensor}}; {name!r} is {type(tensor).__name__}")
        key, shape = Key("local", str(place()[0]), name), tuple(tensor.shape)
        flat = tensor.detach().contiguous().view(-1)
        run = Run.interval(0, flat.numel())
        parts.append(Part(key, shape, run, flat.dtype, lambda flat=flat: flat, lambda _: None))
    return parts


def _json(extra: Any) -> str:
    """A digest of what must be the same on all ranks."""
    try:
        text = json.dumps(extra)
        if json.dumps(json.loads(text)) != text:
            raise CheckpointError("extra has a dict with keys that are the same to JSON, such as 1 and '1'")
        return hashlib.sha256(text.encode()).hexdigest()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"extra is not JSON-able ({error}); put tensors into local") from error


def file_name(number: int) -> str:
    """The file of a rank."""
    return f"rank-{number:05d}.safetensors"


# -- who writes what --------------------------------------------------------------------------------------------------
def _deal(claims: Sequence[list[_Claim]], extras: Sequence[str]) -> tuple[dict[Key, Entry], list[tuple[int, Run, str]]]:
    """(every tensor's pieces, [(number of the part, entries of it, name in the file)] that this rank writes).

    The same on every rank. What several ranks hold is written by the first.
    """
    if len(set(extras)) > 1:
        raise CheckpointError("extra differs between ranks; what belongs to one rank goes into local, as tensors")
    entries: dict[Key, Entry] = {}
    taken: dict[Key, Taken] = {}
    own: list[tuple[int, Run, str]] = []
    for rank, found in enumerate(claims):
        for number, (key, shape, dtype, run) in enumerate(found):
            entry = entries.setdefault(key, Entry(tuple(shape), dtype))
            if entry.shape != tuple(shape) or entry.dtype != dtype:
                raise CheckpointError(
                    f"{key} is {entry.dtype} {entry.shape} on one rank and {dtype} {tuple(shape)} on rank {rank}"
                )
            for new in taken.setdefault(key, Taken()).claim(run):
                name = str(key) if new.size == entry.numel else f"{key}@{new.start}"
                entry.pieces.append(Piece(file_name(rank), name, new))
                if rank == place()[0]:
                    own.append((number, new, name))
    for key, entry in entries.items():
        if taken[key].size != entry.numel:
            raise CheckpointError(
                f"{key}: the ranks hold {taken[key].size} of its {entry.numel} entries. All ranks that share the model "
                "must save, and pieces may not overlap in part"
            )
    return entries, own


def _shape(part: Part, run: Run) -> tuple[tuple[int, ...], str]:
    """(shape in the file, dtype): whole tensors and whole lines keep their form."""
    dtype, inner = format.name_of(part.dtype), math.prod(part.shape[1:])
    if run.size == math.prod(part.shape):
        return part.shape, dtype
    if run.count > 1:
        return (run.count, run.length), dtype
    if run.length % max(inner, 1) == 0 and run.start % max(inner, 1) == 0:
        return (run.length // inner, *part.shape[1:]), dtype
    return (run.length,), dtype


def _getter(part: Part, run: Run):
    """How to get these entries of the part: all of it, or an interval."""
    skip = run.start - part.run.start if run != part.run else 0
    return lambda: part.get()[skip : skip + run.size]


# -- the manifest -----------------------------------------------------------------------------------------------------
def _manifest(target: Target, world: int, extra: Any) -> Manifest:
    optimizer = target.optimizer
    engine = None if target.engine is None else deepspeed_checkpoint.counters(target.engine)
    try:
        json.dumps(engine)
    except TypeError as error:
        raise CheckpointError(
            f"the state of the engine's lr_scheduler is not JSON-able ({error}); use one of DeepSpeed's or torch's"
        ) from error
    groups = [] if optimizer is None else [_group(optimizer, group) for group in optimizer.param_groups]
    algorithm = None if optimizer is None else type(optimizer).__name__
    trained = {name for group in groups for name in group["param_names"]}
    projected = [] if optimizer is None else sorted(optimizer._projected & trained)
    return Manifest(__version__, algorithm, world, groups, projected, extra, engine)


def _group(optimizer: LowRankOptimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group's options, and the names of its parameters that are not frozen."""
    plain = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
    plain["param_names"] = trained_names(optimizer, group)
    try:
        json.dumps(plain)
    except TypeError as error:
        raise CheckpointError(f"a param group has an option that is not JSON-able ({error})") from error
    return plain


# -- the folder -------------------------------------------------------------------------------------------------------
def _begin(final: Path) -> Path | None:
    """Rank 0 makes the folder that is filled. Left-overs of saves to the same path that were killed go."""
    if place()[0] != 0:
        return None
    if final.exists() and not (final / MANIFEST).is_file() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"{final} exists and is no checkpoint of lowrank_ds; it is not replaced")
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(f"{glob.escape(final.name)}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = final.with_name(f"{final.name}.partial-{secrets.token_hex(4)}")
    folder.mkdir()
    return folder


def publish(folder: Path, final: Path) -> None:
    """Give a complete folder its name, instead of the one that has it."""
    format.sync_folder(folder)
    old = None
    if final.exists():
        old = final.with_name(f"{final.name}.old-{secrets.token_hex(4)}")
        os.rename(final, old)
    try:
        os.rename(folder, final)
    except BaseException:
        if old is not None:
            os.rename(old, final)  # what was there stays
        raise
    format.sync_folder(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
