"""The command line of `lowrank-ds plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

from lowrank_ds.plan import find, models, report, simulate
from lowrank_ds.plan.calculate import GIB, Plan, Planner
from lowrank_ds.plan.settings import ADAMW, DTYPES, ENGINES, RECIPES, Settings, Zero

_OPTIONS = ("moments", "projector_dtype", "projector_storage", "proj_type", "subspace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    add = parser.add_argument
    add("--model", default="llama_7b", help=f"a config.json, a folder with one, or {', '.join(models.PRESETS)}")
    add("--recipe", default="fira", help=f"{', '.join([*RECIPES, ADAMW])}, or a class (default fira)")
    add("--rank", type=int, default=None, help="of the subspaces (default: the recipe's; 0: project nothing)")
    add("--engine", default="fsdp2", choices=ENGINES)
    add("--nodes", type=int, default=1)
    add("--gpus", type=int, default=8, help="of each node (default 8)")
    add("--shard", type=int, default=0, metavar="N", help="hsdp: GPUs that share one copy (default: those of a node)")
    add("--seq", type=int, default=2048, help="tokens of a sequence (default 2048)")
    add("--micro-batch", type=int, default=1, help="sequences of a rank (default 1)")
    add("--layerwise", action="store_true", help="updates inside the backward (fsdp2, hsdp, zero3)")
    add("--activation-checkpointing", action="store_true")
    add("--dtype", default="bf16", choices=list(DTYPES), help="of weights, gradients, activations (default bf16)")
    add("--gpu-memory", type=float, default=80, metavar="GIB", help="of a GPU (default 80)")
    add("--reserve", type=float, default=4, metavar="GIB", help="of it for what is not counted (default 4)")
    for option in _OPTIONS:
        add(f"--{option.replace('_', '-')}", default=None, help="the optimizer's option")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="any other option, the value in JSON")
    add("--ds-config", type=pathlib.Path, metavar="FILE", help="read bucket sizes from its zero_optimization")
    add("--simulate", action="store_true", help="also run it on fake tensors (minutes), and print the difference")
    add("--find", action="store_true", help="what fits: engines, ranks, layer-wise, checkpointing, 8 and 4 bits")
    add("--json", type=pathlib.Path, metavar="FILE", help="write everything to this file")


def main(given: argparse.Namespace) -> int:
    """Plan what was asked for; 2 where that is impossible, with the reason on stderr."""
    try:
        return _find(given) if given.find else _plan(given)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"lowrank-ds plan: {error}", file=sys.stderr)
        return 2


def settings_of(given: argparse.Namespace) -> Settings:
    """What the flags say.

    Raises:
        ValueError: a flag's value is impossible, by name.
    """
    if not 0 <= given.reserve < given.gpu_memory:
        raise ValueError(f"--gpu-memory {given.gpu_memory} must be more than --reserve {given.reserve}, both in GiB")
    if given.find and given.simulate:
        raise ValueError("--find with --simulate: simulate what was found, one configuration at a time; leave one out")
    settings = Settings(
        config=models.read(given.model), recipe=given.recipe, rank=given.rank, engine=given.engine, nodes=given.nodes,
        gpus=given.gpus, seq=given.seq, micro_batch=given.micro_batch, layerwise=given.layerwise,
        checkpointing=given.activation_checkpointing, dtype=given.dtype, shard=given.shard, options=_options(given),
        zero=_zero(given.ds_config),
    )  # fmt: skip
    if given.rank and not settings.projects:
        raise ValueError(f"--rank {given.rank}: --recipe {given.recipe} projects nothing and has no rank; leave it out")
    return settings


def _options(given: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(given, name) for name in _OPTIONS if getattr(given, name) is not None}
    for text in given.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option {text}: must be NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    if "rank" in options:
        raise ValueError("--option rank=...: use --rank")
    if options and given.recipe == ADAMW:
        raise ValueError(f"--recipe adamw has no option {', '.join(options)}")
    return options


def _zero(path: pathlib.Path | None) -> Zero:
    if path is None:
        return Zero()
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--ds-config {path}: not valid JSON ({error})") from None
    return Zero.read(config, f"--ds-config {path}")


def _plan(given: argparse.Namespace) -> int:
    settings = settings_of(given)
    if given.simulate:
        simulate.check(settings)
    memory = int((given.gpu_memory - given.reserve) * GIB)
    planner = Planner(settings)
    plan, fitting = planner.plan(), {"plan": planner.largest_micro_batch(memory)}
    beside = None
    if settings.recipe != ADAMW:
        other = Planner(dataclasses.replace(settings, recipe=ADAMW, rank=None, options={}, layerwise=False))
        beside, fitting["beside"] = other.plan(), other.largest_micro_batch(memory)
    print(report.text(plan, beside, fitting, memory))
    result = {"plan": report.as_json(plan), "adamw": beside and report.as_json(beside), "largest_micro_batch": fitting}
    if given.simulate:
        result["simulated"] = _simulate(plan)
    _write(given.json, result)
    return 0


def _simulate(plan: Plan) -> dict[str, Any]:
    found = simulate.in_a_process(plan.settings)
    difference = plan.total / found["total"] - 1
    print(f"\nsimulated on fake tensors, rank 0 ({found['seconds']:.0f} s): {report.size(found['total'])} at the worst "
          f"moment, planned {report.size(plan.total)} ({difference:+.2%})")  # fmt: skip
    print("  " + ", ".join(f"{kind} {report.size(found[kind])}" for kind in ("weights", "gradients", "state", "other")))
    return found


def _find(given: argparse.Namespace) -> int:
    settings, memory = settings_of(given), int((given.gpu_memory - given.reserve) * GIB)
    progress = (lambda text: print(text, file=sys.stderr)) if sys.stderr.isatty() else lambda text: None
    found, smallest = find.find(dataclasses.replace(settings, layerwise=False), memory, progress)
    print(report.found(found, smallest, settings, memory))
    _write(given.json, {
        "memory": memory, "found": [{**report.as_json(one.plan), "bytes_sent": one.traffic, "compute": one.compute}
                                    for one in found]})  # fmt: skip
    return 0 if found else 1


def _write(path: pathlib.Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
