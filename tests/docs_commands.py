"""The commands of bash blocks: bash itself says what they are, the programs' own parsers whether their flags exist."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tests.docs_blocks import ROOT, Block

OMITTED = ("...", "ARGS")  # stand for arguments that a page leaves out
FOLDERS = ("ds_configs", "docs", "launch", "lowrank_ds", "tests")  # what begins so is a file of ours
_KEPT = {"PWD", "OLDPWD", "SHLVL", "_", "PATH", "RECORD"}

# Nothing is found on PATH, so each command comes to the handler, which records its words and the exported names.
_RECORDER = r"""
command_not_found_handle() { printf '%s\0' "$@" $'\1' "${PROGRAM-}" $(compgen -e) $'\2' >> "$RECORD"; }
for name in kill exec source . eval; do eval "$name() { command_not_found_handle $name \"\$@\"; }"; done
"""


@dataclass(frozen=True)
class Command:
    """A command of a page: its words after expansion, the variables set for it, and what PROGRAM names."""

    where: str
    words: tuple[str, ...]
    variables: tuple[str, ...]
    program: str = ""

    @property
    def omits(self) -> bool:
        """Whether the page leaves arguments out, so that required ones may be missing."""
        return any(word in OMITTED for word in self.words)


class BadCommand(AssertionError):
    """A command that would not start; the message says why."""


def recorded(block: Block, folder: Path) -> list[Command]:
    """The commands that bash would run in this block, loops and variables expanded. Nothing but builtins runs.

    folder: an empty one, where redirections write.
    """
    syntax = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    if syntax.returncode:
        raise BadCommand(f"{block.where}: not valid bash: {syntax.stderr.strip()}")
    (folder / "launch").mkdir()
    (folder / "tests").mkdir()
    for script in itertools.chain(
        ROOT.glob("launch/*.sh"), ROOT.glob("tests/*.sh")
    ):  # named with a slash: not looked up
        stub = folder / script.relative_to(ROOT)
        stub.write_text(f'#!/bin/bash\n{_RECORDER}\ncommand_not_found_handle {script.relative_to(ROOT)} "$@"\n')
        stub.chmod(0o755)
    record = folder / ".record"
    environment = {"PATH": "/nonexistent", "RECORD": str(record)}
    subprocess.run(["/bin/bash", "-c", _RECORDER + block.text], cwd=folder, env=environment, timeout=20, text=True,
                   capture_output=True)  # fmt: skip
    found = record.read_text() if record.exists() else ""
    commands = []
    for part in found.split("\2\0")[:-1]:
        words, names = part.split("\1\0")
        program, *names = names.split("\0")
        given = tuple(n for n in names if n and n not in _KEPT)
        commands.append(Command(block.where, tuple(words.split("\0")[:-1]), given, program))
    return commands


def check(command: Command) -> bool:
    """Check one command; answers whether it is one of ours.

    Raises:
        BadCommand: a flag the program does not have, a value it does not take, a file that is not there, or a variable
            that the shell script does not read.
    """
    words = [word for word in command.words if word not in OMITTED]
    words = _without_prefix(words)
    target = _target(words, command)
    if target is None:
        return False
    program, arguments = target
    _check_files(command, [program, *arguments])
    if program.endswith(".sh"):
        _check_variables(command, program)
        program = command.program or program  # a launch script hands its arguments to it
    parser = (PROGRAMS if command.omits else PROGRAMS | WHOLE).get(program)
    if parser is None:
        raise BadCommand(f"{command.where}: {program}: not among the programs that tests/docs_commands.py knows")
    _parse(command, program, lambda: parser(arguments))
    return True


def _without_prefix(words: list[str]) -> list[str]:
    """Without `env`, `nice`, `time`, `sudo`, `exec` and NAME=VALUE in front."""
    while words and (words[0] in ("env", "time", "sudo", "exec", "nohup") or re.match(r"[A-Z_]+=", words[0])):
        words = words[1:]
    return words


def _target(words: list[str], command: Command) -> tuple[str, list[str]] | None:
    """(our program, its arguments), looked for behind launchers, whose own flags are parsed by them; None: not ours."""
    if not words:
        return None
    name, rest = words[0], words[1:]
    if name in ("mpirun", "srun", "sbatch", "mpiexec"):  # not Python: their flags are skipped
        start = next((i for i, w in enumerate(rest) if _starts(w)), None)
        return None if start is None else _target(rest[start:], command)
    if name in LAUNCHERS:
        given: list[str] = []
        _parse(command, name, lambda: given.extend(LAUNCHERS[name](rest)))
        return _python(given)
    if name in ("python", "python3") or re.fullmatch(r".*/python3?", name):
        if rest[:2] == ["-m", "torch.distributed.run"]:
            return _target(["torchrun", *rest[2:]], command)
        return _python(rest)
    if name == "bash" and rest and rest[0].endswith(".sh"):
        return _target(rest, command)
    if name in ("lowrank-ds", "pytest"):
        return name.replace("-", "_"), rest
    return (name, rest) if name.endswith(".sh") and name.startswith(FOLDERS) else None


def _starts(word: str) -> bool:
    return word in ("python", "lowrank-ds", "bash") or word.endswith(("/python", ".sh", ".py"))


def _python(words: list[str]) -> tuple[str, list[str]] | None:
    """What `python WORDS` runs, if it is ours."""
    if words[:1] == ["-m"] and len(words) > 1:
        ours = words[1].split(".")[0] in ("lowrank_ds", "tests", "launch", "pytest")
        return (words[1], words[2:]) if ours else None
    return (words[0], words[1:]) if words and words[0].startswith(FOLDERS) else None


def _torchrun(words: list[str]) -> list[str]:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    return (
        (["-m"] if given.module else [])
        + ([given.training_script] if given.training_script else [])
        + list(given.training_script_args or ())
    )


def _deepspeed(words: list[str]) -> list[str]:
    from deepspeed.launcher.runner import parse_args

    given = parse_args(words)
    return (
        (["-m"] if given.module else [])
        + ([given.user_script] if given.user_script else [])
        + list(given.user_args or ())
    )


LAUNCHERS: dict[str, Callable[[list[str]], list[str]]] = {"torchrun": _torchrun, "deepspeed": _deepspeed}


def _check_files(command: Command, words: list[str]) -> None:
    """Files of the repository that a command names are there (those it writes lie elsewhere, or are there already)."""
    for word in words:
        value = word.partition("=")[2] if word.startswith("-") else word
        if value.split("/")[0] in FOLDERS and "/" in value and not set("*$<{") & set(value):
            path = ROOT / value.partition("::")[0]
            if not path.exists():
                raise BadCommand(f"{command.where}: there is no {value}")


def _check_variables(command: Command, program: str) -> None:
    text = (ROOT / program).read_text() + (ROOT / "launch/common.sh").read_text()
    for name in command.variables:
        if not re.search(rf"\b{name}\b", text):
            raise BadCommand(f"{command.where}: {program} reads no variable {name}")


# -- the programs' own parsers ----------------------------------------------------------------------------------------
class _Parsed(BaseException):
    """The program has parsed its command line; it is not to run."""


def _parse(command: Command, program: str, parse: Callable[[], object]) -> None:
    """Have a program parse; a page that leaves arguments out need not give the required ones."""
    said = io.StringIO()
    with _stopped(command.omits), contextlib.redirect_stderr(said):
        try:
            parse()
        except _Parsed:
            return
        except SystemExit as error:
            lines = said.getvalue().strip().splitlines() or [str(error.code)]
            raise BadCommand(f"{command.where}: {program}: {lines[-1]}") from None


@contextlib.contextmanager
def _stopped(relaxed: bool) -> Iterator[None]:
    """Inside, parse_args of a program called by `_main` ends it; required flags may be missing if `relaxed`."""
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, *arguments, **named):
        self.allow_abbrev = False  # a page gives whole names
        for action in self._actions if relaxed else ():
            action.required = False
        return original(self, *arguments, **named)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_known_args):
        yield


def _main(run: Callable[[], object], name: str, arguments: list[str]) -> None:
    """Run a program's main up to where its command line is parsed."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *given, **named):
        original(self, *given, **named)
        raise _Parsed

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        mock.patch.object(sys, "argv", [name, *arguments]),
    ):
        run()
    raise SystemExit(
        "it parses no command line, and was run: tests/docs_commands.py must not take it for one that does"
    )


