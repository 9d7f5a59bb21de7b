"""LoRA-FA: parity with peft, the mathematics in float64, what peft's optimizer dies of, saved activations."""

from __future__ import annotations

import copy
import io
import logging
import tempfile
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lowrank_ds
from lowrank_ds.lora_layers import RecomputedDropout
from tests import lora, training
from tests.benchmarks.saved_activations import saved_mib
from tests.cluster import batches, tiny_llama
from tests.lora import ALPHA, DECAY, LR, R, lora_llama, optimizer_of

UP = "base_model.model.model.layers.0.mlp.up_proj"


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, skip: int = 0) -> None:
    """Plain training on the global batches number skip, ..., steps - 1."""
    for batch in batches(steps)[skip:]:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weight(model: nn.Module, which: str, layer: str = UP, adapter: str = "default") -> Tensor:
    """lora_A's or lora_B's weight."""
    return getattr(model.get_submodule(layer), which)[adapter].weight


def correction(optimizer: torch.optim.Optimizer, model: nn.Module) -> Tensor:
    """The kept C (r, r) of the layer UP."""
    return optimizer.state[weight(model, "lora_B")]["correction"]


# -- equal to peft, equal to the textbook -----------------------------------------------------------------------------
@pytest.mark.parametrize("rooted", [False, True])
def test_weights_equal_pefts_optimizer(monkeypatch: pytest.MonkeyPatch, rooted: bool) -> None:
    """Mixed ranks, decay, a whole trained head. peft's bf16 autocast of the correction is switched off.

    50 steps on the same gradients; 15 by themselves: this training doubles a difference every three steps from the
    20th on, and one ulp in the initial weights is up to 1.4e-5 after 50.
    """
    from peft.optimizers import lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    ours = lora_llama(use_rslora=rooted)
    apart, theirs = copy.deepcopy(ours), copy.deepcopy(ours)
    start = training.weights_of(ours)
    optimizer, their_optimizer = optimizer_of(ours), lorafa.create_lorafa_optimizer(theirs, R, ALPHA, LR, DECAY)
    halfway = {}
    for number, batch in enumerate(batches(50)):
        if number == 15:
            halfway = training.weights_of(ours)
        ours(input_ids=batch, labels=batch).loss.backward()
        for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True):
            their.grad = None if mine.grad is None else mine.grad.clone()
        optimizer.step(), their_optimizer.step()
        optimizer.zero_grad()
    found = training.weights_of(ours)
    assert training.largest_difference(found, start) > 0.2
    assert training.largest_difference(found, training.weights_of(theirs)) < 2e-6
    train(apart, lorafa.create_lorafa_optimizer(apart, R, ALPHA, LR, DECAY), 15)
    assert training.largest_difference(halfway, start) > 0.05
    assert training.largest_difference(halfway, training.weights_of(apart)) < 2e-6


