"""Peak memory per rank of one training step at LLaMA-7B's dimensions, without the memory or the ranks.

    python -m tests.benchmarks.fake_memory [--layers 32] [--rank 1024] [--worlds 1 2 8]

Fake tensors have sizes and no contents, torch's fake process group answers every collective at once; forward, backward
and step run as they would, and every storage is tracked (lowrank_ds/bench/tracking.py). bf16 weights, 1 x 2048 tokens,
activation checkpointing, FSDP2 with a unit for each layer (one rank: the plain model). Ours keeps fp32 state; torch's
AdamW keeps state in the weights' dtype, bf16. Each cell is a process of its own.

What it does not see: the allocator's rounding and fragmentation, other streams' late frees, workspaces of kernels and
communication. The measured step is an ordinary one: a refresh reads from the device, which fake tensors cannot. They
say that they are on the CPU (FSDP2 needs CUDA's streams otherwise); our blocked loops are set to a GPU's block sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import lowrank_ds
from lowrank_ds import job, layout, linalg
from lowrank_ds.bench.facts import header
from lowrank_ds.bench.tracking import Tracker, largest_two
from lowrank_ds.engines import dtensor
from lowrank_ds.slots import Slot
from tests.fake_ranks import LLAMA_7B

CELLS = [("torch AdamW", False), ("AdamW", False), ("AdamW", True), ("Fira", False), ("Fira", True)]


def sharded_llama(world: int, layers: int, mesh: Any) -> nn.Module:
    """bf16, recomputing activations; under FSDP2 if there is a mesh."""
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(LLAMA_7B | {"num_hidden_layers": layers}), use_cache=False, tie_word_embeddings=False)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(previous)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if mesh is not None:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def build(which: str, model: nn.Module, rank: int) -> torch.optim.Optimizer:
    """The optimizer on all parameters, its state made."""
    if which == "torch AdamW":
        return torch.optim.AdamW(model.parameters(), lr=1e-3)
    if which == "AdamW":
        optimizer = lowrank_ds.GaLoreAdamW(model.named_parameters(), lr=1e-3, rank=None)
    else:
        optimizer = lowrank_ds.FiraAdamW(lowrank_ds.param_groups(model, rank=rank), lr=1e-3)
    optimizer.init_state()
    return optimizer


def as_after_a_first_step(slot: Slot) -> None:
    """In place of `Slot.read_counters`: the bases are made, nothing is read from the device."""
    slot.step = slot.moment_step = slot.refreshes = 1


def outside_the_fake_mode(function: Any) -> Any:
    """A function that reads numbers from tensors of its own."""

    def real(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments)

    return real


def ordinary_steps_on_a_gpu() -> Any:
    """Steps that are no refresh, in the blocks that a GPU works in; layouts are computed from real numbers."""
    patches = contextlib.ExitStack()
    for name in ("_group", "_offsets"):
        real = outside_the_fake_mode(getattr(dtensor, name))
        patches.enter_context(mock.patch.object(dtensor, name, real))
    patches.enter_context(mock.patch.object(Slot, "read_counters", as_after_a_first_step))
    patches.enter_context(mock.patch.object(job, "_PIECE_CPU", job._PIECE))
    patches.enter_context(mock.patch.object(layout, "_COPY_CPU", layout._COPY))
    patches.enter_context(mock.patch.object(linalg, "_CHUNK", 1 << 62))
    return patches


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, length: int) -> None:
    """Forward, backward, step."""
    tokens = torch.zeros(1, length, dtype=torch.long)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(which: str, layerwise: bool, world: int, layers: int, rank: int, length: int = 2048) -> dict[str, Any]:
    """Bytes at the peak of the second step on one rank, by kind; the process must be fresh."""
    mesh, begin = fake_mesh(world) if world > 1 else None, time.perf_counter()
    with ordinary_steps_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True):
        model = sharded_llama(world, layers, mesh)
        optimizer = build(which, model, rank)
        tracker = Tracker()
        tracker.follow_gradients(model)
        if layerwise:
            lowrank_ds.layerwise(model, optimizer)
        train_step(model, optimizer, length)  # fills DTensor's caches, which make fake tensors of whole size
        tracker.name_model(model, optimizer)
        start = tracker.now()
        with tracker:
            train_step(model, optimizer, length)
        tracker.name_model(model, optimizer)
        peak = tracker.peak(start)
        return {
            "total": peak.total, **peak.at, "largest gradients": peak.own["gradients"], "two": largest_two(model),
            "seconds": time.perf_counter() - begin,
        }  # fmt: skip


def fake_mesh(world: int) -> Any:
    """A mesh of `world` ranks of which this is number 0."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    return init_device_mesh("cpu", (world,))  # outside the fake mode: it reads its ranks


def in_a_process(which: str, layerwise: bool, world: int, layers: int, rank: int, length: int = 2048) -> dict[str, Any]:
    """`measure` in a fresh process."""
    cell = json.dumps([which, layerwise, world, layers, rank, length])
    command = [sys.executable, "-m", "tests.benchmarks.fake_memory", "--cell", cell]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{cell} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--cell", help="measure this cell only, here, and print JSON")
    given = parser.parse_args()
    if given.cell is not None:
        print(json.dumps(measure(*json.loads(given.cell))))
        return
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
