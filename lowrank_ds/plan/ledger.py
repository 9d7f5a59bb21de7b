"""A ledger of bytes: what is alive on one rank, by category, and the worst moment."""

from __future__ import annotations

from dataclasses import dataclass, field

CATEGORIES = ("weights", "gradients", "master weights", "moments", "projectors", "activations", "buffers")


@dataclass
class Moment:
    """The largest sum of bytes in a phase. name: what was going on; at: {category: bytes} then."""

    total: int = 0
    name: str = ""
    at: dict[str, int] = field(default_factory=dict)


@dataclass
class Ledger:
    """Bytes alive on one rank.

    alive: {category: bytes}. phase: "forward", "backward" or "step". peaks: {phase: its worst moment}.
    """

    alive: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    phase: str = "forward"
    doing: str = ""
    peaks: dict[str, Moment] = field(default_factory=dict)

    def add(self, category: str, size: int) -> None:
        """`size` bytes more (or fewer) of a category."""
        self.alive[category] += size
        if self.alive[category] < 0:
            raise RuntimeError(f"the plan frees more {category} than there are, {self.doing}: please report this")
        total = sum(self.alive.values())
        if total > self.peaks.setdefault(self.phase, Moment()).total:
            self.peaks[self.phase] = Moment(total, self.doing, dict(self.alive))

    def drop(self, category: str, size: int) -> None:
        """`size` bytes fewer."""
        self.add(category, -size)

    def touch(self, category: str, size: int) -> None:
        """`size` bytes that come and go at once."""
        self.add(category, size)
        self.add(category, -size)

    def begin(self, phase: str, doing: str) -> None:
        """A new phase: what is alive now counts as one of its moments."""
        self.phase, self.doing = phase, doing
        self.add("buffers", 0)

    @property
    def peak(self) -> tuple[str, Moment]:
        """(phase, moment) with the most bytes."""
        return max(self.peaks.items(), key=lambda item: item[1].total)
