"""DeepSpeed's own checkpoints: resumed bit for bit, read without unpickling code, weights found by zero_to_fp32.py."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from tests import training
from tests.cluster import launch, tiny_llama

BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
TWICE = {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 3}
# name: (recipe, stage, ds_config, saved after so many steps). Bases are made in steps 1, 6, 11: a save after 5 is right
# before one, after 6 right after one.
CELLS: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "zero1": ("fira", 1, {}, 5),
    "zero2": ("flora", 2, {}, 6),
    "zero3": ("galore left", 3, {}, 4),
    "zero1 apollo": ("apollo", 1, {}, 6),
    "zero2 adafactor": ("galore adafactor", 2, {}, 5),
    "zero3 after": ("fira", 3, {}, 6),
    "zero2 offload": ("fira", 2, OFFLOAD, 5),
    "zero3 offload": ("galore", 3, OFFLOAD, 5),
    "zero2 accumulated": ("fira", 2, TWICE, 5),
    "zero1 bf16": ("fira", 1, BF16, 5),
    "zero2 bf16": ("galore", 2, BF16, 6),
    "zero3 bf16": ("fira", 3, BF16, 5),
    "bf16 optimizer": ("fira", 1, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}, 5),
}
AFTER = 3


def everything(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of the whole weights, and of this rank's fp32 partitions and state."""
    found = training.weights_of(engine.module)
    for i, (host, state) in enumerate(engine.basic_optimizer.state.items()):  # (ZeRO-3 empties its groups after a step)
        found[f"host {i}"] = host.detach().clone()
        found |= {f"host {i} {key}": value.clone() for key, value in state.items()}
    return found


def save_and_resume(rank: int, world: int, folder: str) -> dict[str, tuple[bool, int]]:
    """{cell: (whether a resumed run equals the one that went on, tensors compared)}; weights as saved are kept."""
    same = {}
    for name, (recipe, stage, config, at) in CELLS.items():
        engine = training.zero_engine(recipe, stage, world, **config)
        training.train_engine(engine, rank, world, at)
        engine.save_checkpoint(f"{folder}/{name}")
        if rank == 0:
            torch.save(training.weights_of(engine.module), f"{folder}/{name}/weights.pt")
        elif stage == 3:
            training.weights_of(engine.module)
        training.train_engine(engine, rank, world, AFTER)
        straight = everything(engine)
        engine.destroy()
        engine = training.zero_engine(recipe, stage, world, tiny_llama(seed=1), **config)
        engine.load_checkpoint(f"{folder}/{name}")
        training.train_engine(engine, rank, world, AFTER)
        resumed = everything(engine)
        engine.destroy()
        alike = straight.keys() == resumed.keys()
        same[name] = alike and all(torch.equal(straight[n], resumed[n]) for n in straight), len(straight)
    return same


def test_resumes_bit_for_bit() -> None:
    """engine.save_checkpoint / load_checkpoint at the same world size; zero_to_fp32.py gives the saved weights."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        for found in launch(2, save_and_resume, folder):
            assert found.keys() == CELLS.keys()
            assert all(same and count > 80 for same, count in found.values()), found
        for name, (_, _, config, _) in CELLS.items():
            if "data_types" in config:
                continue  # zero_to_fp32.py itself refuses the files of BF16_Optimizer
            weights = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/{name}")
            saved = torch.load(f"{folder}/{name}/weights.pt", weights_only=True)
            for key, weight in saved.items():
                found = weights[key].bfloat16().float() if "bf16" in config else weights[key]
                assert torch.equal(found, weight), (name, key)
