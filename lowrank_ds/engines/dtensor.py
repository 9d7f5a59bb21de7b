"""DTensor parameters: FSDP2 (`fully_shard`), HSDP, tensor parallelism, both together, and `replicate()`.

Everything is read off each parameter: its mesh and its placements. Different parameters of a model may live on
different meshes. Mesh dimensions that replicate are ignored (gradients are the same there); those that shard rows or
columns form the group the matrix is shared over; those that shard a leading dimension (stacked experts) only say which
matrices are here.

Uses a private function of torch, `_compute_local_shape_and_global_offset`, so that intervals are what DTensor (and its
checkpoints) say they are, uneven and strided shards included, and `DTensorSpec`, as FSDP2 does. Tested with torch 2.13.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard

from lowrank_ds.axis import Span, Stored
from lowrank_ds.layout import Flat, Layout, Mirror, Tiled

try:
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as _offsets
except ImportError as error:
    raise RuntimeError(
        f"torch {torch.__version__} does not say where DTensor shards begin; FSDP2 support was tested with torch 2.13. "
        "Upgrade torch."
    ) from error


def local(tensor: DTensor) -> Tensor:
    """This rank's part, a plain tensor that shares memory with the DTensor."""
    part = tensor.to_local()
    return part.wait() if isinstance(part, AsyncCollectiveTensor) else part


def local_grad(host: DTensor) -> Tensor:
    """This rank's part of the gradient, laid out as the parameter (sequence parallelism leaves unsummed ones)."""
    grad = host.grad
    if grad.placements != host.placements:
        grad = grad.redistribute(host.device_mesh, host.placements)
    return local(grad)


def locate(host: DTensor, name: str) -> list[DTensorPlacement]:
    """The parameter `name` is `host` itself, sharded as its placements say.

    Raises:
        RuntimeError: a placement that low-rank state cannot follow, by name.
    """
    if host.device_mesh.get_coordinate() is None:
        return []  # this rank is not on the parameter's mesh
    unsummed = [p for p in host.placements if isinstance(p, Partial)]
    if unsummed:
        raise RuntimeError(f"{name} has the placement {unsummed[0]}: its entries are unsummed parts, not weights.")
    return [
        DTensorPlacement(name, tuple(host.shape), host.device_mesh, tuple(host.placements), tuple(local(host).shape))
    ]


def sharing_group(host: DTensor) -> Any:
    """The group of the ranks that together hold the entries of `host`, each once; None if this rank holds all."""
    mesh = host.device_mesh
    dims = tuple(d for d, p in enumerate(host.placements) if not isinstance(p, Replicate) and mesh.size(d) > 1)
    return _group(mesh, dims)[0] if dims else None


