"""The documentation: its code runs, its commands parse, its configurations build, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from lowrank_ds.options import CHECKS, MEANINGS
from tests import docs_commands, docs_context
from tests.cluster import launch
from tests.docs_blocks import ROOT, blocks, every, pages, prose, spans

NOT_RUN = 4  # blocks that may say why they are not run here
OURS = 60  # commands of ours that are checked, at least: fewer, and the test has stopped to see them

PAGES = [str(page.relative_to(ROOT)) for page in pages()]
WITH_PYTHON = [page for page in PAGES if "```python" in (ROOT / page).read_text()]


def test_every_block_says_what_it_is() -> None:
    """Languages, comments; and no more blocks are left out than the number above, each with its reason."""
    reasons = [f"{b.where}: {b.reason}" for page in PAGES for b in blocks(ROOT / page) if b.reason is not None]
    print("not run:", *reasons, sep="\n  ")
    assert len(reasons) <= NOT_RUN, reasons


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs(page: str, tmp_path: Path) -> None:
    """Each page's blocks in order, in one namespace; the traceback of a failure names page and line."""
    found = [block for block in blocks(ROOT / page) if block.language == "python"]
    assert launch(1, docs_context.run_page, found, str(tmp_path)) == [sum(b.reason is None for b in found)]


def test_commands_parse(tmp_path: Path) -> None:
    """Flags, files and variables of every command that starts one of our programs."""
    commands = []
    inline = [block for page in pages() for block in spans(page)]
    for number, block in enumerate([*every("bash"), *inline]):
        folder = tmp_path / str(number)
        folder.mkdir()
        commands += docs_commands.recorded(block, folder)
    checked, wrong = launch(1, docs_commands.check_all, commands)[0]
    assert not wrong, "\n".join(wrong)
    assert checked >= OURS


def test_json_and_yaml(tmp_path: Path) -> None:
    """They parse; ds_configs build, `flags of PROGRAM` are flags of it."""
    found = [*every("json"), *every("yaml")]
    wrong = launch(1, docs_context.check_settings, found, str(tmp_path))[0]
    assert not wrong, "\n".join(wrong)


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the page's headings."""
    seen: Counter[str] = Counter()
    found = set()
    for title in re.findall(r"^#+ +(.*?) *$", prose(page), flags=re.M):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_on_github(page: str) -> None:
    """Files and anchors that relative links and pictures name are there (Sphinx checks the built pages)."""
    file, wrong = ROOT / page, []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(file))):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        goal = (file.parent / path).resolve() if path else file
        if not goal.exists():
            wrong.append(f"{page}: there is no {target}")
        elif anchor and anchor not in _anchors(goal):
            wrong.append(f"{page}: {target}: no such heading")
    assert not wrong, "\n".join(wrong)


def test_sphinx_builds_without_a_warning(tmp_path: Path) -> None:
    """The command of docs/writing.md, into another folder; nothing is fetched."""
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "index.html").exists()


@pytest.mark.parametrize("page", ["options.md", "cli.md"])
def test_reference_is_what_the_code_says(page: str) -> None:
    """`python docs/generate.py` was run after the last change of an option or a flag."""
    written = (ROOT / "docs/reference" / page).read_text()
    assert _loaded("docs/generate.py").PAGES[page]() == written, f"run: python docs/generate.py ({page} is stale)"


def test_every_option_has_a_meaning() -> None:
    """And none that is not there any more has one."""
    assert set(MEANINGS) == set(CHECKS)


def test_figures_are_drawn(tmp_path: Path) -> None:
    """The script runs, and what it draws (text as outlines apart) is what lies in docs/images."""
    figures = _loaded("docs/figures/layouts.py")
    drawn = figures.draw(tmp_path)
    for file in drawn:
        committed = (ROOT / "docs/images" / file.name).read_text()
        assert _shapes(file.read_text()) == _shapes(committed), f"run: python docs/figures/layouts.py ({file.name})"
        assert f"images/{file.name}" in (ROOT / "docs/layouts.md").read_text()


def _shapes(svg: str) -> list[str]:
    """Texts (matplotlib leaves them as comments) and colours of a figure; outlines depend on matplotlib's version."""
    return re.findall(r"<!-- (.*?) -->|fill: (#\w+)", svg)


def _loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
