"""The documentation: its code runs, its commands parse, its configurations build, its links lead somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import docs_commands, docs_context
from tests.cluster import launch
from tests.docs_blocks import ROOT, blocks, every, pages

NOT_RUN = 4  # blocks that may say why they are not run here
OURS = 25  # commands of ours that are checked, at least: fewer, and the test has stopped to see them

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
    for number, block in enumerate(every("bash")):
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