@dataclass(frozen=True)
class DTensorPlacement:
    """A parameter that is a DTensor.

    name, shape: the parameter's. mesh, placements: the DTensor's. here: shape of the part held by this rank.
    """

    name: str
    shape: tuple[int, ...]
    mesh: Any
    placements: tuple[Any, ...]
    here: tuple[int, ...]

    def matrices(self, count: int, m: int, n: int) -> Iterator[tuple[int, int, Layout]]:
        """(index, where its entries start in the local tensor, layout) of each m x n matrix held here."""
        first, stop = self.held(count, m, n)
        layout = self.layout(m, n)
        return ((i, (i - first) * layout.numel, layout) for i in range(first, stop))

    def lead_here(self, m: int, n: int) -> tuple[int, ...]:
        """The leading dimensions of the stack held here; () for a single matrix."""
        return self.here[: self._leading(m, n)]

    def held(self, count: int, m: int, n: int) -> Span:
        """The matrices of a stack that are (partly) held here."""
        if not self._leading(m, n):
            return 0, count
        kept = [p if self._role(p, m, n) == "lead" else Replicate() for p in self.placements]
        sizes, offsets = _offsets(self.shape, self.mesh.shape, list(self.mesh.get_coordinate()), kept)
        inner = count // self.shape[0]
        first = offsets[0] * inner if sizes[0] else 0
        return first, first + sizes[0] * inner

    def _leading(self, m: int, n: int) -> int:
        """How many leading dimensions count the matrices of a stack."""
        return len(self.shape) - 2 if len(self.shape) > 2 and (m, n) == self.shape[-2:] else 0

    def _role(self, placement: Any, m: int, n: int) -> str | None:
        """What a placement divides: "lead", "rows", "columns" or nothing."""
        if not isinstance(placement, (Shard, _StridedShard)):
            return None
        lead, dim = self._leading(m, n), placement.dim
        if len(self.shape) == 1:
            return "columns"
        if dim == 0 or dim - lead == 0:
            return "lead" if lead and dim < lead else "rows"
        if dim - lead == 1:  # of a flattened (d0, d1, ...) too: a part of d1 is a block of its d1 * ... columns
            return "columns"
        raise RuntimeError(
            f"{self.name} of shape {self.shape} is sharded on dimension {dim}, which is neither the rows nor the "
            f"columns of its {m} x {n} matrices. Shard it on another dimension (fully_shard's shard_placement_fn)."
        )

    def layout(self, m: int, n: int) -> Layout:
        """How this rank's group shares one m x n matrix; the same object for parameters that are alike."""
        roles = tuple(self._role(p, m, n) for p in self.placements)
        dims = tuple(d for d, role in enumerate(roles) if role in ("rows", "columns") and self.mesh.size(d) > 1)
        key = (m, n, self.mesh, self.placements, roles)
        if key not in (known := _cache()["layouts"]):
            mirror = self._mirror()
            known[key] = self._tiled(m, n, roles, dims, mirror) if dims else Flat.whole((m, n), mirror)
        return known[key]

    def _mirror(self) -> Mirror | None:
        """The ranks that hold the same part as this one: the mesh dimensions that replicate."""
        dims = tuple(d for d, p in enumerate(self.placements) if isinstance(p, Replicate) and self.mesh.size(d) > 1)
        if not dims:
            return None
        group, coordinates = _group(self.mesh, dims)
        # Numbered by mesh coordinate: on a permuted mesh the ranks in `group` are another order on each process.
        replicas = sorted(coordinates)
        place = replicas.index(tuple(self.mesh.get_coordinate()))
        return Mirror(group, place, tuple(coordinates.index(coordinate) for coordinate in replicas))

    def _tiled(
        self, m: int, n: int, roles: tuple[str | None, ...], dims: tuple[int, ...], mirror: Mirror | None
    ) -> Tiled:
        group, coordinates = _group(self.mesh, dims)
        along = {"rows": 0, "columns": 1}
        moved = [
            _moved(p, along[role]) if d in dims else Replicate()
            for d, (p, role) in enumerate(zip(self.placements, roles, strict=True))
        ]
        tiles = []
        for coordinate in coordinates:
            sizes, starts = _offsets((m, n), self.mesh.shape, list(coordinate), moved)
            tiles.append(tuple((start, start + size) for start, size in zip(starts, sizes, strict=True)))
        tiles = [tuple((min(a, t), min(b, t)) for (a, b), t in zip(tile, (m, n), strict=True)) for tile in tiles]

        def deal(total: int) -> tuple[Span, ...]:
            return _even(self.mesh, dims, coordinates, total)

        rank = dist.get_rank(group)
        try:
            layout = Tiled((m, n), tuple(tiles), rank, group, deal, mirror)
        except ValueError as error:
            raise RuntimeError(
                f"{self.name}: the shards {self.placements} are not contiguous blocks ({error})."
            ) from None
        return layout

    def check(self, count: int, m: int, n: int) -> None:
        """Raise RuntimeError if the local tensor is not what the placements say."""
        first, stop = self.held(count, m, n)
        found, expected = math.prod(self.here), self.layout(m, n).numel * (stop - first)
        if found != expected:
            raise RuntimeError(
                f"{self.name}: this rank holds {found} entries, the placements {self.placements} on a "
                f"{tuple(self.mesh.shape)} mesh say {expected}. Uneven shards of this combination are not supported; "
                "choose dimensions that divide."
            )

    # -- state --------------------------------------------------------------------------------------------------------
    def wrap(self, part: Tensor, stored: Stored, m: int, n: int) -> Tensor:
        """A state tensor of the parameter's m x n matrices as DTensor, so that checkpoints can save and reshard it."""
        if stored.entries:
            return self._dtensor(part, self.shape, self.placements)
        lead = self._leading(m, n)
        if not lead and stored.axis is None and not stored.rest:
            return part  # 0-d and the same on every rank
        placements = [self._state_placement(p, stored, self._role(p, m, n), lead) for p in self.placements]
        return self._dtensor(part, (*self.shape[:lead], *stored.full), placements)

    def _state_placement(self, placement: Any, stored: Stored, role: str | None, lead: int) -> Any:
        if role == "lead":
            return placement
        kind = stored.axis.kind if stored.axis is not None else "whole"
        if role is None or kind == "whole" or (kind in ("rows", "columns") and kind != role):
            return Replicate()
        return Shard(lead) if kind == "even" else _moved(placement, lead)

    def _dtensor(self, part: Tensor, shape: Sequence[int], placements: Sequence[Any]) -> DTensor:
        """Like DTensor.from_local, which would move an offloaded part to the mesh's device."""
        size = torch.Size(shape)
        said = _offsets(size, self.mesh.shape, list(self.mesh.get_coordinate()), list(placements))[0]
        if tuple(part.shape) != tuple(said):
            raise RuntimeError(
                f"{self.name}: this rank's state of shape {tuple(part.shape)} is not what DTensor says for {size} with "
                f"{list(placements)}: {tuple(said)}. Please report this layout."
            )
        meta = TensorMeta(size, torch.empty(size, device="meta").stride(), part.dtype)
        return DTensor(part, DTensorSpec(self.mesh, tuple(placements), meta), requires_grad=False)


