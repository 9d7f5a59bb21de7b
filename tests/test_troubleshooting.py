"""docs/troubleshooting.md quotes messages as they stand in the source, ours and that of packages around us."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
VARIES = "\0"  # stands for what a message fills in
SHORTEST = 10  # letters that a quotation must fix, or it would match anything
NO_MESSAGES, OTHERS = "No message, but wrong", "Around us"


def rows() -> Iterator[tuple[str, str, list[str]]]:
    """(section, where, cells) of every row of the page's tables, heads left out; where: PAGE:LINE."""
    section, head = "", True
    for number, line in enumerate(PAGE.read_text().splitlines(), 1):
        section = line.removeprefix("## ") if line.startswith("## ") else section
        if not line.startswith("| "):
            head = not line.startswith("|---") and (head or not line.startswith("|"))
        elif not head:
            yield section, f"{PAGE.name}:{number}", line.strip("| \n").split(" | ")


QUOTED = [(section, where, cells) for section, where, cells in rows() if section != NO_MESSAGES]
OURS = [(where, cells[0].strip("`")) for section, where, cells in QUOTED if section != OTHERS]
THEIRS = [(where, cells[0].strip("`"), cells[1].strip("`")) for section, where, cells in QUOTED if section == OTHERS]


@cache
def texts(file: Path) -> tuple[str, ...]:
    """Every text of a module but its docstrings; what is filled in is VARIES."""
    tree = ast.parse(file.read_text())
    bare = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    parts = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    found = []
    for node in ast.walk(tree):
        if id(node) in bare | parts:
            continue
        if isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else VARIES for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"%[sdrf.0-9]*[sdrf]|\{[a-z_0-9!:.]*\}", VARIES, node.value))
    return tuple(found)


def is_said(message: str, text: str) -> bool:
    """Whether the fixed parts of the message follow each other in the text."""
    at = 0
    for part in map(str.strip, message.split("...")):
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def sources() -> list[Path]:
    """Our modules."""
    return sorted([*(ROOT / "lowrank_ds").rglob("*.py"), *(ROOT / "launch").glob("*.py")])


def test_there_are_messages() -> None:
    """The tables are found; no row is twice; every row says cause and action."""
    assert len(OURS) > 80 and len(THEIRS) > 10
    messages = [cells[0] for _, _, cells in QUOTED]
    assert len(set(messages)) == len(messages)
    assert all(len(cells) == (4 if section == OTHERS else 3) and all(cells) for section, _, cells in QUOTED)
    assert all(text.startswith("`") and text.endswith("`") and text.count("`") == 2 for text in messages)


@pytest.mark.parametrize(("where", "message"), OURS, ids=lambda v: v[:40])
def test_our_message_is_in_the_source(where: str, message: str) -> None:
    """One text of lowrank_ds or launch has its fixed parts, in this order."""
    assert len(message.replace("...", "").replace(" ", "")) >= SHORTEST, f"{where}: too short to tell"
    assert any(is_said(message, text) for file in sources() for text in texts(file)), (
        f"{where}: no message of ours says {message!r}; mend the page, or the message"
    )


@pytest.mark.parametrize(("where", "message", "module"), THEIRS, ids=lambda v: v[:40])
def test_their_message_is_in_their_source(where: str, message: str, module: str) -> None:
    """As installed; if a new version says it otherwise, the page is for the old one."""
    package = module.split("/")[0]
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin, f"{package} is not installed"
    file = Path(spec.origin).parents[1] / module
    assert any(is_said(message, text) for text in texts(file)), f"{where}: {module} no longer says {message!r}"
