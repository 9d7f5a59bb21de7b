"""Checkpoints of FSDP2 training through torch.distributed.checkpoint: bitwise at the same world size, reshardable."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import lowrank_ds
from tests import test_mixed_model as mixed
from tests import training
from tests.cluster import launch, tiny_llama

RECIPES = ("galore left", "galore full", "galore adafactor", "fira", "flora unfactored")
SAVED_AT, STEPS = 6, 9  # refreshes at steps 0, 4 and 8: two before the save, one after it
LIMIT = 2e-6  # a run continued at another world size, against the one that never stopped


def options(flat: bool = False, **more: Any) -> StateDictOptions:
    """State dict options with the optimizer's state flattened or not."""
    return StateDictOptions(flatten_optimizer_state_dict=flat, **more)


def state_of(model: Any, optimizer: Any, flat: bool) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options(flat)),
    }


def restore(model: Any, optimizer: Any, folder: str, flat: bool) -> None:
    """dcp.load into a fresh model and optimizer."""
    found = state_of(model, optimizer, flat)
    dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(model, found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"], options=options(flat))


def fresh(recipe: str, kind: str, world: int) -> tuple[Any, Any]:
    """An untrained model and optimizer; kind "one" is not wrapped at all."""
    model = tiny_llama(seed=3) if kind == "one" else training.fully_sharded(kind, world, tiny_llama(seed=3))
    return model, training.build(recipe, model)


def whole_state(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """{"parameter.key": whole tensor}."""
    gathered = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))["state"]
    return {f"{name}.{key}": value.clone() for name, own in gathered.items() for key, value in own.items()}


def save(rank: int, world: int, folder: str, kind: str, recipes: tuple[str, ...], flat: bool) -> dict:
    """Train to SAVED_AT, save, go on to STEPS. {recipe: (state when saved, weights of the run that never stopped)}."""
    found = {}
    for recipe in recipes:
        model, optimizer = fresh(recipe, kind, world)
        training.train_sharded(model, optimizer, kind, rank, world, range(SAVED_AT))
        dcp.save(state_of(model, optimizer, flat), checkpoint_id=f"{folder}/{recipe}")
        state = whole_state(model, optimizer)
        training.train_sharded(model, optimizer, kind, rank, world, range(SAVED_AT, STEPS))
        found[recipe] = state, training.weights_of(model)
    return found


def resume(rank: int, world: int, folder: str, kind: str, recipes: tuple[str, ...], flat: bool) -> dict:
    """Load into a fresh model and go on to STEPS. {recipe: (state as loaded, weights)}."""
    found = {}
    for recipe in recipes:
        model, optimizer = fresh(recipe, kind, world)
        restore(model, optimizer, f"{folder}/{recipe}", flat)
        state = whole_state(model, optimizer)
        training.train_sharded(model, optimizer, kind, rank, world, range(SAVED_AT, STEPS))
        found[recipe] = state, training.weights_of(model)
    return found


def assert_same(saved: dict, resumed: dict, limit: float) -> None:
    """The state arrived bit for bit, the weights afterwards are within `limit`."""
    for recipe, (state, weights) in saved.items():
        other_state, other = resumed[recipe]
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            assert value.dtype == other_state[key].dtype, key
            assert torch.equal(value, other_state[key]), (recipe, key)
        assert training.largest_difference(weights, other) <= limit, recipe


RESHARDED = ("galore left", "fira", "galore adafactor")


def test_two_ranks_save_and_any_number_resumes() -> None:
    """FSDP2 x 2 saves; x 2 resumes bit for bit; x 3, x 4, HSDP, x 1 and an unwrapped model within rounding."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        saved = launch(2, save, folder, "fsdp2", RECIPES, False)[0]
        assert_same(saved, launch(2, resume, folder, "fsdp2", RECIPES, False)[1], 0.0)
        some = {recipe: saved[recipe] for recipe in RESHARDED}
        for world, kind in ((3, "fsdp2"), (4, "fsdp2"), (4, "hsdp"), (1, "fsdp2"), (1, "one")):
            assert_same(some, launch(world, resume, folder, kind, RESHARDED, False)[world - 1], LIMIT)


def tensor_parallel_saves(rank: int, world: int, folder: str) -> dict:
    """Saved on FSDP2 x TP tiles, resumed in the same processes on FSDP2 x 4 rows, flattened state."""
    saved = save(rank, world, folder, "fsdp2 tp", RESHARDED, True)
    return {"saved": saved} | {
        kind: resume(rank, world, folder, kind, RESHARDED, True) for kind in ("fsdp2 tp", "fsdp2")
    }


def test_tiles_reshard_to_rows() -> None:
    """FSDP2 x TP (2 x 2): bit for bit on the same mesh, within rounding on FSDP2 x 4; flattened state dicts."""
    with tempfile.TemporaryDirectory() as folder:
        found = launch(4, tensor_parallel_saves, folder)[0]
    assert_same(found["saved"], found["fsdp2 tp"], 0.0)
    assert_same(found["saved"], found["fsdp2"], LIMIT)


def other_ways(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Asynchronous saving; a full state dict broadcast from rank 0; a fresh optimizer asked for its state."""
    found: dict[str, Any] = {}
    model, optimizer = fresh("fira", "fsdp2", world)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(SAVED_AT))
    saving = dcp.async_save(
        state_of(model, optimizer, False), checkpoint_id=f"{folder}/async", process_group=torch.distributed.new_group()
    )
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_optimizer_state_dict(model, optimizer, options=whole), get_model_state_dict(model, options=whole)
    full = copy.deepcopy(full)  # 0-d CPU tensors in it are the optimizer's own
    state = whole_state(model, optimizer)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(SAVED_AT, STEPS))
    saving.result()
    saved = {"fira": (state, training.weights_of(model))}

    found["async"] = saved, resume_alone(rank, world, f"{folder}/async")
    model, optimizer = fresh("fira", "fsdp2", world)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full[1] if rank == 0 else {}, options=broadcast)
    set_optimizer_state_dict(model, optimizer, full[0] if rank == 0 else {}, options=broadcast)
    state = whole_state(model, optimizer)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(SAVED_AT, STEPS))
    found["broadcast"] = saved, {"fira": (state, training.weights_of(model))}
    return found | {"trace": trace(rank, world)}


