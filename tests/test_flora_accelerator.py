"""`FloraAccelerator`: flora-opt's loop; sums of micro-batches in random subspaces against float64, engines, resume."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ds
from lowrank_ds import linalg
from tests import huggingface as hf
from tests import reference
from tests.cluster import batches, launch, share, tiny_llama
from tests.training import largest_difference

RANK, SKETCH, MICRO = 4, 6, 4
STEPS, HALF = 12, 6  # micro-batches: three steps, and in the middle of the second


@pytest.fixture(autouse=True)
def no_engine() -> None:
    """No engine left over from another test."""
    hf.forget_engine()


def accelerator(engine: str = "plain", rank: int | None = SKETCH, micro: int = MICRO) -> Any:
    """A FloraAccelerator for "plain" (one process or DDP) or "fsdp2"."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    hf.forget_engine()
    plugin = None
    if engine == "fsdp2":
        hf.fsdp2_on_cpu()
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    return lowrank_ds.FloraAccelerator(rank, gradient_accumulation_steps=micro, cpu=True, fsdp_plugin=plugin)


# --- the mathematics ------------------------------------------------------------------------------------------------
def sketched(gradients: Tensor, name: str, step: int, rank: int = SKETCH) -> Tensor:
    """What the step (1-based) makes of the gradients (micro-batches, m, n) of a wide matrix: A A^T of their sum."""
    basis = linalg.gaussian((0, name, "accumulate", step), gradients.shape[1], rank).double()
    return basis @ (basis.T @ gradients.double().sum(0))


def test_a_step_uses_the_sketch_of_the_sum() -> None:
    """Three steps of four micro-batches equal Flora's float64 reference on A A^T (G_1 + ... + G_4)."""
    torch.manual_seed(0)
    model, gradients = nn.Linear(20, 12, bias=False), torch.randn(3, MICRO, 12, 20)
    start, settings = model.weight.detach().clone(), {"lr": 1e-2, "beta1": 0.9, "kappa": 2}
    optimizer = lowrank_ds.Flora(model.named_parameters(), rank=RANK, **settings)
    accelerate = accelerator()
    model, optimizer = accelerate.prepare(model, optimizer)
    for gradient in gradients.flatten(0, 1):
        with accelerate.accumulate(model):
            accelerate.backward(MICRO * (model.weight * gradient).sum())  # accelerate divides by MICRO
            assert model.weight.grad is None
            optimizer.step()
            optimizer.zero_grad()
    basis = lambda k: linalg.gaussian((0, "weight", k), 12, RANK)
    expected = reference.flora(
        start, [sketched(g, "weight", step) for step, g in enumerate(gradients, 1)], basis, **settings
    )
    whole = reference.flora(start, [g.double().sum(0) for g in gradients], basis, **settings)
    assert (model.weight - expected).abs().max() < 1e-6
    assert (model.weight - whole).abs().max() > 1e-4


def test_the_sketch_is_unbiased() -> None:
    """Over many steps the mean of what is used tends to the sum, as 1 / sqrt(steps)."""
    torch.manual_seed(0)
    gradients, steps = torch.randn(MICRO, 12, 20), 800
    total = gradients.double().sum(0)
    mean = sum(sketched(gradients, "weight", step) for step in range(steps)) / steps
    one = (sketched(gradients, "weight", 0) - total).norm() / total.norm()
    assert (mean - total).norm() / total.norm() < 3 * one / steps**0.5


# --- engines and checkpoints ----------------------------------------------------------------------------------------
def prepared(engine: str, model: Any) -> tuple[Any, Any, Any]:
    """(accelerator, model, optimizer); flora-opt's two lines."""
    accelerate = accelerator(engine)
    groups = lowrank_ds.param_groups(model, rank=RANK)
    return (accelerate, *accelerate.prepare(model, lowrank_ds.Flora(groups, lr=1e-2, kappa=2)))


