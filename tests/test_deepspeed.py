"""DeepSpeed features around the step: every way to hand the optimizer over, every mode, against one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ds
from lowrank_ds import FiraAdamW, collectives, param_groups
from tests import training
from tests.cluster import batches, launch, quiet_deepspeed, tiny_llama
from tests.counting import COUNTED, Counting, at_most

LIMIT = 1e-5
STEPS = 6  # refreshes at 0 and 4
FIRA = training.settings_of("fira")[1]


# --- one case = (what the ranks run, what one process runs) ---------------------------------------------------------
def zero_case(stage: int, **config: Any) -> Callable:
    """Fira under ZeRO `stage` with more ds_config keys."""
    return lambda rank, world: training.zero(rank, world, "fira", stage, STEPS, **config)


def with_engine(make: Callable[[Any, int], Any]) -> Callable:
    """Train the engine that `make(deepspeed, world)` builds."""

    def run(rank: int, world: int) -> dict[str, torch.Tensor]:
        engine = make(quiet_deepspeed(), world)
        training.train_engine(engine, rank, world, STEPS)
        weights = training.weights_of(engine.module)
        engine.destroy()
        return weights

    return run


def client(stage: int, as_callable: bool) -> Callable:
    """A client optimizer: an instance built from param_groups, or a callable that DeepSpeed calls."""

    def make(deepspeed: Any, world: int) -> Any:
        model = tiny_llama()
        if as_callable:
            optimizer = lambda params: FiraAdamW(params, **FIRA)
        else:
            options = {k: v for k, v in FIRA.items() if k != "rank"}
            optimizer = FiraAdamW(param_groups(model, rank=8), **options)
        config = training.ds_config(None, stage, world)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    return with_engine(make)


def two_groups(stage: int) -> Callable:
    """Decay and no-decay groups, as Hugging Face makes them, with an optimizer named in the ds_config."""

    def make(deepspeed: Any, world: int) -> Any:
        model = tiny_llama()
        groups = decay_groups(model)
        return deepspeed.initialize(
            model=model, model_parameters=groups, config=training.ds_config("fira", stage, world)
        )[0]

    return with_engine(make)


def decay_groups(model: nn.Module, named: bool = False) -> list[dict[str, Any]]:
    """Weights with decay, norms without."""
    split = [[(n, p) for n, p in model.named_parameters() if (p.dim() > 1) == big] for big in (True, False)]
    groups = [{"params": [p for _, p in part], "weight_decay": d} for part, d in zip(split, (0.1, 0.0), strict=True)]
    if named:
        for group, part in zip(groups, split, strict=True):
            group["param_names"] = [n for n, _ in part]
    return groups


def zero_init() -> Callable:
    """The model is built inside deepspeed.zero.Init: no rank ever holds a whole weight."""

    def make(deepspeed: Any, world: int) -> Any:
        config = training.ds_config("fira", 3, world)
        whole = tiny_llama().state_dict()
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = tiny_llama()
        for name, p in model.named_parameters():
            with deepspeed.zero.GatheredParameters(p, modifier_rank=0):
                p.data.copy_(whole[name]) if torch.distributed.get_rank() == 0 else None
        return deepspeed.initialize(model=model, config=config)[0]

    return with_engine(make)


def special_model(kind: str) -> nn.Module:
    """The tiny LLaMA with a frozen matrix, an unused layer, or a tied embedding."""
    model = tiny_llama(tie_word_embeddings=kind == "tied")
    target = model.model.layers[1].mlp.up_proj.weight
    if kind == "frozen":
        target.requires_grad_(False)
    if kind == "unused":
        model.unused = nn.Linear(20, 16)
    return model


POISONED = "model.layers.1.mlp.up_proj.weight"


def poison(optimizer: torch.optim.Optimizer, when: int) -> None:
    """One entry of POISONED's gradient becomes NaN just before step `when` (0, 1, ...), on the rank that holds it.

    Injected below the engine: DeepSpeed drops a whole step whose gradients it sees to be non-finite.
    """
    calls, place = [0], 7 * 36 + 3

    def hook(*_: Any) -> None:
        if calls[0] == when:
            for slot in [s for slots in optimizer._slots.values() for s in slots if s.name == POISONED]:
                first, last = slot.layout.span(slot.layout.rank)
                if first <= place < last:
                    slot.entries(slot.host.grad.view(-1))[place - first] = float("nan")
        calls[0] += 1

    optimizer.register_step_pre_hook(hook)


def poisoned(stage: int, when: int) -> Callable:
    """Fira under ZeRO with one NaN."""

    def make(deepspeed: Any, world: int) -> Any:
        engine = training.zero_engine("fira", stage, world)
        poison(engine.basic_optimizer, when)
        return engine

    return with_engine(make)


def poisoned_reference(when: int) -> dict[str, torch.Tensor]:
    """One process with the same NaN."""
    model = tiny_llama()
    optimizer = training.build("fira", model)
    poison(optimizer, when)
    for batch in batches(STEPS):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped() == {POISONED: 1}
    return training.weights_of(model)


def special(kind: str, stage: int) -> Callable:
    """Train a special model under ZeRO, with weight decay."""
    more = {"settings": {"weight_decay": 0.1}}
    return lambda rank, world: training.zero(rank, world, "fira", stage, STEPS, model=special_model(kind), **more)


def accumulated(clip: float, schedule: bool) -> dict[str, torch.Tensor]:
    """One process: the mean gradient of the whole batch, clipped, under DeepSpeed's own WarmupLR."""
    model = tiny_llama()
    optimizer = training.build("fira", model)
    from deepspeed.runtime.lr_schedules import WarmupLR

    warmup = WarmupLR(optimizer, **WARMUP["params"]) if schedule else None
    for batch in batches(STEPS):
        model(input_ids=batch, labels=batch).loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if warmup:
            warmup.step()
        optimizer.zero_grad()
    return training.weights_of(model)


