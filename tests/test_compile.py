"""`compile=True`: the pure arithmetic of a step as one kernel, on one process and on FSDP2's local tensors."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch

import lowrank_ds
from lowrank_ds import rules
from tests import training
from tests.cluster import launch

STEPS = 4


def use(backend: str) -> list[int]:
    """Compile with `backend` (inductor needs a C++ compiler), and count the graphs it is given."""
    torch._dynamo.reset()
    graphs: list[int] = []
    made = torch._dynamo.lookup_backend(backend)

    def counted(graph, inputs, **options):
        graphs.append(len(graph.graph.nodes))
        return made(graph, inputs, **options)

    rules._compiled_moments = functools.cache(lambda: torch.compile(rules._moments, dynamic=True, backend=counted))
    return graphs


def on_fsdp2(rank: int, world: int, backend: str) -> tuple[dict[str, torch.Tensor], int]:
    """(weights after training compiled, graphs compiled), with empty and uneven shards."""
    graphs = use(backend)
    model = training.fully_sharded("fsdp2", world)
    optimizer = training.build("fira", model, compile=True)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(STEPS))
    return training.weights_of(model), len(graphs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"] if shutil.which("g++") else ["aot_eager"])
def test_compiled_equals_eager(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within fp32 rounding of eager, with few compilations for many shapes."""
    torch.set_num_threads(1)
    eager = training.one_process("fira", STEPS)
    monkeypatch.setattr(rules, "_compiled_moments", rules._compiled_moments)
    graphs = use(backend)
    assert training.largest_difference(training.one_process("fira", STEPS, compile=True), eager) <= 1e-5
    assert 1 <= len(graphs) <= 8
    if backend == "aot_eager":
        weights, count = launch(3, on_fsdp2, backend)[0]
        assert training.largest_difference(weights, eager) <= 1e-5
        assert 1 <= count <= 8


def test_loading_keeps_the_choice_of_this_run() -> None:
    """`compile` and `projector_storage` say how this run computes and stores: a checkpoint does not change them."""

    def build(**more):
        weight = torch.nn.Parameter(torch.ones(6, 4))
        return lowrank_ds.GaLoreAdamW([("w", weight)], lr=1e-2, rank=2, **more)

    ours = build(compile=True, projector_storage="replicated")
    ours.load_state_dict(build().state_dict())
    assert ours.param_groups[0]["compile"] is True and ours.param_groups[0]["projector_storage"] == "replicated"
