"""Shapes a LLaMA does not have: experts cut across ranks, rank-1 matrices, scalars, groups with own options."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import lowrank_ds
from lowrank_ds.params import canonical
from tests import training
from tests.cluster import launch, quiet_deepspeed

STEPS = 8
RECIPES = {
    "galore left power rotate": (
        "GaLoreAdamW",
        {"update_proj_gap": 3, "proj_type": "left", "subspace": "power", "on_refresh": "rotate"},
    ),
    "galore full reset": ("GaLoreAdamW", {"update_proj_gap": 3, "proj_type": "full", "on_refresh": "reset"}),
    "fira stagger randomized": (
        "FiraAdamW",
        {"update_proj_gap": 3, "proj_type": "reverse_std", "stagger": True, "subspace": "randomized"},
    ),
    "apollo tensor reset": ("ApolloAdamW", {"update_proj_gap": 3, "scale_type": "tensor", "on_refresh": "reset"}),
    "galore adafactor": ("GaLoreAdafactor", {"update_proj_gap": 3, "beta1": 0.9}),
    "flora": ("Flora", {"kappa": 3}),
    "flora flattened left": ("Flora", {"kappa": 3, "matricize": "flatten", "proj_type": "left"}),
}


class Mixed(nn.Module):
    """A linear layer, five stacked experts (5, 12, 9), a column, a row, a scalar gain."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(10, 12)
        self.experts = nn.Parameter(torch.randn(5, 12, 9) * 0.3)
        self.head = nn.Linear(9, 3)
        self.column, self.row = nn.Parameter(torch.randn(9, 1)), nn.Parameter(torch.randn(1, 9))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A loss; x (batch, 10)."""
        hidden = torch.tanh(torch.einsum("bi,eij->bej", torch.tanh(self.inp(x)), self.experts)).sum(1)
        return self.head(hidden * self.gain + self.row).square().mean() + (hidden @ self.column).square().mean()


def groups(model: Mixed) -> list[dict]:
    """Rank 3 for the matrices, rank 1 for column and row, plain for the rest with its own learning rate."""
    named = {canonical(n): p for n, p in model.named_parameters()}
    big, thin = ("inp.weight", "experts"), ("column", "row")
    rest = [(n, p) for n, p in named.items() if n not in big + thin]
    return [
        {"params": [(n, named[n]) for n in big], "rank": 3, "weight_decay": 0.1},
        {"params": [(n, named[n]) for n in thin], "rank": 1},
        {"params": rest, "lr": 5e-3},
    ]


def optimizer_of(recipe: str, model: Mixed) -> torch.optim.Optimizer:
    """The recipe's optimizer on the three groups."""
    name, options = RECIPES[recipe]
    return getattr(lowrank_ds, name)(groups(model), lr=1e-2, **options)


def data() -> list[torch.Tensor]:
    """Global batches."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(12, 10, generator=generator) for _ in range(STEPS)]


def one_process(recipe: str) -> dict[str, torch.Tensor]:
    """Weights after training in this process."""
    model = Mixed()
    optimizer = optimizer_of(recipe, model)
    for batch in data():
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    return training.weights_of(model)


def under_zero(rank: int, world: int) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
    """{(recipe, stage): weights}."""
    deepspeed, found = quiet_deepspeed(), {}
    for recipe in RECIPES:
        for stage in (1, 3):
            model = Mixed()
            engine = deepspeed.initialize(
                model=model, optimizer=optimizer_of(recipe, model), config=training.ds_config(None, stage, world)
            )[0]
            for batch in data():
                engine.backward(engine(batch.chunk(world)[rank]))
                engine.step()
            found[recipe, stage] = training.weights_of(engine.module)
            engine.destroy()
    return found


def by_expert_dim(dim: int):
    """shard_placement_fn: the stacked experts on dimension `dim` (1: rows, 2: columns), everything else by rows."""
    from torch.distributed.tensor import Shard

    return lambda p: Shard(dim) if p.dim() == 3 else Shard(0)


FSDP2 = {
    "fsdp2": {},  # whole experts on each rank: 2, 2 and 1
    "fsdp2 expert rows": {"shard_placement_fn": by_expert_dim(1)},
    "fsdp2 expert columns": {"shard_placement_fn": by_expert_dim(2)},
}


REFUSED = ("flora flattened left", "fsdp2 expert columns")  # no block of the flattened matrix (see test_errors)


def under_fsdp2(rank: int, world: int) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """{(recipe, kind): weights}."""
    from torch.distributed.fsdp import fully_shard

    mesh, found = training.mesh_of("fsdp2", world), {}
    for recipe in RECIPES:
        for kind, options in FSDP2.items():
            if (recipe, kind) == REFUSED:
                continue
            model = fully_shard(Mixed(), mesh=mesh, **options)
            optimizer = optimizer_of(recipe, model)
            for batch in data():
                optimizer.zero_grad()
                model(batch.chunk(world)[rank]).backward()
                optimizer.step()
            found[recipe, kind] = training.weights_of(model)
    return found


@functools.cache
def results() -> dict[tuple[str, int | str], dict[str, torch.Tensor]]:
    """From three ranks: experts are cut, and some ranks hold nothing of the small matrices."""
    return launch(3, under_zero)[0] | launch(3, under_fsdp2)[0]


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("engine", [1, 3, *FSDP2])
def test_equal_to_one_process(recipe: str, engine: int | str) -> None:
    """Every parameter, whatever its shape and group, within fp32 rounding of one process."""
    if (recipe, engine) == REFUSED:
        pytest.skip("refused by name: a shard of the last dimension is no block of the flattened matrix")
    torch.set_num_threads(1)
    expected = one_process(recipe)
    assert training.largest_difference(results()[recipe, engine], expected) <= 1e-5
    assert training.largest_difference(expected, training.weights_of(Mixed())) > 1e-2