def _moved(placement: Any, dim: int) -> Any:
    """The same kind of shard on another dimension."""
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim, split_factor=placement.split_factor)
    return Shard(dim)


def _even(mesh: Any, dims: tuple[int, ...], coordinates: list[tuple[int, ...]], total: int) -> tuple[Span, ...]:
    """What each rank of the group keeps of `total` lines: DTensor's Shard(0) over all of `dims`."""
    placements = [Shard(0) if d in dims else Replicate() for d in range(mesh.ndim)]
    spans = []
    for coordinate in coordinates:
        (size,), (start,) = _offsets((total,), mesh.shape, list(coordinate), placements)
        spans.append((start, start + size) if size else (total, total))
    return tuple(spans)


# -- groups -----------------------------------------------------------------------------------------------------------
_CACHE: dict[str, Any] = {}


def _cache() -> dict[str, Any]:
    """Groups and layouts of the current default process group."""
    if _CACHE.get("world") is not dist.group.WORLD:
        _CACHE.clear()
        _CACHE.update(world=dist.group.WORLD, groups={}, layouts={})
    return _CACHE


def _group(mesh: Any, dims: tuple[int, ...]) -> tuple[Any, list[tuple[int, ...]]]:
    """The group of the ranks that differ from this one in `dims` only, and their mesh coordinates, by group rank."""
    mine = mesh.get_coordinate()
    ranges = [range(mesh.size(d)) if d in dims else (mine[d],) for d in range(mesh.ndim)]
    ranks = {int(mesh.mesh[coordinate]): coordinate for coordinate in itertools.product(*ranges)}
    if len(dims) == 1:
        group = mesh.get_group(dims[0])
    else:
        groups, key = _cache()["groups"], tuple(sorted(ranks))
        if key not in groups:
            groups[key] = dist.new_group(sorted(ranks), use_local_synchronization=True)
        group = groups[key]
    ordered = sorted(ranks, key=lambda rank: dist.get_group_rank(group, rank))
    return group, [ranks[rank] for rank in ordered]
