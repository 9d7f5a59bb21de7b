"""Peak memory per rank of one training step at LLaMA-7B's dimensions, without the memory or the ranks.

    python -m tests.benchmarks.fake_memory [--layers 32] [--rank 1024] [--worlds 1 2 8]

`lowrank_ds.plan.simulate` on fake tensors: bf16 weights, 1 x 2048 tokens, activation checkpointing, FSDP2 with a unit
for each layer (one rank: the plain model). Ours keeps fp32 state; torch's AdamW keeps state in the weights' dtype,
bf16. Each cell is a process of its own.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from lowrank_ds.bench.facts import header
from lowrank_ds.plan import Settings, models, simulate

CELLS = [("torch AdamW", False), ("AdamW", False), ("AdamW", True), ("Fira", False), ("Fira", True)]
_RECIPES = {"torch AdamW": "adamw", "AdamW": "galore", "Fira": "fira"}


def settings_of(which: str, layerwise: bool, world: int, layers: int, rank: int, length: int = 2048) -> Settings:
    """A cell as a plan has it."""
    config = models.PRESETS["llama_7b"] | {"num_hidden_layers": layers}
    return Settings(
        config, _RECIPES[which], rank if which == "Fira" else 0, "fsdp2" if world > 1 else "ddp", gpus=world,
        seq=length, layerwise=layerwise, checkpointing=True,
    )  # fmt: skip


def in_a_process(which: str, layerwise: bool, world: int, layers: int, rank: int, length: int = 2048) -> dict[str, Any]:
    """Bytes at the peak of the second step on one rank, by kind."""
    return simulate.in_a_process(settings_of(which, layerwise, world, layers, rank, length))


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 8])
    given = parser.parse_args()
    print(header(torch.device("cpu")))
    print(f"\n### LLaMA-7B's dimensions, {given.layers} layers, rank {given.rank}, GiB per rank\n")
    print(
        "| ranks | optimizer | updates | peak | weights | gradients | state | activations, temporaries, gathered "
        "weights | gradients, own peak |\n" + "|---" * 9 + "|"
    )
    for world in given.worlds:
        for which, layerwise in CELLS:
            found = in_a_process(which, layerwise, world, given.layers, given.rank)
            kinds = ("total", "weights", "gradients", "state", "other", "largest gradients")
            sizes = " | ".join(f"{found[kind] / 2**30:.2f}" for kind in kinds)
            print(f"| {world} | {which} | {'layer-wise' if layerwise else 'step()'} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
