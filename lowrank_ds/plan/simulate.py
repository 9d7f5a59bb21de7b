"""The planned configuration run as it would be, on fake tensors: sizes without contents, ranks without processes.

    python -m lowrank_ds.plan.simulate SETTINGS   (JSON; prints JSON)

torch's fake process group answers every collective at once; forward, backward and step run, and every storage is
tracked (bench/tracking.py). What it does not see: the allocator's rounding and fragmentation, other streams' late
frees, workspaces of kernels and communication. The measured step is an ordinary one: a refresh reads from the device,
which fake tensors cannot. They say that they are on the CPU (FSDP2 needs CUDA's streams otherwise); our blocked loops
are set to a GPU's block sizes. FSDP2, HSDP, or one rank alone: DeepSpeed and DDP look at addresses, which fake tensors
do not have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

from lowrank_ds import backward, dense, job, layout, linalg
from lowrank_ds.bench.tracking import Tracker, largest_two
from lowrank_ds.plan.settings import ADAMW, DTYPES, Settings, Zero
from lowrank_ds.slots import Slot

ENGINES = ("fsdp2", "hsdp")


def build_model(settings: Settings, mesh: Any) -> nn.Module:
    """The model, training; sharded layer by layer if there is a mesh."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {k: v for k, v in settings.config.items() if k != "model_type"}
    fields["max_position_embeddings"] = max(settings.seq, fields.get("max_position_embeddings", 0))
    config = LlamaConfig(**{"tie_word_embeddings": False} | fields | {"use_cache": False})
    config._attn_implementation = "sdpa"
    previous = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[settings.dtype])
    try:
        model = LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(previous)
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model if mesh is None else shard(model, mesh)


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """`fully_shard` on each decoder layer and on the model, as plans assume."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def build_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer on all parameters, its state made; or AdamW."""
    if settings.recipe == ADAMW:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    optimizer = settings.algorithm(model.named_parameters(), **settings.arguments)
    optimizer.init_state()
    return optimizer


# -- steps without contents -------------------------------------------------------------------------------------------
def as_after_a_first_step(slot: Slot) -> None:
    """In place of `Slot.read_counters`: the bases are made, nothing is read from the device."""
    slot.step = slot.moment_step = slot.refreshes = 1


def outside_the_fake_mode(function: Any) -> Any:
    """A function that reads numbers from tensors of its own."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    def real(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments)

    return real


@contextlib.contextmanager
def blocks_of_a_gpu() -> Any:
    """Steps on the CPU in the blocks that a GPU works in, and without looking at what it computes."""
    with contextlib.ExitStack() as patches:
        for module, name, value in (
            (job, "_PIECE_CPU", job._PIECE), (layout, "_COPY_CPU", layout._COPY), (dense, "_CHUNK_CPU", dense._CHUNK),
            (linalg, "_CHUNK", 1 << 22), (job, "_host_sees", lambda live: False),
        ):  # fmt: skip
            patches.enter_context(mock.patch.object(module, name, value))
        yield


@contextlib.contextmanager
def ordinary_steps_on_a_gpu() -> Any:
    """Steps that are no refresh, in a GPU's blocks; layouts are computed from real numbers."""
    from lowrank_ds.engines import dtensor

    with contextlib.ExitStack() as patches:
        patches.enter_context(blocks_of_a_gpu())
        for name in ("_group", "_offsets"):
            real = outside_the_fake_mode(getattr(dtensor, name))
            patches.enter_context(mock.patch.object(dtensor, name, real))
        patches.enter_context(mock.patch.object(Slot, "read_counters", as_after_a_first_step))
        yield


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, length: int) -> None:
    """Forward, backward, step."""
    tokens = torch.zeros(batch, length, dtype=torch.long)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def fake_mesh(world: int, shards: int) -> Any:
    """A mesh of `world` ranks of which this is number 0; of two dimensions where copies are replicated."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    if shards == world:
        return init_device_mesh("cpu", (world,))  # outside the fake mode: it reads its ranks
    return init_device_mesh("cpu", (world // shards, shards), mesh_dim_names=("replicate", "shard"))


def check(settings: Settings) -> None:
    """Raise ValueError for what fake tensors cannot run."""
    alone = settings.engine == "ddp" and settings.world == 1
    if settings.engine not in ENGINES and not alone:
        raise ValueError(
            f"--simulate: {settings.engine} looks at addresses, which fake tensors do not have; --engine fsdp2 and "
            "hsdp can be simulated, and ddp on one GPU"
        )


def measure(settings: Settings) -> dict[str, Any]:
    """Bytes at the peak of the second step on rank 0, by kind; the process must be fresh."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    check(settings)
    mesh = fake_mesh(settings.world, settings.shards) if settings.engine in ENGINES else None
    begin = time.perf_counter()
    with ordinary_steps_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(settings, mesh)
        optimizer = build_optimizer(settings, model)
        tracker = Tracker()
        tracker.follow_gradients(model)
        if settings.layerwise:
            backward.layerwise(model, optimizer)
        step: Callable[[], None] = lambda: train_step(model, optimizer, settings.micro_batch, settings.seq)
        step()  # fills DTensor's caches, which make fake tensors of whole size
        tracker.name_model(model, optimizer)
        start = tracker.now()
        with tracker:
            step()
        tracker.name_model(model, optimizer)
        peak = tracker.peak(start)
        return {
            "total": peak.total, **peak.at, "largest gradients": peak.own["gradients"], "two": largest_two(model),
            "seconds": time.perf_counter() - begin,
        }  # fmt: skip


def in_a_process(settings: Settings) -> dict[str, Any]:
    """`measure` in a fresh process.

    Raises:
        ValueError: fake tensors cannot run it.
        RuntimeError: it failed, with what it said.
    """
    check(settings)
    command = [sys.executable, "-m", "lowrank_ds.plan.simulate", json.dumps(dataclasses.asdict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the simulation failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure what the first argument says; print JSON."""
    given = json.loads(sys.argv[1])
    print(json.dumps(measure(Settings(**given | {"zero": Zero(**given["zero"])}))))


if __name__ == "__main__":
    main()
