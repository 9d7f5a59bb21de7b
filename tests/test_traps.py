"""Traps of updating inside the backward: what torch's hooks do under each engine, and what we say about it.

They are torch's behaviour, measured here because docs/fsdp2.md tells people about it: a test that fails after an
upgrade means that the page (and `lowrank_ds.engines.before_reduction`) must change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

import lowrank_ds
from tests import training
from tests.cluster import batches, launch, share, tiny_llama

WEIGHT = "model.layers.0.mlp.up_proj.weight"


def backward(model: nn.Module, rank: int, world: int, pieces: int = 1, sync_all: bool = True) -> None:
    """One global batch, in `pieces` micro-batches."""
    parts = share(batches(1)[0], rank, world).chunk(pieces)
    for number, part in enumerate(parts, 1):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(sync_all or number == pieces)
        (model(input_ids=part, labels=part).loss / pieces).backward()


def weight_of(model: nn.Module) -> nn.Parameter:
    """The parameter that is watched."""
    return next(p for name, p in model.named_parameters() if name.endswith(WEIGHT.removeprefix("model.layers.0.")))


def fires(make: Callable[[], nn.Module], register: str, rank: int, world: int, **how) -> tuple[int, int]:
    """How often a hook registered after `make()` fires in one batch, (here, on all ranks)."""
    model, seen = make(), [0]
    p = weight_of(model)
    getattr(p, register)(lambda *_: seen.__setitem__(0, seen[0] + 1))
    backward(model, rank, world, **how)
    total = torch.tensor(seen[0])
    torch.distributed.all_reduce(total)
    return seen[0], int(total)


def hooks(rank: int, world: int) -> dict[str, int]:
    """{case: times a hook fires on this rank, or (FSDP1) on all}."""
    sharded = lambda: training.fully_sharded("fsdp2", world)  # noqa: E731
    post = "register_post_accumulate_grad_hook"
    early, seen = tiny_llama(), [0]
    weight_of(early).register_post_accumulate_grad_hook(lambda _: seen.__setitem__(0, seen[0] + 1))
    backward(training.fully_sharded("fsdp2", world, early), rank, world)
    return {
        "before fully_shard": seen[0],
        "after fully_shard": fires(sharded, post, rank, world)[0],
        "register_hook": fires(sharded, "register_hook", rank, world)[0],
        "every micro-batch": fires(sharded, post, rank, world, pieces=3)[0],
        "synchronised once": fires(sharded, post, rank, world, pieces=3, sync_all=False)[0],
        "replicate": fires(lambda: training.fully_sharded("replicate", world), post, rank, world)[0],
        "ddp, every micro-batch": fires(
            lambda: nn.parallel.DistributedDataParallel(tiny_llama()), post, rank, world, pieces=3
        )[0],
        "fsdp1": fires(training.fsdp1_model, post, rank, world)[1],
    }


def test_when_hooks_fire() -> None:
    """Never if registered too early or with register_hook; once per synchronised micro-batch otherwise."""
    for found in launch(2, hooks):
        assert found == {
            "before fully_shard": 0,
            "after fully_shard": 1,
            "register_hook": 0,
            "every micro-batch": 3,
            "synchronised once": 1,
            "replicate": 1,
            "ddp, every micro-batch": 3,
            "fsdp1": 0,
        }


def step_in_backward(rank: int, world: int, kind: str) -> tuple[list[str], torch.Tensor]:
    """(what is logged, the weight) when a hook steps an optimizer of its own."""
    model: nn.Module = tiny_llama() if kind == "ddp" else training.fully_sharded(kind, world)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    p, records = weight_of(model), []
    optimizer = lowrank_ds.GaLoreAdamW([{"params": [("w", p)], "rank": 8}], lr=1e-2)
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("lowrank_ds").addHandler(handler)
    p.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    backward(model, rank, world)
    weight = p.detach()
    return records, (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).clone()


def test_a_step_in_ddps_backward_is_said_and_drifts() -> None:
    """The warning names the way out; there is none under replicate() and FSDP2, where the ranks agree."""
    (said, first), (_, second) = launch(2, step_in_backward, "ddp")
    assert any("inside a backward pass" in m and "replicate()" in m for m in said)
    assert (first - second).abs().max() > 1e-3
    for kind in ("fsdp2", "replicate"):
        (said, first), (_, second) = launch(2, step_in_backward, kind)
        assert not any("inside a backward pass" in m for m in said)
        assert torch.equal(first, second)
