"""Peak memory of training: {AdamW, Fira} x {updates in step(), layer-wise} x {activations kept, checkpointed}.

    python -m tests.benchmarks.memory [--model llama_60m] [--batch 1] [--length 256] [--rank 128] [--subspace svd]

One process, CPU, fp32, random weights; each cell in a process of its own. Tensors are tracked storage by storage
(lowrank_ds/bench/tracking.py) over three steps, the refresh among them. The resident set of the same run is read from
the kernel: its peak less what it was before the model was built, with malloc told to give pages back (else what was
freed counts too). AdamW is torch's in step(), ours without projection (GaLoreAdamW, rank=None) layer-wise.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import torch

import lowrank_ds
from lowrank_ds.bench.facts import header
from lowrank_ds.bench.tracking import Tracker, largest_two

CELLS = [
    (optimizer, mode, checkpointed)
    for optimizer in ("AdamW", "Fira")
    for mode, checkpointed in (("step()", False), ("step()", True), ("layer-wise", False), ("layer-wise", True))
]
MODELS = pathlib.Path(__file__).parents[2] / "ds_configs" / "models"
PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def build_model(name: str, checkpointed: bool) -> Any:
    """A LLaMA with random weights, training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_json_file(MODELS / f"{name}.json")
    config.use_cache = False
    model = LlamaForCausalLM(config).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def build_optimizer(which: str, layerwise: bool, model: Any, rank: int, subspace: str) -> torch.optim.Optimizer:
    """AdamW or Fira on all parameters."""
    if which == "Fira":
        groups = lowrank_ds.param_groups(model, rank=rank)
        return lowrank_ds.FiraAdamW(groups, lr=1e-3, update_proj_gap=200, subspace=subspace)
    if layerwise:
        return lowrank_ds.GaLoreAdamW(model.named_parameters(), lr=1e-3, rank=None)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)


def train(model: Any, optimizer: torch.optim.Optimizer, batch: int, length: int, steps: int = 3) -> float:
    """Three steps on random tokens. Answers the last loss."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = loss.item()
        del loss
    return last


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS", or "VmHWM", the largest since it was reset."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def cell(which: str, mode: str, checkpointed: bool, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one cell, in this process."""
    import torch.distributed.tensor  # noqa: F401  (imported now, so that it is not counted)
    from transformers import LlamaForCausalLM  # noqa: F401

    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins here
    before = resident("VmRSS")
    model = build_model(given.model, checkpointed)
    optimizer = build_optimizer(which, mode == "layer-wise", model, given.rank, given.subspace)
    tracker = Tracker()
    tracker.follow_gradients(model)
    if mode == "layer-wise":
        lowrank_ds.layerwise(model, optimizer)
    tracker.name_model(model, optimizer)
    begin = time.perf_counter()
    with tracker:
        loss = train(model, optimizer, given.batch, given.length)
    seconds, rss = time.perf_counter() - begin, resident("VmHWM") - before
    tracker.name_model(model, optimizer)
    peak = tracker.peak()
    return {
        "total": peak.total, **peak.at, "largest gradients": peak.own["gradients"], "rss": rss, "loss": loss,
        "two": largest_two(model), "seconds": seconds, "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def in_a_process(index: int, arguments: list[str]) -> dict[str, Any]:
    """`cell` number `index` in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", *arguments, "--cell", str(index)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **PAGES}, check=False)
    if done.returncode:
        raise RuntimeError(f"cell {CELLS[index]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(index: int, found: dict[str, Any]) -> str:
    """One line of the table, MiB."""
    which, mode, checkpointed = CELLS[index]
    kinds = ("total", "weights", "gradients", "state", "other", "largest gradients")
    sizes = " | ".join(f"{found[kind] / 2**20:.0f}" for kind in kinds)
    share = found["largest gradients"] / found["two"]
    kept = "checkpointed" if checkpointed else "kept"
    return f"| {which} | {mode} | {kept} | {sizes} | {share:.3f} | {found['rss'] / 2**20:.0f} |"


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_60m", help="a file of ds_configs/models, without .json")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--subspace", default="svd")
    parser.add_argument("--cell", type=int, help="measure this cell only, here, and print JSON")
    given = parser.parse_args()
    if given.cell is not None:
        print(json.dumps(cell(*CELLS[given.cell], given)))
        return
    print(header(torch.device("cpu")))
    print(f"\n### {given.model}, {given.batch} x {given.length} tokens, rank {given.rank}, {given.subspace}, MiB\n")
    print(
        "| optimizer | updates | activations | peak | weights | gradients | state | activations, temporaries "
        "| gradients, own peak | / two largest parameters | peak RSS |\n" + "|---" * 11 + "|"
    )
    for index in range(len(CELLS)):
        print(row(index, in_a_process(index, sys.argv[1:])), flush=True)


if __name__ == "__main__":
    main()
