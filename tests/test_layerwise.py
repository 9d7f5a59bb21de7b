"""Updates inside the backward: the same weights, state and resumed runs as updates in step()."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch

import lowrank_ds
from tests import training
from tests.cluster import batches, launch, share, tiny_llama

STEPS = 6  # bases at steps 0 and 4
RECIPES = ("galore", "fira", "apollo", "flora", "adalomo")
LIMIT = 1e-6


def run(
    recipe: str,
    layerwise: bool,
    pieces: int = 1,
    model: Any = None,
    steps: int = STEPS,
    part: tuple[int, int] = (0, 1),
    clip: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Weights after training on this process's part of the batches, in `pieces` micro-batches a step."""
    model = model or tiny_llama()
    optimizer = training.build(recipe, model, **settings)
    if layerwise:
        lowrank_ds.layerwise(model, optimizer, pieces, **(clip or {}))
    train(model, optimizer, batches(steps), pieces, part)
    return training.weights_of(model)


def train(
    model: Any, optimizer: Any, data: list[torch.Tensor], pieces: int = 1, part: tuple[int, int] = (0, 1)
) -> None:
    """The usual loop; it is the same with and without layer-wise updates."""
    for batch in data:
        mine = share(batch, *part)
        for piece in mine.chunk(pieces):
            (model(input_ids=piece, labels=piece).loss * len(piece) / len(mine)).backward()
        optimizer.step()
        optimizer.zero_grad()


# -- one process ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", list(training.RECIPES))
def test_equals_the_step(recipe: str) -> None:
    """Bit for bit, with one micro-batch (the five algorithms) and with four (every recipe)."""
    torch.set_num_threads(1)
    for pieces in (1, 4) if recipe in RECIPES else (4,):
        normal = run(recipe, False, pieces)
        assert training.largest_difference(run(recipe, True, pieces), normal) == 0, pieces


@pytest.mark.parametrize("recipe", [name for name in training.RECIPES if name.startswith("galore")])
def test_sums_in_the_subspace_equal_whole_sums(recipe: str) -> None:
    """Projection is linear: `compress_accumulation` changes nothing but rounding, layer-wise or not."""
    torch.set_num_threads(1)
    normal = run(recipe, False, 4)
    assert training.largest_difference(run(recipe, True, 4, compress_accumulation=True), normal) <= LIMIT
    assert training.largest_difference(folded(recipe, batches(STEPS)), normal) <= LIMIT


def folded(recipe: str, data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """`optimizer.accumulate()` after each of four micro-batches, updates in step()."""
    model = tiny_llama()
    optimizer = training.build(recipe, model, compress_accumulation=True)
    for number, batch in enumerate(data):
        for piece in batch.chunk(4):
            (model(input_ids=piece, labels=piece).loss / 4).backward()
            optimizer.accumulate()
            freed = [p.grad is None for n, p in model.named_parameters() if n.endswith("proj.weight")]
            # whole gradients are needed where a basis is due: all at steps 0 and 4 (with stagger, at others)
            assert not any(freed) if number == 0 else any(freed) or number == 4
        optimizer.step()
        optimizer.zero_grad()
    return training.weights_of(model)


def test_gradients_are_freed_as_they_come() -> None:
    """Never more alive than the two largest gradients, and none after step()."""
    model = tiny_llama()
    optimizer = training.build("fira", model)
    lowrank_ds.layerwise(model, optimizer)
    alive: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad.numel() for q in model.parameters() if q.grad is not None))
        )
    train(model, optimizer, batches(2))
    sizes = sorted(p.numel() for p in model.parameters())
    assert max(alive) <= sizes[-1] + sizes[-2] < sum(sizes) / 4
    assert all(p.grad is None for p in model.parameters())


