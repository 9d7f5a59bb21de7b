"""Memory that layer-wise updates and sums in the subspace save, tracked storage by storage."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import lowrank_ds
from lowrank_ds import job
from lowrank_ds.bench.tracking import Tracker, largest_two
from tests import training
from tests.cluster import batches, tiny_llama


def llama() -> nn.Module:
    """Gradients far larger than the activations of 16 tokens; no matrix is a large part of the whole."""
    sizes = {"hidden_size": 132, "intermediate_size": 356, "num_hidden_layers": 4, "vocab_size": 509}
    return tiny_llama(num_key_value_heads=3, **sizes)


def backward(model: nn.Module, batch: torch.Tensor) -> None:
    """Forward and backward."""
    model(input_ids=batch, labels=batch).loss.backward()


def grad_bytes(model: nn.Module) -> int:
    """Bytes of all gradients there are."""
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


# --- the tracker itself ----------------------------------------------------------------------------------------------
def test_the_tracker_agrees_with_counting_by_hand() -> None:
    """Two linear layers: every byte alive at the worst moment of a backward."""
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False))
    x, tracker = torch.ones(32, 64), Tracker()
    tracker.follow_gradients(model)
    tracker.name("weights", model.parameters())
    with tracker:
        model(x).sum().backward()
        start = tracker.now()
        model.zero_grad()
    weight, hidden = 64 * 128 * 4, 32 * 128 * 4
    found = tracker.peak()
    # the end of the backward: both gradients, the gradient of the hidden layer; ones for the sum's (4 bytes each)
    assert found.at["weights"] == 2 * weight == found.own["weights"]
    assert found.at["gradients"] == 2 * weight == found.own["gradients"]
    assert hidden <= found.at["other"] <= hidden + 16
    assert tracker.peak(tracker.now()).at["gradients"] == 0 < tracker.peak(start).at["gradients"]


def test_the_tracker_follows_resized_and_fake_storages() -> None:
    """What FSDP2 frees and fills again, and tensors without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode in (FakeTensorMode(), torch.no_grad()):
        with mode, Tracker() as tracker:
            x = torch.empty(1000)
            x.untyped_storage().resize_(0)
            y = torch.empty(500)
            x.untyped_storage().resize_(4000)
            del x
            z = y[:3] + 1
            assert [size for _, size in tracker._events] == [4000, -4000, 2000, 4000, -4000, 12]
            assert z.shape == (3,) and tracker.peak().total == 6000


# --- layer-wise ------------------------------------------------------------------------------------------------------
def layerwise_run(recipe: str, layerwise: bool) -> tuple[nn.Module, Tracker, list[int]]:
    """Three steps, a refresh among them; (model, tracker, bytes in all .grad whenever a gradient arrives)."""
    model, seen = llama(), []
    optimizer = training.build(recipe, model, rank=32, update_proj_gap=2)
    tracker = Tracker()
    tracker.follow_gradients(model)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: seen.append(grad_bytes(model)))
    if layerwise:
        lowrank_ds.layerwise(model, optimizer)
    gc.disable()  # what only the cycle collector would free counts
    try:
        with tracker:
            for batch in batches(3, size=1, vocabulary=509):
                backward(model, batch)
                seen.append(grad_bytes(model))
                optimizer.step()
                optimizer.zero_grad()
    finally:
        gc.enable()
    tracker.name_model(model, optimizer)
    return model, tracker, seen


@pytest.mark.parametrize("recipe", ["galore", "fira"])
def test_live_gradients_never_exceed_the_two_largest_tensors(recipe: str) -> None:
    """Neither in `.grad` nor anywhere else; without layer-wise updates all gradients are alive together."""
    torch.set_num_threads(1)
    model, tracker, seen = layerwise_run(recipe, True)
    everything, two = sum(p.nbytes for p in model.parameters()), largest_two(model)
    assert two < everything / 4
    assert 0 < max(seen) <= two
    assert 0 < tracker.peak().own["gradients"] <= two
    assert grad_bytes(model) == 0
    _, usual, seen = layerwise_run(recipe, False)
    assert max(seen) == everything == usual.peak().own["gradients"]
    assert tracker.peak().own["state"] == usual.peak().own["state"]
    assert tracker.peak().total <= usual.peak().total - (everything - two) / 2  # temporaries do not eat it up


def test_temporaries_of_an_unprojected_parameter_are_small() -> None:
    """AdamW on an embedding: the step makes no second copy of it."""
    p = nn.Parameter(torch.ones(4096, 512))
    optimizer = lowrank_ds.GaLoreAdamW([("embedding", p)], lr=1e-3, rank=None)
    p.grad = torch.ones_like(p)
    optimizer.init_state()
    with Tracker() as tracker:
        optimizer.step()
    tracker.name("weights", [p, p.grad])
    tracker.name_model(nn.ParameterList([p]), optimizer)
    assert 0 < tracker.peak().own["other"] <= p.nbytes / 1.5


# --- sums of micro-batches in the subspace ---------------------------------------------------------------------------
@pytest.mark.parametrize("layerwise", [False, True])
def test_sums_of_eight_micro_batches_cost_r_over_the_short_side(layerwise: bool) -> None:
    """state["accumulated"] against fp32 gradients, matrix by matrix; gradients are freed between micro-batches."""
    torch.set_num_threads(1)
    model, rank = llama(), 32
    optimizer = training.build("galore", model, rank=rank, compress_accumulation=True, update_proj_gap=100)
    if layerwise:
        lowrank_ds.layerwise(model, optimizer, accumulation_steps=8)
    projected = {n: p for n, p in model.named_parameters() if "_proj" in n}
    for step, batch in enumerate(batches(2, size=8, vocabulary=509)):
        for number, part in enumerate(batch.chunk(8), 1):
            backward(model, part)
            if not layerwise:
                optimizer.accumulate()
            kept = {name for name, p in projected.items() if p.grad is not None}
            if step == 0 and number < 8:  # the coming step makes a basis: it needs the whole gradient
                assert kept == set(projected)
            if step == 1:
                assert not kept, (number, kept)
                folded = sum(int(optimizer.state[p]["micro_batches"]) for p in projected.values())
                assert folded == (number if not layerwise or number < 8 else 0) * len(projected)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in projected.items():
        sums = optimizer.state[p]["accumulated"]
        assert sums.nbytes * min(p.shape) == rank * p.nbytes, name
    assert len(projected) == 28


# --- pieces ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["galore", "fira", "galore adafactor", "flora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_pieces_changes_nothing(recipe: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps in pieces of 64 entries and in one piece, the same weights; bf16 is rounded stochastically."""
    torch.set_num_threads(1)
    found = []
    for size in (64, 1 << 40):
        monkeypatch.setattr(job, "_PIECE_CPU", size)
        found.append(training.one_process(recipe, 3, tiny_llama().to(dtype), lr=1e-3, weight_decay=0.1))
    differing = sum((found[0][n] != found[1][n]).sum().item() for n in found[0])
    if dtype == torch.float32:  # products of other shapes round in the last bit
        assert training.largest_difference(*found) <= 1e-7
    else:  # which decides a few draws
        assert differing <= 0.001 * sum(w.numel() for w in found[0].values())
