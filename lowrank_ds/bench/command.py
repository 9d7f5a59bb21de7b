"""The command line of `lowrank-ds bench`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import sys
from typing import Any

import torch

from lowrank_ds.bench import facts, render

BENCHMARKS = {
    "micro": "one matrix: step, refresh, state and temporaries, beside torch's AdamW and the packages",
    "model": "all parameters of a LLaMA on one process, refreshes included",
    "sharded": "two ranks under ZeRO-2, ZeRO-3 and FSDP2: tokens per second against AdamW, traffic",
    "gpu": "on CUDA: layer shapes of LLaMA-7B, and its whole training step with peak memory",
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """`bench` among the commands of `lowrank-ds`."""
    bench = commands.add_parser("bench", help="measure speed, memory and traffic beside AdamW and the packages")
    which = bench.add_subparsers(dest="benchmark", required=True)
    for name, text in BENCHMARKS.items():
        parser = which.add_parser(name, help=text, description=text)
        _common_arguments(parser)
        _module(name).add_arguments(parser)
    parser = which.add_parser("render", help="make tables from the JSON of runs")
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="JSON files; their tables are printed")
    parser.add_argument("--into", type=pathlib.Path, metavar="PAGE", help="in place of printing: make the blocks of "
        "this Markdown page anew, each from the file it names")  # fmt: skip


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", type=pathlib.Path, metavar="FILE", help="also write everything measured to this file")
    add("--device", default="auto", help="cpu, cuda or auto (default; CUDA where it matters: gpu)")
    add("--threads", type=int, default=1, help="that a step computes with (default 1; sharded: of each rank)")
    add("--rounds", type=int, default=12, help="in which the contenders take turns (default 12)")
    add("--only", nargs="+", metavar="NAME", help="these contenders, and fused AdamW")
    add("--no-packages", dest="packages", action="store_false", help="leave the published packages out")


def _module(name: str) -> Any:
    return importlib.import_module(f"lowrank_ds.bench.{name}")


def main(given: argparse.Namespace) -> int:
    """Run what was asked for; 2 where it cannot be run, with the reason on stderr."""
    try:
        return _render(given) if given.benchmark == "render" else _measure(given)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"lowrank-ds bench {given.benchmark}: {error}", file=sys.stderr)
        return 2


def _measure(given: argparse.Namespace) -> int:
    if given.threads < 1 or given.rounds < 1:
        raise ValueError("--threads and --rounds must be at least 1")
    module = _module(given.benchmark)
    given.asked = given.device
    given.device = str(device_of(given.device, given.benchmark))
    given.progress = lambda text: print(text, file=sys.stderr, flush=True)
    before, os.environ["OMP_NUM_THREADS"] = torch.get_num_threads(), str(given.threads)  # of ranks started later, too
    torch.set_num_threads(given.threads)
    try:
        found = facts.collect(torch.device(given.device), given.threads, given.argv)
        measured = module.run(given)
    finally:
        torch.set_num_threads(before)
    result = {"benchmark": given.benchmark, "facts": facts.finish(found), **measured}
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    print(render.document(result))
    return 0


def device_of(asked: str, benchmark: str) -> torch.device:
    """The device of a run. Raises ValueError for one that is not there or cannot be measured on."""
    if asked == "auto":
        return torch.device("cuda" if benchmark == "gpu" and torch.cuda.is_available() else "cpu")
    if asked.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {asked!r}: must be cpu, cuda, cuda:NUMBER or auto")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {asked}: there is no CUDA device here (torch {torch.__version__}); use --device cpu"
        )
    return torch.device(asked)


def _render(given: argparse.Namespace) -> int:
    if bool(given.files) == (given.into is not None):
        raise ValueError("give either JSON files, or --into PAGE")
    if given.into is not None:
        given.into.write_text(render.fill(given.into))
    for path in given.files:
        print(f"{render.document(render.load(path))}\n")
    return 0
