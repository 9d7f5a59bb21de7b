"""int8 weights: codes, their stochastic rounding, and training on them in one process and under FSDP2."""

from __future__ import annotations

import copy
import functools
import io
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_ds
from lowrank_ds import CheckpointError, Int8Weight, int8_codes, int8_weights, load_checkpoint, save_checkpoint
from tests import test_bf16_weights as bf16
from tests.cluster import batches, launch, tiny_llama
from tests.training import (
    RECIPES,
    build,
    fsdp1_model,
    fully_sharded,
    largest_difference,
    mesh_of,
    one_process,
    tensor_parallel,
    train_sharded,
    weights_of,
    zero_engine,
)

STEP = 1 / int8_codes.LEVELS


def coded(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) of values (m, n), rounded to nearest."""
    weight = Int8Weight.quantize(values, block, "w")
    return weight.codes, weight.scales


def spread(scales: Tensor, n: int, block: int) -> Tensor:
    """Scales (m, b) as one for each entry (m, n)."""
    return scales.repeat_interleave(block, 1)[:, :n]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8_llama() -> Any:
    """The tiny LLaMA with int8 weights, rows of 36 and 52 in blocks of 16."""
    model = tiny_llama()
    int8_weights(model, block=16)
    return model


def numbers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with plain tensors."""
    return {n: w.dequantize() if isinstance(w, Int8Weight) else w for n, w in weights.items()}


# -- codes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "block"), [(300, 256), (512, 256), (10, 256), (50, 7), (8, 1)])
def test_codes_are_the_nearest_and_stay(n: int, block: int) -> None:
    """Half a step off at most; writing what is stored changes no bit, with noise or without."""
    values = normal(9, n) * torch.logspace(-3, 3, 9).unsqueeze(1)
    values[4] = 0
    codes, scales = coded(values, block)
    assert scales.shape == (9, math.ceil(n / block))
    found = int8_codes.decode(codes, scales, block, torch.float32)
    step = spread(scales, n, block)
    assert ((found - values).abs() <= 0.5001 * step).all() and (found[4] == 0).all()
    assert (step.view(torch.int32) & 0xFF == 0).all()
    for key in (None, (0, "w", 1)):
        again, its_scales = codes.clone(), scales.clone()
        int8_codes.encode_(again, its_scales, block, found, key, 0, n)
        assert torch.equal(again, codes) and torch.equal(its_scales, scales)
    for chance in (0.0, 1 - 2.0**-24):  # the least and the largest noise there is
        again = codes.clone()
        int8_codes._encode(again, scales, block, found, torch.full_like(found, chance), True)
        assert torch.equal(again, codes)


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean of many roundings is the value, for values near a code, far from one, and of either sign."""
    values, n, trials = normal(4, 40), 40, 2000
    codes, scales = coded(values, 16)
    total = torch.zeros(4, n)
    for trial in range(trials):
        c, s = codes.clone(), scales.clone()
        int8_codes.encode_(c, s, 16, values, (0, "w", trial), 0, n)
        assert torch.equal(s, scales)
        total += int8_codes.decode(c, s, 16, torch.float32)
    step = spread(scales, n, 16)
    part = (values / step) % 1
    error = (total / trials - values) / (step * (part * (1 - part) / trials).sqrt().clamp_min(1e-3))
    assert error.abs().max() < 4.5  # standard deviations, of 160 entries
    assert error.square().mean().sqrt() < 1.3


def test_updates_far_below_a_step_add_up() -> None:
    """2000 updates of a thousandth of a step move the mean by two steps; to nearest nothing ever moves."""
    n, moves = 64, 2000
    codes, scales = coded(normal(32, n), 64)
    start = int8_codes.decode(codes, scales, 64, torch.float32)
    step = spread(scales, n, 64)
    results = []
    for rounds in ("w", None):
        c, s = codes.clone(), scales.clone()
        for move in range(moves if rounds else 50):
            values = int8_codes.decode(c, s, 64, torch.float32) - 0.001 * step * start.sign()
            int8_codes.encode_(c, s, 64, values, rounds and (0, rounds, move), 0, n)
        results.append((int8_codes.decode(c, s, 64, torch.float32) - start) / step)
    moved, stuck = results
    assert (stuck == 0).all()
    towards_zero = -(moved * start.sign())[start != 0]
    assert abs(towards_zero.mean() - 2) < 0.15  # 2000 entries with a standard deviation of 1.4: 0.03 each way, and
    # entries within two steps of zero turn around there


def test_noise_belongs_to_a_place() -> None:
    """Rows encoded by themselves get the codes they get in the whole matrix."""
    values, n = normal(50, 3000), 3000
    codes, scales = coded(0.9 * values, 256)
    parts, their_scales = codes.clone(), scales.clone()
    int8_codes.encode_(codes, scales, 256, values, (3, "w", 5), 0, n)
    for rows in (slice(0, 1), slice(1, 30), slice(30, 50)):
        first = rows.start * n
        int8_codes.encode_(parts[rows], their_scales[rows], 256, values[rows], (3, "w", 5), first, n)
    assert torch.equal(parts, codes) and torch.equal(their_scales, scales)
    for other in ((4, "w", 5), (3, "v", 5), (3, "w", 6)):
        int8_codes.encode_(parts, their_scales, 256, values, other, 0, n)
        assert (parts != codes).float().mean() > 0.2


def test_scales_are_renewed_only_when_they_must() -> None:
    """Kept while the largest weight fits and fills three quarters; NaN and infinity are not hidden."""
    scale = torch.tensor(0.5)
    reach = 0.5 * int8_codes.LEVELS
    for peak in (0.75 * reach, 0.9 * reach, reach):
        assert int8_codes.fitting(torch.tensor(peak), scale) == scale
    for peak in (0.74 * reach, 1.001 * reach, 100 * reach, 1e-6):
        assert int8_codes.fitting(torch.tensor(peak), scale) == pytest.approx(1.0625 * peak / 127, rel=1e-4)
    for bad in (math.nan, math.inf):
        values = normal(2, 8)
        values[0, 3] = bad
        found = Int8Weight.quantize(values, 4, "w").dequantize()
        assert found[0, :4].isnan().all() and not found[0, 4:].isnan().any() and not found[1].isnan().any()


# -- the product ------------------------------------------------------------------------------------------------------
class _Saved:
    """What autograd keeps: use as saved_tensors_hooks' pack."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """Note and keep."""
        self.tensors.append(tensor)
        return tensor


