"""The recipes whose collectives are counted, and what counts them."""

from lowrank_ds.bench.counting import Counting

__all__ = ["COUNTED", "Counting", "at_most"]

COUNTED = ("galore right", "galore left", "galore full", "fira", "apollo", "flora", "galore adafactor")


def at_most(recipe: str) -> int:
    """Collectives of a step of a recipe on rows and flat cuts, for any depth of the model."""
    return 5 if recipe == "flora" else 6