def _script(path: str) -> Callable[[list[str]], None]:
    def parse(arguments: list[str]) -> None:
        folder = str((ROOT / path).parent)
        with mock.patch.object(sys, "path", [folder, *sys.path]):
            _main(lambda: runpy.run_path(str(ROOT / path), run_name="__main__"), path, arguments)

    return parse


def _module(name: str) -> Callable[[list[str]], None]:
    def parse(arguments: list[str]) -> None:
        _main(lambda: runpy.run_module(name, run_name="__main__"), name, arguments)

    return parse


def _cli(arguments: list[str]) -> None:
    cli = importlib.import_module("lowrank_ds.cli")
    _main(lambda: cli.main(arguments), "lowrank-ds", arguments)


def _pretrain(arguments: list[str]) -> None:
    """pretrain.py's checks of flags against each other, too; for commands that leave nothing out."""
    importlib.import_module("launch.options").parse(arguments)


def _none(arguments: list[str]) -> None:
    if arguments:
        raise SystemExit(f"takes no arguments, got {arguments}")


def _pytest(arguments: list[str]) -> None:
    """tests/run.sh and pytest: files are looked for by `_check_files`."""


def _uncommented(script: str) -> str:
    return "\n".join(line for line in script.splitlines() if not line.startswith("#"))


