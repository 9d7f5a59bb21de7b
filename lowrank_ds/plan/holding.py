"""Who holds what: where the parameters lie in the tensors that one rank's optimizer is handed, without any engine.

The same cuts as the engines make (`lowrank_ds/engines` reads them off live engines): tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lowrank_ds.engines.placement import Placement
from lowrank_ds.layout import Flat, Layout, Mirror, Tiled, torch_chunks
from lowrank_ds.plan.settings import Settings
from lowrank_ds.plan.wire import Group

NCCL_ALIGNMENT = 2  # DeepSpeed pads a flat buffer to a multiple of this times the ranks


@dataclass(frozen=True)
class Host:
    """A tensor that the optimizer is handed: its entries on this rank, and the parameters in it.

    shape: on this rank. held: this rank's entries of the parameters, without padding.
    """

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class Rows(Placement):
    """A parameter cut between rows (1-D: between entries), as FSDP2's DTensors are. replicas: copies of it (HSDP)."""

    replicas: int = 1

    def layout(self, m: int, n: int) -> Layout:
        """How the ranks share the m x n matrix."""
        return _tiled(m, n, len(self.shape), self.group, self.replicas)

    def matrices(self, count: int, m: int, n: int) -> Iterator[tuple[int, int, Layout]]:
        """(index, where its entries start, layout); one matrix a parameter is all that plan knows."""
        if count != 1:
            raise ValueError(f"{self.name} of shape {self.shape} is a stack of matrices, which plan does not know")
        yield 0, 0, self.layout(m, n)


@lru_cache(maxsize=256)
def _tiled(m: int, n: int, dims: int, group: Group, replicas: int) -> Layout:
    mirror = None
    if replicas > 1:
        mirror = Mirror(Group(replicas, 0, "replicas"), 0, tuple(range(replicas)))
    if group.size == 1:
        return Flat.whole((m, n), mirror)
    cut = torch_chunks(n if dims == 1 else m, group.size)
    tiles = tuple(((0, m), part) if dims == 1 else (part, (0, n)) for part in cut)
    return Tiled((m, n), tiles, group.rank, group, lambda total: torch_chunks(total, group.size), mirror)


# -- engines ----------------------------------------------------------------------------------------------------------
def hosts(settings: Settings, rank: int) -> list[Host]:
    """What the optimizer of shard `rank` is handed, as the engine would."""
    shapes = settings.shapes
    if settings.engine == "ddp":
        return [Host(s, (Placement(n, s, (0, math.prod(s)), 0, None, 0),)) for n, s in shapes.items()]
    group = Group(settings.shards, rank, "shards")
    if settings.engine in ("fsdp2", "hsdp"):
        return [_rows(name, shape, group, settings.world // settings.shards) for name, shape in shapes.items()]
    if settings.engine in ("zero1", "zero2"):
        return [_flat_buffer(settings, group)]
    pieces = {name: ceil_div(math.prod(shape), group.size) for name, shape in shapes.items()}
    if settings.layerwise:
        return [Host((_count(settings, n, group),), (_piece(n, s, pieces[n], group, 0),)) for n, s in shapes.items()]
    return [_sub_group(names, settings, pieces, group) for names in sub_groups(settings, pieces)]


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def _rows(name: str, shape: tuple[int, ...], group: Group, replicas: int) -> Host:
    start, stop = torch_chunks(shape[0], group.size)[group.rank]
    numel = math.prod(shape)
    return Host((stop - start, *shape[1:]), (Rows(name, shape, (0, numel), group.rank, group, 0, replicas=replicas),))


def flat_size(settings: Settings) -> int:
    """Entries of ZeRO-1/2's flat buffer: all parameters, padded so that the ranks get equal parts."""
    total, step = sum(map(math.prod, settings.shapes.values())), NCCL_ALIGNMENT * settings.shards
    return ceil_div(total, step) * step


def _flat_buffer(settings: Settings, group: Group) -> Host:
    size, start, placements = flat_size(settings) // group.size, 0, []
    for name, shape in settings.shapes.items():
        numel = math.prod(shape)
        cuts = tuple(min(max(i * size - start, 0), numel) for i in range(group.size)) + (numel,)
        place = start + cuts[group.rank] - group.rank * size
        placements.append(Placement(name, shape, cuts, group.rank, group, place))
        start += numel
    return Host((size,), tuple(placements))


def _count(settings: Settings, name: str, group: Group) -> int:
    numel = math.prod(settings.shapes[name])
    size = ceil_div(numel, group.size)
    return min((group.rank + 1) * size, numel) - min(group.rank * size, numel)


def _piece(name: str, shape: tuple[int, ...], size: int, group: Group, offset: int) -> Placement:
    """A parameter that ZeRO-3 has cut into pieces of `size` entries, the last of them shorter."""
    numel = math.prod(shape)
    cuts = tuple(min(i * size, numel) for i in range(group.size)) + (numel,)
    return Placement(name, shape, cuts, group.rank, group, offset)


def sub_groups(settings: Settings, pieces: dict[str, int]) -> list[list[str]]:
    """Parameters that ZeRO-3 steps together: their pieces reach sub_group_size entries."""
    found: list[list[str]] = [[]]
    size = 0
    for name in settings.shapes:
        if size >= settings.zero.sub_group_size:
            found.append([])
            size = 0
        found[-1].append(name)
        size += pieces[name]
    return found


def _sub_group(names: Sequence[str], settings: Settings, pieces: dict[str, int], group: Group) -> Host:
    offset, placements = 0, []
    for name in names:
        placements.append(_piece(name, settings.shapes[name], pieces[name], group, offset))
        offset += pieces[name]
    return Host((offset,), tuple(placements))
