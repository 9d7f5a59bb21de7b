"""Every recipe under every engine, saved and resumed through our checkpoints: the long form of tests/test_neutral.py.

    python -m tests.resume_matrix [--recipes NAME ...] [--engines NAME ...]

Saved after 3 (right before bases are renewed), 4 (right after) or 5 steps in turn; fp32 and bf16; END steps in all.
Prints the largest difference from the run that never stopped, over both, and fails unless all are 0.0.
"""

from __future__ import annotations

import argparse
import tempfile

from tests import training
from tests.cluster import launch
from tests.test_neutral import END, in_place

ENGINES = ("one", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2")


def differences(recipe: str, number: int, engine: str, folder: str) -> dict[tuple[str, bool], float]:
    """{(engine, bf16): largest difference of any weight}."""
    cells = tuple((engine, recipe, 3 + (number + low) % 3, bool(low)) for low in (False, True))
    found = launch(1 if engine == "one" else 2, in_place, folder, cells)[0]
    return {(engine, cells[i][3]): training.largest_difference(*both) for i, both in found.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipes", nargs="*", default=list(training.RECIPES))
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    given = parser.parse_args()
    worst = 0.0
    print(f"{'recipe, ' + str(END) + ' steps':26s}" + "".join(f"{engine:>9s}" for engine in given.engines), flush=True)
    for number, recipe in enumerate(given.recipes):
        row = []
        for place, engine in enumerate(given.engines):
            with tempfile.TemporaryDirectory() as folder:
                row.append(max(differences(recipe, number + place, engine, folder).values()))
        print(f"{recipe:26s}" + "".join(f"{value:9.1e}" for value in row), flush=True)
        worst = max(worst, *row)
    print(f"largest difference from the run that never stopped: {worst:.1e}")
    raise SystemExit(0 if worst == 0.0 else 1)


if __name__ == "__main__":
    main()
