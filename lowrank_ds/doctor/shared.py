"""Whether all ranks see the same files in a folder."""

from __future__ import annotations

import os
import pathlib
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence

from lowrank_ds.doctor.findings import Facts, Finding, groups, problem

PATIENCE = 5.0  # seconds that a network file system may need to show a new file


def offer(folder: pathlib.Path) -> str:
    """Rank 0 writes a file with its own name in it; returns that name."""
    name = f".lowrank_ds_doctor-{os.getpid()}-{secrets.token_hex(6)}"
    (folder / name).write_text(name)
    return name


def look(folder: pathlib.Path, name: str, rank: int) -> str:
    """Read rank 0's file and write one beside it. Returns what went wrong, "" if nothing did."""
    deadline = time.monotonic() + PATIENCE
    try:
        while not (folder / name).exists():
            if time.monotonic() > deadline:
                return "a file that rank 0 wrote is not seen"
            time.sleep(0.1)
        if (folder / name).read_text() != name:
            return "a file that rank 0 wrote has other contents"
        (folder / f"{name}.{rank}").write_text(name)
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return ""


def clear(folder: pathlib.Path, name: str, wrote: Iterable[int]) -> list[int]:
    """Rank 0 removes all these files again. Returns the ranks that wrote one which is not seen here."""
    unseen = []
    for rank in wrote:
        deadline = time.monotonic() + PATIENCE
        while not (path := folder / f"{name}.{rank}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        if not path.exists():
            unseen.append(rank)
        path.unlink(missing_ok=True)
    (folder / name).unlink(missing_ok=True)
    return unseen


def check(ranks: Sequence[Facts], went_wrong: dict[int, str], folder: pathlib.Path) -> Iterator[Finding]:
    """went_wrong: {rank: text, "" where nothing did}."""
    for text, who in groups([f for f in ranks if went_wrong.get(f["rank"])], lambda f: went_wrong[f["rank"]]).items():
        yield problem(
            f"--shared {folder}: {text}",
            "Mount one file system at the same place on all hosts, writable: checkpoints and caches go there",
            who,
        )
