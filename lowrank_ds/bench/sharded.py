"""`lowrank-ds bench sharded`: tokens per second and traffic of two ranks, ours against AdamW on the same batches."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

from lowrank_ds.bench import budget
from lowrank_ds.bench.clock import ratio, summary
from lowrank_ds.bench.facts import ROOT, version_of
from lowrank_ds.bench.ranks import FAMILIES, REFRESHING

ENGINES = ("zero2", "zero3", "fsdp2")
_NEEDS = {"zero2": "deepspeed", "zero3": "deepspeed", "fsdp2": "torch"}
_TIMEOUT = 3600  # seconds for one engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this sub-command."""
    add = parser.add_argument
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--world", type=int, default=2, help="ranks (default 2)")
    add("--model", default=None, help="HF config (default: ds_configs/models/llama_tiny.json, as the quickstart)")
    add("--rank", type=int, default=32, help="of the subspaces (default 32, as the quickstart)")
    add("--batch", type=int, default=16, help="sequences a step, all ranks' together (default 16)")
    add("--length", type=int, default=128, help="tokens a sequence (default 128)")
    add("--block", type=int, default=4, help="steps before the next contender's turn (default 4)")
    add("--refresh-rounds", type=int, default=3, help="blocks of steps that all make new bases (default 3; 0: none)")
    add("--gap", type=int, default=200, help="steps between refreshes that their time is spread over (default 200)")
    add("--options", type=json.loads, default={}, metavar="JSON", help="of Fira and GaLore, e.g. "
        "'{\"subspace\": \"power\"}'")  # fmt: skip


def run(given: argparse.Namespace) -> dict[str, Any]:
    """{"results": one entry an engine, "missing"}."""
    settings = _settings(given)
    results, missing = [], []
    for engine in given.engines:
        needed = [name for name in (_NEEDS[engine], "transformers") if version_of(name) is None]
        if needed:
            missing.append(f"{engine}: not measured, {', '.join(needed)} is not installed")
            continue
        contenders = _contenders(given, engine)
        found = launch({**settings, "engine": engine, "contenders": contenders}, given.world)
        results.append({"engine": engine, "world": given.world, **_digest(found, settings, engine, given)})
        given.progress(f"{engine} done")
    return {"settings": {**settings, "gap": given.gap}, "results": results, "missing": missing}


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """What the ranks are told. Raises ValueError where launch/ is missing or numbers do not fit."""
    if not (ROOT / "launch" / "pretrain.py").exists():
        raise ValueError(
            "the training loop is launch/pretrain.py, which is not part of the installed package: run this from a "
            "checkout of the sources (pip install -e . there)"
        )
    model = pathlib.Path(given.model or ROOT / "ds_configs" / "models" / "llama_tiny.json")
    if not model.exists():
        raise ValueError(f"--model {model}: no such file")
    if given.world < 1 or given.batch % given.world:
        raise ValueError(f"--batch {given.batch} is no multiple of --world {given.world}")
    if not isinstance(given.options, dict):
        raise ValueError("--options must be a JSON object")
    if given.device != "cpu" and given.world > 1:
        import torch

        if torch.cuda.device_count() < given.world:
            raise ValueError(f"--world {given.world}, but there are {torch.cuda.device_count()} CUDA devices")
    return {
        "model": str(model), "vocabulary": json.loads(model.read_text())["vocab_size"], "rank": given.rank,
        "world": given.world, "batch": given.batch, "length": given.length, "block": given.block,
        "rounds": given.rounds, "refresh_rounds": given.refresh_rounds, "threads": given.threads,
        "options": given.options, "dtype": "fp32" if given.device == "cpu" else "bf16",
    }  # fmt: skip


def _contenders(given: argparse.Namespace, engine: str) -> list[str]:
    """AdamW, ours, and ours with new bases at every step. Raises ValueError for names that are none."""
    for name in given.only or ():
        if name not in FAMILIES:
            raise ValueError(f"--only {name!r} is no contender; there are: {', '.join(FAMILIES)}")
    ours = [name for name in FAMILIES if not given.only or name in given.only]
    base = ["AdamW", "AdamW fused"] if engine == "fsdp2" else ["AdamW"]
    return base + ours + ([name + REFRESHING for name in ours] if given.refresh_rounds else [])