def textbook(a: Tensor, b: Tensor, grads: list[Tensor], s: float, decay: float) -> Tensor:
    """LoRA-FA in float64: B after AdamW (decay last, eps beside sqrt(v)) on s^-2 g (A A^T)^-1, by least squares.

    a (r, n), b (m, r), grads of b (m, r). g = s G A^T for some full gradient G, and g' minimises |s g' A - G| over g':
    s (A A^T) g'^T = A G^T = g^T / s.
    """
    a, b = a.double(), b.double().clone()
    m, v = torch.zeros_like(b), torch.zeros_like(b)
    for t, grad in enumerate((g.double() for g in grads), 1):
        g = torch.linalg.lstsq(s * (a @ a.T), grad.T / s).solution.T
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        b -= LR * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m / (v.sqrt() + 1e-6)
        b *= 1 - LR * decay
    return b


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_step_is_the_textbooks(kind: str) -> None:
    """Against float64, on given gradients; a convolution is the matrix (out, r) with A (r, in * k * k)."""
    torch.manual_seed(0)
    base = nn.Linear(20, 12) if kind == "linear" else nn.Conv2d(5, 12, 3)
    model = peft.get_peft_model(
        nn.ModuleDict({"x": base}), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["x"], lora_bias=True)
    )
    optimizer = lowrank_ds.create_lorafa_optimizer(model, 4, 6, LR, DECAY)
    layer = model.base_model.model["x"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    start, grads = b.detach().clone(), [torch.randn(b.shape) for _ in range(20)]
    for grad in grads:
        b.grad, layer.lora_B["default"].bias.grad = grad.clone(), torch.ones(12)
        optimizer.step()
    expected = textbook(a.flatten(1), start.flatten(1), [g.flatten(1) for g in grads], 1.5, DECAY)
    assert (b.flatten(1) - expected).abs().max() < 1e-6
    assert layer.lora_B["default"].bias.max() < -0.1  # plain AdamW


def test_the_corrected_update_is_the_nearest_to_the_full_gradient() -> None:
    """|s g' A - G| cannot be made smaller by moving g'."""
    torch.manual_seed(0)
    a, full, s = torch.randn(4, 20), torch.randn(12, 20), 1.5
    corrected = s * full @ a.T @ lowrank_ds.linalg.gram_inverse(a)[0] / s**2
    error = (s * corrected @ a - full).square().sum()
    for _ in range(20):
        moved = corrected + 1e-2 * torch.randn_like(corrected)
        assert (s * moved @ a - full).square().sum() > error


# -- what the correction follows --------------------------------------------------------------------------------------
def test_correction_is_made_once_and_again_when_a_or_the_scaling_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In-place changes of A and set_scale are noticed at the next step; nothing is computed otherwise."""
    calls: list[int] = []
    inverse = lowrank_ds.linalg.gram_inverse
    monkeypatch.setattr(lowrank_ds.linalg, "gram_inverse", lambda a: calls.append(1) or inverse(a))
    model = lora_llama()
    optimizer = optimizer_of(model)
    train(model, optimizer, 3)
    assert len(calls) == 8  # layers
    before = correction(optimizer, model).clone()
    a = weight(model, "lora_A").detach().double()
    s = ALPHA / 3**0.5
    torch.testing.assert_close(before, torch.linalg.inv(a @ a.T).float() / s**2, rtol=1e-5, atol=0)
    with torch.no_grad():
        weight(model, "lora_A").mul_(2)
    train(model, optimizer, 4, 3)
    torch.testing.assert_close(correction(optimizer, model), before / 4)
    model.get_submodule(UP).set_scale("default", 3.0)
    train(model, optimizer, 5, 4)
    torch.testing.assert_close(correction(optimizer, model), before / 36)
    assert len(calls) == 10


def test_state_is_tensors_on_the_parameters_and_resumes_bit_for_bit() -> None:
    """weights_only load into a model loaded the same way; a lora_A has no state."""
    model = lora_llama()
    optimizer = optimizer_of(model)
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 8, 4)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert all(isinstance(v, Tensor) for s in saved["optimizer"]["state"].values() for v in s.values())
    resumed = lora_llama()
    resumed.load_state_dict(saved["model"])
    second = optimizer_of(resumed)
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, 8, 4)
    assert training.largest_difference(training.weights_of(model), training.weights_of(resumed)) == 0
    assert all(p.requires_grad for p in optimizer.state)


def test_state_of_another_a_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """The optimizer's state loaded, the adapter forgotten."""
    model, other = lora_llama(), lora_llama()
    with torch.no_grad():
        weight(other, "lora_A").mul_(1.5)
    optimizer, second = optimizer_of(model), optimizer_of(other)
    train(model, optimizer, 2)
    second.load_state_dict(optimizer.state_dict())
    with caplog.at_level(logging.WARNING, "lowrank_ds"):
        train(other, second, 1)
    assert [r for r in caplog.records if f"{UP}.lora_A.default.weight (or its scaling) is not" in r.message]


def test_init_state_makes_the_corrections() -> None:
    """A state dict is complete before the first step."""
    model = lora_llama()
    optimizer = optimizer_of(model)
    optimizer.init_state()
    assert bool(correction(optimizer, model).any())


# -- where peft's optimizer dies --------------------------------------------------------------------------------------
def test_two_adapters_and_a_b_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adapter has its own clock; the one that is not active, or was not reached, stays and has no state."""
    model = lora_llama()
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["up_proj"])
    model.add_adapter("second", config)
    optimizer = optimizer_of(model)
    other = weight(model, "lora_B", adapter="second")
    down = weight(model, "lora_B", UP.replace("up", "down"))
    before = down.detach().clone()
    batch = batches(1)[0]
    model(input_ids=batch, labels=batch).loss.backward()
    down.grad = None
    optimizer.step()
    assert other not in optimizer.state and bool((down == before).all())
    model.set_adapter("second")
    optimizer.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    with pytest.raises(RuntimeError, match=r"lora_A\.second\.weight requires a gradient again .*freeze_lora_a"):
        optimizer.step()
    lowrank_ds.freeze_lora_a(model)
    optimizer.step()
    assert bool(other.any()) and optimizer.state[other]["correction"].shape == (2, 2)


def test_the_arguments_are_checked_against_the_layers(caplog: pytest.LogCaptureFixture) -> None:
    """Each layer's rank and scaling are used; a disagreement is said once, agreement is silent."""
    with caplog.at_level(logging.WARNING, "lowrank_ds"):
        lowrank_ds.create_lorafa_optimizer(lora_llama(rank_pattern={}), R, ALPHA, LR)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "lowrank_ds"):
        lowrank_ds.create_lorafa_optimizer(lora_llama(), R, ALPHA, LR, use_rslora=True)
        lowrank_ds.create_lorafa_optimizer(lora_llama(rank_pattern={}), R, ALPHA, LR, use_rslora=False)
    first, second = (record.getMessage() for record in caplog.records)
    assert "4 of 8 adapters differ from r=6" in first and "8 of 8 adapters differ from r=6" in second