def _programs() -> dict[str, Callable[[list[str]], None]]:
    """Our programs: each one's name -> what parses its arguments. A new file with a parser is known by itself."""
    found: dict[str, Callable[[list[str]], None]] = {
        "lowrank_ds": _cli,
        "tests/run.sh": _pytest,
        "pytest": _pytest,
    }
    sources = [*ROOT.glob("launch/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("tests/*/*.py")]
    for file in [*sources, *ROOT.glob("ds_configs/*.py"), *ROOT.glob("docs/*.py"), *ROOT.glob("docs/figures/*.py")]:
        text, path = file.read_text(), str(file.relative_to(ROOT))
        if "__main__" in text:
            module = path.removesuffix(".py").replace("/", ".")
            parses = "ArgumentParser(" in text or re.search(r"\bparse\(", text) is not None
            found[path] = _script(path) if parses else _none
            found[module] = _module(module) if parses else _none
    for script in ROOT.glob("launch/*.sh"):
        trains = re.search(r'"\$program"|/torchrun\.sh" "\$@"', _uncommented(script.read_text()))
        found[f"launch/{script.name}"] = found["launch/pretrain.py"] if trains else _none
    return found


PROGRAMS = _programs()
WHOLE = {"launch/pretrain.py": _pretrain}  # in place of those, for commands that leave no arguments out


def check_all(rank: int, world: int, commands: list[Command]) -> tuple[int, list[str]]:
    """(commands of ours, what is wrong with them, a message each). For tests.cluster.launch(1, ...)."""
    ours, wrong = 0, []
    os.chdir(ROOT)
    for command in commands:
        try:
            ours += check(command)
        except BadCommand as error:
            wrong.append(str(error))
    return ours, wrong


def check_flags(program: str, file: Path) -> None:
    """Check a YAML file of flags (`--config FILE`); a file need not have all that are required.

    Raises:
        BadCommand: a key that is no flag of the program, or a value it does not take.
    """
    if program not in PROGRAMS:
        raise BadCommand(f"there is no program {program}")
    words = (program, "--config", str(file), *OMITTED[:1])
    _parse(Command(program, words, ()), program, lambda: PROGRAMS[program](["--config", str(file)]))
