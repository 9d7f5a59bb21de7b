"""Checkpoints of FSDP2 training through torch.distributed.checkpoint: bitwise at the same world size, reshardable."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tests import training
from tests.cluster import launch, tiny_llama

RECIPES = ("galore", "galore left", "galore full", "galore adafactor", "fira", "apollo", "flora", "flora unfactored")
SAVED_AT, STEPS = 7, 12  # refreshes at steps 0, 5 and 10: one on either side of the save
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


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_two_ranks_save_and_any_number_resumes(flat: bool) -> None:
    """FSDP2 x 2 saves; x 2 resumes bit for bit; x 3, x 4, x 1 and an unwrapped model within rounding."""
    torch.set_num_threads(1)
    recipes = RECIPES if not flat else ("fira", "galore left")
    with tempfile.TemporaryDirectory() as folder:
        saved = launch(2, save, folder, "fsdp2", recipes, flat)[0]
        assert_same(saved, launch(2, resume, folder, "fsdp2", recipes, flat)[1], 0.0)
        for world, kind in ((3, "fsdp2"), (4, "hsdp"), (1, "fsdp2"), (1, "one")):
            assert_same(saved, launch(world, resume, folder, kind, recipes, flat)[world - 1], LIMIT)
