"""One way to train a whole LLaMA on one device: time of a step, tokens per second, peak memory.

Started by `gpu.in_a_process` with the settings as JSON and the file to write. Random weights in bf16, random tokens,
activation checkpointing.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import lowrank_ds
from lowrank_ds.bench.clock import Clock, summaries
from lowrank_ds.bench.facts import version_of

WARMUP = 2  # steps before those that are timed; the first makes state and bases


@dataclass(frozen=True)
class Cell:
    """A way to train.

    optimizer: builds it from (model, settings). layerwise: updates inside the backward. int8: weights of linear layers
    as int8 codes. distributions: any of these must be installed.
    """

    optimizer: Callable[[Any, dict[str, Any]], torch.optim.Optimizer]
    layerwise: bool = True
    int8: bool = False
    distributions: tuple[str, ...] = ()


def _adamw(model: Any, settings: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _adamw_8bit(model: Any, settings: dict[str, Any]) -> torch.optim.Optimizer:
    if version_of("bitsandbytes"):
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-4)
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=1e-4)


def _ours(cls: type, **options: Any) -> Callable[[Any, dict[str, Any]], torch.optim.Optimizer]:
    def build(model: Any, settings: dict[str, Any]) -> torch.optim.Optimizer:
        given = dict(options)
        rank = given.pop("rank", settings["rank"])
        if cls not in (lowrank_ds.ApolloAdamW, lowrank_ds.ApolloMini):
            given["subspace"] = settings["subspace"]
        return cls(lowrank_ds.param_groups(model, rank=rank), lr=1e-4, update_proj_gap=10**9, **given)

    return build


CELLS = {
    "AdamW fused": Cell(_adamw, layerwise=False),
    "AdamW 8-bit": Cell(_adamw_8bit, layerwise=False, distributions=("bitsandbytes", "torchao")),
    "GaLore": Cell(_ours(lowrank_ds.GaLoreAdamW)),
    "Fira": Cell(_ours(lowrank_ds.FiraAdamW)),
    "APOLLO": Cell(_ours(lowrank_ds.ApolloAdamW)),
    "APOLLO-Mini": Cell(_ours(lowrank_ds.ApolloMini, rank=1)),
    "GaLore 8-bit": Cell(_ours(lowrank_ds.GaLoreAdamW8bit)),
    "Q-GaLore, int8 weights": Cell(_ours(lowrank_ds.QGaLore), int8=True),
}


def missing(name: str) -> str | None:
    """Why a cell cannot run here, naming what to install."""
    needed = CELLS[name].distributions
    if not needed or any(version_of(d) for d in needed):
        return None
    return f"{name}: not measured, install {' or '.join(needed)}"


def build_model(settings: dict[str, Any], int8: bool) -> Any:
    """A bf16 LLaMA on the device that recomputes activations; int8 weights are made on it layer by layer, later."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{**settings["config"], "use_cache": False})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(settings["device"]):
            model = LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)
    if int8:
        lowrank_ds.int8_weights(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """{"times", "first_ms", "tokens_per_s", "peak_bytes", "reserved_bytes", "weight_bytes", "state_bytes"}.

    The peak is that of all steps, the first one's refresh included; making int8 weights out of bf16 ones is not part.
    """
    cell, device = CELLS[settings["cell"]], torch.device(settings["device"])
    model = build_model(settings, cell.int8)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # building int8 weights needs them in bf16 first: not part of a step
    optimizer = cell.optimizer(model, settings)
    if cell.layerwise:
        lowrank_ds.layerwise(model, optimizer)
    step = train_step(model, optimizer, settings, device)
    clock, times = Clock(device, settings["threads"]), []
    first = clock.time(step)[clock.main]
    for number in range(WARMUP - 1 + settings["steps"]):
        found = clock.time(step)
        times += [found] if number >= WARMUP - 1 else []
    samples = {kind: [t[kind] for t in times] for kind in times[0]}
    digest = summaries(samples)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    tokens = settings["batch"] * settings["length"]
    return {
        "times": digest, "first_ms": first, "tokens_per_s": tokens / digest["wall"]["median"] * 1e3,
        "peak_bytes": peak, "reserved_bytes": torch.cuda.max_memory_reserved(device) if peak else None,
        "weight_bytes": lowrank_ds.weight_bytes(model), "state_bytes": lowrank_ds.state_bytes(optimizer),
    }  # fmt: skip


def train_step(
    model: Any, optimizer: torch.optim.Optimizer, settings: dict[str, Any], device: torch.device
) -> Callable[[], None]:
    """Forward, backward and update on random tokens."""
    generator = torch.Generator().manual_seed(0)
    size = (settings["batch"], settings["length"])
    tokens = torch.randint(0, settings["config"]["vocab_size"], size, generator=generator).to(device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Command line: SETTINGS (JSON) and the file to write."""
    settings, out = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    torch.set_float32_matmul_precision(settings["matmul_precision"])
    try:
        found = measure(settings)
    except torch.OutOfMemoryError as error:
        found = {"failed": "does not fit: " + str(error).split(". ")[0]}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