def resume_alone(rank: int, world: int, folder: str) -> dict:
    """`resume` for one recipe in `folder` itself."""
    model, optimizer = fresh("fira", "fsdp2", world)
    restore(model, optimizer, folder, False)
    state = whole_state(model, optimizer)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(SAVED_AT, STEPS))
    return {"fira": (state, training.weights_of(model))}


def trace(rank: int, world: int) -> tuple[dict, dict, dict[str, Any]]:
    """(weights of a run, of one whose state was read before its first step, the state that was read)."""
    runs = []
    for ask in (False, True):
        model, optimizer = fresh("fira", "fsdp2", world)
        if ask:
            read = get_optimizer_state_dict(model, optimizer)["state"]
            counters = {f"{n}.{k}": v.item() for n, own in read.items() for k, v in own.items() if v.dim() == 0}
        training.train_sharded(model, optimizer, "fsdp2", rank, world, range(4))
        runs.append(training.weights_of(model))
    return runs[0], runs[1], counters


def test_async_broadcast_and_no_trace() -> None:
    """async_save and full_state_dict + broadcast_from_rank0 resume bit for bit; reading a fresh state changes nothing.

    (torch makes the state of a fresh optimizer by a step with zero gradients: it must not fix a basis or count.)
    """
    with tempfile.TemporaryDirectory() as folder:
        for found in launch(2, other_ways, folder):
            assert_same(*found["async"], 0.0)
            assert_same(*found["broadcast"], 0.0)
            before, after, counters = found["trace"]
            assert training.largest_difference(before, after) == 0.0
            counted = {key: value for key, value in counters.items() if not key.endswith("residual_norm")}
            assert counted and set(counted.values()) == {0.0}


def low_precision(rank: int, world: int, folder: str) -> tuple[set, bool]:
    """State dtypes of bf16 parameters after a round trip, and whether the next steps are the same bits."""
    model = training.fully_sharded("fsdp2", world, tiny_llama().bfloat16())
    optimizer = training.build("fira", model)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(SAVED_AT))
    dcp.save(state_of(model, optimizer, False), checkpoint_id=folder)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(SAVED_AT, STEPS))
    straight = training.weights_of(model)
    model = training.fully_sharded("fsdp2", world, tiny_llama(seed=3).bfloat16())
    optimizer = training.build("fira", model)
    restore(model, optimizer, folder, False)
    dtypes = {v.dtype for own in optimizer.state.values() for v in own.values()}
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(SAVED_AT, STEPS))
    return dtypes, training.largest_difference(straight, training.weights_of(model)) == 0.0


def test_bf16_parameters_keep_fp32_state() -> None:
    """torch's own load_state_dict would cast moments to the parameter's dtype."""
    with tempfile.TemporaryDirectory() as folder:
        for dtypes, same in launch(2, low_precision, folder):
            assert dtypes == {torch.float32} and same


def wrong_loads(rank: int, world: int, folder: str) -> dict[str, str]:
    """Messages for state that does not fit."""
    model, optimizer = fresh("fira", "fsdp2", world)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(2))
    dcp.save(state_of(model, optimizer, False), checkpoint_id=folder)
    plain = {**optimizer.state_dict()}
    plain["state"] = {
        i: {k: getattr(v, "to_local", lambda v=v: v)() for k, v in own.items()} for i, own in plain["state"].items()
    }
    messages = {}

    def other_rank() -> None:
        model = training.fully_sharded("fsdp2", world)
        restore(model, training.build("fira", model, rank=6), folder, False)

    def other_algorithm() -> None:
        restore(*fresh("flora", "fsdp2", world), folder, False)

    def local_tensors() -> None:
        _, target = fresh("fira", "fsdp2", world)
        target.load_state_dict(plain)
        target.init_state()

    for name, call in (("rank", other_rank), ("algorithm", other_algorithm), ("local", local_tensors)):
        try:
            call()
        except BaseException as error:  # torch's CheckpointException is none of Exception's
            messages[name] = str(error)
    return messages


