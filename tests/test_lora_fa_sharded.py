"""LoRA-FA under every engine: the weights of one process, a sharded correction, checkpoints. One launch per world."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lowrank_ds
from lowrank_ds import collectives
from tests import lora, training
from tests.cluster import launch
from tests.counting import Counting

LIMIT = 1e-5
ZERO = {f"zero{stage}": functools.partial(lora.zero, stage=stage) for stage in (1, 2, 3)}


def layerwise(rank: int, world: int) -> dict[str, torch.Tensor]:
    """FSDP2 with every update inside the backward."""
    model = lora.sharded("fsdp2", world)
    optimizer = lora.optimizer_of(model)
    lowrank_ds.layerwise(model, optimizer)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(lora.STEPS))
    return training.weights_of(model)


def zero_resumed(rank: int, world: int, stage: int) -> dict[str, torch.Tensor]:
    """DeepSpeed's checkpoint after half of the steps, loaded into a new engine."""
    from tests.cluster import batches, share

    def train(engine: Any, steps: range) -> None:
        for batch in batches(steps.stop)[steps.start :]:
            mine = share(batch, rank, world)
            engine.backward(engine(input_ids=mine, labels=mine).loss)
            engine.step()

    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        torch.distributed.broadcast_object_list(folder)
        engine = lora.engine_of(stage, world)
        train(engine, range(6))
        engine.save_checkpoint(folder[0])
        engine.destroy()
        engine = lora.engine_of(stage, world)
        engine.load_checkpoint(folder[0])
        train(engine, range(6, lora.STEPS))
        weights = training.weights_of(engine.module)
        engine.destroy()
        torch.distributed.barrier()
    return weights


def fsdp2_resumed(rank: int, world: int) -> dict[str, torch.Tensor]:
    """State through torch.distributed.checkpoint.state_dict into a new optimizer on the same weights."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = lora.sharded("fsdp2", world)
    first = lora.optimizer_of(model)
    training.train_sharded(model, first, "fsdp2", rank, world, range(6))
    state = get_optimizer_state_dict(model, first)
    second = lora.optimizer_of(model)
    set_optimizer_state_dict(model, second, state)
    training.train_sharded(model, second, "fsdp2", rank, world, range(6, lora.STEPS))
    return training.weights_of(model)


def figures(rank: int, world: int, replicated: bool) -> dict[str, Any]:
    """Bytes of optimizer state on this rank, and the collectives of the third step."""
    model = lora.sharded("fsdp2", world)
    optimizer = lora.optimizer_of(model, projector_storage="replicated" if replicated else None)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(2))
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    original, collectives.dist = collectives.dist, Counting(collectives.dist)
    optimizer.step()
    counted, collectives.dist = collectives.dist, original
    return {"bytes": lowrank_ds.state_bytes(optimizer), "collectives": counted.calls}


CELLS: dict[int, dict[str, Callable]] = {
    2: {
        "ddp": lora.ddp, **ZERO, "fsdp1": lora.fsdp1, "fsdp2": lora.fsdp2, "fsdp2 layer-wise": layerwise,
        "fsdp2 replicated": functools.partial(lora.fsdp2, projector_storage="replicated"),
        "fsdp2 resumed": fsdp2_resumed,
        "zero2 resumed": functools.partial(zero_resumed, stage=2),
        "zero3 resumed": functools.partial(zero_resumed, stage=3),
        "zero2 instance": functools.partial(lora.zero, stage=2, named=False),
        "zero3 instance": functools.partial(lora.zero, stage=3, named=False),
        "zero3 sub-groups": functools.partial(lora.zero, stage=3, zero={"sub_group_size": 400}),
        "figures": functools.partial(figures, replicated=False),
        "figures replicated": functools.partial(figures, replicated=True),
    },
    3: {**ZERO, "fsdp1": lora.fsdp1, "fsdp2": lora.fsdp2},
}  # fmt: skip


def all_cells(rank: int, world: int) -> dict[str, Any]:
    """{cell: what it answers}; weights from rank 0 only."""
    found = {name: run(rank, world) for name, run in CELLS[world].items()}
    return found if rank == 0 else {name: value for name, value in found.items() if name.startswith("figures")}


@functools.cache
def results(world: int) -> list[dict[str, Any]]:
    """What each rank answers."""
    torch.set_num_threads(1)
    return launch(world, all_cells)


@pytest.mark.parametrize("world", list(CELLS))
def test_weights_do_not_depend_on_sharding(world: int, capsys: pytest.CaptureFixture) -> None:
    """Mixed ranks, rsLoRA, a trained head, cuts inside rows: all within fp32 rounding of one process."""
    found, expected = results(world)[0], lora.one_process()
    far = {
        name: training.largest_difference(weights, expected)
        for name, weights in found.items()
        if not name.startswith("figures")
    }
    with capsys.disabled():
        print("", *(f"LoRA-FA, {name} x {world}: {value:.1e}" for name, value in far.items()), sep="\n")
    assert training.largest_difference(expected, training.weights_of(lora.lora_llama())) > 0.05
    assert not {name: value for name, value in far.items() if not value <= LIMIT}
    # resuming is bit for bit
    for name in [name for name in far if name.endswith("resumed")]:
        assert training.largest_difference(found[name], found[name.split()[0]]) == 0, name


def test_the_correction_is_sharded_and_costs_one_collective() -> None:
    """Summed over ranks, state is one process's (law 2); gathering C shares the round that checks the gradients."""
    model = lora.lora_llama()
    optimizer = lora.optimizer_of(model)
    training.train_wrapped(model, optimizer, 0, 1, 2)
    alone = lowrank_ds.state_bytes(optimizer)
    sharded, replicated = ([rank[name] for rank in results(2)] for name in ("figures", "figures replicated"))
    assert alone <= sum(rank["bytes"] for rank in sharded) <= 1.05 * alone
    assert sum(rank["bytes"] for rank in replicated) > sum(rank["bytes"] for rank in sharded)
    assert all(rank["collectives"] == 1 for rank in (*sharded, *replicated))