def loop(rank: int, world: int, run: tuple[Any, Any, Any], start: int, place: str = "") -> dict[str, Tensor]:
    """Weights after the micro-batches from `start` on; `place` gets a checkpoint in the middle of a sum."""
    accelerate, model, optimizer = run
    projected = {id(p) for g in hf.inner(optimizer).param_groups if g["rank"] for p in g["params"]}
    for step, batch in enumerate(batches(STEPS, size=4)[start:], start):
        if place and step == HALF:
            accelerate.save_state(place)
        with accelerate.accumulate(model):
            ids = share(batch, rank, world)
            accelerate.backward(model(input_ids=ids, labels=ids).loss)
            if not accelerate.sync_gradients:
                held = [p for p in model.parameters() if p.grad is not None]
                assert held and not any(id(p) in projected for p in held)
            optimizer.step()
            optimizer.zero_grad()
    return hf.weights(accelerate.unwrap_model(model))


def straight_and_resumed(rank: int, world: int, folder: str, engine: str) -> tuple[dict, dict]:
    """(weights, the same after `save_state` in the middle of a sum, a new model and `load_state`)."""
    place = str(Path(folder) / engine)
    run = prepared(engine, tiny_llama())
    if engine == "fsdp2":
        assert all(hasattr(p, "placements") for p in run[1].parameters())
    expected = loop(rank, world, run, 0, place)
    run = prepared(engine, tiny_llama(seed=9))
    run[0].load_state(place)
    return expected, loop(rank, world, run, HALF)


def both(rank: int, world: int, folder: str) -> dict[str, tuple[dict, dict]]:
    """DDP and FSDP2."""
    return {engine: straight_and_resumed(rank, world, folder, engine) for engine in ("plain", "fsdp2")}


def test_engines_agree_and_resume_in_the_middle_of_a_sum(tmp_path: Path) -> None:
    """One process (updates in the backward), DDP x 2 (in `step()`) and FSDP2 x 2; each resumes bit for bit."""
    found = {"one": straight_and_resumed(0, 1, str(tmp_path / "one"), "plain")}
    found |= launch(2, both, str(tmp_path / "two"))[0]
    moved = largest_difference(found["one"][0], hf.weights(tiny_llama()))
    assert moved > 1e-3
    for engine, (straight, resumed) in found.items():
        assert largest_difference(straight, found["one"][0]) < 1e-6, engine
        assert largest_difference(straight, resumed) == 0.0, engine


# --- messages -------------------------------------------------------------------------------------------------------
def flora(**options: Any) -> tuple[nn.Module, Any]:
    """A small model and its Flora."""
    model = nn.Linear(8, 6, bias=False)
    return model, lowrank_ds.Flora(model.named_parameters(), **{"lr": 1e-3, "rank": 2, **options})


def test_messages() -> None:
    """What FloraAccelerator cannot serve is refused, with the way out."""
    model, optimizer = flora()
    with pytest.raises(TypeError, match=r"must be lowrank_ds.Flora, got torch.optim.adamw.AdamW"):
        accelerator().prepare(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="is 6, but the optimizer's is 3. Give it to one of them"):
        accelerator().prepare(*flora(accumulation_compression_rank=3))
    with pytest.raises(ValueError, match="no param group has a rank"):
        accelerator().prepare(*flora(rank=None))
    with pytest.raises(ValueError, match="with its model in one call; got 0"):
        accelerator().prepare(optimizer)
    accelerate = accelerator()
    accelerate.prepare_optimizer(flora()[1])
    with pytest.raises(RuntimeError, match="prepared without its model"), accelerate.accumulate(model):
        pass
    with pytest.raises(ValueError, match="must be a whole number >= 1, got 0"):
        lowrank_ds.FloraAccelerator(0)
    with pytest.raises(RuntimeError, match="no norm to clip. Flora limits its updates itself"):
        accelerator().clip_grad_norm_(model.parameters(), 1.0)


def test_one_micro_batch_needs_no_sums() -> None:
    """As in flora-opt, nothing is sketched without accumulation."""
    model, optimizer = flora()
    accelerate = accelerator(micro=1)
    model, optimizer = accelerate.prepare(model, optimizer)
    assert all("accumulated" not in state for state in optimizer.state.values()) and len(optimizer.state) == 1


def test_accelerate_is_imported_on_demand() -> None:
    """`import lowrank_ds` leaves accelerate alone; unknown names are still errors."""
    code = "import lowrank_ds, sys; assert 'accelerate' not in sys.modules; lowrank_ds.FloraAccelerator"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    with pytest.raises(AttributeError, match="no attribute 'FloraAcelerator'"):
        _ = lowrank_ds.FloraAcelerator