@pytest.mark.parametrize("case", ["fp32", "bf16", "autocast", "no bias"])
def test_linear_is_that_of_the_dequantised_weight(case: str) -> None:
    """Bit for bit, forward and backward; nothing of the weight's size is kept but codes."""
    dtype = torch.bfloat16 if case == "bf16" else torch.float32
    weight = nn.Parameter(Int8Weight.quantize(normal(20, 300).to(dtype), 64, "w"))
    dense = nn.Parameter(weight.dequantize())
    assert dense.dtype == dtype
    results = []
    for w in (weight, dense):
        x = normal(2, 5, 300, seed=1).to(dtype).requires_grad_()
        bias = None if case == "no bias" else normal(20, seed=2).to(dtype).requires_grad_()
        saved = _Saved()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
            torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t),
        ):
            y = linear(x, w, bias)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, w.grad] + ([] if bias is None else [bias.grad]))
        kept = [t for t in saved.tensors if t.numel() == 20 * 300]
        assert all(isinstance(t, Int8Weight) for t in kept) == (w is weight)
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and type(ours) is Tensor and torch.equal(ours, theirs)


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    """As for any weight: the backward must not use another weight than the forward did."""
    layer = nn.Linear(8, 8, bias=False)
    int8_weights(layer)
    optimizer = lowrank_ds.GaLoreAdamW(layer.named_parameters(), lr=1e-2, rank=2)
    layer(normal(3, 8)).sum().backward()
    loss = layer(normal(3, 8).requires_grad_()).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- training, one process --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_steps_on_codes(recipe: str) -> None:
    """The step is that of the dequantised weights, then rounded: to the nearest code or to one beside the result."""
    results, start = {}, int8_llama().state_dict()
    for mode in ("fp32", "stochastic", "nearest"):
        model = int8_llama()
        for module in model.modules():
            if mode == "fp32" and isinstance(module, nn.Linear) and isinstance(module.weight, Int8Weight):
                module.weight = nn.Parameter(module.weight.dequantize())
        one_process(recipe, 1, model, stochastic_rounding=mode != "nearest")
        results[mode] = dict(model.named_parameters())
    for name, exact in results["fp32"].items():
        for mode, most in (("stochastic", 1.0), ("nearest", 0.5)):
            found = results[mode][name]
            if not isinstance(found, Int8Weight):
                assert torch.equal(found, exact)
                continue
            step = spread(found.scales, found.shape[1], 16)
            error = (found.dequantize() - exact).detach() / step
            assert error.abs().max() < most + 1e-3, name
    moved = [(w.codes != start[n].codes).any() for n, w in results["stochastic"].items() if isinstance(w, Int8Weight)]
    assert sum(moved) > len(moved) / 2


