"""What an engine's file says of the private attributes it reads: which versions have them, and what to do without."""

from __future__ import annotations

import os
from typing import Any

Versions = tuple[tuple[int, int], tuple[int, int]]  # from, below


def require(found: str, versions: Versions, override: str, message: str) -> None:
    """Raise RuntimeError unless a version is among those that were tested, or the variable `override` is 1.

    message: may name {found}, {low} and {high}, the first version and the first one that was not tested.
    """
    parts = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if versions[0] <= parts < versions[1] or os.environ.get(override) == "1":
        return
    low, high = (".".join(map(str, version)) for version in versions)
    raise RuntimeError(message.format(found=found, low=low, high=high))


def attribute(owner: Any, name: str, message: str) -> Any:
    """A private attribute that every tested version has; else RuntimeError. message: may name {missing}."""
    if not hasattr(owner, name):
        raise RuntimeError(message.format(missing=f"{type(owner).__name__} has no {name}"))
    return getattr(owner, name)