def test_activation_checkpointing_and_bf16() -> None:
    """With HF's checkpointing; with bf16 compute over fp32 weights; with bf16 weights: bit for bit the normal step."""

    def checkpointed() -> Any:
        model = tiny_llama()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    assert training.largest_difference(run("fira", True, model=checkpointed()), run("fira", False)) == 0
    low = [run("fira", on, model=tiny_llama().bfloat16()) for on in (True, False)]
    assert training.largest_difference(*low) == 0
    with torch.autocast("cpu", torch.bfloat16):
        mixed = [run("galore", on, 4) for on in (True, False)]
    assert training.largest_difference(*mixed) == 0


def test_odd_parameters() -> None:
    """Tied, frozen and unused parameters, a learning rate schedule, and a last step with fewer micro-batches."""

    def trained(on: bool) -> dict[str, torch.Tensor]:
        model = tiny_llama(tie_word_embeddings=True)
        model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
        model.spare = torch.nn.Linear(12, 12)
        optimizer = training.build("fira", model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        if on:
            lowrank_ds.layerwise(model, optimizer, 4)
        data = batches(STEPS)
        for batch in data[:-1]:
            train(model, optimizer, [batch], 4)
            schedule.step()
        train(model, optimizer, data[-1:], 2)
        return training.weights_of(model)

    assert training.largest_difference(trained(True), trained(False)) == 0


# -- clipping ---------------------------------------------------------------------------------------------------------
def clipped(recipe: str, how: str, data: list[torch.Tensor], largest: float = 0.5) -> tuple[Any, list[float]]:
    """(weights, gradient norms): `how` is a clip mode, or "torch" for clip_grad_norm_, "each" for it on each tensor."""
    model = tiny_llama()
    optimizer, norms = training.build(recipe, model), []
    plain = how in ("torch", "each")
    handle = None if plain else lowrank_ds.layerwise(model, optimizer, clip=how, max_grad_norm=largest)
    for batch in data:

        def closure() -> torch.Tensor:
            loss = model(input_ids=batch, labels=batch).loss  # noqa: B023 (used at once)
            loss.backward()
            return loss

        if how == "two_pass":
            assert optimizer.step(closure).isfinite()
        else:
            closure()
            for tensors in [list(model.parameters())] if how == "torch" else [[p] for p in model.parameters()]:
                if plain:
                    norms.append(torch.nn.utils.clip_grad_norm_(tensors, largest).item())
            optimizer.step()
        if handle is not None and handle.norm is not None:
            norms.append(handle.norm.item())
        optimizer.zero_grad()
    return training.weights_of(model), norms


def test_two_pass_clipping_is_exact() -> None:
    """The weights and norms of clip_grad_norm_."""
    (weights, norms), (ours, our_norms) = (clipped("galore", how, batches(STEPS)) for how in ("torch", "two_pass"))
    assert min(norms) > 0.5  # every step is clipped
    assert our_norms == pytest.approx(norms, rel=1e-5)
    assert training.largest_difference(ours, weights) <= LIMIT
    free = run("galore", False)
    assert training.largest_difference(weights, free) > 1e-5  # else the test says nothing


def test_two_pass_repeats_random_numbers() -> None:
    """The second forward has the dropout masks of the first."""
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5))
    optimizer = lowrank_ds.GaLoreAdamW(layer.named_parameters(), rank=2)
    lowrank_ds.layerwise(layer, optimizer, clip="two_pass", max_grad_norm=1.0)
    seen = []

    def closure() -> torch.Tensor:
        out = layer(torch.ones(4, 8))
        seen.append(out == 0)
        out.sum().backward()
        return out.sum()

    for _ in range(2):
        optimizer.step(closure)
    assert seen[0].equal(seen[1]) and seen[2].equal(seen[3]) and not seen[0].equal(seen[2])