def test_every_step_draws_anew() -> None:
    """With the same gradient, a fifth of a step long, other weights move at the second step than at the first."""
    layer = nn.Linear(256, 64, bias=False)
    int8_weights(layer)
    step = spread(layer.weight.scales, 256, 256)
    optimizer = lowrank_ds.Lomo(layer.named_parameters(), lr=0.2, rank=None)
    codes, moved = layer.weight.codes.clone(), []
    for _ in range(2):
        layer.weight.grad = step.clone()
        optimizer.step()
        moved.append((layer.weight.codes != codes).flatten())
        codes = layer.weight.codes.clone()
    first, second = moved
    assert 0.19 < first.float().mean() < 0.21 and 0.19 < second.float().mean() < 0.21
    assert 0.17 < second[first].float().mean() < 0.23


@functools.cache
def trained(mode: str) -> tuple[float, float]:
    """(first loss, mean of the last losses) of GaLore on tests/test_bf16_weights.py's model and data."""
    torch.set_num_threads(1)
    model = bf16.Model()
    for name, p in list(model.named_parameters()):
        if mode != "fp32" and p.dim() == 2 and name != "embed":  # the head, too: all that linear multiplies by
            setattr(model, name, nn.Parameter(Int8Weight.quantize(p, 256, name)))
    optimizer = lowrank_ds.GaLoreAdamW(
        model.named_parameters(), lr=bf16.LR, stochastic_rounding=mode != "nearest", rank=8, update_proj_gap=100,
        exclude=["embed", "head"],
    )  # fmt: skip
    losses = []
    for step, tokens in enumerate(bf16.sequences(bf16.STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = bf16.LR * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / bf16.STEPS))
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], sum(losses[-bf16.LAST :]) / bf16.LAST


def test_training_keeps_up_with_fp32(capsys: pytest.CaptureFixture) -> None:
    """Within 1 % of fp32's final loss after 300 steps; rounding to nearest is far off."""
    first, exact = trained("fp32")
    _, stochastic = trained("stochastic")
    _, nearest = trained("nearest")
    with capsys.disabled():
        for mode, last in (("fp32", exact), ("int8, stochastic", stochastic), ("int8, to nearest", nearest)):
            print(
                f"\nGaLoreAdamW {mode:18s} loss {first:.3f} -> {last:.4f} ({100 * (last / exact - 1):+6.2f} %)", end=""
            )
    assert exact < 0.5 * first
    assert abs(stochastic / exact - 1) < 0.01
    assert nearest > 1.3 * exact


def test_layerwise_is_step_bitwise() -> None:
    """Updates inside the backward give the same codes and scales."""
    states = []
    for inside in (False, True):
        model = int8_llama()
        optimizer = build("fira", model)
        if inside:
            lowrank_ds.layerwise(model, optimizer)
        for batch in batches(6):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(numbers(model.state_dict()))
    assert largest_difference(*states) == 0.0


