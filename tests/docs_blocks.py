"""The fenced blocks of the documentation's pages, and what comments before them ask of the tests (docs/writing.md)."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("python", "bash", "json", "yaml", "text")
_FENCE = re.compile(r"( *)(```+|~~~+)(.*)")
_COMMENT = re.compile(r"<!-- docs-test: (not run: (?P<reason>.+?)|(?P<fresh>fresh)|flags of (?P<flags>\S+)"
                      r"|before\n(?P<before>.*?)) ?-->", re.S)  # fmt: skip


_STARTS = re.compile(
    r"(torchrun|deepspeed|python|lowrank-ds|pytest|mpirun|srun|sbatch|bash) \S|[A-Z_]+=\S+ \S|launch/\w+\.sh "
)


@dataclass(frozen=True)
class Block:
    """A fenced block: `text` is its content, unindented, whose first line is line `line` of `page` (1-based)."""

    page: str  # relative to the repository's root
    line: int
    language: str
    text: str
    reason: str | None = None  # why it is not run, from a comment
    fresh: bool = False  # model, optimizer and so on are made anew before it
    flags: str | None = None  # yaml: the program whose flags are its keys
    before: tuple[tuple[int, str], ...] = ()  # (line, code) of comments to run first

    @property
    def where(self) -> str:
        """PAGE:LINE."""
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Every page whose blocks are tested."""
    documented = (p for p in (ROOT / "docs").rglob("*.md") if not _built(p.relative_to(ROOT / "docs")))
    readmes = [ROOT / "README.md", ROOT / "launch/README.md", ROOT / "launch/configs/README.md"]
    return [p for p in readmes if p.exists()] + sorted(documented)


def _built(page: Path) -> bool:
    return page.parts[0] in ("_build", "launch")  # copies that conf.py makes


def blocks(page: Path) -> list[Block]:
    """The page's blocks, in order.

    Raises:
        ValueError: a block that does not end, has no language or one that no test knows, or a comment that starts
            with "docs-test" and says nothing known, or that no block follows.
    """
    name, lines = str(page.relative_to(ROOT)), page.read_text().splitlines()
    found: list[Block] = []
    begin = end = 0  # of the prose before a block
    while (fence := _next(lines, end)) is not None:
        close = _close(lines, fence)
        if close is None:
            raise ValueError(f"{name}:{fence + 1}: this block does not end")
        language = _FENCE.match(lines[fence])[3].strip()
        if language not in LANGUAGES and not language.startswith("{"):
            raise ValueError(f"{name}:{fence + 1}: the block's language is {language!r}, not one of {LANGUAGES}")
        asked = _asked(name, begin, "\n".join(lines[end:fence]))
        text = textwrap.dedent("\n".join(lines[fence + 1 : close])) + "\n"
        found.append(Block(name, fence + 2, language, text, **asked))
        begin = end = close + 1
    if _asked(name, begin, "\n".join(lines[end:])):
        raise ValueError(f"{name}: the last docs-test comment has no block after it")
    return found


def _next(lines: list[str], start: int) -> int | None:
    return next((i for i in range(start, len(lines)) if _FENCE.fullmatch(lines[i])), None)


def _close(lines: list[str], fence: int) -> int | None:
    mark = _FENCE.match(lines[fence])[2]
    return next((i for i in range(fence + 1, len(lines)) if lines[i].strip() == mark), None)


def _asked(page: str, start: int, prose: str) -> dict:
    """What the comments in the prose before a block say, as fields of Block; start: lines before the prose."""
    asked: dict = {}
    for at in (m.start() for m in re.finditer("^ *<!-- docs-test", prose, flags=re.M)):
        match = _COMMENT.match(prose, prose.index("<", at))
        line = start + prose.count("\n", 0, at) + 1
        if match is None:
            raise ValueError(f"{page}:{line}: this docs-test comment is none of those in docs/writing.md")
        if match["before"] is not None:
            asked["before"] = (*asked.get("before", ()), (line + 1, match["before"]))
        elif match["fresh"]:
            asked["fresh"] = True
        else:
            asked |= {key: " ".join(match[key].split()) for key in ("reason", "flags") if match[key]}
    return asked


def every(language: str) -> Iterator[Block]:
    """All pages' blocks of a language."""
    return (block for page in pages() for block in blocks(page) if block.language == language)


def spans(page: Path) -> Iterator[Block]:
    """Commands in the running text, such as `torchrun ... -m lowrank_ds doctor`; they may leave arguments out."""
    text, name = prose(page), str(page.relative_to(ROOT))
    for match in re.finditer(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", text):
        if _STARTS.match(match[1]):
            command = " ".join(match[1].split()) + " ...\n"
            yield Block(name, text.count("\n", 0, match.start()) + 1, "bash", command)


def prose(page: Path) -> str:
    """The page without its blocks, line numbers kept."""
    lines, end = page.read_text().splitlines(), 0
    while (fence := _next(lines, end)) is not None:
        end = _close(lines, fence) + 1
        lines[fence:end] = [""] * (end - fence)
    return "\n".join(lines)