def launch(settings: dict[str, Any], world: int) -> dict[str, Any]:
    """What `ranks` found, started once for each rank. Raises RuntimeError with the end of a failed rank's output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "found.json"
        command = [sys.executable, "-m", "lowrank_ds.bench.ranks", json.dumps(settings), str(out)]
        processes = []
        try:
            for rank in range(world):
                with open(f"{folder}/{rank}.log", "w") as log:
                    environment = _environment(rank, world, port, settings["threads"], settings["dtype"] == "fp32")
                    processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
            _wait(processes, folder)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return json.loads(out.read_text())


def _environment(rank: int, world: int, port: int, threads: int, cpu: bool) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "LOCAL_SIZE": world,
             "MASTER_PORT": port, "OMP_NUM_THREADS": threads}  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    text = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if cpu else {}
    return {**os.environ, **{name: str(number) for name, number in ranks.items()}, **text, **hidden}


def _wait(processes: list[subprocess.Popen], folder: str) -> None:
    """Until all are done, or one has failed."""
    deadline = time.monotonic() + _TIMEOUT
    while True:
        codes = [process.poll() for process in processes]
        bad = next((rank for rank, code in enumerate(codes) if code), None)
        if bad is not None:
            end = pathlib.Path(f"{folder}/{bad}.log").read_text()[-3000:]
            raise RuntimeError(f"rank {bad} ended with exit code {codes[bad]}:\n{end}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"the ranks were not done after {_TIMEOUT} s")
        time.sleep(0.1)


def _digest(found: dict[str, Any], settings: dict[str, Any], engine: str, given: argparse.Namespace) -> dict[str, Any]:
    """{"rows", "matrices", "plain"}: each contender's speed, refreshes spread over --gap steps, and traffic."""
    times = {
        name: {kind: [block[kind] for block in blocks] for kind in ("wall", "cpu", "optimizer")}
        for name, blocks in found["blocks"].items()
    }
    rows = []
    for name in (n for n in times if not n.endswith(REFRESHING)):
        refreshing = times.get(name + REFRESHING)
        row = {"name": name, "times": {kind: summary(values) for kind, values in times[name].items()}}
        tokens = settings["batch"] * settings["length"] * 1e3
        row["tokens_per_s"] = tokens / row["times"]["wall"]["median"]
        row["to_adamw"] = {kind: _speed(times, name, refreshing, kind, given.gap) for kind in ("wall", "cpu")}
        row["refresh_ms"] = _refresh(times[name], refreshing, "wall") if refreshing else None
        row["traffic"] = found["traffic"][name]
        row["refresh_traffic"] = found["traffic"].get(name + REFRESHING)
        if name in FAMILIES:
            shapes = [tuple(shape) for shape in found["matrices"]]
            row["budget_bytes"] = budget.largest(name, shapes, found["plain"], given.rank, given.world, engine)
        rows.append(row)
    return {"rows": rows, "matrices": found["matrices"], "plain": found["plain"]}


def _refresh(steady: dict[str, list[float]], refreshing: dict[str, list[float]], kind: str) -> float:
    """Milliseconds that a refresh of all matrices takes: a step with one less a step without."""
    return max(0.0, summary(refreshing[kind])["median"] - summary(steady[kind])["median"])


def _speed(times: dict, name: str, refreshing: dict | None, kind: str, gap: int) -> dict[str, float]:
    """Tokens per second to AdamW's, by medians and by the quickest blocks: "steady", and with refreshes "all"."""
    steady = ratio(times["AdamW"][kind], times[name][kind])
    share = _refresh(times[name], refreshing, kind) / gap if refreshing else 0.0
    spread = ratio(times["AdamW"][kind], [value + share for value in times[name][kind]])
    return {"steady": steady, "all": spread}