def linear(zero: bool = False, **config: Any) -> nn.Module:
    """A linear layer and an embedding with LoRA on the first (or on what `config` says)."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"x": nn.Linear(20, 12), "e": nn.Embedding(9, 20), "c": nn.Conv1d(4, 8, 3, groups=2)})
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": ["x"], **config}))
    if zero:
        nn.init.zeros_(model.base_model.model["x"].lora_A["default"].weight)
    return model


def create(model: nn.Module) -> lowrank_ds.LoRAFA:
    """LoRA-FA on `linear()`."""
    return lowrank_ds.create_lorafa_optimizer(model, 4, 8, LR)


def start_from_zero() -> None:
    """An A of zeros, which is met when the state is made."""
    model = linear(zero=True)
    create(model).init_state()


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "dora": (lambda: create(linear(use_dora=True)), ValueError, r"x\.lora_B\.default\.weight is of a DoRA layer"),
    "embedding": (lambda: create(linear(target_modules=["x", "e"])), ValueError, "e.lora_embedding_.* a LoRA embed"),
    "groups": (lambda: create(linear(target_modules=["c"])), ValueError, r"c\.lora_B.* do not multiply"),
    "bare parameter": (
        lambda: create(linear(target_modules=[], target_parameters=["x.weight"])), ValueError, "use target_modules"),
    "zero A": (start_from_zero, ValueError, r"x\.lora_A\.default\.weight is all zeros"),
    "scaling 0": (lambda: create(linear(lora_alpha=0)), ValueError, "scaling 0"),
    "no layers": (lambda: create(tiny_llama()), ValueError, "LlamaForCausalLM has no LoRA layers"),
    "unseen": (lambda: lowrank_ds.LoRAFA(linear().named_parameters(), lr=LR), ValueError, "not seen.*create_lorafa"),
    "rank": (lambda: lowrank_ds.LoRAFA(linear().named_parameters(), rank=4), ValueError, "unknown option 'rank'"),
    "seed storage": (
        lambda: lowrank_ds.create_lorafa_optimizer(linear(), 4, 8, LR, projector_storage="seed"), ValueError,
        "LoRA-FA draws nothing"),
    "two eps": (lambda: lowrank_ds.create_lorafa_optimizer(linear(), 4, 8, LR, eps=(1, 1)), ValueError, "one number"),
    "dropout of what": (lambda: lowrank_ds.recompute_dropout(tiny_llama()), ValueError, "no LoRA layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_done_is_refused_by_name(case: str) -> None:
    """The message names the parameter or option and what to do."""
    make, kind, message = REFUSED[case]
    with pytest.raises(kind, match=f"(?i){message}"):
        make()


def test_an_untrained_dora_adapter_does_not_matter() -> None:
    """Only what is trained is refused."""
    model = linear()
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["x"], use_dora=True))
    assert "1 lora_B corrected" in create(model).summary()


def test_dependent_rows_are_said_and_train(caplog: pytest.LogCaptureFixture) -> None:
    """Two equal rows of A: finite, and named."""
    model = linear()
    layer = model.base_model.model["x"]
    with torch.no_grad():
        layer.lora_A["default"].weight[1] = layer.lora_A["default"].weight[0]
    optimizer = create(model)
    layer(torch.randn(5, 20)).square().sum().backward()
    with caplog.at_level(logging.WARNING, "lowrank_ds"):
        optimizer.step()
    assert any("has dependent rows" in record.getMessage() for record in caplog.records)
    assert bool(layer.lora_B["default"].weight.isfinite().all())


def test_a_gradient_that_is_not_finite_is_skipped() -> None:
    """As in all algorithms: counted, and the weights stay."""
    model = linear()
    optimizer, b = create(model), model.base_model.model["x"].lora_B["default"].weight
    b.grad = torch.ones_like(b)
    optimizer.step()
    before = b.detach().clone()
    b.grad = torch.full_like(b, torch.nan)
    optimizer.step()
    assert bool((b == before).all()) and sum(optimizer.skipped().values()) == 1


# -- dropout without a saved mask -------------------------------------------------------------------------------------
def test_dropouts_gradient_uses_the_mask_of_the_forward() -> None:
    """Entry by entry: y = x m / (1 - p) and dx = dy m / (1 - p); the share of kept entries is 1 - p."""
    torch.manual_seed(0)
    dropout = RecomputedDropout(0.25)
    x = torch.rand(300, 400).add_(1).requires_grad_()
    y = dropout(x)
    y.backward(torch.full_like(y, 3.0))
    kept = y != 0
    torch.testing.assert_close(y.detach(), torch.where(kept, x.detach() / 0.75, 0.0))
    torch.testing.assert_close(x.grad, torch.where(kept, 4.0, 0.0))
    assert abs(kept.float().mean().item() - 0.75) < 0.005
    assert not bool((dropout(x) == y).all())
    assert dropout.eval()(x) is x and not bool(RecomputedDropout(1.0)(x).any())


def test_activation_checkpointing_draws_the_same_mask() -> None:
    """The seed comes from the generator that torch.utils.checkpoint restores."""
    from torch.utils.checkpoint import checkpoint

    dropout, found = RecomputedDropout(0.5), []
    for wrapped in (False, True):
        torch.manual_seed(0)
        x = torch.ones(64, 64, requires_grad=True)
        y = checkpoint(lambda x: dropout(x).square(), x, use_reentrant=False) if wrapped else dropout(x).square()
        y.sum().backward()
        found.append(x.grad)
    assert bool((found[0] == found[1]).all()) and 1000 < int((found[0] == 0).sum()) < 3000


def test_pefts_features_work_with_recomputed_dropout() -> None:
    """Training reaches B, and merge, unmerge, disable_adapter, save and load give what they gave before."""
    model = lora_llama(lora_dropout=0.1)
    assert lowrank_ds.recompute_dropout(model) == 8 and lowrank_ds.recompute_dropout(model) == 0
    train(model, optimizer_of(model), 2)
    plain = lora_llama(lora_dropout=0.1)
    plain.load_state_dict(model.state_dict())
    model.eval(), plain.eval()
    batch = batches(1)[0]

    def logits(of: nn.Module) -> Tensor:
        return of(input_ids=batch).logits

    assert bool((logits(model) == logits(plain)).all())
    with model.disable_adapter(), plain.disable_adapter():
        assert bool((logits(model) == logits(plain)).all())
    expected = logits(plain)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), folder).eval()
    assert bool((logits(loaded) == expected).all())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected)


def test_saved_activations() -> None:
    """MiB kept for the backward: with dropout as without, and never more than peft's LoRA-FA."""
    found = {(kind, p): saved_mib(kind, p, layers=1, hidden=64) for kind in ("lora", "fa", "ours") for p in (0.0, 0.05)}
    assert found["ours", 0.0] == found["fa", 0.0] < found["lora", 0.0]
    assert found["ours", 0.05] == found["fa", 0.0] < 0.8 * found["fa", 0.05]