def grouped() -> dict[str, torch.Tensor]:
    """One process with decay and no-decay groups."""
    model = tiny_llama()
    optimizer = FiraAdamW(decay_groups(model, named=True), **FIRA)
    for batch in batches(STEPS):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return training.weights_of(model)


def plain() -> dict[str, torch.Tensor]:
    """One process, Fira."""
    return training.one_process("fira", STEPS)


def special_reference(kind: str) -> dict[str, torch.Tensor]:
    """One process, special model."""
    return training.one_process("fira", STEPS, model=special_model(kind), weight_decay=0.1)


WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 4,
                                         "warmup_type": "linear"}}  # fmt: skip
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
MICRO = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}

CASES: dict[str, tuple[Callable, Callable]] = {
    "client instance, zero2": (client(2, False), plain),
    "client instance, zero3": (client(3, False), plain),
    "client callable, zero1": (client(1, True), plain),
    "two groups, zero2": (two_groups(2), grouped),
    "two groups, zero3": (two_groups(3), grouped),
    "zero.Init": (zero_init(), plain),
    "cpu offload, zero2": (zero_case(2, zero_force_ds_cpu_optimizer=False, **OFFLOAD), plain),
    "cpu offload, zero3": (zero_case(3, zero_force_ds_cpu_optimizer=False, **OFFLOAD), plain),
    "accumulation, zero1": (zero_case(1, **MICRO), plain),
    "accumulation, zero3": (zero_case(3, **MICRO), plain),
    "clipping, zero2": (zero_case(2, gradient_clipping=0.05), functools.partial(accumulated, 0.05, False)),
    "clipping, zero3": (zero_case(3, gradient_clipping=0.05), functools.partial(accumulated, 0.05, False)),
    "scheduler, zero2": (zero_case(2, scheduler=WARMUP), functools.partial(accumulated, 0.0, True)),
    "round robin, zero1": (zero_case(1, zero={"round_robin_gradients": True}), plain),
    "overlap, zero2": (zero_case(2, zero={"overlap_comm": True, "reduce_bucket_size": 3000}), plain),
    "sub-groups, zero3": (zero_case(3, zero={"sub_group_size": 3000}), plain),
    **{
        f"{kind}, zero{stage}": (special(kind, stage), functools.partial(special_reference, kind))
        for kind, stage in (("frozen", 2), ("frozen", 3), ("unused", 1), ("tied", 2), ("tied", 3))
    },
    **{
        f"NaN at step {when}, zero{stage}": (poisoned(stage, when), functools.partial(poisoned_reference, when))
        for when, stage in ((3, 2), (4, 2), (3, 3), (4, 3))
    },
}