def test_previous_clipping() -> None:
    """Each step is scaled by what the norm of the one before asks for; a non-finite norm is not remembered."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4, bias=False)
    optimizer = lowrank_ds.Lomo(layer.named_parameters(), lr=1.0)
    handle = lowrank_ds.layerwise(layer, optimizer, clip="previous", max_grad_norm=1.0)
    factors, norm = [], 0.0
    for size in (3.0, 5.0, float("nan"), 0.1, 0.2):
        before, x = layer.weight.detach().clone(), torch.full((1, 6), size)
        layer(x).sum().backward()
        optimizer.step()
        moved = (before - layer.weight.detach()).norm().item()
        true = x.norm().item() * 2  # the gradient is four rows of x
        if true == true:
            factors.append((moved / true, min(1.0, 1 / norm) if norm else 1.0))
            norm = true
            assert handle.norm.item() == pytest.approx(true, rel=1e-5)
        else:
            assert moved == 0
    for found, expected in factors:
        assert found == pytest.approx(expected, rel=1e-4)


def test_per_tensor_clipping() -> None:
    """Each gradient by its own norm, as clip_grad_norm_ on each parameter."""
    weights = [clipped("galore", how, batches(STEPS), 0.05)[0] for how in ("each", "per_tensor")]
    assert training.largest_difference(*weights) <= LIMIT


# -- resume -----------------------------------------------------------------------------------------------------------
def saved(*parts: Any) -> list[Any]:
    """State dicts through a file and torch's safe loader."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def started(recipe: str, pieces: int, clip: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    model = tiny_llama()
    optimizer = training.build(recipe, model, **settings)
    lowrank_ds.layerwise(model, optimizer, pieces, **clip)
    return model, optimizer


@pytest.mark.parametrize(
    ("recipe", "settings", "clip"),
    [
        ("galore", {"compress_accumulation": True}, {}),
        ("fira", {}, {"clip": "previous", "max_grad_norm": 0.5}),
        ("flora", {"accumulation_compression_rank": 6}, {}),
    ],
)
def test_resume_is_bitwise(recipe: str, settings: dict, clip: dict) -> None:
    """Saved between steps, before, at and after a refresh, and loaded into a new model and optimizer."""
    data = batches(STEPS + 1)
    model, optimizer = started(recipe, 4, clip, **settings)
    train(model, optimizer, data, 4)
    through = training.weights_of(model)
    for stop in (3, 4, 5):
        model, optimizer = started(recipe, 4, clip, **settings)
        train(model, optimizer, data[:stop], 4)
        states = saved(model, optimizer)
        model, optimizer = started(recipe, 4, clip, **settings)
        for part, state in zip((model, optimizer), states, strict=True):
            part.load_state_dict(state)
        train(model, optimizer, data[stop:], 4)
        assert training.largest_difference(training.weights_of(model), through) == 0, stop


