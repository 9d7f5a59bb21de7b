"""The recipes whose collectives are counted, and what counts them."""

from lowrank_ds.bench.counting import Counting

__all__ = ["COUNTED", "Counting"]

COUNTED = ("galore right", "galore left", "galore full", "fira", "apollo", "flora", "galore adafactor")