class _Largest(TorchDispatchMode):
    """The most bytes of a tensor made inside."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run and look at what comes out."""
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        views = any(r.alias_info for r in func._schema.returns)
        for t in () if views else made:
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.nbytes)
        return out


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdafactor"])
def test_no_float_copy_of_a_matrix_is_made(name: str) -> None:
    """A step of a 4096 x 1024 matrix makes no tensor as large as its codes, whose fp32 copy is four times that."""
    layer = nn.Linear(1024, 4096, bias=False)
    int8_weights(layer)
    optimizer = getattr(lowrank_ds, name)(layer.named_parameters(), lr=1e-3, rank=4, proj_type="right")
    layer.weight.grad = normal(4096, 1024)
    optimizer.state[layer.weight].update(_state_with_basis(optimizer, layer.weight))
    with _Largest() as made:
        optimizer.step()
    assert made.bytes <= layer.weight.codes.nbytes / 2


def _state_with_basis(optimizer: Any, weight: Tensor) -> dict[str, Tensor]:
    """State after a refresh, without the SVD of a large matrix."""
    optimizer.init_state()
    state = optimizer.state[weight]
    state = {name: value.clone() for name, value in state.items()}
    state["projector"].copy_(torch.linalg.qr(normal(1024, 4)).Q)
    for counter in ("step", "refreshes", "moment_step"):
        state[counter].fill_(1)
    return state


# -- copies, files ----------------------------------------------------------------------------------------------------
def _run(model: Any, optimizer: Any, steps: range) -> None:
    for batch in batches(steps.stop)[steps.start :]:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_resume_is_bitwise() -> None:
    """Through torch.save and torch.load(weights_only=True), copied or assigned; a deep copy trains on alike."""
    model = int8_llama()
    optimizer = build("galore", model)
    _run(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    twin = copy.deepcopy(model)
    _run(model, optimizer, range(4, 8))
    for way in ("copy", "assign", "deepcopy"):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other = twin if way == "deepcopy" else int8_llama()
        if way != "deepcopy":
            other.load_state_dict(saved["model"], assign=way == "assign")
        again = build("galore", other)
        again.load_state_dict(saved["optimizer"])
        _run(other, again, range(4, 8))
        for name, weight in model.state_dict().items():
            found = other.state_dict()[name]
            assert type(found) is type(weight) and torch.equal(found, weight), (way, name)
            if isinstance(weight, Int8Weight):
                assert torch.equal(found.codes, weight.codes) and torch.equal(found.scales, weight.scales)


def test_checkpoints_tell_int8_from_float(tmp_path: Path) -> None:
    """Neither kind of weight is taken for the other."""
    save_checkpoint(tmp_path / "int8", int8_llama())
    save_checkpoint(tmp_path / "float", tiny_llama())
    with pytest.raises(CheckpointError, match=r"q_proj.weight is a weight of int8 numbers in the checkpoint and float"):
        load_checkpoint(tmp_path / "int8", tiny_llama())
    with pytest.raises(CheckpointError, match=r"q_proj.weight is a weight of float numbers in the checkpoint and int8"):
        load_checkpoint(tmp_path / "float", int8_llama())


def test_float_numbers_go_in_and_out() -> None:
    """A float state dict is rounded to nearest; Module.to changes what the weight looks like, not its codes."""
    model, plain = int8_llama(), tiny_llama(seed=3)
    model.load_state_dict(plain.state_dict())
    weight, exact = model.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight
    assert (weight.dequantize() - exact).abs().max() <= 0.5001 * weight.scales.max()
    optimizer = build("galore", model)  # holds weak references to the parameters: .to() must keep them
    assert optimizer.summary().endswith("; int8: 14 of them")
    codes = weight.codes.clone()
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight is weight and weight.dtype == torch.bfloat16
    assert torch.equal(weight.codes, codes) and weight.scales.dtype == torch.float32
    _run(model, optimizer, range(1))
    assert not torch.equal(weight.codes, codes)


def test_bytes_of_a_60m_llama(capsys: pytest.CaptureFixture) -> None:
    """1 + 4/256 bytes for each weight of a linear layer (rows of 1376 have a shorter last block)."""
    with torch.device("meta"):
        model = tiny_llama(
            vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=8,
        )  # fmt: skip
    fp32, half = lowrank_ds.weight_bytes(model), lowrank_ds.weight_bytes(model.to(torch.bfloat16))
    model.to(torch.float32).to_empty(device="cpu")
    for p in model.parameters():
        p.data.zero_()
    chosen = int8_weights(model)
    entries = {n: p.numel() for n, p in model.named_parameters() if n in chosen}
    coded = sum(numel + 4 * numel // n.shape[1] * math.ceil(n.shape[1] / 256) for numel, n in _shapes(model, entries))
    found = lowrank_ds.weight_bytes(model)
    with capsys.disabled():
        linears = sum(entries.values())
        print(
            f"\nLLaMA-60M weights: fp32 {fp32 / 2**20:.1f} MiB, bf16 {half / 2**20:.1f}, int8 (rest fp32) "
            f"{found / 2**20:.1f}; its {linears / 1e6:.1f} M linear weights: {4 * linears / 2**20:.1f}, "
            f"{2 * linears / 2**20:.1f}, {coded / 2**20:.1f}",
            end="",
        )
    assert fp32 == 2 * half and found == fp32 - 4 * sum(entries.values()) + coded
    assert coded < 1.02 * sum(entries.values())


def _shapes(model: nn.Module, entries: dict[str, int]) -> list[tuple[int, Tensor]]:
    """(entries, weight) of the named weights."""
    named = dict(model.named_parameters())
    return [(numel, named[name]) for name, numel in entries.items()]


# -- refusals ---------------------------------------------------------------------------------------------------------
def _tied() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    return model


def _again() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    int8_weights(model)
    int8_weights(model)


def _a_weight() -> Int8Weight:
    return Int8Weight.quantize(normal(4, 8), 4, "layer.weight")


def _foreign_optimizer() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False)})
    int8_weights(model)
    model["a"](normal(2, 4)).sum().backward()
    torch.optim.AdamW(model.parameters(), foreach=False).step()


