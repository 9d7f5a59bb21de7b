"""One recipe of tests/training.py under two ranks, against one process: what to run while an algorithm is being added.

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m tests.one_recipe fira                  # zero2, zero3, fsdp2
    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m tests.one_recipe fira ddp zero1        # these engines

tests/test_sharded.py does the same with all recipes, engines and numbers of ranks, and asserts.
"""

from __future__ import annotations

import sys

import torch

from tests import test_sharded, training
from tests.cluster import launch


def cells(rank: int, world: int, recipe: str, engines: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """{engine: weights after training}, computed by every rank, returned by rank 0."""
    found = {engine: test_sharded.runner(engine)(rank, world, recipe) for engine in engines}
    return found if rank == 0 else {}


def main(recipe: str, *engines: str) -> int:
    """Print the largest weight differences; 1 if one is above the tests' limit."""
    known = test_sharded.ENGINES[2]
    if recipe not in training.RECIPES or not set(engines) <= set(known):
        print(f"give one of {', '.join(training.RECIPES)}, and engines of {', '.join(known)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    alone, far = training.one_process(recipe), training.largest_difference
    print(f"one process: moved by {far(alone, training.weights_of(training.tiny_llama())):.1e}", flush=True)
    print(f"one ulp in the initial weights: {far(training.one_ulp_away(recipe), alone):.1e}", flush=True)
    found = launch(2, cells, recipe, engines or ("zero2", "zero3", "fsdp2"))[0]
    apart = {engine: far(weights, alone) for engine, weights in found.items()}
    for engine, difference in apart.items():
        print(f"{engine} x 2: {difference:.1e}")
    return int(not all(difference <= test_sharded.LIMIT for difference in apart.values()))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