# -- around it --------------------------------------------------------------------------------------------------------
def test_a_4_bit_base() -> None:
    """bitsandbytes' NF4 Linear on this machine's device: only B moves, and the loss falls."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        # where the CPU has bf16 products, bitsandbytes packs a weight's rows by 32 and refuses any other number of them
        tiny_llama(hidden_size=64, intermediate_size=64, num_attention_heads=2).save_pretrained(folder)
        base = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantized, device_map={"": "cpu"})
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["up_proj"]))
    assert isinstance(model.get_submodule(UP).base_layer, bitsandbytes.nn.Linear4bit)
    assert lowrank_ds.recompute_dropout(model) == 2
    optimizer, batch, losses = lowrank_ds.create_lorafa_optimizer(model, 4, 8, 3e-2), batches(1)[0], []
    for _ in range(8):
        losses.append(model(input_ids=batch, labels=batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.02


def test_trainer_builds_it_by_name() -> None:
    """`for_trainer("LoRAFA")` as Trainer calls it: lora_B decayed and corrected, lora_A frozen."""
    factory, options = lowrank_ds.for_trainer("LoRAFA", lr=LR, weight_decay=DECAY)
    model = lora_llama()
    optimizer = factory()(model, **options)
    train(model, optimizer, 3)
    reference = lora_llama()
    train(reference, optimizer_of(reference), 3)
    assert training.largest_difference(training.weights_of(model), training.weights_of(reference)) == 0


def test_ddp_around_a_trained_lora_a_is_refused() -> None:
    """DDP would wait for a gradient that never comes."""
    model = lora_llama()
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(ValueError, match="freeze_lora_a"):
        lora.optimizer_of(wrapped)