@pytest.mark.parametrize("recipe", ["galore", "flora"])
def test_resume_between_micro_batches(recipe: str, caplog: pytest.LogCaptureFixture) -> None:
    """Sums in the subspace are in the state dict: a run goes on bit for bit from inside a step."""
    option = {"galore": "compress_accumulation", "flora": "accumulation_compression_rank"}[recipe]
    name, settings = training.settings_of(recipe, **{option: True if recipe == "galore" else 6})

    def begin() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30, bias=False), torch.nn.Linear(30, 16, bias=False))
        optimizer = getattr(lowrank_ds, name)(model.named_parameters(), **settings)
        lowrank_ds.layerwise(model, optimizer, 4)
        return model, optimizer

    def micro(model: Any, number: int) -> None:
        x = torch.randn(5, 20, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()

    def go_on(model: Any, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            micro(model, number)
            if number % 4 == 3:
                optimizer.step()

    model, optimizer = begin()
    go_on(model, optimizer, range(16))
    through = training.weights_of(model)
    model, optimizer = begin()
    go_on(model, optimizer, range(10))  # two micro-batches into step 2, whose basis is step 0's
    assert all(p.grad is None for p in model.parameters())
    states = saved(model, optimizer)
    assert "between" not in caplog.text
    model, optimizer = begin()
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    go_on(model, optimizer, range(10, 16))
    assert training.largest_difference(training.weights_of(model), through) == 0


def test_saving_amid_a_step_says_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """Whole gradients are not in a state dict, and neither is half a step."""
    model, optimizer = started("fira", 2, {})
    batch = batches(1)[0]
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.state_dict()
    assert "between a backward pass and step()" in caplog.text


def test_idle_options_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """compress_accumulation without accumulate(); fewer gradients than accumulation_steps; not when used rightly."""

    def trained(on: bool, called: bool, pieces: int) -> str:
        caplog.clear()
        model = tiny_llama()
        optimizer = training.build("galore", model, compress_accumulation=True)
        if on:
            lowrank_ds.layerwise(model, optimizer, 2)
        for piece in batches(1)[0].chunk(pieces):
            model(input_ids=piece, labels=piece).loss.backward()
            if called:
                optimizer.accumulate()
        optimizer.step()
        return caplog.text

    assert "has no effect" in trained(False, False, 2) and "has no effect" not in trained(False, True, 2)
    assert "after 1 of accumulation_steps=2" in trained(True, False, 1)
    assert "accumulation_steps=" not in (said := trained(True, False, 2)) and "has no effect" not in said


def test_zero_grad_drops_sums() -> None:
    """zero_grad() before step() drops what was summed, as it drops gradients."""
    runs = []
    for spoiled in (False, True):
        model = tiny_llama()
        optimizer = training.build("galore", model, compress_accumulation=True)
        for batch in batches(3):
            if spoiled:
                model(input_ids=batch[:2], labels=batch[:2]).loss.backward()
                optimizer.accumulate()
                optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.accumulate()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(training.weights_of(model))
    assert training.largest_difference(*runs) == 0


def test_a_bad_micro_batch_skips_the_step() -> None:
    """A non-finite micro-batch in a sum leaves weights and moments of its matrix, is counted, and does not linger."""
    for settings in ({"compress_accumulation": True}, {}):
        torch.manual_seed(0)
        layer = torch.nn.Linear(10, 8, bias=False)
        optimizer = lowrank_ds.GaLoreAdamW(layer.named_parameters(), rank=3, lr=0.1, **settings)
        lowrank_ds.layerwise(layer, optimizer, 2)
        for step, bad in enumerate((False, True, False)):
            before = layer.weight.detach().clone()
            for micro in range(2):
                x = torch.randn(4, 10)
                layer(x * (float("inf") if bad and micro == 0 else 1.0)).square().sum().backward()
            optimizer.step()
            assert layer.weight.isfinite().all()
            assert layer.weight.equal(before) == bad, step
        assert optimizer.skipped() == {"weight": 1}


# -- several processes -------------------------------------------------------------------------------------------------
KINDS = {2: ("fsdp2", "replicate"), 3: ("fsdp2",), 4: ("hsdp", "fsdp2 tp")}


CELLS = (
    ("normal", 1, {}), ("layer-wise", 1, {}),
    ("normal, 3 micro-batches", 3, {}), ("layer-wise, 3 micro-batches", 3, {}),
    ("layer-wise, 3 micro-batches in the subspace", 3, {"compress_accumulation": True}),
)  # fmt: skip
BASES = {
    "layer-wise": "normal", "layer-wise, 3 micro-batches": "normal, 3 micro-batches", "on": "off",
    "layer-wise, 3 micro-batches in the subspace": "normal, 3 micro-batches",
}  # fmt: skip


def sharded_cells(rank: int, world: int) -> dict[tuple, dict]:
    """{(kind, recipe, what): weights}, normal and layer-wise."""
    found = {}
    for kind in KINDS[world]:
        part = training.data_ranks(kind, rank, world)
        for recipe in RECIPES:
            for what, pieces, more in CELLS:
                # three micro-batches of all recipes on one layout (and on one process), of GaLore on the others
                if recipe in (RECIPES if not more and (pieces == 1 or (kind, world) == ("fsdp2", 2)) else ("galore",)):
                    model, on = training.fully_sharded(kind, world), what.startswith("layer-wise")
                    found[kind, recipe, what] = run(recipe, on, pieces, model, 5, part, **more)
        if kind != "fsdp2 tp" and world != 3:
            found |= policies(kind, world, part)
    return found if rank == 0 else {}


def policies(kind: str, world: int, part: tuple[int, int]) -> dict[tuple, dict]:
    """Mixed precision, CPU offload, activation checkpointing, two-pass clipping."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    mixed = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    found = {}
    for on in (False, True):
        what = "on" if on else "off"
        found[kind, "mixed", what] = run("fira", on, 2, training.fully_sharded(kind, world, **mixed), 5, part)
        model = training.fully_sharded(kind, world, tiny_llama().bfloat16())
        found[kind, "bf16", what] = run("galore", on, 1, model, 5, part)
        if kind == "fsdp2":
            offloaded = training.fully_sharded(kind, 2, offload_policy=CPUOffloadPolicy(pin_memory=False))
            found[kind, "offload", what] = run("fira", on, 1, offloaded, 5, part)
        model = tiny_llama().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found[kind, "checkpointed", what] = run("fira", on, 1, training.fully_sharded(kind, world, model), 5, part)
    found |= {(kind, "resumed", what): weights for what, weights in resumed(kind, world, part).items()}
    for how in ("two_pass", "previous"):
        found[kind, "clip", how] = clipped_sharded(kind, how, world, part)
    return found


def resumed(kind: str, world: int, part: tuple[int, int]) -> dict[str, dict[str, torch.Tensor]]:
    """A layer-wise run of 6 steps ("off"), and one saved and loaded into a new model and optimizer after 4 ("on")."""
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    def begin() -> tuple[Any, Any]:
        model = training.fully_sharded(kind, world)
        optimizer = training.build("galore", model, compress_accumulation=True)
        lowrank_ds.layerwise(model, optimizer, 2)
        return model, optimizer

    model, optimizer = begin()
    data = batches(6)
    train(model, optimizer, data[:4], 2, part)
    states = copy.deepcopy((get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)))
    train(model, optimizer, data[4:], 2, part)
    through = training.weights_of(model)
    model, optimizer = begin()
    set_model_state_dict(model, states[0])
    set_optimizer_state_dict(model, optimizer, states[1])
    train(model, optimizer, data[4:], 2, part)
    return {"off": through, "on": training.weights_of(model)}


def clipped_sharded(kind: str, how: str, world: int, part: tuple[int, int]) -> dict[str, torch.Tensor]:
    model = training.fully_sharded(kind, world)
    optimizer = training.build("galore", model)
    lowrank_ds.layerwise(model, optimizer, clip=how, max_grad_norm=0.5)
    for batch in batches(STEPS):
        mine = share(batch, *part)

        def closure() -> None:
            model(input_ids=mine, labels=mine).loss.backward()  # noqa: B023 (used at once)

        if how == "two_pass":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        optimizer.zero_grad()
    return training.weights_of(model)


@pytest.mark.parametrize("world", list(KINDS))
def test_equals_the_step_on_several_processes(world: int, capsys: pytest.CaptureFixture) -> None:
    """FSDP2, HSDP, replicate, FSDP x TP: the normal step's weights, with 1 and with 3 micro-batches."""
    torch.set_num_threads(1)
    cells = launch(world, sharded_cells)[0]
    differences = {}
    for (kind, recipe, what), weights in cells.items():
        if what in BASES:
            differences[kind, recipe, what] = training.largest_difference(weights, cells[kind, recipe, BASES[what]])
    with capsys.disabled():
        print()
        for key, value in differences.items():
            print(f"{world} processes, {', '.join(key)}: {value:.1e} from the normal step")
    assert not {key: value for key, value in differences.items() if not value <= LIMIT}
    assert all(value == 0 for (_, what, _), value in differences.items() if what in ("resumed", "checkpointed"))
    for kind in KINDS[world]:
        alone = run("fira", False, steps=5)
        assert training.largest_difference(cells[kind, "fira", "layer-wise"], alone) <= 1e-5
        # the norm is that of all ranks: one process clips alike (another order of its sum moves weights by 1e-6)
        for how in [what for of, recipe, what in cells if (of, recipe) == (kind, "clip")]:
            alone = clipped("galore", how, batches(STEPS))[0]
            assert training.largest_difference(cells[kind, "clip", how], alone) <= 1e-5, how


def wrong_engines(rank: int, world: int) -> list[str]:
    """What layerwise says to DDP, FSDP1, a model not yet wrapped, and one wrapped too late."""
    from torch.distributed.fsdp import fully_shard

    said = []

    def attempt(action: Any) -> None:
        with pytest.raises(RuntimeError) as caught:
            action()
        said.append(str(caught.value))

    wrapped = torch.nn.parallel.DistributedDataParallel(tiny_llama())
    attempt(lambda: lowrank_ds.layerwise(wrapped, training.build("galore", wrapped)))
    attempt(lambda: training.build("galore", wrapped, compress_accumulation=True).accumulate())
    flat = training.fsdp1_model()
    attempt(lambda: lowrank_ds.layerwise(flat, training.fsdp1_optimizer("galore", flat)))
    batch = batches(1)[0]

    def plain() -> None:
        model = tiny_llama()
        lowrank_ds.layerwise(model, training.build("galore", model))
        model(input_ids=batch, labels=batch).loss.backward()

    def late() -> None:
        model = tiny_llama()
        optimizer = training.build("galore", model)
        lowrank_ds.layerwise(model, optimizer)
        fully_shard(model)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()

    def stale() -> None:
        model = tiny_llama()
        optimizer = training.build("galore", model)
        fully_shard(model)
        lowrank_ds.layerwise(model, optimizer)

    for action in (plain, late, stale):
        attempt(action)
    averaged = training.build("galore", wrapped, compress_accumulation=True)
    with wrapped.no_sync():
        attempt(lambda: averaged.accumulate(wrapped))
    return said


def test_engines_that_cannot_are_refused_by_name() -> None:
    """Each message names what to use instead."""
    said = launch(2, wrong_engines)[0]
    expected = (
        "replicate()", "accumulate(model)", "fully_shard", "replicate()", "layerwise() afterwards",
        "Build it afterwards", "no_sync()",
    )  # fmt: skip
    for message, words in zip(said, expected, strict=True):
        assert words in message
    assert said[0] != said[3]


# -- misuse -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps must be a whole number >= 1"),
        ({"accumulation_steps": True}, "accumulation_steps must be a whole number >= 1"),
        ({"max_grad_norm": 1.0}, 'clip="two_pass"'),
        ({"clip": "global", "max_grad_norm": 1.0}, "clip must be one of 'two_pass', 'per_tensor', 'previous'"),
        ({"clip": "previous"}, "needs max_grad_norm"),
        ({"clip": "previous", "max_grad_norm": -1.0}, "a finite number > 0"),
    ],
)
def test_wrong_arguments(arguments: dict, words: str) -> None:
    """Each names the argument and what to give."""
    layer = torch.nn.Linear(4, 4)
    optimizer = lowrank_ds.GaLoreAdamW(layer.named_parameters(), rank=2)
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        lowrank_ds.layerwise(layer, optimizer, **arguments)
    assert optimizer._in_backward is None


