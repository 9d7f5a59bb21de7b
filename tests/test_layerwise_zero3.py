"""Layer-wise updates under DeepSpeed ZeRO-3: every way to ask for them, every mode, against ordinary one process."""

from __future__ import annotations

import copy
import functools
import gc
import re
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ds
from lowrank_ds import FiraAdamW, layerwise, param_groups
from tests import training
from tests.cluster import batches, launch, quiet_deepspeed, share, tiny_llama
from tests.test_deepspeed import WARMUP, accumulated, decay_groups, grouped, special_model, special_reference

LIMIT = 5e-6
STEPS = 6  # refreshes at 0 and 4
FIRA = training.settings_of("fira")[1]
ASKED = {"settings": {"layerwise": True}}


# --- one case = (what the ranks run, what one process runs) ---------------------------------------------------------
def configured(
    recipe: str = "fira", model: Callable[[], nn.Module] = tiny_llama, layerwise: Any = True, **config: Any
) -> Callable:
    """The ds_config alone asks for it; `config`: more of its keys."""

    def make(deepspeed: Any, world: int) -> Any:
        more = {**config, "settings": {**config.get("settings", {}), "layerwise": layerwise}}
        return training.zero_engine(recipe, 3, world, model(), **more)

    return make


def in_python(deepspeed: Any, world: int) -> Any:
    """The engine is built without an optimizer, which is attached afterwards; the ds_config has a scheduler."""
    engine = deepspeed.initialize(model=tiny_llama(), config=training.ds_config(None, 3, world, scheduler=WARMUP))[0]
    options = {k: v for k, v in FIRA.items() if k != "rank"}
    layerwise(engine, FiraAdamW(param_groups(engine.module, rank=8), **options))
    return engine


def zero_init(deepspeed: Any, world: int) -> Any:
    """The model is built inside deepspeed.zero.Init: no rank ever holds a whole weight."""
    config, whole = training.ds_config("fira", 3, world, **copy.deepcopy(ASKED)), tiny_llama().state_dict()
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = tiny_llama()
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters(p, modifier_rank=0):
            p.data.copy_(whole[name]) if torch.distributed.get_rank() == 0 else None
    return deepspeed.initialize(model=model, config=config)[0]


def two_groups(deepspeed: Any, world: int) -> Any:
    """Decay and no-decay groups, as Hugging Face makes them."""
    model = tiny_llama()
    config = training.ds_config("fira", 3, world, **copy.deepcopy(ASKED))
    return deepspeed.initialize(model=model, model_parameters=decay_groups(model), config=config)[0]


def recomputing() -> nn.Module:
    """A model that computes its activations again in the backward, as Hugging Face does it."""
    model = tiny_llama()
    model.train()
    model.gradient_checkpointing_enable()
    return model


def by_section() -> nn.Module:
    """The same by DeepSpeed's function: a backward inside the backward for each layer."""
    model = tiny_llama()
    model.train()
    lowrank_ds.activation_checkpointing(model, {"activation_checkpointing": {}})
    return model


def plain(recipe: str = "fira") -> Callable:
    """One process, a step after each backward."""
    return functools.partial(training.one_process, recipe, STEPS)


PER_TENSOR = {"clip": "per_tensor", "max_grad_norm": 0.02}