def run_cases(rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """All cases in one pair of processes."""
    found = {name: run(rank, world) for name, (run, _) in CASES.items()}
    return found if rank == 0 else {}


@functools.cache
def case_results() -> dict[str, dict[str, torch.Tensor]]:
    """{case: weights} from two ranks."""
    return launch(2, run_cases)[0]


@pytest.mark.parametrize("case", list(CASES))
def test_equal_to_one_process(case: str) -> None:
    """Weights after 6 steps, two refreshes, are within fp32 rounding of one process."""
    torch.set_num_threads(1)
    expected = CASES[case][1]()
    difference = training.largest_difference(case_results()[case], expected)
    assert difference <= LIMIT, f"{case}: {difference:.1e}"
    assert training.largest_difference(expected, training.weights_of(special_model(case.split(",")[0]))) > 1e-2


# --- bf16 ------------------------------------------------------------------------------------------------------------
BF16 = {
    "zero1": {},
    "zero2": {},
    "zero3": {},
    "zero1 BF16_Optimizer": {"data_types": {"grad_accum_dtype": "fp32"}},
    "zero2 bf16 master": {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    },
}


def run_bf16(rank: int, world: int) -> dict[str, Any]:
    """{mode: (weights, dtypes of the state, matrices projected, losses)}."""
    found = {}
    for mode, more in BF16.items():
        engine = training.zero_engine("fira", int(mode[4]), world, **{"bf16": {"enabled": True}, **more})
        optimizer = engine.basic_optimizer
        training.train_engine(engine, rank, world, STEPS)
        dtypes = {t.dtype for state in optimizer.state.values() for t in state.values()}
        slots = [s for slots in optimizer._slots.values() for s in slots]
        projected = [s.name for s in slots if s.projected]
        found[mode] = (training.weights_of(engine.module), dtypes, len(projected), type(engine.optimizer).__name__)
        engine.destroy()
    return found


@functools.cache
def bf16_results() -> list[dict[str, Any]]:
    """What both ranks found."""
    return launch(2, run_bf16)


@pytest.mark.parametrize("mode", list(BF16))
def test_bf16_follows_fp32_and_keeps_fp32_state(mode: str) -> None:
    """bf16 with an fp32 master (and without) projects, keeps fp32 state and stays near the fp32 run."""
    torch.set_num_threads(1)
    weights, dtypes, projected, wrapper = bf16_results()[0][mode]
    assert dtypes == {torch.float32}
    assert projected > 0
    assert (wrapper == "BF16_Optimizer") == ("BF16_Optimizer" in mode)
    start, exact = training.weights_of(tiny_llama()), plain()
    moved = sum((exact[n] - start[n]).square().sum() for n in exact).sqrt()
    apart = sum((exact[n] - weights[n]).square().sum() for n in exact).sqrt()
    assert apart < 0.25 * moved


# --- layout, collectives, memory, checkpoint -------------------------------------------------------------------------
def cuts_and_holders(rank: int, world: int) -> dict[str, Any]:
    """What each rank holds of the projected matrices under ZeRO-1 and ZeRO-3."""
    found = {}
    for stage in (1, 3):
        engine = training.zero_engine("galore", stage, world)
        training.train_engine(engine, rank, world, 1)
        slots = [s for slots in engine.basic_optimizer._slots.values() for s in slots if s.projected]
        found[stage] = {s.name: (s.layout.numel, s.layout.cut_inside_row, s.layout.shared) for s in slots}
        engine.destroy()
    return found


def test_rows_are_cut_and_ranks_hold_nothing_of_some_matrix() -> None:
    """The tiny model exercises the hard layouts: cuts inside rows, and ranks without any entry."""
    ranks = launch(3, cuts_and_holders)
    names = {n for n, p in tiny_llama().named_parameters() if p.dim() == 2 and "layers" in n}
    for stage in (1, 3):
        cut = {name for found in ranks for name, (_, inside, shared) in found[stage].items() if inside and shared}
        assert cut, f"no matrix is cut inside a row under ZeRO-{stage}"
    without = {name for found in ranks for name in names if found[1].get(name, (0,))[0] == 0}
    shared_without = {n for found in ranks for n, (numel, _, shared) in found[1].items() if shared and numel == 0}
    assert without and shared_without, "some rank must hold nothing of a matrix that others share"


def count_collectives(rank: int, world: int, layers: int) -> dict[tuple[str, int], tuple[int, int]]:
    """{(recipe, stage): (collectives, bytes) that our optimizer issues in one ordinary step}."""
    found = {}
    for recipe in COUNTED:
        for stage in (2, 3):
            engine = training.zero_engine(recipe, stage, world, tiny_llama(num_hidden_layers=layers))
            training.train_engine(engine, rank, world, 2)  # binds, and the refresh of step 0
            counter = collectives.dist = Counting(torch.distributed)
            training.train_engine(engine, rank, world, 1)
            collectives.dist = torch.distributed
            found[recipe, stage] = counter.calls, counter.bytes
            engine.destroy()
    return found


def test_collectives_per_step_do_not_grow_with_depth(capsys: pytest.CaptureFixture) -> None:
    """The number of collectives our step adds is small and the same for 2 and 6 layers."""
    shallow, deep = (launch(2, count_collectives, layers)[0] for layers in (2, 6))
    with capsys.disabled():
        print("\ncollectives a step adds (2 ranks; 2 layers -> 6 layers; bytes received per rank)")
        for key, (calls, size) in shallow.items():
            print(f"  {key[0]:18s} zero{key[1]}  {calls} -> {deep[key][0]}   {size} -> {deep[key][1]} bytes")
    for key in shallow:
        assert shallow[key][0] == deep[key][0] <= at_most(key[0]), key
    assert shallow["galore right", 3][0] <= 2  # basis with liveness; cut rows


LARGER = {"hidden_size": 132, "intermediate_size": 356, "num_hidden_layers": 3, "num_key_value_heads": 3,
          "vocab_size": 509}  # fmt: skip


def measure_state(rank: int, world: int, recipes: tuple[str, ...]) -> dict[tuple[str, int], int]:
    """{(recipe, stage): bytes of optimizer state on this rank}."""
    found = {}
    for recipe in recipes:
        for stage in (2, 3):
            engine = training.zero_engine(recipe, stage, world, tiny_llama(**LARGER), settings={"rank": 32})
            training.train_engine(engine, rank, world, 1)
            found[recipe, stage] = lowrank_ds.state_bytes(engine.basic_optimizer)
            engine.destroy()
    return found


def test_state_summed_over_ranks_is_the_one_process_state(capsys: pytest.CaptureFixture) -> None:
    """Projectors included, the ranks together hold at most 5 % more than one process (2 and 4 ranks, ZeRO-2 and 3)."""
    torch.set_num_threads(1)
    recipes = ("galore", "galore full", "fira", "apollo", "flora", "galore adafactor")
    alone = {}
    for recipe in recipes:
        model = tiny_llama(**LARGER)
        optimizer = training.build(recipe, model, rank=32)
        optimizer.init_state()
        alone[recipe] = lowrank_ds.state_bytes(optimizer)
    rows = []
    for world in (2, 4):
        ranks = launch(world, measure_state, recipes)
        for key in ranks[0]:
            rows.append((world, *key, max(r[key] for r in ranks), sum(r[key] for r in ranks) / alone[key[0]]))
    with capsys.disabled():
        print("\noptimizer state: ranks, recipe, stage, largest rank's bytes, sum over ranks / one process")
        print("\n".join(f"  {w} x {r:18s} zero{s} {size:9d} {ratio:.4f}" for w, r, s, size, ratio in rows))
    assert all(ratio <= 1.05 for *_, ratio in rows)
