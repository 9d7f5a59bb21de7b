"""State per rank of a large model on many ranks, without any of them: python -m tests.fake_ranks RANK WORLD.

torch's fake process group answers every collective at once, meta tensors have sizes but no memory. Prints JSON
{recipe: [bytes on RANK, bytes on one process]}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

import lowrank_ds
from lowrank_ds.plan import models
from tests import training

LLAMA_7B = models.PRESETS["llama_7b"] | {"num_hidden_layers": 8}
RECIPES = ("galore", "galore right", "galore full", "galore adafactor", "fira", "apollo", "flora")


def model(sharded: bool, world: int) -> Any:
    """LLaMA-7B's dimensions, 8 layers, on the meta device; as `fully_shard` leaves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        whole = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA_7B.items() if k != "model_type"}))
    return training.fully_sharded("fsdp2", world, whole) if sharded else whole


def state_bytes(recipe: str, sharded: bool, world: int) -> int:
    """Bytes of state on this rank, projectors included."""
    optimizer = training.build(recipe, model(sharded, world), rank=128)
    optimizer.init_state()
    return lowrank_ds.state_bytes(optimizer)


def main(rank: int, world: int) -> None:
    """Print the table."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    print(json.dumps({r: [state_bytes(r, sharded, world) for sharded in (True, False)] for r in RECIPES}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
