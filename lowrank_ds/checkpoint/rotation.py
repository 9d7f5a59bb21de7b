"""The checkpoints of one run in one folder: which is the newest, which may go, what killed saves left behind.

    ROOT/step-00000200    a complete checkpoint: it got this name in one rename, after all of it was on the disk
    ROOT/step-00000100    the one before it
    ROOT/latest           one line, the name of the newest; moved last, in one rename
    ROOT/step-*.partial*  a save that is going on, or was killed
    ROOT/step-*.removed   an old checkpoint that is being removed, or whose removal was killed
    ROOT/step-*.torn      a damaged checkpoint that was set aside; it goes when a newer one is complete

Whatever moment a process is killed at, a folder with a complete checkpoint's name is complete.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from lowrank_ds.checkpoint.format import sync_folder

LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")
_LEFT_BEHIND = re.compile(r"\.?(latest|step-\d{8,})\.(partial|removed)")


class Rotation:
    """The checkpoints in `root`, of which the `keep_last` newest are kept.

    One process of a job calls what changes something: `commit`, `clean` and `set_aside`.

    Raises:
        ValueError: keep_last below 1.
    """

    def __init__(self, root: str | os.PathLike[str], keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, the checkpoint just written; got {keep_last}.")
        self.root, self.keep_last = Path(root), keep_last

    def path(self, step: int) -> Path:
        """Where the checkpoint of this step belongs; steps: optimizer steps done, so the first is 1."""
        return self.root / f"step-{step:08d}"

    def newest_first(self) -> list[Path]:
        """Every checkpoint with a complete one's name."""
        found = [(int(match[1]), path) for path in _children(self.root) if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True) if path.is_dir()]

    def latest(self) -> Path | None:
        """The checkpoint that the file `latest` names; None without the file, or if it names nothing that is there.

        A save killed between its rename and the move of `latest` leaves it one checkpoint behind; `clean` mends that.
        """
        try:
            name = (self.root / LATEST).read_text().strip()
        except FileNotFoundError:
            return None
        return self.root / name if _NAME.fullmatch(name) and (self.root / name).is_dir() else None

    def commit(self, step: int) -> None:
        """The checkpoint of `step` is complete: point `latest` at it, and only then remove those no longer kept.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            OSError: `latest` could not be written (the older checkpoints are all still there then).
        """
        self._point(self.path(step))
        for path in self.newest_first()[self.keep_last :]:
            _remove(path)
        for path in _children(self.root):
            if path.name.endswith(".torn"):
                shutil.rmtree(path, ignore_errors=True)

    def clean(self) -> list[str]:
        """Remove what killed saves and removals left behind, and have `latest` name the newest; the names removed.

        Only for the start of a job: a save that is going on looks like one that was killed.
        """
        left = [path for path in _children(self.root) if _LEFT_BEHIND.match(path.name)]
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        newest = next(iter(self.newest_first()), None)
        if newest is not None and self.latest() != newest:
            self._point(newest)
        return sorted(path.name for path in left)

    def set_aside(self, path: Path) -> Path:
        """Give a damaged checkpoint a name that says so; the new path."""
        torn = path.with_name(f"{path.name}.torn")
        if torn.exists():
            shutil.rmtree(torn)
        os.replace(path, torn)
        return torn

    def _point(self, path: Path) -> None:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not there; latest still names {self.latest()}.")
        replace_text(self.root / LATEST, path.name + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a small file in one rename: a reader, or a power cut, finds the old text or the new one."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def _remove(path: Path) -> None:
    """Under another name first: a removal that is killed must not leave half a checkpoint under a complete one's."""
    gone = path.with_name(f"{path.name}.removed")
    if gone.exists():
        shutil.rmtree(gone)
    os.replace(path, gone)
    shutil.rmtree(gone)


def _children(root: Path) -> list[Path]:
    return list(root.iterdir()) if root.is_dir() else []
