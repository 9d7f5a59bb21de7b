"""The folder: `manifest.json` and safetensors files. No pickle; nothing here knows engines or ranks.

    manifest.json           what is where (`Manifest`), written last: a folder without it is no checkpoint
    rank-00000.safetensors  pieces of weights, buffers, optimizer state and tensors of one rank

A piece is a `Run` of a tensor's row-major entries. A tensor that is whole is one piece, so consolidated and sharded
checkpoints are the same thing to a reader.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_ds.checkpoint.agree import CheckpointError
from lowrank_ds.checkpoint.runs import Run

FORMAT = 1
MANIFEST = "manifest.json"

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


class Key(NamedTuple):
    """What a tensor is.

    section: "weights", "buffers", "state", "gradients" (amid a step only) or "local". name: of the parameter, buffer or
    matrix; for "local", the rank as a string. part: of "state" and "local", which of its tensors; else "".
    """

    section: str
    name: str
    part: str = ""

    def __str__(self) -> str:
        """What it is called in files (followed by @start where it is not whole) and messages."""
        if self.section in ("weights", "buffers"):
            return self.name
        return f"{self.name}::{self.part}" if self.section == "state" else f"{self.section}::{self.name}::{self.part}"


class Piece(NamedTuple):
    """Where a piece is kept: a file, the tensor in it (any shape, its entries in order), and which entries it is."""

    file: str
    tensor: str
    run: Run


@dataclass
class Entry:
    """One tensor: its full shape, its dtype ("float32"), and pieces that hold each of its entries once."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[Piece] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Entries of the whole tensor."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        return self.numel * dtype_of(self.dtype).itemsize


@dataclass
class Manifest:
    """What a checkpoint says of itself.

    version: of lowrank_ds. algorithm: the optimizer's class name, None if no optimizer was saved. world_size: ranks
    that saved. groups: the optimizer's param groups, options and "param_names". projected: names of what is projected.
    extra: the caller's. engine: DeepSpeed's counters, None elsewhere. files: {name: (bytes, SHA-256)}.
    entries: {what: where its pieces are}.
    """

    version: str
    algorithm: str | None
    world_size: int
    groups: list[dict[str, Any]]
    projected: list[str]
    extra: Any
    engine: dict[str, Any] | None
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    entries: dict[Key, Entry] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, durably."""
        names = list(self.files)
        place = {name: i for i, name in enumerate(names)}
        body = {k: v for k, v in asdict(self).items() if k not in ("files", "entries")} | {
            "format": FORMAT,
            "files": [[name, *self.files[name]] for name in names],
            "tensors": [
                [*key, list(e.shape), e.dtype, [[place[p.file], p.tensor, *p.run] for p in e.pieces]]
                for key, e in self.entries.items()
            ],
        }
        text = json.dumps(body)
        with open(folder / MANIFEST, "w", encoding="utf-8") as file:
            json.dump({"sha256": hashlib.sha256(text.encode()).hexdigest(), "checkpoint": body}, file)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path, verify: bool = True) -> Manifest:
        """Read `manifest.json`.

        Raises:
            CheckpointError: there is none, it is torn or changed, or of a newer format.
        """
        body = _checked_json(folder, verify)
        if body.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder / MANIFEST} has format {body.get('format')}, this lowrank_ds reads format {FORMAT}: it was "
                f"saved by lowrank_ds {body.get('version')}. Install that version or a newer one."
            )
        names = [name for name, *_ in body["files"]]
        entries = {
            Key(section, name, part): Entry(
                tuple(shape), dtype, [Piece(names[file], tensor, Run(*run)) for file, tensor, *run in pieces]
            )
            for section, name, part, shape, dtype, pieces in body["tensors"]
        }
        own = {k: body[k] for k in ("version", "algorithm", "world_size", "groups", "projected", "extra", "engine")}
        return cls(**own, files={name: (size, sha) for name, size, sha in body["files"]}, entries=entries)


def _checked_json(folder: Path, verify: bool) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        others = [found.parent for found in folder.parent.glob(f"{glob.escape(folder.name)}.*/{MANIFEST}")]
        hint = f" {others[0]} is complete: rename it." if others and not folder.exists() else ""
        raise CheckpointError(f"{folder} is no checkpoint of lowrank_ds.save_checkpoint: it has no {MANIFEST}.{hint}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        body, sha = found["checkpoint"], found["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is torn or not ours ({error}). Use another checkpoint.") from error
    if verify and hashlib.sha256(json.dumps(body).encode()).hexdigest() != sha:
        raise CheckpointError(f"{path} was changed after it was saved (another checksum). Use another checkpoint.")
    return body


# -- dtypes -----------------------------------------------------------------------------------------------------------
def dtype_of(name: str) -> torch.dtype:
    """torch.float32 of "float32"."""
    return getattr(torch, name)


def name_of(dtype: torch.dtype) -> str:
    """The inverse of `dtype_of`.

    Raises:
        CheckpointError: safetensors has no such dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _NAMES:
        raise CheckpointError(f"a tensor is {dtype}, which safetensors files cannot hold.")
    return name


# -- files ------------------------------------------------------------------------------------------------------------
class Blob(NamedTuple):
    """A tensor to be written: its name in the file, shape, dtype, and how to get it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    get: Callable[[], Tensor]


def write_file(path: Path, blobs: Sequence[Blob]) -> tuple[int, str]:
    """Write a safetensors file, one tensor in memory at a time, and make it durable. Answers (bytes, SHA-256).

    Raises:
        CheckpointError: two tensors of the same name.
        OSError: the disk is full, ...
    """
    blobs = sorted(blobs, key=lambda b: (-dtype_of(b.dtype).itemsize, b.name))  # so that each one is aligned
    header, position = {}, 0
    for blob in blobs:
        if blob.name in header:
            raise CheckpointError(f"two tensors would be called {blob.name} in {path.name}; rename one of them.")
        end = position + math.prod(blob.shape) * dtype_of(blob.dtype).itemsize
        header[blob.name] = {"dtype": _NAMES[blob.dtype], "shape": list(blob.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for chunk in (len(text).to_bytes(8, "little"), text):
            digest.update(chunk)
            file.write(chunk)
        for blob in blobs:
            tensor = blob.get().detach().to("cpu").contiguous()
            chunk = (ctypes.c_ubyte * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
            if len(chunk):
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + position, digest.hexdigest()


def check_file(folder: Path, name: str, size: int, sha: str | None) -> None:
    """Raise CheckpointError unless the file is there, complete and (sha given) unchanged."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Copy the whole folder again, or use another checkpoint.")
    if path.stat().st_size != size:
        raise CheckpointError(
            f"{path} is torn: it has {path.stat().st_size} bytes, {size} were saved. Copy it again, or use another "
            "checkpoint."
        )
    if sha is not None and _sha256(path) != sha:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}. Copy it again, or use another checkpoint "
            "(verify=False loads it all the same)."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
