"""Offline: join the pieces of a checkpoint, cut it into other files, say what is in it. One tensor in memory at a time.

Everything works on a `Checkpoint`: its manifest says where the pieces are, its `fetch` reads them.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from lowrank_ds.checkpoint import format
from lowrank_ds.checkpoint.agree import CheckpointError
from lowrank_ds.checkpoint.format import MANIFEST, Blob, Entry, Key, Piece
from lowrank_ds.checkpoint.read import Checkpoint
from lowrank_ds.checkpoint.runs import Run
from lowrank_ds.checkpoint.save import file_name, publish

_Place = Callable[[Key, Entry], Iterator[tuple[str, Run]]]  # which file gets which entries of a tensor


def consolidate(source: Checkpoint, out: Path) -> None:
    """Write each tensor whole: weights and buffers under their own names into `model.safetensors`, which
    `safetensors.torch.load_file` gives as a state dict, and the optimizer's state into `optimizer.safetensors`.

    Raises:
        CheckpointError: `out` exists.
    """

    def place(key: Key, entry: Entry) -> Iterator[tuple[str, Run]]:
        file = "model" if key.section in ("weights", "buffers") else "optimizer"
        yield f"{file}.safetensors", Run.interval(0, entry.numel)

    _rewrite(source, out, place)


def reshard(source: Checkpoint, out: Path, files: int) -> None:
    """Divide each tensor by its lines among `files` files (one with fewer lines: whole into one of them).

    Raises:
        CheckpointError: `out` exists, or fewer than one file is asked for.
    """
    if files < 1:
        raise CheckpointError(f"a checkpoint needs at least one file, not {files}.")
    used = [0] * files

    def place(key: Key, entry: Entry) -> Iterator[tuple[str, Run]]:
        lines = entry.shape[0] if entry.shape else 1
        if lines < files:
            number = used.index(min(used))
            used[number] += entry.bytes
            yield file_name(number), Run.interval(0, entry.numel)
            return
        inner = entry.numel // lines
        for number in range(files):
            first, last = lines * number // files, lines * (number + 1) // files
            used[number] += (last - first) * inner
            yield file_name(number), Run.interval(first * inner, last * inner)

    _rewrite(source, out, place)


def _rewrite(source: Checkpoint, out: Path, place: _Place) -> None:
    """The same checkpoint in other files."""
    if out.exists():
        raise CheckpointError(f"{out} exists; choose another name, or remove it.")
    blobs: dict[str, list[Blob]] = defaultdict(list)
    entries: dict[Key, Entry] = {}
    for key, entry in source.manifest.entries.items():
        source.check_covered(key, Run.interval(0, entry.numel))
        new = entries[key] = Entry(entry.shape, entry.dtype)
        for file, run in place(key, entry):
            whole = run.size == entry.numel
            name = str(key) if whole else f"{key}@{run.start}"
            shape = entry.shape if whole else (run.size // math.prod(entry.shape[1:]), *entry.shape[1:])
            new.pieces.append(Piece(file, name, run))
            blobs[file].append(Blob(name, shape, entry.dtype, lambda key=key, run=run: source.read(key, run)))
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        files = {name: format.write_file(folder / name, blobs[name]) for name in sorted(blobs)}
        dataclasses.replace(source.manifest, files=files, entries=entries).write(folder)
        publish(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def describe(path: Path, verify: bool = True) -> tuple[str, bool]:
    """(what is in a checkpoint, for people; whether it is undamaged).

    Raises:
        CheckpointError: it has no readable manifest.
    """
    with Checkpoint(path, verify=False) as saved:
        manifest = saved.manifest
        sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for key, entry in manifest.entries.items():
            sizes[key.section][0] += 1
            sizes[key.section][1] += entry.bytes
        lines = [
            f"{path}: lowrank_ds {manifest.version}, {manifest.algorithm or 'no optimizer'}, saved by "
            f"{manifest.world_size} ranks, {len(manifest.files)} files, "
            f"{sum(size for size, _ in manifest.files.values())} bytes"
        ]
        lines += [f"  {section}: {count} tensors, {size} bytes" for section, (count, size) in sorted(sizes.items())]
        lines.append(f"  extra: {manifest.extra!r}")
        try:
            format.Manifest.read(path, verify)
            saved.check_files(verify)
        except CheckpointError as error:
            return "\n".join([*lines, f"  DAMAGED: {error}"]), False
        steps = sorted({int(saved.read(k, Run.interval(0, 1))) for k in manifest.entries if k.part == "step"})
        lines.append(f"  steps taken: {', '.join(map(str, steps)) or 'none'}")
        checked = "checksums agree" if verify else "checksums not compared"
        return "\n".join([*lines, f"  {MANIFEST} and all files: complete, {checked}"]), True
