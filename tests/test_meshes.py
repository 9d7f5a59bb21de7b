"""Meshes beyond the recipe x engine table: permuted ranks, three dimensions, stacks and replicas together, odd shapes.

DTensors are made by hand, gradients are the same for every sharding: each case is compared with plain tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ds
from tests.cluster import launch

STEPS = 5
LIMIT = 1e-5
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "galore": ("GaLoreAdamW", {"update_proj_gap": 2}),
    "galore full": ("GaLoreAdamW", {"update_proj_gap": 2, "proj_type": "full"}),
    "galore stagger": ("GaLoreAdamW", {"update_proj_gap": 3, "stagger": True}),
    "replicated power": (
        "GaLoreAdamW",
        {"update_proj_gap": 2, "subspace": "power", "on_refresh": "rotate", "projector_storage": "replicated"},
    ),
    "fira": ("FiraAdamW", {"update_proj_gap": 2, "proj_type": "right"}),
    "adafactor": ("GaLoreAdafactor", {"update_proj_gap": 2}),
    "flora": ("Flora", {"kappa": 2, "factorize_second_moment": False, "matricize": "stack"}),
}
# {case: (mesh shape, rank order, {name: (shape, placements: "r" replicated or a dimension)})}
CASES: dict[str, tuple[tuple[int, ...], list[int], dict[str, tuple[tuple[int, ...], str]]]] = {
    "uneven experts beside a matrix, two replicas": (
        (2, 2), [0, 1, 2, 3], {"experts": ((3, 8, 6), "r0"), "q": ((8, 6), "r0"), "k": ((6, 8), "r0")},
    ),
    "permuted replicas and shards": (
        (2, 2), [2, 1, 0, 3], {"q": ((9, 6), "r0"), "k": ((6, 9), "r0"), "up": ((8, 6), "r1")},
    ),
    "permuted tiles": ((2, 2), [3, 0, 2, 1], {"down": ((8, 6), "01"), "up": ((8, 6), "10"), "odd": ((7, 5), "01")}),
    "experts over two dimensions": (
        (2, 2), [0, 1, 2, 3], {"experts": ((4, 8, 6), "01"), "rows": ((4, 8, 6), "12"), "one": ((1, 8, 6), "r1")},
    ),
    "one matrix in three dimensions": ((1, 2), [0, 1], {"tokens": ((1, 8, 6), "r0"), "wide": ((1, 8, 6), "r2")}),
    "three dimensions, eight rows of ranks": (
        (2, 2, 1), [1, 3, 0, 2], {"q": ((8, 6), "r01"), "k": ((6, 9), "r0r"), "scale": ((), "rrr")},
    ),
}  # fmt: skip


def part_of(whole: torch.Tensor, like: Any) -> torch.Tensor:
    """What this rank holds of `whole` when it is sharded as `like`."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as offsets

    shape, first = offsets(whole.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(f, f + s) for f, s in zip(first, shape, strict=True))].contiguous()


def sharded(whole: torch.Tensor, mesh: Any, code: str) -> torch.Tensor:
    """A DTensor of `whole` with the placements that `code` spells."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Replicate() if c == "r" else Shard(int(c)) for c in code]
    like = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    like = type("Like", (), {"device_mesh": like.device_mesh, "placements": placements})
    return DTensor.from_local(
        part_of(whole, like), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def assembled(weight: Any) -> torch.Tensor:
    """The whole weight. (full_tensor() of torch 2.13 puts the parts in another order on a permuted mesh.)"""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as offsets

    shape, first = offsets(weight.shape, weight.device_mesh, weight.placements)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, (first, weight.to_local()))
    whole = torch.full(weight.shape, float("nan"))
    for first, part in parts:
        place = tuple(slice(f, f + s) for f, s in zip(first, part.shape, strict=True))
        replaced = whole[place]
        assert replaced.isnan().all() or torch.allclose(replaced, part, atol=LIMIT), "replicas differ"
        whole[place] = part
    return whole


def train(case: str, name: str, mesh: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(whole weights after STEPS, state whose local part is not what DTensor says); mesh None: plain tensors."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as offsets

    generator, params, grads = torch.Generator().manual_seed(0), {}, {}
    for key, (shape, code) in CASES[case][2].items():
        start, grads[key] = torch.randn(shape, generator=generator), torch.randn(STEPS, *shape, generator=generator)
        params[key] = nn.Parameter(start if mesh is None else sharded(start, mesh, code))
    matrices = [(key, p) for key, p in params.items() if p.dim() > 1]
    rest = [(key, p) for key, p in params.items() if p.dim() <= 1]
    cls, options = OPTIMIZERS[name]
    groups = [{"params": matrices, "rank": 2}] + ([{"params": rest}] if rest else [])
    optimizer = getattr(lowrank_ds, cls)(groups, lr=1e-2, rank=None, **options)
    for step in range(STEPS):
        for key, (_, code) in CASES[case][2].items():
            params[key].grad = grads[key][step] if mesh is None else sharded(grads[key][step], mesh, code)
        optimizer.step()
    wrong = [
        f"{key}.{k}"
        for key, p in params.items()
        for k, v in optimizer.state[p].items()
        if hasattr(v, "placements") and tuple(v.to_local().shape) != offsets(v.shape, v.device_mesh, v.placements)[0]
    ]
    return {key: p.detach() if mesh is None else assembled(p.detach()) for key, p in params.items()}, wrong


def on_meshes(rank: int, world: int) -> dict:
    """{(case, optimizer): (weights, wrong state)} on every mesh of this many ranks."""
    from torch.distributed.device_mesh import DeviceMesh

    found = {}
    for case, (shape, order, _) in CASES.items():
        if len(order) == world:
            mesh = DeviceMesh("cpu", torch.tensor(order).view(shape))
            found |= {(case, name): train(case, name, mesh) for name in OPTIMIZERS}
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_every_mesh_equals_plain_tensors(world: int) -> None:
    """Weights within fp32 rounding, on every rank, and every state DTensor is what it says it is."""
    torch.set_num_threads(1)
    for found in launch(world, on_meshes):
        assert len(found) >= len(OPTIMIZERS)
        for (case, name), (weights, wrong) in found.items():
            expected, _ = train(case, name, None)
            assert not wrong, (case, name, wrong)
            for key, weight in expected.items():
                assert (weights[key] - weight).abs().max() <= LIMIT, (case, name, key)
