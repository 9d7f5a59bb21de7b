"""R on the wire: `reduce_in_subspace` gives the weights of averaging whole gradients, and sends what it says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import lowrank_ds
from lowrank_ds.bench.counting import counting
from lowrank_ds.engines import hsdp
from tests import training
from tests.cluster import batches, launch, share, tiny_llama
from tests.training import GAP, STEPS

EXACT, LIMIT = 1e-6, 1e-5  # beside whole gradients on the wire; beside one process
FOUR = 5e-6  # beside whole gradients on 4 replicas: the order of the sums alone moves replicate() from DDP by 3e-6
# With three ranks 1e-2 is at rounding's mercy: one ulp in the initial weights moves one process by 3.5e-6, and DDP with
# whole gradients ends 1.8e-6 from one process.
SLOWER = "galore, lr 3e-3"
THREE = [SLOWER, "power, rotated"]
SHORT = {"steps": 6}  # with refreshes at 0 and 4; else 9 steps, with one more at 8
# {case: (recipe, optimizer settings, how it is trained)}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "galore": ("galore", {}, {}),
    SLOWER: ("galore", {"lr": 3e-3}, {}),
    "right, decay": ("galore right", {}, SHORT),
    "full": ("galore full", {}, SHORT),
    "power, rotated": ("galore power rotate", {}, {}),
    "staggered, reset": ("galore randomized reset", {}, SHORT),
    "adafactor": ("galore adafactor", {}, SHORT),
    "gaussian": ("galore", {"subspace": "gaussian"}, SHORT),
    "lazy": ("galore", {"update_proj_gap": 1, "lazy_refresh": True, "lazy_threshold": 1e-6}, {"steps": 10}),
    "micro-batches, the last averaged": ("galore", {}, {"pieces": 2, **SHORT}),
    "micro-batches, each averaged": ("galore", {}, {"pieces": 2, "each": True}),
    "low-bit": ("galore", {"moments": "8bit", "projector_dtype": "4bit", "min_8bit_size": 0}, {"same": True, **SHORT}),
}  # fmt: skip
# torch 2.13's static graph dies in no_sync(), with or without us
DDP: dict[str, tuple[str, dict[str, Any]]] = {
    "bucket views": ("micro-batches, the last averaged", {"gradient_as_bucket_view": True}),
    "static graph": ("galore", {"static_graph": True}),
}


def wrap(kind: str, world: int, **options: Any) -> Any:
    """The tiny LLaMA under "ddp", "hsdp" (two shards), "hsdp 1" (one shard) or "replicate"."""
    if kind == "ddp":
        return DistributedDataParallel(tiny_llama(), **{"bucket_cap_mb": 0.01, **options})
    if kind == "hsdp 1":
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))
        return training.fully_sharded("fsdp2", world, mesh=mesh, **options)
    return training.fully_sharded(kind, world, **options)


def syncing(model: Any, on: bool) -> Any:
    """A context in which a backward averages gradients over replicas, or does not."""
    if isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext() if on else model.no_sync()
    model.set_requires_gradient_sync(on)
    return contextlib.nullcontext()


def run(
    kind: str, rank: int, world: int, case: str, on: bool, wire_dtype: Any = None, **options: Any
) -> tuple[dict[str, torch.Tensor], list[Any], Any]:
    """(weights, traffic of each step, optimizer) after training a case; on: with coordinates on the wire."""
    recipe, settings, how = CASES[case]
    model = wrap(kind, world, **options)
    optimizer = training.build(recipe, model, **settings)
    handle = lowrank_ds.reduce_in_subspace(model, optimizer, wire_dtype) if on else None
    pieces, traffic = how.get("pieces", 1), []
    for batch in batches(how.get("steps", STEPS)):
        mine = batch[:4] if how.get("same") else share(batch, rank, world)
        for number, piece in enumerate(mine.chunk(pieces), 1):
            with syncing(model, how.get("each") or number == pieces):
                (model(input_ids=piece, labels=piece).loss / pieces).backward()
        optimizer.step()
        optimizer.zero_grad()
        traffic.append(handle and handle.traffic)
    return training.weights_of(model), traffic, optimizer


def beside_whole(kind: str, rank: int, world: int, cases: list[str]) -> dict[str, tuple[float, list[Any], Any]]:
    """{case: (largest difference of weights to those with whole gradients, traffic, weights)}."""
    found = {}
    for case in cases:
        whole, _, plain = run(kind, rank, world, case, False)
        weights, traffic, optimizer = run(kind, rank, world, case, True)
        own, theirs = ({n: list(s) for n, s in enumerate(o.state.values())} for o in (optimizer, plain))
        assert own == theirs, "the state has other tensors"
        found[case] = training.largest_difference(weights, whole), traffic, weights
    return found


def check(case: str, difference: float, traffic: list[Any], limit: float = EXACT) -> None:
    """The weights, and that coordinates did travel but for the steps that made a basis."""
    assert difference <= (0 if case == "low-bit" else limit), (case, difference)
    refreshing = [step for step, t in enumerate(traffic) if not t.coordinates]
    if case in ("galore", "full", "low-bit", "gaussian"):
        assert refreshing == list(range(0, len(traffic), GAP)), case
        assert len({t for step, t in enumerate(traffic) if step not in refreshing}) == 1
        assert all(t.whole == t.without for step, t in enumerate(traffic) if step in refreshing)
        assert all(t.coordinates + t.whole < 0.6 * t.without for t in traffic if t.coordinates)
    assert sum(t.coordinates for t in traffic), case


# -- DDP ---------------------------------------------------------------------------------------------------------------
def ddp(rank: int, world: int) -> dict[str, Any]:
    """Every case under DDP with 2 ranks, some with 3; and what else is asked of DDP."""
    found = beside_whole(
        "ddp", rank, world, [case for case in CASES if case not in (SLOWER, "gaussian")] if world == 2 else THREE
    )
    if world == 2:
        for name, (case, options) in DDP.items():
            whole, _, _ = run("ddp", rank, world, case, False, **options)
            weights, traffic, _ = run("ddp", rank, world, case, True, **options)
            found[name] = training.largest_difference(weights, whole), traffic, weights
        found["extras"] = {function.__name__: function(rank, world) for function in EXTRAS}
    return found


def resumed(rank: int, world: int) -> float:
    """Largest difference of weights and state after 9 steps in one go, and with a new job after 7."""

    def go_on(model: Any, optimizer: Any, data: list[torch.Tensor]) -> None:
        for batch in data:
            mine = share(batch, rank, world)
            model(input_ids=mine, labels=mine).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def started() -> tuple[Any, Any]:
        model = wrap("ddp", world)
        optimizer = training.build("galore", model)
        lowrank_ds.reduce_in_subspace(model, optimizer)
        return model, optimizer

    data = batches(STEPS)
    model, optimizer = started()
    go_on(model, optimizer, data[:7])
    saved = [{k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()]
    again, other = started()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    go_on(again, other, data[7:])
    go_on(model, optimizer, data[7:])
    return training.largest_difference(training.weights_of(model), training.weights_of(again))


def not_finite(rank: int, world: int) -> tuple[float, dict[str, int], dict[str, int]]:
    """(difference, skipped with and without) when one replica's gradient is NaN at a step without refresh."""
    runs = []
    for on in (False, True):
        model = wrap("ddp", world)
        optimizer = training.build("galore", model)
        if on:
            lowrank_ds.reduce_in_subspace(model, optimizer)
        for step, batch in enumerate(batches(5)):
            mine = share(batch, rank, world)
            loss = model(input_ids=mine, labels=mine).loss
            (loss * float("nan") if step == 3 and rank == 1 else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((training.weights_of(model), optimizer.skipped()))
    return training.largest_difference(runs[0][0], runs[1][0]), runs[0][1], runs[1][1]


def dropped(rank: int, world: int) -> list[float]:
    """Differences to one backward when another one's gradients were dropped before: by the optimizer, by the model."""
    weights = []
    for drop in (None, lambda model, optimizer: optimizer.zero_grad(), lambda model, optimizer: model.zero_grad()):
        model = wrap("ddp", world)
        optimizer = training.build("galore", model)
        lowrank_ds.reduce_in_subspace(model, optimizer)
        first, second, discarded = (share(batch, rank, world) for batch in batches(3))
        for mine in (first, second) if drop is None else (first, discarded, second):
            model(input_ids=mine, labels=mine).loss.backward()
            if mine is discarded:
                drop(model, optimizer)
                continue
            optimizer.step()
            optimizer.zero_grad()
        weights.append(training.weights_of(model))
    return [training.largest_difference(weights[0], other) for other in weights[1:]]


def counted(rank: int, world: int) -> list[tuple[int, int]]:
    """(bytes that went through the collectives, bytes the handle tells) of steps 2 and 3."""
    model = wrap("ddp", world)
    optimizer = training.build("galore", model)
    handle = lowrank_ds.reduce_in_subspace(model, optimizer)
    found = []
    for batch in batches(3):
        mine = share(batch, rank, world)
        with counting() as counter:
            model(input_ids=mine, labels=mine).loss.backward()
        assert all(p.grad is None for n, p in model.named_parameters() if "_proj" in n) == bool(found)
        optimizer.step()
        optimizer.zero_grad()
        found.append((counter.bytes, handle.traffic.coordinates + handle.traffic.whole))
    assert handle.total.without == 3 * handle.traffic.without
    return found[1:]


def narrow(rank: int, world: int) -> tuple[float, float]:
    """(difference of weights, ratio of bytes) with bf16 on the wire."""
    weights, exact, _ = run("ddp", rank, world, "full", True)
    rounded, traffic, _ = run("ddp", rank, world, "full", True, torch.bfloat16)
    return training.largest_difference(weights, rounded), sum(map(sum_of, traffic)) / sum(map(sum_of, exact))


def sum_of(traffic: Any) -> int:
    """Bytes that travelled."""
    return traffic.coordinates + traffic.whole


@contextlib.contextmanager
def refused(found: dict[str, str], name: str) -> Iterator[None]:
    """Keep the message of what is raised inside; "" if nothing is."""
    found[name] = ""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        found[name] = f"{type(error).__name__}: {error}"


def prepared(rank: int, world: int, steps: int = 1, case: str = "galore") -> tuple[Any, Any, Callable[[], None]]:
    """(model, optimizer, a backward pass) under DDP after some steps."""
    model = wrap("ddp", world)
    optimizer = training.build(case, model)
    lowrank_ds.reduce_in_subspace(model, optimizer)

    def backward() -> None:
        mine = share(batches(1)[0], rank, world)
        model(input_ids=mine, labels=mine).loss.backward()

    for _ in range(steps):
        backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, backward


def misuse(rank: int, world: int) -> dict[str, str]:
    """{what was done: the message}, of the training loop."""
    found: dict[str, str] = {}
    for name, steps in {"clipped": 1, "clipped at a refresh": 0}.items():
        model, optimizer, backward = prepared(rank, world, steps)
        backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        with refused(found, name):
            optimizer.step()
    model, optimizer, backward = prepared(rank, world)
    with model.no_sync():
        backward()
    with refused(found, "not averaged"):
        optimizer.step()
    model, optimizer, backward = prepared(rank, world)
    backward()
    optimizer.load_state_dict(optimizer.state_dict())
    with refused(found, "loaded before the step"):
        optimizer.step()
    model, optimizer, backward = prepared(rank, world, 0)
    for slots in optimizer._slots.values():
        slots[0].step += rank
    with refused(found, "another step on one rank"):
        backward()
    return found


def overlooked(rank: int, world: int) -> dict[str, str]:
    """{what was done: the message}, of what leaves no trace on a gradient that is still there."""
    found: dict[str, str] = {}
    model, optimizer, backward = prepared(rank, world)
    backward()
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad * 0.5
    with refused(found, "replaced"):
        optimizer.step()
    optimizer.zero_grad()
    backward()
    with refused(found, "removed before the step"):
        optimizer._replicas.remove()
    for name in ("scaled", "unscaled"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(torch.ones(()))
        if name == "unscaled":
            scaler.unscale_(optimizer)
        with refused(found, name):
            scaler.step(optimizer)
    optimizer.zero_grad()
    backward()
    optimizer.step()
    with refused(found, "stepped twice"):
        optimizer.step()
    model, optimizer, backward = prepared(rank, world, 0)
    backward()
    optimizer.step()  # all gradients were averaged whole
    model.zero_grad()
    with model.no_sync():
        backward()
    with refused(found, "not averaged after a refresh"):
        optimizer.step()
    return found


def removed(rank: int, world: int) -> tuple[int, float]:
    """(bytes of coordinates after `remove`, difference to whole gradients) of 4 steps, the last two without."""
    weights = []
    for on in (False, True):
        model = wrap("ddp", world)
        optimizer = training.build("galore", model)
        handle = lowrank_ds.reduce_in_subspace(model, optimizer) if on else None
        for number, batch in enumerate(batches(4)):
            if number == 2 and on:
                sent = handle.total.coordinates
                handle.remove()
            mine = share(batch, rank, world)
            model(input_ids=mine, labels=mine).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(training.weights_of(model))
    return handle.total.coordinates - sent, training.largest_difference(*weights)


EXTRAS = (resumed, not_finite, dropped, counted, narrow, misuse, overlooked, removed)


def test_ddp_two_ranks() -> None:
    """Every case: the weights of whole gradients; one process; resume; NaN; dropped gradients; bytes; misuse."""
    for rank, found in enumerate(launch(2, ddp)):
        extras = found.pop("extras")
        for case, (difference, traffic, weights) in found.items():
            check(case, difference, traffic)
            if rank == 0 and case in ("galore", "right, decay", "adafactor"):
                alone = training.one_process(CASES[case][0], len(traffic), **CASES[case][1])
                assert training.largest_difference(weights, alone) <= LIMIT, case
        assert extras["resumed"] == 0
        difference, skipped, also = extras["not_finite"]
        assert difference <= EXACT and skipped == also and len(skipped) > 10
        assert extras["dropped"] == [0, 0]
        assert all(sent == told > 0 for sent, told in extras["counted"])
        assert extras["removed"][0] == 0 and extras["removed"][1] <= EXACT
        difference, ratio = extras["narrow"]
        assert 0 < difference < 0.05 and ratio == 0.5
        said = extras["misuse"]
        assert "clip_grad_norm_" in said["clipped"] and "clip_grad_norm_" in said["clipped at a refresh"]
        assert "no_sync()" in said["not averaged"]
        assert "zero_grad() after loading" in said["loaded before the step"]
        assert "not at the same step" in said["another step on one rank"]
        said = extras["overlooked"]
        assert "was changed after it was averaged" in said["replaced"]
        assert "GradScaler" in said["scaled"] and "GradScaler" in said["unscaled"]
        assert "lose the gradients" in said["removed before the step"]
        assert "step() came a second time" in said["stepped twice"]
        assert "no_sync()" in said["not averaged after a refresh"]


def test_ddp_three_ranks() -> None:
    """Divided by three, nothing is exact in binary."""
    for found in launch(3, ddp):
        for case, (difference, traffic, _) in found.items():
            check(case, difference, traffic)


# -- HSDP --------------------------------------------------------------------------------------------------------------
HSDP = [
    "galore",
    "micro-batches, the last averaged",
    "micro-batches, each averaged",
    "low-bit",
]


def sharded(rank: int, world: int) -> dict[str, Any]:
    """HSDP with two shards and with one, `replicate()`; refusals; and who all-reduces over replicas."""
    hsdp.BUCKET = 20_000  # several buckets
    found: dict[str, Any] = {"hsdp": beside_whole("hsdp", rank, world, HSDP)}
    for kind in ("hsdp 1", "replicate"):
        found[kind] = beside_whole(kind, rank, world, ["gaussian" if kind == "replicate" else "full"])
    found["reduced"] = all_reduced(rank, world)
    found["refused"] = refusals(rank, world)
    return found


def all_reduced(rank: int, world: int) -> list[tuple[int, int]]:
    """(bytes that any all-reduce of the backward gave to more than this rank, what the handle tells), of each step."""
    import torch.distributed as dist

    model = wrap("hsdp", world)
    optimizer = training.build("galore right", model)  # no coordinates cross shards
    handle = lowrank_ds.reduce_in_subspace(model, optimizer)
    whole, sent, found = dist.all_reduce, [], []

    def recorded(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        sent.append(tensor.nbytes if dist.get_world_size(keywords.get("group")) > 1 else 0)
        return whole(tensor, *arguments, **keywords)

    for batch in batches(3):
        mine = share(batch, rank, world)
        dist.all_reduce = recorded
        try:
            model(input_ids=mine, labels=mine).loss.backward()
        finally:
            dist.all_reduce = whole
        optimizer.step()
        optimizer.zero_grad()
        found.append((sum(sent), handle.traffic.coordinates + handle.traffic.whole))
        sent.clear()
    return found[1:]


def refusals(rank: int, world: int) -> dict[str, str]:
    """{what was asked for: the message}."""
    found: dict[str, str] = {}
    ask = lowrank_ds.reduce_in_subspace

    def ddp_model(**options: Any) -> Any:
        return wrap("ddp", world, **options)

    for recipe in ("fira", "apollo", "flora", "adalomo"):
        model = ddp_model()
        with refused(found, recipe):
            ask(model, training.build(recipe, model))
    models = {
        "fsdp2": lambda: training.fully_sharded("fsdp2", world),
        "not the wrapped model": lambda: ddp_model().module,
        "unused parameters": lambda: ddp_model(find_unused_parameters=True),
        "compress_accumulation": ddp_model,
        "wire_dtype": ddp_model,
        "twice": ddp_model,
    }
    for name, make in models.items():
        model = make()
        optimizer = training.build("galore", model, compress_accumulation=name == "compress_accumulation")
        if name == "twice":
            ask(model, optimizer)
        with refused(found, name):
            ask(model, optimizer, torch.int8 if name == "wire_dtype" else None)
    model = training.fsdp1_model()
    with refused(found, "fsdp1"):
        ask(model, training.fsdp1_optimizer("galore", model))
    model = ddp_model()
    with refused(found, "torch.optim"):
        ask(model, torch.optim.AdamW(model.parameters()))
    model = wrap("hsdp", world)
    optimizer = training.build("galore", model)
    handle = ask(model, optimizer)
    with refused(found, "layerwise after"):
        lowrank_ds.layerwise(model, optimizer)
    with refused(found, "another optimizer"):
        ask(model, training.build("galore", model))
    model(input_ids=batches(1)[0], labels=batches(1)[0]).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # moves no version counter of a DTensor
    with refused(found, "clipped"):
        optimizer.step()
    optimizer.zero_grad()
    handle.remove()
    lowrank_ds.layerwise(model, optimizer)
    with refused(found, "layerwise before"):
        ask(model, optimizer)
    return found


MESSAGES = {
    "fira": "ValueError: reduce_in_subspace: FiraAdamW: its update has the part of the gradient outside the subspace",
    "apollo": "ValueError: reduce_in_subspace: ApolloAdamW: its update is the whole gradient, scaled",
    "flora": "ValueError: reduce_in_subspace: Flora: its rule (Adafactor) works on the whole gradient",
    "adalomo": "projects nothing",
    "fsdp2": "has no replicas",
    "not the wrapped model": "Pass the DDP-wrapped model itself",
    "unused parameters": "static_graph=True",
    "compress_accumulation": "Leave out compress_accumulation",
    "wire_dtype": "got torch.int8",
    "twice": "was called for this optimizer before",
    "fsdp1": "wrapped in FSDP1",
    "torch.optim": "TypeError: reduce_in_subspace: optimizer must be one of lowrank_ds",
    "layerwise after": "layerwise: reduce_in_subspace",
    "layerwise before": "layerwise() updates inside the backward",
    "another optimizer": "was called for this model before",
    "clipped": "was changed after it was averaged",
}


def test_hsdp_and_replicate() -> None:
    """2 x 2, 4 x 1 and `replicate()`: the weights of whole gradients; only coordinates cross replicas; refusals."""
    for rank, found in enumerate(launch(4, sharded)):
        for kind in ("hsdp", "hsdp 1", "replicate"):
            for case, (difference, traffic, weights) in found[kind].items():
                check(case, difference, traffic, EXACT if kind == "hsdp" else FOUR)
                if rank == 0 and case in ("galore", "gaussian"):
                    recipe, settings, how = CASES[case]
                    alone = training.one_process(recipe, how.get("steps", STEPS), **settings)
                    assert training.largest_difference(weights, alone) <= LIMIT, kind
        assert all(sent == told > 0 for sent, told in found["reduced"])
        for name, message in MESSAGES.items():
            assert message in found["refused"][name], (name, found["refused"][name])


def test_versions_and_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that was not tested, and DeepSpeed ZeRO, are refused by name."""
    with pytest.raises(RuntimeError, match="torch 2.12.1.cpu found"):
        hsdp.check_version("2.12.1+cpu")
    hsdp.check_version("2.13.0+cpu")
    monkeypatch.setenv("LOWRANK_DS_UNTESTED_TORCH", "1")
    hsdp.check_version("2.12.1")
    model = tiny_llama()
    optimizer = training.build("galore", model)
    with pytest.raises(RuntimeError, match="with one process there is nothing to send"):
        lowrank_ds.reduce_in_subspace(model, optimizer)
    model.zero_optimization_stage = lambda: 2  # what the engine of DeepSpeed has
    with pytest.raises(RuntimeError, match="under DeepSpeed ZeRO no gradient is all-reduced"):
        lowrank_ds.reduce_in_subspace(model, optimizer)