def test_state_that_does_not_fit_is_refused() -> None:
    """Another rank, another algorithm, and rank-local tensors in place of DTensors."""
    with tempfile.TemporaryDirectory() as folder:
        for found in launch(2, wrong_loads, folder):
            assert "ize mismatch" in found["rank"]
            assert "Missing key in checkpoint" in found["algorithm"]
            assert "embed_tokens.weight: the loaded 'exp_avg' has shape (3" in found["local"]
            assert "torch.distributed.checkpoint" in found["local"]


def mixed_model(recipe: str, world: int, dim: int) -> tuple[Any, Any]:
    """Stacked experts sharded on `dim`, a row, a column, a scalar, an unused layer: empty shards on 3 ranks."""
    from torch.distributed.fsdp import fully_shard

    model = mixed.Mixed()
    model.unused = torch.nn.Linear(4, 6)
    fully_shard(model, mesh=training.mesh_of("fsdp2", world), shard_placement_fn=mixed.by_expert_dim(dim))
    groups = mixed.groups(model)
    groups[0]["params"].append(("unused.weight", model.unused.weight))
    groups[2]["params"] = [(n, p) for n, p in groups[2]["params"] if n != "unused.weight"]
    name, settings = mixed.RECIPES[recipe]
    return model, getattr(lowrank_ds, name)(groups, lr=1e-2, **settings)


def mixed_steps(model: Any, optimizer: Any, rank: int, world: int, steps: slice) -> dict[str, torch.Tensor]:
    """Weights after training on some of the global batches."""
    for batch in mixed.data()[steps]:
        optimizer.zero_grad()
        model(batch.chunk(world)[rank]).backward()
        optimizer.step()
    return training.weights_of(model)


MIXED = [(r, d) for r in ("galore left power rotate", "fira stagger randomized", "flora") for d in (0, 1)]


def mixed_save(rank: int, world: int, folder: str) -> dict:
    """{(recipe, dim): (weights of the run that never stopped, of one resumed here)}; saved at step 4 of 8."""
    found = {}
    for recipe, dim in MIXED:
        model, optimizer = mixed_model(recipe, world, dim)
        mixed_steps(model, optimizer, rank, world, slice(0, 4))
        assert all(isinstance(v, torch.Tensor) for own in optimizer.state.values() for v in own.values())
        dcp.save(state_of(model, optimizer, False), checkpoint_id=f"{folder}/{recipe}{dim}")
        straight = mixed_steps(model, optimizer, rank, world, slice(4, 8))
        found[recipe, dim] = straight, mixed_resume(rank, world, folder, recipe, dim)
    return found


def mixed_resume(rank: int, world: int, folder: str, recipe: str, dim: int) -> dict[str, torch.Tensor]:
    """Weights after loading and four more steps."""
    model, optimizer = mixed_model(recipe, world, dim)
    restore(model, optimizer, f"{folder}/{recipe}{dim}", False)
    return mixed_steps(model, optimizer, rank, world, slice(4, 8))


def mixed_resumes(rank: int, world: int, folder: str) -> dict:
    """`mixed_resume` for every case."""
    return {case: mixed_resume(rank, world, folder, *case) for case in MIXED}


def test_experts_empty_shards_and_unused_layers_reshard() -> None:
    """3 ranks (empty shards, whole experts here or elsewhere) save; 3 resume bit for bit, 2 within rounding."""
    with tempfile.TemporaryDirectory() as folder:
        saved = launch(3, mixed_save, folder)[0]
        fewer = launch(2, mixed_resumes, folder)[0]
    for case, (straight, resumed) in saved.items():
        assert training.largest_difference(straight, resumed) == 0.0, case
        assert training.largest_difference(straight, fewer[case]) <= LIMIT, case


def test_codes_stay_codes() -> None:
    """load_state_dict keeps the dtype of every tensor (torch's casts to the parameter's: codes become floats)."""
    weight = torch.nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16))
    optimizer = lowrank_ds.GaLoreAdamW([("w", weight)], lr=1e-2, rank=2)
    optimizer.init_state()
    saved = optimizer.state_dict()
    saved["state"][0]["codes"] = torch.arange(12, dtype=torch.uint8).view(6, 2)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[weight]["codes"], saved["state"][0]["codes"])
    assert optimizer.state[weight]["codes"].dtype == torch.uint8
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