def test_wrong_use() -> None:
    """Foreign optimizers, twice, gradients without a hook, more passes than steps, compressed sums with clipping."""
    layer = torch.nn.Linear(4, 4, bias=False)
    with pytest.raises(TypeError, match="one of lowrank_ds"):
        lowrank_ds.layerwise(layer, torch.optim.AdamW(layer.parameters()))
    optimizer = lowrank_ds.GaLoreAdamW(layer.named_parameters(), rank=2, compress_accumulation=True)
    with pytest.raises(ValueError, match="whole gradients"):
        lowrank_ds.layerwise(layer, optimizer, 2, clip="previous", max_grad_norm=1.0)
    optimizer = lowrank_ds.GaLoreAdamW(layer.named_parameters(), rank=2)
    with pytest.raises(RuntimeError, match="compress_accumulation=True"):
        optimizer.accumulate()
    handle = lowrank_ds.layerwise(layer, optimizer)
    with pytest.raises(RuntimeError, match="called for this optimizer before"):
        lowrank_ds.layerwise(layer, optimizer)
    with pytest.raises(RuntimeError, match="no hook has fired"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="clip="):
        handle.measuring().__enter__()
    x = torch.randn(3, 4)
    layer(x).sum().backward()
    with pytest.raises(RuntimeError, match="weight arrived 2 times without"):
        layer(x).sum().backward()
    optimizer.zero_grad()
    layer.weight.grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match="its hook did not fire"):
        optimizer.step()
    handle.remove()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not layer.weight.equal(before)
    two = lowrank_ds.layerwise(layer, optimizer, clip="two_pass", max_grad_norm=1.0)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="closure"):
        layer(x).sum().backward()
    optimizer.zero_grad()
    with two.measuring():
        layer(x).sum().backward()
    with pytest.raises(RuntimeError, match="no backward pass came after measuring"):
        optimizer.step()
    two.remove()


