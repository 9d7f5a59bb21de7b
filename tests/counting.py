"""The recipes whose collectives are counted, and what counts them."""

from lowrank_ds.bench.counting import Counting

__all__ = ["AT_MOST", "COUNTED", "Counting"]

COUNTED = ("galore right", "galore left", "galore full", "fira", "apollo", "flora", "galore adafactor")
AT_MOST = {"flora": 5, "galore adafactor": 6}  # collectives of a step on rows and flat cuts, for any depth; others: 8
