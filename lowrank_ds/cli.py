"""The `lowrank-ds` command (also `python -m lowrank_ds`)."""

from __future__ import annotations

import argparse
import importlib.metadata
import pathlib
import platform
import runpy
import sys

from lowrank_ds.algorithms import ALGORITHMS
from lowrank_ds.doctor import command as doctor
from lowrank_ds.report import command as report
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
    _checkpoint_commands(commands)
    _bench_command(commands, sys.argv[1:] if argv is None else argv)
    doctor.add_parser(commands)
    _plan_command(commands, sys.argv[1:] if argv is None else argv)
    _report_commands(commands)
    given = parser.parse_args(argv)
    if given.command == "run":
        launcher = [f"--local_rank={given.local_rank}"] if given.local_rank is not None else []
        run(given.script, [*launcher, *given.arguments])
    elif given.command == "info":
        print(info())
    elif given.command == "doctor":
        return doctor.main(given)
    elif given.command in ("report", "similarity"):
        return getattr(report, given.command)(given)
    elif given.command == "bench":
        from lowrank_ds.bench import command

        given.argv = ["lowrank-ds", *(sys.argv[1:] if argv is None else argv)]
        return command.main(given)
    elif given.command == "plan":
        from lowrank_ds.plan import command as plan_command

        return plan_command.main(given)
    else:
        return _checkpoint(given)
    return 0


def _bench_command(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    """`bench`; what it needs is imported only when it is asked for."""
    if "bench" in argv[:3]:
        from lowrank_ds.bench import command

        command.add_parser(commands)
    else:
        commands.add_parser("bench", help="measure speed, memory and traffic beside AdamW and the packages")


def _plan_command(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    """`plan`; what it needs is imported only when it is asked for."""
    parser = commands.add_parser("plan", help="memory and traffic of a configuration, before anything is rented")
    if "plan" in argv[:3]:
        from lowrank_ds.plan import command

        command.add_arguments(parser)


def _report_commands(commands: argparse._SubParsersAction) -> None:
    """Pages and figures of the folders that launch/pretrain.py writes."""
    report.add_report(commands.add_parser("report", help="compare runs: one HTML page, and figures as PNG"))
    described = "how alike scaling factors are at low and at full rank: table, CSV, JSON, figures"
    report.add_similarity(commands.add_parser("similarity", help=described))


def _checkpoint_commands(commands: argparse._SubParsersAction) -> None:
    """What can be done with folders that `save_checkpoint`, ours or a DeepSpeed engine's, wrote."""
    joined = commands.add_parser("consolidate", help="join a checkpoint's pieces: every tensor whole")
    cut = commands.add_parser("reshard", help="divide a checkpoint among another number of files")
    for command in (joined, cut):
        command.add_argument("source", type=pathlib.Path, help="a folder of save_checkpoint, ours or DeepSpeed's")
        command.add_argument("out", type=pathlib.Path, help="a new folder")
    cut.add_argument("--files", type=int, required=True, help="how many")
    shown = commands.add_parser("inspect", help="what is in a checkpoint, and whether it is undamaged")
    shown.add_argument("source", type=pathlib.Path, help="a folder of save_checkpoint, ours or DeepSpeed's")
    shown.add_argument("--no-verify", action="store_true", help="do not compare checksums (reads all files)")


def _checkpoint(given: argparse.Namespace) -> int:
    """Run one of them; 1 if the checkpoint is damaged or cannot be written."""
    from lowrank_ds.checkpoint import CheckpointError, tools

    try:
        if given.command == "inspect":
            text, undamaged = tools.describe(given.source, not given.no_verify)
            print(text)
            return 0 if undamaged else 1
        with tools.open_checkpoint(given.source) as source:
            source.check_files()
            if given.command == "consolidate":
                tools.consolidate(source, given.out)
            else:
                tools.reshard(source, given.out, given.files)
    except (CheckpointError, OSError) as error:
        print(f"lowrank-ds {given.command}: {error}", file=sys.stderr)
        return 1
    print(tools.describe(given.out, verify=False)[0])
    return 0