def test_a_parameter_of_two_optimizers_is_not_left_out() -> None:
    """The first hook frees the gradient: the second optimizer would train nothing, without a word."""
    layer = torch.nn.Linear(4, 4)
    for _ in range(2):
        lowrank_ds.layerwise(layer, lowrank_ds.Lomo(layer.named_parameters()))
    with pytest.raises(RuntimeError, match="was taken away before its update"):
        layer(torch.randn(3, 4)).sum().backward()


def test_a_step_that_was_given_up_leaves_no_norm(caplog: pytest.LogCaptureFixture) -> None:
    """Norms are of one step: not of a backward before zero_grad(), nor of a measuring pass that broke off."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for clip in ("previous", "two_pass"):
        layer = torch.nn.Linear(4, 4)
        optimizer = lowrank_ds.Lomo(layer.named_parameters(), lr=0.0)
        handle = lowrank_ds.layerwise(layer, optimizer, clip=clip, max_grad_norm=1e3)
        grads = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        expected = torch.stack([g.norm() for g in grads]).norm()
        if clip == "previous":
            layer(x).square().sum().backward()
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.step()  # nothing to do: the norm of the last real step stays
            assert "found no gradient" in caplog.text
            assert optimizer.param_groups[0]["previous_grad_norm"] == float(handle.norm)
        else:
            with pytest.raises(ZeroDivisionError), handle.measuring():
                layer(x).square().sum().backward()
                raise ZeroDivisionError
            with handle.measuring():
                layer(x).square().sum().backward()
        torch.testing.assert_close(handle.norm, expected)


def test_nothing_is_kept_alive() -> None:
    """Model, optimizer and state go with their last reference; without the optimizer gradients are ordinary ones."""
    layer = torch.nn.Linear(4, 4)
    optimizer = lowrank_ds.GaLoreAdamW(layer.named_parameters(), rank=2)
    handle = lowrank_ds.layerwise(layer, optimizer)
    layer(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    gone = [weakref.ref(thing) for thing in (optimizer, handle, optimizer.state[layer.weight]["exp_avg"])]
    del optimizer, handle
    gc.collect()
    assert [thing() for thing in gone] == [None] * 3
    layer(torch.randn(3, 4)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("algorithm", ["FiraAdamW", "ApolloAdamW"])
def test_recipes_that_need_whole_gradients_say_so(algorithm: str) -> None:
    """compress_accumulation is refused where it would change the numbers."""
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="compress_accumulation=True sums micro-batches in the subspace"):
        getattr(lowrank_ds, algorithm)(layer.named_parameters(), rank=2, compress_accumulation=True)


def test_compression_can_be_switched_on_later() -> None:
    """State saved without sums loads into an optimizer that keeps them, and the other way round."""
    data = batches(4)
    model = tiny_llama()
    optimizer = training.build("galore", model)
    train(model, optimizer, data[:2])
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, data[2:])
    expected = training.weights_of(model)
    model = tiny_llama()
    optimizer = training.build("galore", model, compress_accumulation=True)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    lowrank_ds.layerwise(model, optimizer, 2)
    train(model, optimizer, data[2:], 2)
    assert training.largest_difference(training.weights_of(model), expected) <= LIMIT