def clipped_per_tensor(recipe: str) -> dict[str, torch.Tensor]:
    """One process: each gradient clipped by its own norm."""
    model = tiny_llama()
    optimizer = training.build(recipe, model)
    for batch in batches(STEPS):
        model(input_ids=batch, labels=batch).loss.backward()
        for p in model.parameters():
            nn.utils.clip_grad_norm_([p], PER_TENSOR["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
    return training.weights_of(model)


def persistent(threshold: int) -> Callable:
    """Parameters up to `threshold` numbers stay gathered."""
    return configured(zero={"stage3_param_persistence_threshold": threshold})


RECIPES = ("galore", "fira", "apollo", "flora", "lomo", "adalomo")
CASES: dict[str, tuple[Callable, Callable]] = {
    **{recipe: (configured(recipe), plain(recipe)) for recipe in RECIPES},
    "in Python, scheduler": (in_python, functools.partial(accumulated, 0.0, True)),
    "zero.Init": (zero_init, plain()),
    "all persistent": (persistent(100_000), plain()),
    "none persistent": (persistent(0), plain()),
    "two groups": (two_groups, grouped),
    "activation checkpointing": (configured(model=recomputing), plain()),
    "activation checkpointing by the ds_config": (configured(model=by_section), plain()),
    **{
        f"{kind} model": (
            configured(model=functools.partial(special_model, kind), settings={"weight_decay": 0.1}),
            functools.partial(special_reference, kind),
        )
        for kind in ("frozen", "tied", "unused")
    },
}
MICRO = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}
THREE: dict[str, tuple[Callable, Callable]] = {
    **{recipe: (configured(recipe), plain(recipe)) for recipe in RECIPES},
    "4 micro-batches": (configured(**MICRO), plain()),
    "4 micro-batches, all persistent": (
        configured(**MICRO, zero={"stage3_param_persistence_threshold": 100_000}),
        plain(),
    ),
    "4 micro-batches, summed in the subspace": (
        configured("galore", settings={"compress_accumulation": True}, **MICRO),
        plain("galore"),
    ),
    "clip per_tensor": (configured(layerwise=PER_TENSOR), functools.partial(clipped_per_tensor, "fira")),
}


def run_cases(rank: int, world: int, names: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Cases in one set of processes."""
    found, deepspeed = {}, quiet_deepspeed()
    for name in names:
        engine = (CASES if world == 2 else THREE)[name][0](deepspeed, world)
        training.train_engine(engine, rank, world, STEPS)
        assert type(engine.optimizer).__name__ == "FusedZero3"
        found[name] = training.weights_of(engine.module)
        engine.destroy()
    for recipe in RECIPES:
        found[f"ordinary {recipe}"] = training.zero(rank, world, recipe, 3, STEPS)
    return found if rank == 0 else {}


@functools.cache
def case_results(world: int) -> dict[str, dict[str, torch.Tensor]]:
    """{case: weights}."""
    return launch(world, run_cases, list(CASES if world == 2 else THREE))[0]


@pytest.mark.parametrize(("world", "case"), [*((2, case) for case in CASES), *((3, case) for case in THREE)])
def test_equal_to_ordinary_one_process(world: int, case: str) -> None:
    """Weights after 6 steps, two refreshes, are within fp32 rounding of one process that steps after the backward."""
    torch.set_num_threads(1)
    expected = (CASES if world == 2 else THREE)[case][1]()
    difference = training.largest_difference(case_results(world)[case], expected)
    assert difference <= LIMIT, f"{case}: {difference:.1e}"


@pytest.mark.parametrize("world", [2, 3])
def test_equal_to_ordinary_zero3(world: int, capsys: pytest.CaptureFixture) -> None:
    """The same engine and ranks, with and without: 1e-6."""
    found = case_results(world)
    apart = {recipe: training.largest_difference(found[recipe], found[f"ordinary {recipe}"]) for recipe in RECIPES}
    with capsys.disabled():
        print(f"\nlayer-wise against ordinary ZeRO-3, {world} ranks:", {k: f"{v:.1e}" for k, v in apart.items()})
    assert max(apart.values()) <= 1e-6


# --- what is alive, bf16, torch's own backward, checkpoints -----------------------------------------------------------
def live_gradients(rank: int, world: int) -> dict[str, Any]:
    """The most gradient entries that were alive at once, and whether each weight moved inside the backward."""
    model, most, before = tiny_llama(), [0, 0], {}
    sizes = {n: p.numel() for n, p in model.named_parameters()}

    def look(_: Any) -> None:  # registered first: sees each whole gradient before it is taken
        pieces = [p._lowrank_ds_piece.grad for p in model.parameters()]
        most[0] = max(most[0], sum(p.grad.numel() for p in model.parameters() if p.grad is not None))
        most[1] = max(most[1], sum(piece.numel() for piece in pieces if piece is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    engine = training.zero_engine("fira", 3, world, model, **copy.deepcopy(ASKED))
    for p in model.parameters():
        before[p] = p.ds_tensor.clone()
    mine = share(batches(1)[0], rank, world)
    engine.backward(engine(input_ids=mine, labels=mine).loss)
    moved = all(not torch.equal(p.ds_tensor, before[p]) for p in model.parameters())
    kept = [p for p in model.parameters() if p.grad is not None or p._lowrank_ds_piece.grad is not None]
    engine.destroy()
    return {"most": most, "largest": max(sizes.values()), "moved": moved, "kept": len(kept)}


def torch_backward(rank: int, world: int) -> dict[str, torch.Tensor]:
    """loss.backward() instead of engine.backward(loss)."""
    engine = in_python(quiet_deepspeed(), world)
    for batch in batches(STEPS):
        mine = share(batch, rank, world)
        engine(input_ids=mine, labels=mine).loss.backward()
        engine.step()
    weights = training.weights_of(engine.module)
    engine.destroy()
    return weights


def two_pass(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Clipped by the exact global norm, which a first backward measures; the handle is the optimizer's."""
    asked = {"settings": {"layerwise": {"clip": "two_pass", "max_grad_norm": 0.05}}}
    engine = training.zero_engine("fira", 3, world, **asked)
    for batch in batches(STEPS):
        mine = share(batch, rank, world)
        with engine.optimizer.layerwise.measuring():
            engine.backward(engine(input_ids=mine, labels=mine).loss)
        engine.backward(engine(input_ids=mine, labels=mine).loss)
        engine.step()
        assert engine.get_global_grad_norm() > 0.05
    weights = training.weights_of(engine.module)
    engine.destroy()
    return weights


def bf16(rank: int, world: int) -> dict[str, Any]:
    """(weights, their dtype as they are kept, dtypes of state and of the gradient pieces) of a bf16 run."""
    engine = training.zero_engine("fira", 3, world, bf16={"enabled": True}, **copy.deepcopy(ASKED))
    training.train_engine(engine, rank, world, STEPS)
    kept = {p.ds_tensor.dtype for p in engine.module.parameters()}
    state = {t.dtype for state in engine.basic_optimizer.state.values() for t in state.values()}
    found = {"weights": training.weights_of(engine.module), "kept": kept, "state": state}
    engine.destroy()
    return found


def fp32_sums(rank: int, world: int) -> set[torch.dtype]:
    """Dtypes of the gradient pieces between micro-batches, when the ds_config asks for fp32 sums."""
    more = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "gradient_accumulation_steps": 2}
    engine = training.zero_engine("fira", 3, world, **more, **copy.deepcopy(ASKED))
    mine = share(batches(1)[0], rank, world)
    engine.backward(engine(input_ids=mine, labels=mine).loss)
    found = {p._lowrank_ds_piece.grad.dtype for p in engine.module.parameters()}
    engine.step()
    engine.backward(engine(input_ids=mine, labels=mine).loss)
    engine.step()
    engine.destroy()
    return found


def bf16_reference() -> dict[str, torch.Tensor]:
    """One process, bf16 weights; buffers stay fp32, as DeepSpeed leaves them."""
    model, buffers = tiny_llama(), dict(tiny_llama().named_buffers())
    model.bfloat16()
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name]
    return training.one_process("fira", STEPS, model=model)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Euclidean, over all weights."""
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


def resume(rank: int, world: int, folder: str) -> dict[str, bool]:
    """Whether training on from a DeepSpeed checkpoint gives the same bits, and what zero_to_fp32 makes of it."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    same = {}
    for recipe, more in (("fira", {}), ("flora", {}), ("fira bf16", {"bf16": {"enabled": True}})):
        build = functools.partial(training.zero_engine, recipe.split()[0], 3, world, scheduler=WARMUP, **more)
        engine, place = build(**copy.deepcopy(ASKED)), f"{folder}/{recipe}"
        training.train_engine(engine, rank, world, 4)
        engine.save_checkpoint(place)
        saved = training.weights_of(engine.module)
        training.train_engine(engine, rank, world, 4)
        straight = training.weights_of(engine.module)
        engine.destroy()
        whole = get_fp32_state_dict_from_zero_checkpoint(place)
        same[f"{recipe} zero_to_fp32"] = all(torch.equal(whole[n].float(), saved[n]) for n in saved)
        engine = build(tiny_llama(seed=1), **copy.deepcopy(ASKED))
        engine.load_checkpoint(place)
        training.train_engine(engine, rank, world, 4)
        resumed = training.weights_of(engine.module)
        same[recipe] = all(torch.equal(straight[n], resumed[n]) for n in straight)
        engine.destroy()
    return same


