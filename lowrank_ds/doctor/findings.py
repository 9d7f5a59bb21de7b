"""A problem or a warning, and what differs between ranks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Facts = dict[str, Any]  # what one rank tells (`facts.collect`)


@dataclass(frozen=True)
class Finding:
    """What was found. A problem makes the exit status 1, a warning does not.

    what: is wrong. action: what to do. ranks: that it is about.
    """

    level: str
    what: str
    action: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.level} ({names(self.ranks)}): {self.what}. {self.action}."

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"ranks": list(self.ranks)}


def problem(what: str, action: str, ranks: Iterable[int]) -> Finding:
    """Training would fail, hang or give wrong numbers."""
    return Finding("problem", what, action, tuple(sorted(ranks)))


def warning(what: str, action: str, ranks: Iterable[int]) -> Finding:
    """Training may be slower, or fail under some engine; or a difference that may be meant."""
    return Finding("warning", what, action, tuple(sorted(ranks)))


def names(ranks: Iterable[int]) -> str:
    """ "rank 4", "ranks 0-3, 7"."""
    ordered = sorted(ranks)
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {text}" if len(ordered) == 1 else f"ranks {text}"


def groups(ranks: Sequence[Facts], get: Callable[[Facts], Hashable]) -> dict[Any, list[int]]:
    """{value: ranks that have it}, the most frequent value first."""
    found: dict[Any, list[int]] = {}
    for facts in ranks:
        found.setdefault(get(facts), []).append(facts["rank"])
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def told(found: dict[Any, list[int]]) -> str:
    """ "5.1 on ranks 0-2, 5.0 on rank 3"."""
    return ", ".join(f"{value} on {names(ranks)}" for value, ranks in found.items())


def fewer(found: dict[Any, list[int]]) -> list[int]:
    """The ranks that have another value than most."""
    return [rank for ranks in list(found.values())[1:] for rank in ranks]
