"""The communication budget of docs/layouts.md (the design's section 5): what a step may add, by formula."""

from __future__ import annotations

from collections.abc import Iterable

_FLOAT = 4  # bytes

COLLECTIVES = 6  # a step, for any number of layers


def largest(family: str, shapes: Iterable[tuple[int, int]], plain: int, rank: int, world: int, flat: bool) -> int:
    """Bytes that a step without refresh may bring to one rank: an upper bound for `proj_type="std"`.

    For each m x n matrix, by rows over the ranks: right (m >= n) the stored basis, n r, is gathered; left (m < n) the
    coordinates are added up and gathered again, 2 r n. A basis from a seed is drawn, not gathered. Flat ranges add, for
    each of at most world - 1 cuts in a row, 2 r. Each matrix (and other parameter) adds one number that says whether
    its gradient is finite; Fira, APOLLO and Flora one to three norms.

    Args:
        family: "Fira", "GaLore", "APOLLO" or "Flora".
        shapes: (m, n) of the projected matrices.
        plain: how many parameters are not projected.
        rank: r.
        world: ranks that share them.
        flat: ZeRO's flat ranges, not whole rows.
    """
    stored = family in ("Fira", "GaLore")
    numbers = {"GaLore": 1, "Fira": 2, "APOLLO": 2, "Flora": 5}[family]
    shapes, total = list(shapes), 0
    for m, n in shapes:
        r = min(rank, m, n)
        lines = r + (0 if family == "GaLore" else 1)  # coordinates, and the norms that travel with them
        total += (n * r if stored else 0) if m >= n else 2 * lines * n
        total += 2 * lines * (world - 1) if flat else 0
        total += numbers
    return _FLOAT * (total + plain * (1 if family != "Flora" else 5))
