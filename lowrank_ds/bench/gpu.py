"""`lowrank-ds bench gpu`: LLaMA-7B's layer shapes in bf16, and its whole training step, on CUDA.

Without CUDA it says "not measured"; `--device cpu --small` runs all of its code on small sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import torch

from lowrank_ds.bench import llama, micro, training
from lowrank_ds.bench.facts import ROOT, version_of

SHAPES = ("4096x4096", "4096x11008", "11008x4096")
PRECISIONS = ("highest", "high")
_SMALL_SHAPES = ("64x64", "64x96", "96x64")
_TIMEOUT = 1800  # seconds for one way to train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this sub-command."""
    add = parser.add_argument
    add("--small", action="store_true", help="a tiny model and small matrices: for --device cpu, not for figures")
    add("--shapes", nargs="+", default=None, metavar="MxN", help=f"default: {' '.join(SHAPES)}")
    add("--ranks", nargs="+", type=int, default=None, help="default: a quarter of the smallest side, and 128")
    add("--refresh-rounds", type=int, default=3, help="of the layer shapes; 0: do not measure refreshes (default 3)")
    add("--no-layers", dest="layers", action="store_false", help="leave the layer shapes out")
    add("--no-training", dest="training", action="store_false", help="leave the whole model out")
    add("--model", default=None, metavar="FILE", help="HF config of a LLaMA (default: ds_configs/models/llama_7b.json)")
    add("--rank", type=int, default=None, help="of the subspaces of the whole model (default: a quarter of its width)")
    add("--batch", type=int, default=1, help="sequences a step (default 1)")
    add("--length", type=int, default=None, help="tokens a sequence (default 2048)")
    add("--steps", type=int, default=10, help="timed steps of the whole model (default 10)")
    add("--subspace", default="power", choices=("svd", "randomized", "power"), help="of the whole model (default "
        "power)")  # fmt: skip
    add("--matmul-precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of products in fp32, as "
        "torch.set_float32_matmul_precision has it (high: TF32); the whole model takes the last (default: "
        f"{' '.join(PRECISIONS)})")  # fmt: skip
    add("--cells", nargs="+", metavar="NAME", default=None, help=f"ways to train: {', '.join(training.CELLS)}")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """{"measured", "layers", "training", "missing"}; nothing where no CUDA device is and none was asked for."""
    unknown = [name for name in given.cells or () if name not in training.CELLS]
    if unknown:
        raise ValueError(f"--cells {unknown[0]!r} is no way to train; there are: {', '.join(training.CELLS)}")
    if given.device == "cpu" and not given.small:
        if given.asked != "auto":
            raise ValueError("--device cpu is only for a trial of this benchmark: add --small (micro and model measure "
                             "CPUs)")  # fmt: skip
        return {"measured": False, "layers": [], "training": [], "missing": []}
    found: dict[str, Any] = {"measured": True, "layers": [], "training": [], "missing": []}
    if given.layers:
        for precision in given.matmul_precision:
            cells = _layers(given, precision)
            found = {**found, "layers": found["layers"] + cells["results"], "missing": cells["missing"]}
    if given.training:
        settings = _settings(given)
        found["settings"] = settings
        for name in given.cells or training.CELLS:
            why = training.missing(name)
            if why:
                found["missing"].append(why)
                continue
            found["training"].append({"name": name, **in_a_process({**settings, "cell": name})})
            given.progress(f"{name} done")
    return found


def _layers(given: argparse.Namespace, precision: str) -> dict[str, Any]:
    """What `micro` finds for the layer shapes, with products in this precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        cells = micro.run(_as_micro(given))
    finally:
        torch.set_float32_matmul_precision(before)
    for cell in cells["results"]:
        cell["matmul_precision"] = precision
    return cells


def _as_micro(given: argparse.Namespace) -> argparse.Namespace:
    """Flags of `micro` for the layer shapes."""
    shapes = given.shapes or (_SMALL_SHAPES if given.small else SHAPES)
    sides = [min(micro.parse_shape(text)) for text in shapes]
    ranks = given.ranks or ([min(sides) // 4] if given.small else [min(sides) // 4, 128])
    return argparse.Namespace(**{**vars(given), "shapes": list(shapes), "ranks": ranks, "dtypes": ["bfloat16"]})


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """What a process that trains is told. Raises ValueError where something it needs is not there."""
    if version_of("transformers") is None:
        raise ValueError("the whole model needs transformers: pip install transformers, or give --no-training")
    config = llama.read_config(given.model, "llama_tiny" if given.small else "llama_7b")
    length = given.length or (32 if given.small else 2048)
    if min(given.batch, length, given.steps) < 1:
        raise ValueError("--batch, --length and --steps must be at least 1")
    config["max_position_embeddings"] = max(length, config.get("max_position_embeddings", length))
    return {
        "config": config, "device": given.device, "rank": given.rank or config["hidden_size"] // 4,
        "batch": given.batch, "length": length, "steps": given.steps, "subspace": given.subspace,
        "threads": given.threads, "matmul_precision": given.matmul_precision[-1],
    }  # fmt: skip


def in_a_process(settings: dict[str, Any]) -> dict[str, Any]:
    """`training.measure` in a fresh process, whose peak memory is its own. A run out of memory is a result."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "found.json"
        command = [sys.executable, "-m", "lowrank_ds.bench.training", json.dumps(settings), str(out)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {_TIMEOUT} s"}
        if out.exists():
            return json.loads(out.read_text())
        return {"failed": f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}


def total_memory(device: str) -> int | None:
    """Bytes of the device's memory."""
    return torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else None
