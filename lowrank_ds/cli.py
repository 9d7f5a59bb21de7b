"""The `lowrank-ds` command (also `python -m lowrank_ds`)."""

from __future__ import annotations

import argparse
import importlib.metadata
import pathlib
import platform
import runpy
import sys

from lowrank_ds.algorithms import ALGORITHMS
from lowrank_ds.version import __version__


def run(script: str, arguments: list[str]) -> None:
    """Run an unmodified Python script with the algorithms registered, so that its ds_config can name them."""
    sys.argv = [script, *arguments]
    sys.path[0] = str(pathlib.Path(script).resolve().parent)  # as the interpreter does: its neighbours are importable
    runpy.run_path(script, run_name="__main__")


def info() -> str:
    """Versions and algorithms, for bug reports."""
    lines = [f"lowrank_ds {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for name in ("torch", "deepspeed", "transformers", "datasets", "sentencepiece", "mpi4py"):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    lines += ["", "optimizers (the ds_config's optimizer.type), with their options:"]
    for cls in ALGORITHMS:
        lines.append(f"  {cls.__name__}: " + ", ".join(f"{k}={v!r}" for k, v in cls.OPTIONS.items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser("lowrank-ds", description="Low-rank optimizers for DeepSpeed and PyTorch.")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # inserted by the deepspeed launcher
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run an unmodified script whose ds_config names one of our optimizers")
    runner.add_argument("script", help="a Python script")
    runner.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    commands.add_parser("info", help="versions, optimizers and their options")
    given = parser.parse_args(argv)
    if given.command == "run":
        launcher = [f"--local_rank={given.local_rank}"] if given.local_rank is not None else []
        run(given.script, [*launcher, *given.arguments])
    else:
        print(info())
    return 0
