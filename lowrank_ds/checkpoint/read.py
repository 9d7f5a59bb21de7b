"""Reading: any entries of any tensor, in whatever pieces they were written; only what is asked for is read."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lowrank_ds.checkpoint import format
from lowrank_ds.checkpoint.agree import CheckpointError, place
from lowrank_ds.checkpoint.format import Entry, Key, Manifest, Piece
from lowrank_ds.checkpoint.runs import Run, overlaps


class Checkpoint:
    """A folder that was saved: its manifest, and its tensors on demand. A context manager: it keeps files open.

    For pieces that are kept otherwise (DeepSpeed's files), override `fetch`; everything else only uses the manifest.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: Manifest | None = None, verify: bool = True) -> None:
        """Read the manifest.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        self.path = Path(path)
        self.manifest = Manifest.read(self.path, verify) if manifest is None else manifest
        self._open = contextlib.ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: Any) -> None:
        self._files.clear()
        self._open.close()

    def check_files(self, verify: bool = True) -> None:
        """Raise CheckpointError unless all files are complete; checksums of every world-th file, by each rank."""
        rank, world = place()
        for number, (name, (size, sha)) in enumerate(self.manifest.files.items()):
            format.check_file(self.path, name, size, sha if verify and number % world == rank else None)

    def entry(self, key: Key) -> Entry | None:
        """What is known about a tensor; None: it is not here."""
        return self.manifest.entries.get(key)

    def fetch(self, piece: Piece, first: int, last: int) -> Tensor:
        """Entries [first, last) of a piece, counted as it holds them, 1-D on the CPU."""
        if piece.file not in self._files:
            self._files[piece.file] = self._open.enter_context(safe_open(self.path / piece.file, framework="pt"))
        found = self._files[piece.file].get_slice(piece.tensor)
        shape = found.get_shape()
        if not shape:
            return self._files[piece.file].get_tensor(piece.tensor).view(1)
        inner = math.prod(shape[1:])
        start = first // inner
        return found[start : -(-last // inner)].reshape(-1)[first - start * inner : last - start * inner]

    def read(self, key: Key, run: Run) -> Tensor:
        """Some entries of a tensor (run.size,), in its dtype, on the CPU."""
        entry = self.manifest.entries[key]
        out = torch.empty(run.size, dtype=format.dtype_of(entry.dtype))
        for piece in entry.pieces:
            for shared in overlaps(piece.run, run):
                shared.copy(self.fetch(piece, *shared.window), out)
        return out

    def check_covered(self, key: Key, run: Run) -> None:
        """Raise CheckpointError unless the pieces have all of these entries."""
        pieces = self.manifest.entries[key].pieces
        found = sum(shared.rows * shared.cols for piece in pieces for shared in overlaps(piece.run, run))
        if found != run.size:
            raise CheckpointError(f"{key}: the checkpoint has {found} of the {run.size} entries needed here.")