def taken_off(rank: int, world: int) -> dict[str, Any]:
    """handle.remove(), layerwise() again with a clip, and what destroy() leaves on the parameters."""
    found: dict[str, Any] = {}
    engine = training.zero_engine("lomo", 3, world, **copy.deepcopy(ASKED))
    training.train_engine(engine, rank, world, 1)
    engine.optimizer.layerwise.remove()
    try:
        training.train_engine(engine, rank, world, 1)
    except RuntimeError as error:
        found["message"] = str(error)
    engine.module.zero_grad()
    layerwise(engine, engine.basic_optimizer, **PER_TENSOR)
    before = training.weights_of(engine.module)
    training.train_engine(engine, rank, world, 1)
    found["moved"] = distance(before, training.weights_of(engine.module))
    host = next(engine.module.parameters())
    engine.destroy()
    return {**found, "hooks": len(host._post_accumulate_grad_hooks)}


def run_the_rest(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Everything else that needs two ranks."""
    quiet_deepspeed()
    return {
        "live": live_gradients(rank, world),
        "torch": torch_backward(rank, world),
        "two_pass": two_pass(rank, world),
        "bf16": bf16(rank, world),
        "fp32 sums": fp32_sums(rank, world),
        "resume": resume(rank, world, folder),
        "taken off": taken_off(rank, world),
    }


@functools.cache
def rest() -> list[dict[str, Any]]:
    """What both ranks found."""
    with tempfile.TemporaryDirectory() as folder:
        return launch(2, run_the_rest, folder)


def test_one_whole_gradient_is_alive_at_a_time() -> None:
    """Never more than the largest gradient, and half that in pieces; all weights moved when the backward returns."""
    for found in (result["live"] for result in rest()):
        whole, pieces = found["most"]
        assert whole <= found["largest"] and pieces <= found["largest"] / 2, found
        assert found["moved"] and not found["kept"], found


def test_backward_of_the_loss_itself() -> None:
    """loss.backward(), torch's way, gives what engine.backward(loss) does."""
    torch.set_num_threads(1)
    difference = training.largest_difference(rest()[0]["torch"], accumulated(0.0, True))
    assert difference <= LIMIT, f"{difference:.1e}"


def test_two_pass_clipping_is_exact() -> None:
    """As clip_grad_norm_ in one process."""
    torch.set_num_threads(1)
    difference = training.largest_difference(rest()[0]["two_pass"], accumulated(0.05, False))
    assert difference <= LIMIT, f"{difference:.1e}"


def test_bf16_is_what_one_process_does() -> None:
    """bf16 weights, no fp32 copy, stochastic rounding, fp32 state: one rank bit for bit, two within their average."""
    torch.set_num_threads(1)
    two = rest()[0]["bf16"]
    assert two["kept"] == {torch.bfloat16} and two["state"] == {torch.float32}
    start, exact, same = training.weights_of(tiny_llama()), plain()(), bf16_reference()
    assert distance(two["weights"], exact) < 0.1 * distance(exact, start)
    assert distance(two["weights"], same) < 0.05 * distance(exact, start)  # two ranks average in bf16
    assert training.largest_difference(refusals()["bf16"], same) == 0
    assert rest()[0]["fp32 sums"] == {torch.float32}


def test_checkpoints_resume_bit_exactly() -> None:
    """engine.save_checkpoint / load_checkpoint at the same world size, scheduler included; zero_to_fp32 is exact."""
    for found in (result["resume"] for result in rest()):
        assert len(found) == 6 and all(found.values()), found


# --- refusals --------------------------------------------------------------------------------------------------------
def test_taken_off_and_put_on_again() -> None:
    """After remove() nothing is trained silently, layerwise() may follow; destroy() takes every hook off."""
    for found in (result["taken off"] for result in rest()):
        assert "call lowrank_ds.layerwise(engine, optimizer)" in found["message"]
        assert found["moved"] > 1e-4
        assert found["hooks"] == 0


def refused(words: str, stage: int = 3, **config: Any) -> tuple[Callable, str]:
    """A ds_config that asks for layer-wise updates and something they cannot do."""
    return (lambda deepspeed: training.zero_engine("fira", stage, 1, **{**copy.deepcopy(ASKED), **config})), words


def attached(words: str, change: Callable | None = None, **arguments: Any) -> tuple[Callable, str]:
    """layerwise() on an engine; change(deepspeed, engine) -> (target, optimizer) in place of the right ones."""

    def run(deepspeed: Any) -> None:
        engine = deepspeed.initialize(model=tiny_llama(), config=training.ds_config(None, 3, 1))[0]
        target, optimizer = engine, None
        if change is not None:
            target, optimizer = change(engine)
        layerwise(target, optimizer or FiraAdamW(param_groups(engine.module, rank=8), lr=1e-2), **arguments)

    return run, words


def stage_2(deepspeed: Any) -> None:
    """A client optimizer, already wrapped by ZeRO-2."""
    engine = training.zero_engine("fira", 2, 1)
    layerwise(engine, engine.basic_optimizer)


def stage_2_model(deepspeed: Any) -> None:
    """The same, by its model."""
    engine = training.zero_engine("fira", 2, 1)
    layerwise(engine.module, engine.basic_optimizer)


def wrapped(deepspeed: Any) -> None:
    """An engine that has built its ZeRO-3 optimizer."""
    engine = training.zero_engine("fira", 3, 1)
    layerwise(engine, engine.basic_optimizer)


def stepped(deepspeed: Any) -> None:
    """An optimizer on partitioned parameters that nothing feeds."""
    engine = deepspeed.initialize(model=tiny_llama(), config=training.ds_config(None, 3, 1))[0]
    FiraAdamW(param_groups(engine.module, rank=8), lr=1e-2).step()


def never_taken(deepspeed: Any) -> None:
    """An optimizer that asks for layer-wise updates and is handed to no engine."""
    engine = training.zero_engine("fira", 2, 1)
    FiraAdamW(engine.module.named_parameters(), rank=8, layerwise=True).step()


def some_of(engine: Any) -> tuple[Any, Any]:
    """An optimizer that leaves parameters out."""
    named = [(n, p) for n, p in engine.module.named_parameters() if "norm" not in n]
    return engine, FiraAdamW(named, rank=8, lr=1e-2)


REFUSED: dict[str, tuple[Callable, str]] = {
    "stage 0": refused("stage is 0.*Set stage 3", 0),
    "stage 1": refused("stage is 1.*Set stage 3.*FSDP2", 1),
    "stage 2": refused("stage is 2.*Set stage 3.*FSDP2", 2),
    "stage 2, in Python": (stage_2, "stage is 2.*Set stage 3"),
    "stage 3 already built": (wrapped, "already has an optimizer.*without an optimizer"),
    "clipping": refused('gradient_clipping is 1.0.*"gradient_clipping": 0.0', gradient_clipping=1.0),
    "fp16": refused("fp16 needs loss scaling.*bf16", torch_autocast={"enabled": True, "dtype": "float16"}),
    "offload_param": refused("offload_param", zero={"offload_param": {"device": "cpu"}}),
    "offload_optimizer": refused("offload_optimizer", zero={"offload_optimizer": {"device": "cpu"}}),
    "quantized weights": refused("zero_quantized_weights", zero={"zero_quantized_weights": True}),
    "quantized gradients": refused("zero_quantized_gradients", zero={"zero_quantized_gradients": True}),
    "hpZ": refused("zero_hpz_partition_size", zero={"zero_hpz_partition_size": 2}),
    "unmanaged accumulation": refused("managed_gradient_accumulation", managed_gradient_accumulation=False),
    "a value of another kind": refused("layerwise must be true", settings={"layerwise": 3}),
    "stage 2, the model": (stage_2_model, "engine.*not with the model"),
    "the model instead of the engine": attached("engine.*not with the model", lambda e: (e.module, None)),
    "a parameter left out": attached("is in no param group", some_of),
    "another model": attached("not the engine's", lambda e: (e, FiraAdamW(tiny_llama().named_parameters(), rank=8))),
    "another number of micro-batches": attached("accumulation_steps=3", accumulation_steps=3),
    "never taken over": (never_taken, "did not take it over"),
    "a step that nothing feeds": (stepped, "layerwise\\(engine, optimizer\\)"),
}


def run_refused(rank: int, world: int) -> dict[str, Any]:
    """{case: the error's message}; and the weights of a bf16 run on this one rank."""
    found, deepspeed = {}, quiet_deepspeed()
    found["bf16"] = bf16(rank, world)["weights"]
    for name, (run, _) in REFUSED.items():
        try:
            run(deepspeed)
            found[name] = "nothing was raised"
        except (RuntimeError, ValueError) as error:
            found[name] = str(error)
        gc.collect()  # a dropped engine clears the names that DeepSpeed records, whoever recorded them
    return found


@functools.cache
def refusals() -> dict[str, Any]:
    """What one rank was told."""
    return launch(1, run_refused)[0]


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_with_what_to_do(case: str) -> None:
    """Each setting that layer-wise updates cannot honour is named."""
    assert re.search(REFUSED[case][1], refusals()[case]), refusals()[case]


def test_the_option_outside_deepspeed_is_not_ignored() -> None:
    """layerwise=True where no ds_config is at work names the function to call."""
    with pytest.raises(ValueError, match=r"lowrank_ds.layerwise\(model, optimizer\)"):
        lowrank_ds.FiraAdamW(nn.Linear(8, 8).named_parameters(), rank=2, layerwise=True)
    lowrank_ds.FiraAdamW(nn.Linear(8, 8).named_parameters(), rank=2, layerwise=False)