def _give_data() -> None:
    _a_weight().data = torch.zeros(4, 8)


REFUSALS = {
    "block": (lambda: int8_weights(nn.Linear(4, 4), block=0), ValueError, "block must be a whole number >= 1, got 0"),
    "no linear": (lambda: int8_weights(nn.LayerNorm(4)), ValueError, "LayerNorm has no nn.Linear"),
    "pattern": (lambda: int8_weights(tiny_llama(), ["atn"]), ValueError, "'atn' matches no parameter"),
    "excluded": (lambda: int8_weights(tiny_llama(), exclude=["proj"]), ValueError, "nothing"),
    "tied": (lambda: int8_weights(_tied()), RuntimeError, "one tensor under the names a.weight, b.weight"),
    "twice": (_again, RuntimeError, "a.weight is int8 already"),
    "meta": (lambda: int8_weights(nn.Linear(4, 4, device="meta")), RuntimeError, "weight is on the meta device"),
    "one row": (lambda: int8_weights(nn.Linear(4, 1)), RuntimeError, "single row"),
    "columns": (lambda: _a_weight()[:, :4], RuntimeError, "layer.weight .* columns share scales"),
    "in place": (lambda: _a_weight().mul_(2), RuntimeError, "layer.weight .* aten.mul_.Tensor cannot work on"),
    "transposed": (lambda: _a_weight().t(), RuntimeError, "layer.weight .*torch.nn.functional.linear"),
    "flattened": (lambda: torch.cat([_a_weight().view(-1)]), RuntimeError, "layer.weight .* ZeRO"),
    "reshaped": (lambda: _a_weight().view(8, 4), RuntimeError, r"cannot be seen as \[8, 4\]"),
    "shape": (lambda: _a_weight().copy_(torch.zeros(8)), RuntimeError, r"shape \(8,\) cannot be copied"),
    "data": (_give_data, RuntimeError, "layer.weight .* cannot become a plain tensor"),
    "optimizer": (_foreign_optimizer, RuntimeError, "a.weight .* an optimizer of lowrank_ds"),
    "input": (lambda: linear(_a_weight(), torch.zeros(2, 8)), RuntimeError, "cannot be the input"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    """What cannot work says which weight, what is wrong, and what to do."""
    call, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        call()


# -- several processes ------------------------------------------------------------------------------------------------
RECIPE, RATE = "galore adafactor", 0.3  # not chaotic: an ulp stays one, so that a single other code would be seen
SAVED, TOTAL = 4, 7  # steps; bases are renewed at 0 and 5
HOW = {"lr": RATE, "update_proj_gap": 5}


def _sharded(rank: int, world: int, kind: str, recipe: str, steps: int, inside: bool = False, **options: Any) -> dict:
    model = fully_sharded(kind, world, int8_llama(), **options)
    optimizer = build(recipe, model, **(HOW if recipe == RECIPE else {}))
    if inside:
        lowrank_ds.layerwise(model, optimizer)
    train_sharded(model, optimizer, kind, rank, world, range(steps))
    assert all(
        isinstance(m.weight.to_local(), Int8Weight) for m in model.model.layers.modules() if type(m) is nn.Linear
    )
    return numbers(weights_of(model))


def _checkpointed(rank: int, world: int, folder: str, load: bool, ours: bool = False) -> tuple[dict, dict]:
    """(weights at step 4, at step 7) of a run saved at step 4, or loaded there, by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = fully_sharded("fsdp2", world, int8_llama())
    optimizer = build(RECIPE, model, **HOW)
    if not load:
        train_sharded(model, optimizer, "fsdp2", rank, world, range(SAVED))
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    if ours:
        load_checkpoint(f"{folder}/ours", model, optimizer)
    elif load:
        dcp.load(saved, checkpoint_id=f"{folder}/dcp")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    else:
        dcp.save(saved, checkpoint_id=f"{folder}/dcp")
        save_checkpoint(f"{folder}/ours", model, optimizer)
    at_save = numbers(weights_of(model))
    train_sharded(model, optimizer, "fsdp2", rank, world, range(SAVED, TOTAL))
    return at_save, numbers(weights_of(model))


def _message(call: Any) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "nothing raised"


def _refusals(world: int) -> dict[str, str]:
    from torch.distributed.tensor import Shard

    columns = lambda p: Shard(p.dim() - 1)
    return {
        "columns": _message(lambda: fully_sharded("fsdp2", world, int8_llama(), shard_placement_fn=columns)),
        "late": _message(lambda: int8_weights(fully_sharded("fsdp2", world))),
        "ddp": _message(lambda: nn.parallel.DistributedDataParallel(int8_llama())),
        "fsdp1": _message(lambda: fsdp1_model(int8_llama())),
        "tp": _message(lambda: tensor_parallel(int8_llama(), mesh_of("fsdp2", world))),
        "zero2": _message(lambda: zero_engine(RECIPE, 2, world, int8_llama())),
        "zero3": _message(lambda: zero_engine(RECIPE, 3, world, int8_llama())),
    }  # fmt: skip


def _worker(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if world == 2:
        found["save"] = _checkpointed(rank, world, folder, load=False)
        found["replicate"] = _sharded(rank, world, "replicate", RECIPE, TOTAL)
        found["layerwise"] = _sharded(rank, world, "fsdp2", RECIPE, TOTAL, inside=True)
        found["one step of Adam"] = _sharded(rank, world, "fsdp2", "galore", 1)
        found["refusals"] = _refusals(world)
    else:
        found["steps"] = _sharded(rank, world, "fsdp2", RECIPE, TOTAL)
    found["load"] = _checkpointed(rank, world, folder, load=True)
    found["load ours"] = _checkpointed(rank, world, folder, load=True, ours=True)
    return found


@pytest.fixture(scope="module")
def worlds() -> dict[int, dict[str, Any]]:
    """What rank 0 of 2 and of 3 found."""
    with tempfile.TemporaryDirectory() as folder:
        return {world: launch(world, _worker, folder)[0] for world in (2, 3)}


def test_sharded_training_is_one_process(worlds: dict, capsys: pytest.CaptureFixture) -> None:
    """Seven steps give the same codes on 1, 2 and 3 processes and under replicate(), and the same weights to 1e-6."""
    start, expected = numbers(int8_llama().state_dict()), numbers(one_process(RECIPE, TOTAL, int8_llama(), **HOW))
    moved = torch.cat([(expected[n] != start[n]).flatten() for n in expected if "proj" in n])
    assert moved.float().mean() > 0.7
    runs = {"fsdp2 x2": worlds[2]["save"][1], "fsdp2 x3": worlds[3]["steps"], "replicate x2": worlds[2]["replicate"]}
    found = {name: largest_difference(weights, expected) for name, weights in runs.items()}
    with capsys.disabled():
        print(f"\n{RECIPE}, int8, from one process: {', '.join(f'{n} {d:.1e}' for n, d in found.items())}", end="")
    assert max(found.values()) <= 1e-6


def test_a_code_may_flip_where_the_gradient_differs_by_an_ulp(worlds: dict) -> None:
    """Adam's first step is 20 codes long here: one value in 20000 is at rounding error from where noise says up."""
    found, expected = worlds[2]["one step of Adam"], numbers(one_process("galore", 1, int8_llama()))
    flips = torch.cat([(found[n] - expected[n]).abs().flatten() for n in expected])
    assert flips.max() < 1e-3  # one step of the coarsest scale
    assert (flips > 1e-5).float().mean() < 1e-3


def test_layerwise_sharded_is_step(worlds: dict) -> None:
    """Bit for bit: nothing is computed otherwise, only earlier."""
    assert largest_difference(worlds[2]["layerwise"], worlds[2]["save"][1]) == 0.0


@pytest.mark.parametrize("way", ["load", "load ours"])
def test_distributed_checkpoint(worlds: dict, way: str) -> None:
    """Bitwise at the same world size; on three ranks the same codes and scales, then the same training to 1e-6."""
    (at, end), (at2, end2), (at3, end3) = worlds[2]["save"], worlds[2][way], worlds[3][way]
    assert largest_difference(at, at2) == largest_difference(end, end2) == 0.0
    assert largest_difference(at, at3) == 0.0
    assert largest_difference(end, end3) <= 1e-6


@pytest.mark.parametrize("engine", ["columns", "ddp", "fsdp1", "tp", "zero2", "zero3", "late"])
def test_engines_that_cannot_are_refused(worlds: dict, engine: str) -> None:
    """By the weight's name, with what to do."""
    message = worlds[2]["refusals"][engine]
    assert "model.layers.0.self_attn." in message and "fully_shard" in message
    if engine != "late":
        assert "an int8 weight" in message and "replicate()" in message


def test_one_byte_an_entry_travels() -> None:
    """What FSDP2 gathers: codes and scales, rows of the smaller shards padded; one tensor where all rows are here."""

    class Three:
        size = staticmethod(lambda: 3)

    weight = Int8Weight.quantize(normal(4, 100), 32, "w")
    last = weight[2:3]
    (codes, scales), _ = last.fsdp_pre_all_gather(Three)
    assert codes.dtype == torch.int8 and codes.shape == (2, 100) and scales.shape == (2, 4)
    assert torch.equal(codes[:1], weight.codes[2:3]) and not codes[1:].any()
    (packed,), _ = weight.fsdp_pre_all_gather(Three)
    assert packed.nbytes == weight.held_bytes == 4 * (100 + 4 * 4)
    whole, _ = weight.fsdp_post_all_gather((packed,), None, torch.bfloat16)
    assert whole.dtype == torch.bfloat16 and torch.equal(whole.codes, weight.codes)
    assert torch.equal(whole.scales, weight.scales)
