"""The communication budget of docs/layouts.md (the design's section 5): what a step may add, by formula."""

from __future__ import annotations

from collections.abc import Iterable

_FLOAT = 4  # bytes

COLLECTIVES = 6  # a step, for any number of layers


def largest(family: str, shapes: Iterable[tuple[int, int]], plain: int, rank: int, world: int, engine: str) -> int:
    """Bytes that a step without refresh may bring to one rank: an upper bound for `proj_type="std"`.

    For each m x n matrix that ranks share: right (m >= n) the stored basis, n r, is gathered; left (m < n) the
    coordinates are added up and gathered again, 2 r n. A basis from a seed is drawn, not gathered. Flat ranges add, for
    each of at most world - 1 cuts in a row, 2 r. Each matrix and other parameter adds the numbers that say whether its
    gradient is finite, and how large its update: one for GaLore, two for Fira and APOLLO, five for Flora.
    ZeRO-1 and 2 cut all parameters together into `world` ranges: world - 1 of them are shared, at worst the dearest.

    Args:
        family: "Fira", "GaLore", "APOLLO" or "Flora".
        shapes: (m, n) of the projected matrices.
        plain: how many parameters are not projected.
        rank: r.
        world: ranks.
        engine: "zero1", "zero2", "zero3" or "fsdp2".
    """
    shapes = list(shapes)
    shared = sorted((_of_a_matrix(family, m, n, min(rank, m, n), world, engine) for m, n in shapes), reverse=True)
    if engine in ("zero1", "zero2"):
        shared = shared[: world - 1]
    numbers = {"GaLore": 1, "Fira": 2, "APOLLO": 2, "Flora": 5}[family]
    return _FLOAT * (sum(shared) + numbers * (len(shapes) + plain) * world)


def _of_a_matrix(family: str, m: int, n: int, rank: int, world: int, engine: str) -> int:
    """Numbers for one matrix that all ranks share."""
    line = rank + (0 if family == "GaLore" else 1)  # coordinates, and the norm that travels with them
    total = 2 * line * n
    if m >= n:
        total = n * rank if family in ("Fira", "GaLore") else 0
    return total + (2 * line * (world - 1) if engine.startswith("zero") else 0)
