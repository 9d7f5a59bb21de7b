"""One recipe of tests/training.py under two ranks, against one process: what to run while an algorithm is being added.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m tests.one_recipe fira                  # zero2, zero3, fsdp2
    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m tests.one_recipe fira ddp zero1        # these engines

tests/test_sharded.py does the same with all recipes, engines and numbers of ranks, and asserts.
"""

from __future__ import annotations

import argparse

import torch

from tests import test_sharded, training
from tests.cluster import launch


def cells(rank: int, world: int, recipe: str, engines: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """{engine: weights after training}, computed by every rank, returned by rank 0."""
    found = {engine: test_sharded.runner(engine)(rank, world, recipe) for engine in engines}
    return found if rank == 0 else {}


def main() -> int:
    """Print the largest weight differences; 1 if one is above the tests' limit."""
    parser = argparse.ArgumentParser(description="One recipe under two ranks, against one process.")
    parser.add_argument("recipe", choices=training.RECIPES, help="a row of tests/training.py RECIPES")
    parser.add_argument("engines", nargs="*", help=f"of {', '.join(test_sharded.ENGINES[2])}; zero2 zero3 fsdp2")
    given = parser.parse_args()
    recipe, engines = given.recipe, tuple(given.engines) or ("zero2", "zero3", "fsdp2")
    if not set(engines) <= set(test_sharded.ENGINES[2]):
        parser.error(f"engines are {', '.join(test_sharded.ENGINES[2])}; got {', '.join(engines)}")
    torch.set_num_threads(1)
    alone, far = training.one_process(recipe), training.largest_difference
    print(f"one process: moved by {far(alone, training.weights_of(training.tiny_llama())):.1e}", flush=True)
    print(f"one ulp in the initial weights: {far(training.one_ulp_away(recipe), alone):.1e}", flush=True)
    found = launch(2, cells, recipe, engines)[0]
    apart = {engine: far(weights, alone) for engine, weights in found.items()}
    for engine, difference in apart.items():
        print(f"{engine} x 2: {difference:.1e}")
    return int(not all(difference <= test_sharded.LIMIT for difference in apart.values()))


if __name__ == "__main__":
    raise SystemExit(main())
