"""One rank of `lowrank-ds bench sharded`: launch/pretrain.py's trainers, several in one process, taking turns.

Started by `sharded.launch` with the settings as JSON; rank 0 writes what was found.
"""

from __future__ import annotations

import json
import logging
import pathlib
import sys
import tempfile
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lowrank_ds.bench.counting import counting
from lowrank_ds.bench.facts import ROOT

FAMILIES = {"Fira": "FiraAdamW", "GaLore": "GaLoreAdamW", "APOLLO": "ApolloAdamW", "Flora": "Flora"}
NEVER = 10**9


class Vocabulary:
    """What launch/model.py asks a tokenizer for. size: tokens."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def main() -> None:
    """Command line: SETTINGS (JSON) and the file to write."""
    settings, out = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    sys.path.insert(0, str(ROOT))
    from launch.processes import find_processes

    torch.set_num_threads(settings["threads"])
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    processes = find_processes()
    found = measure(settings, processes)
    if processes.is_main:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(settings: dict[str, Any], processes: Any) -> dict[str, Any]:
    """{"seconds", "cpu", "collectives", ...}: of each contender, block by block."""
    trainers = {name: _trainer(name, settings, processes) for name in settings["contenders"]}
    batches = _batches(settings, processes)
    blocks: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    rare = {name for name in trainers if name.endswith(REFRESHING)}
    for number in range(-1, settings["rounds"]):
        names = sorted(trainers)[number % len(trainers) :] + sorted(trainers)[: number % len(trainers)]
        for name in names:
            if name in rare and number >= settings["refresh_rounds"]:
                continue
            found = _block(trainers[name], batches, settings["block"], processes)
            if number >= 0:
                blocks[name].append(found)
    traffic = {name: _traffic(trainer, batches) for name, trainer in trainers.items()}
    shapes = _shapes(trainers)
    return {"blocks": blocks, "traffic": traffic, **shapes}


REFRESHING = " refreshing"  # what a contender's name ends in that makes new bases at every step


def _trainer(name: str, settings: dict[str, Any], processes: Any) -> Any:
    """launch/pretrain.py's trainer with this contender's optimizer."""
    from launch import build, pretrain
    from launch.optimizers import warmup_then
    from launch.options import load_ds_config, parse

    with tempfile.TemporaryDirectory() as folder:
        args = parse([*_flags(name, settings), "--output", f"{folder}/none"])
    config = load_ds_config(args) if args.deepspeed_config else None
    if config is not None and name.startswith("AdamW"):  # of one stage only there is a file
        config["zero_optimization"] = json.loads(_ds_config("fira", settings["engine"]).read_text())[
            "zero_optimization"
        ]
    plan = build.plan_batches(args, config, processes.world)
    vocabulary, factor = Vocabulary(settings["vocabulary"]), warmup_then("cosine", args.steps, args.warmup_steps, 0.1)
    model_of = partial(pretrain.model_of, args, vocabulary)
    if config is not None:
        return build.build_deepspeed(args, config, model_of, factor, processes)
    return build.build_torch(args, model_of, factor, plan, processes)


def _ds_config(recipe: str, engine: str) -> pathlib.Path:
    return ROOT / "ds_configs" / f"{engine}_{recipe}.json"


def _flags(name: str, settings: dict[str, Any]) -> list[str]:
    """launch/pretrain.py's flags."""
    family, engine = name.removesuffix(REFRESHING), settings["engine"]
    flags = ["--model", settings["model"], "--tokenizer", "-", "--train-data", "-", "--valid-data", "-", "--steps",
             "100000", "--seq-len", str(settings["length"]), "--batch-size", str(settings["batch"]), "--micro-batch",
             str(settings["batch"] // settings["world"]), "--dtype", settings["dtype"]]  # fmt: skip
    ours = family in FAMILIES
    gap = 1 if name.endswith(REFRESHING) else NEVER
    options: dict[str, Any] = {"kappa" if family == "Flora" else "update_proj_gap": gap} if ours else {}
    options |= settings["options"] if family in ("Fira", "GaLore") else {}
    options |= {"fused": True} if family == "AdamW fused" else {}
    flags += ["--rank", str(settings["rank"])] if ours else []
    if engine.startswith("zero"):
        path = _ds_config(family.lower(), engine) if ours else _ds_config("adamw", "zero2")
        return [*flags, "--deepspeed_config", str(path), "--optimizer-args", json.dumps(options)]
    optimizer = FAMILIES.get(family, "AdamW")
    lr = "0.01" if ours else "0.00125"
    return [*flags, "--engine", engine, "--optimizer", optimizer, "--lr", lr, "--optimizer-args", json.dumps(options)]


def _batches(settings: dict[str, Any], processes: Any) -> list[torch.Tensor]:
    """Random tokens (sequences of this rank, length), the same for every contender."""
    generator = torch.Generator().manual_seed(processes.rank)
    size = (settings["batch"] // processes.world, settings["length"])
    return [torch.randint(3, settings["vocabulary"], size, generator=generator) for _ in range(settings["block"])]


def _block(trainer: Any, batches: list[torch.Tensor], steps: int, processes: Any) -> dict[str, float]:
    """{"wall", "cpu", "optimizer"}: milliseconds a step, from when all ranks begin until all are done."""
    trainer.watch.settle()
    trainer.watch.seconds = {"step": [], "optimizer": []}
    processes.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    for ids in batches[:steps]:
        trainer.train_step([ids])
    if processes.device.type == "cuda":
        torch.cuda.synchronize()
    cpu = time.process_time() - cpu
    processes.barrier()
    wall = time.perf_counter() - wall
    trainer.watch.settle()
    optimizer = sum(trainer.watch.seconds["optimizer"])
    return {"wall": wall / steps * 1e3, "cpu": cpu / steps * 1e3, "optimizer": optimizer / steps * 1e3}


def _traffic(trainer: Any, batches: list[torch.Tensor]) -> dict[str, Any]:
    """Collectives that our optimizer adds to one step, and bytes brought to this rank, by kind."""
    with counting() as counter:
        trainer.train_step([batches[0]])
    return {"calls": dict(counter.kinds), "bytes": dict(counter.bytes_of)}


def _shapes(trainers: dict[str, Any]) -> dict[str, Any]:
    """{"matrices": shapes of what is projected, "plain": how many parameters are not}."""
    from launch.model import full_shape

    parameters = list(next(iter(trainers.values())).module.named_parameters())
    inner = [tuple(full_shape(p)) for name, p in parameters if ".layers." in name and len(full_shape(p)) == 2]
    return {"matrices": inner, "plain": len(parameters) - len(inner)}


if __name__ == "__main__":
    main()
