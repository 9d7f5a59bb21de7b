"""Writes what the reference takes from the code: reference/options.md and reference/cli.md.

    python docs/generate.py

tests/test_docs.py compares the files with what this would write.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

REFERENCE = Path(__file__).resolve().parent / "reference"
sys.path.insert(0, str(REFERENCE.parent.parent))

from lowrank_ds import LoRAFA, cli  # noqa: E402
from lowrank_ds.algorithms import ALGORITHMS  # noqa: E402
from lowrank_ds.options import CHECKS, MEANINGS  # noqa: E402

_CLASSES = (*ALGORITHMS, LoRAFA)
_NOTE = "<!-- Made by docs/generate.py; change the code and run it again. -->"
_INTRODUCTION = """\
The same names in Python, in a param group, in a ds_config's `"params"`, in `for_trainer(...)` and in a YAML file's
`optimizer_args`; null is None in Python. An unknown name or a value out of range raises ValueError, which lists what
there is. Background: [algorithms](../algorithms.md), [refresh](../refresh.md), [low-bit state](../low_bit.md),
[micro-batches](../layerwise.md#micro-batches), [projector storage](../fsdp2.md).

| option | default | takes | meaning | optimizers |
|---|---|---|---|---|"""
_COMMANDS = "`lowrank-ds` and a command, or `python -m lowrank_ds` and a command; launchers start the module."


def options() -> str:
    """Every option of every optimizer as one table, from `lowrank_ds/options.py` and the classes' OPTIONS."""
    names = dict.fromkeys(name for cls in _CLASSES for name in cls.OPTIONS)
    rows = [f"| `{n}` | {_default(n)} | {_cell(CHECKS[n][1])} | {_cell(MEANINGS[n])} | {_takers(n)} |" for n in names]
    return "\n".join(["# Options of the optimizers", "", _NOTE, "", _INTRODUCTION, *rows, ""])


def _default(name: str) -> str:
    """The default most classes have, then those of others."""
    values: dict[str, list[str]] = {}
    for cls in _CLASSES:
        if name in cls.OPTIONS:
            values.setdefault(_shown(cls.OPTIONS[name]), []).append(cls.__name__)
    most, *others = sorted(values.items(), key=lambda item: -len(item[1]))
    return "; ".join([f"{most[0]}", *(f"{', '.join(classes)}: {value}" for value, classes in others)])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _takers(name: str) -> str:
    takers = [cls.__name__ for cls in _CLASSES if name in cls.OPTIONS]
    others = [cls.__name__ for cls in _CLASSES if name not in cls.OPTIONS]
    if not others:
        return "all"
    return "all but " + ", ".join(others) if len(others) < len(takers) else ", ".join(takers)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def commands() -> str:
    """The commands of `lowrank-ds` and their arguments, from its own parsers."""
    parts = ["# Command line", "", _NOTE, "", _COMMANDS]
    for name in _choices("info").choices:
        chosen = _choices(name)
        parser, about = chosen.choices[name], _help(chosen, name)
        parts += ["", f"## {name}", "", _cell(_sentence(parser.description or about)), *_arguments(parser)]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for sub, inner in action.choices.items():
                    what = _sentence(_help(action, sub))
                    parts += ["", f"### {name} {sub}", "", _cell(what), *_arguments(inner)]
    return "\n".join(parts) + "\n"


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _choices(command: str) -> argparse._SubParsersAction:
    """The commands, as `lowrank-ds COMMAND` makes them: what one needs is imported only when it is asked for."""
    found: list[argparse.ArgumentParser] = []

    def parse_args(self: argparse.ArgumentParser, *_: Any) -> None:
        found.append(self)
        raise KeyboardInterrupt

    with (
        contextlib.suppress(KeyboardInterrupt),
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
    ):
        cli.main([command])
    return next(a for a in found[0]._actions if isinstance(a, argparse._SubParsersAction))


def _help(commands: argparse._SubParsersAction, name: str) -> str:
    return next((c.help or "" for c in commands._choices_actions if c.dest == name), "")


def _arguments(parser: argparse.ArgumentParser) -> Sequence[str]:
    shown = [a for a in parser._actions if a.help != argparse.SUPPRESS and a.dest != "help"
             and not isinstance(a, argparse._SubParsersAction)]  # fmt: skip
    if not shown:
        return []
    rows = [f"| {_named(action)} | {_given(action)} | {_cell(action.help or '')} |" for action in shown]
    return ["", "| argument | default | |", "|---|---|---|", *rows]


def _named(action: argparse.Action) -> str:
    name = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest.upper()}`"
    if action.choices:
        return f"{name} {_cell(' | '.join(map(str, action.choices)))}"
    value = action.metavar or action.dest.upper()
    return f"{name} {value}" if action.option_strings and action.nargs != 0 else name


def _given(action: argparse.Action) -> str:
    if not action.option_strings or action.required:
        return "required" if action.nargs not in ("?", "*", "...") else ""
    default = action.default
    if default is None or action.nargs == 0 or default == argparse.SUPPRESS:
        return ""
    return _cell(" ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default))


PAGES = {"options.md": options, "cli.md": commands}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (REFERENCE / page).write_text(make())
        print(REFERENCE / page)
