"""save_checkpoint and load_checkpoint: bit for bit in place, within rounding at any world size and under any engine."""

from __future__ import annotations

import tempfile

import torch

import lowrank_ds
from tests import neutral, training
from tests.cluster import launch

# (engine, recipe, steps before saving, bf16): bases are renewed in steps 5 and 10, counted from 0
CELLS = (
    ("ddp", "fira", 5, False),
    ("ddp", "galore", 6, True),
    ("zero1", "galore adafactor", 6, False),
    ("zero1", "galore left", 7, True),
    ("zero2", "fira", 5, True),
    ("zero2 scheduled", "apollo mini", 7, False),
    ("zero3", "flora", 6, False),
    ("zero3", "galore full", 7, True),
    ("zero3 layerwise", "fira matrix", 5, False),
    ("zero3 layerwise", "galore", 7, True),
    ("fsdp1", "flora unfactored", 6, False),
    ("fsdp1", "fira paper", 5, True),
    ("fsdp2", "galore randomized reset", 7, False),
    ("fsdp2", "apollo svd", 6, True),
    ("fsdp2", "adalomo", 5, False),
)
END = 11


def in_place(rank: int, world: int, folder: str, cells: tuple) -> dict:
    """{cell: (weights of the run that never stopped, of the resumed one, what loading answered)}."""
    found = {}
    for cell in cells:
        kind, recipe, stop, bf16 = cell
        run = neutral.start(kind, recipe, rank, world, bf16=bf16)
        run.advance(range(stop))
        where = f"{folder}/{len(found)}"
        mine = {"rng": torch.full((2,), rank, dtype=torch.uint8)}
        lowrank_ds.save_checkpoint(where, run.model, run.optimizer, extra={"at": stop}, local=mine)
        run.advance(range(stop, END))
        again, (extra, local) = neutral.resume(where, kind, recipe, rank, world, bf16=bf16)
        assert extra == {"at": stop} and torch.equal(local["rng"], mine["rng"])
        again.advance(range(stop, END))
        found[cell] = run.weights(), again.weights()
        if kind.startswith("zero"):
            names = ("global_steps", "global_samples", "micro_steps")
            assert all(getattr(run.model, n) == getattr(again.model, n) > 0 for n in names)
            assert run.model.get_lr() == again.model.get_lr()
    return found


def test_bitwise_in_place() -> None:
    """Every engine and kind of state: fp32 and bf16; before, at and after a step that renews bases."""
    with tempfile.TemporaryDirectory() as folder:
        for found in launch(2, in_place, folder, CELLS):
            for cell, (straight, resumed) in found.items():
                assert training.largest_difference(straight, resumed) == 0.0, cell
