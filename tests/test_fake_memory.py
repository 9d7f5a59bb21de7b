"""A whole training step at LLaMA-7B's dimensions on many ranks, on fake tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from lowrank_ds.plan import Planner
from tests.benchmarks.fake_memory import in_a_process, settings_of

LAYERS, WORLD, RANK = 4, 8, 1024
LAYER, ROOT, NORMS = 4 * 4096**2 + 3 * 4096 * 11008, 2 * 32000 * 4096, (2 * LAYERS + 1) * 4096  # entries


def test_layerwise_frees_gradients_under_fsdp2(capsys: pytest.CaptureFixture) -> None:
    """Fira, 4 layers, 8 ranks: weights, gradients and state are an eighth; layer-wise no more than two units of it.

    FSDP2 keeps the gradients of a unit (here a layer, or embedding and head) in one buffer: it is freed with the last.
    """
    with ThreadPoolExecutor() as pool:
        usual, ours = pool.map(lambda layerwise: in_a_process("Fira", layerwise, WORLD, LAYERS, RANK), (False, True))
    with capsys.disabled():
        for name, found in (("step()", usual), ("layer-wise", ours)):
            print(f"\n{name:10s}", {k: round(v / 2**20, 1) for k, v in found.items() if k != "seconds"}, "MiB")
    everything = (LAYERS * LAYER + ROOT + NORMS) * 2 // WORLD  # bf16
    units = (LAYER + ROOT + 2 * 4096 + 4096) * 2 // WORLD
    for found in (usual, ours):
        assert 0 <= found["weights"] - everything < 2**20  # rotary tables
        # both moments (4096 or 11008 lines of r) and a basis (r columns, 4096 or 4096 rows), fp32
        moments = LAYERS * 2 * (4 * 4096 + 3 * 11008) * RANK
        bases = LAYERS * 7 * 4096 * RANK
        assert 0 <= found["state"] - (moments + bases + 2 * (ROOT + NORMS)) * 4 // WORLD < 2**20  # counters
    for layerwise, found in ((False, usual), (True, ours)):
        plan = Planner(settings_of("Fira", layerwise, WORLD, LAYERS, RANK)).plan(refresh=False)
        assert plan.total == pytest.approx(found["total"], rel=0.03)
    assert usual["largest gradients"] == everything
    assert LAYER * 2 // WORLD <= ours["largest gradients"] <= units < 0.6 * everything
    assert ours["total"] < usual["total"]
