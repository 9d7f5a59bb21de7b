"""Law 1: the weights after N steps do not depend on how the model was sharded. Every recipe, every engine.

The model is a real LlamaForCausalLM whose matrices do not divide by the world sizes; the reference is one process
with the same recipe on the same global batches. The table of differences is printed; its last column is what one ulp
in the initial weights does to one process, the floor below which no comparison can go.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from tests import training
from tests.cluster import launch

LIMIT = 1e-5
ENGINES = {
    2: ("ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2", "replicate"),
    3: ("zero1", "zero2", "zero3", "fsdp1", "fsdp2"),
    4: ("fsdp2", "hsdp", "fsdp2 tp"),
}
# The world size at which an engine trains all recipes; at its others it trains SOME (time of CI).
ALL_AT = {
    **dict.fromkeys(("ddp", "replicate", "zero1", "fsdp1"), 2),
    **dict.fromkeys(("zero2", "zero3", "fsdp2"), 3),
    **dict.fromkeys(("hsdp", "fsdp2 tp"), 4),
}
SOME = ("galore", "galore full", "fira default", "apollo", "flora", "galore adafactor")


def recipes(engine: str, world: int) -> list[str]:
    """The recipes that an engine trains at a world size; at one of them it trains them all."""
    return [recipe for recipe in training.RECIPES if ALL_AT[engine] == world or recipe in SOME]


def all_cells(rank: int, world: int) -> dict:
    """{(recipe, engine): weights}, computed by every rank, returned by rank 0."""
    found = {}
    for recipe in training.RECIPES:
        for engine in (each for each in ENGINES[world] if recipe in recipes(each, world)):
            found[recipe, engine] = runner(engine)(rank, world, recipe)
    return found if rank == 0 else {}


def runner(engine: str) -> Callable[[int, int, str], dict]:
    """The function of tests/training.py that trains under an engine."""
    if engine.startswith("zero"):
        return functools.partial(training.zero, stage=int(engine[-1]))
    if engine in ("ddp", "fsdp1"):
        return getattr(training, engine)
    return functools.partial(training.fsdp2, kind=engine)


@functools.cache
def reference(recipe: str) -> dict[str, torch.Tensor]:
    """The one-process weights of a recipe."""
    return training.one_process(recipe)


@functools.cache
def differences(world: int) -> dict[tuple[str, str], float]:
    """The table: {(recipe, engine): largest weight difference from one process}."""
    cells = launch(world, all_cells)[0]
    return {key: training.largest_difference(weights, reference(key[0])) for key, weights in cells.items()}


def as_table(world: int) -> str:
    """The table of one world size as text."""
    found = differences(world)
    rows = [f"{'recipe':26s}" + "".join(f"{f'{e} x {world}':>14s}" for e in ENGINES[world]) + f"{'(one ulp)':>12s}"]
    for recipe in training.RECIPES:
        noise = training.largest_difference(training.one_ulp_away(recipe), reference(recipe))
        values = [found.get((recipe, e)) for e in ENGINES[world]]
        cells = "".join(" " * 14 if value is None else f"{value:14.1e}" for value in values)
        rows.append(f"{recipe:26s}{cells}   ({noise:.1e})")
    return "\n".join(["", f"largest weight difference from one process after {training.STEPS} steps", *rows])


@pytest.mark.parametrize("world", list(ENGINES))
def test_weights_do_not_depend_on_sharding(world: int, capsys: pytest.CaptureFixture) -> None:
    """Every cell is within fp32 rounding of one process."""
    torch.set_num_threads(1)
    table = as_table(world)
    with capsys.disabled():
        print(table)
    too_far = {key: value for key, value in differences(world).items() if not value <= LIMIT}
    assert not too_far


def test_every_engine_trains_every_recipe() -> None:
    """The table has no hole: each recipe is trained under each engine at one world size at least."""
    trained = {(e, recipe) for world, engines in ENGINES.items() for e in engines for recipe in recipes(e, world)}
    engines = {engine for each in ENGINES.values() for engine in each}
    assert trained == {(engine, recipe) for engine in engines for recipe in training.RECIPES}
    assert set(SOME) < set(training.RECIPES)


def test_the_recipes_move_the_weights_and_differ() -> None:
    """The table can fail: each recipe moves the weights by far more than LIMIT, and to a different place."""
    torch.set_num_threads(1)
    start = training.weights_of(training.tiny_llama())
    for recipe in training.RECIPES:
        assert training.largest_difference(reference(recipe), start) > 5e-3, recipe
    for recipe in ("galore left", "galore full", "fira", "fira paper", "apollo", "flora"):
        assert training.largest_difference(reference(recipe), reference("galore")) > 1e-3, recipe
