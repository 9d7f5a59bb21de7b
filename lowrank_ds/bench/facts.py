"""What a figure depends on: machine, versions, commit, command, and how busy the machine was."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import torch

import lowrank_ds

ROOT = pathlib.Path(lowrank_ds.__file__).resolve().parents[1]  # of the source checkout, where there is one
PACKAGES = ("galore-torch", "fira", "apollo-torch", "flora-opt")
_CODE = ("lowrank_ds", "launch", "ds_configs", "tests", "pyproject.toml")
ENGINES = ("deepspeed", "transformers", "bitsandbytes", "torchao")


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> tuple[str, bool | None]:
    """(short hash of the checkout this code runs from, whether its code differs from that); ("unknown", None).

    Documents do not count: writing the JSON of one benchmark must not mark the next one.
    """
    if not (ROOT / ".git").exists():
        return "unknown", None
    try:
        return _git("rev-parse", "--short", "HEAD"), bool(_git("status", "--porcelain", "--", *_CODE))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def processor() -> str:
    """The CPU's model name, number of cores, and what torch's kernels use of it (AVX2, AVX512 ...)."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    name = name or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def load() -> float | None:
    """Processes that ran or waited for a core, averaged over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def collect(device: torch.device, threads: int, argv: list[str] | None = None) -> dict[str, Any]:
    """The facts of a run that begins now, for its JSON. `finish` adds what is known at the end.

    Args:
        device: what is measured.
        threads: that it computes with.
        argv: the command, program first; None: of this process.
    """
    argv = sys.argv if argv is None else argv
    found, dirty = commit()
    versions = {name: version_of(name) for name in (*PACKAGES, *ENGINES)}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([pathlib.Path(argv[0]).name, *argv[1:]]),
        "commit": found,
        "dirty": dirty,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": processor(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {"lowrank_ds": lowrank_ds.__version__, "torch": torch.__version__} | {
            name: text for name, text in versions.items() if text
        },
        "not_installed": [name for name, text in versions.items() if not text],
        "load_start": load(),
    }  # fmt: skip


def finish(facts: dict[str, Any]) -> dict[str, Any]:
    """The same with the load at the end."""
    return {**facts, "load_end": load()}


def line(facts: dict[str, Any]) -> str:
    """The facts as a paragraph."""
    versions = ", ".join(f"{name} {text}" for name, text in facts["versions"].items())
    commit = facts["commit"] + (" with changes" if facts["dirty"] else "")
    where = facts["cpu"] if facts["device"] == "CPU" else f"{facts['device']} ({facts['cpu']})"
    load = f"load {facts['load_start']} at the start, {facts.get('load_end')} at the end"
    which = f"commit {commit}; {facts['date']}"
    return f"{where}; {facts['threads']} thread(s); {versions}; {which}; {load}; `{facts['command']}`"


def header(device: torch.device) -> str:
    """`line` for scripts that print a table as they go."""
    return line(finish(collect(device, torch.get_num_threads())))
