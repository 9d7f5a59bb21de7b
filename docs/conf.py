"""Sphinx's settings: `python -m sphinx -W -n --keep-going -b html docs docs/_build/html` builds without a network.

The pages are Markdown that GitHub shows as well, so links between them are ordinary relative links. What lies outside
docs/ is no page of a build: READMEs of folders are copied in (`FOREIGN`), other files are named, not linked.
"""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from lowrank_ds.version import __version__  # noqa: E402

project = "lowrank_ds"
author = "the authors of lowrank_ds"
project_copyright = author
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "figures"]
html_theme = "furo"
html_title = f"lowrank_ds {release}"
html_copy_source = False  # READMEs of other folders have no source in docs/
html_show_sourcelink = False
pygments_style = "friendly"

myst_heading_anchors = 4  # GitHub's anchors
myst_links_external_new_tab = False
myst_url_schemes = ("http", "https")
suppress_warnings = ["misc.highlighting_failure"]  # a block may be part of a JSON file

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types are in the signatures' prose: shapes and units say more
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False
default_role = "code"  # `x` in a docstring is code, as in Markdown
nitpick_ignore_regex = [  # of other packages, and types that the reference does not show
    ("py:exc", ".*"),
    ("py:class", r"(torch|collections|argparse)\..*|optional|lowrank_ds\.plan\.\w+\.\w+"),
]
napoleon_use_ivar = True

# READMEs of other folders that are pages here too: name of the page -> file.
FOREIGN = {
    "launch/README": ROOT / "launch" / "README.md",
    "launch/configs/README": ROOT / "launch" / "configs" / "README.md",
}
_LINK = re.compile(r"(?<!!)\[([^\]\n]*(?:\n[^\]\n]*)?)\]\(([^)\s]+)\)")


def _rewritten(text: str, source: pathlib.Path) -> str:
    """The page's Markdown with links out of docs/ resolved: to a copied README, or to the name of the file.

    Args:
        text: Markdown.
        source: the file that it is of, which relative links start from.
    """
    copies = {file: DOCS / f"{name}.md" for name, file in FOREIGN.items()}
    here = copies.get(source, source).parent

    def link(match: re.Match) -> str:
        label, target = match[1], match[2]
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        file = (source.parent / path).resolve()
        page = copies.get(file, file)
        if page.is_relative_to(DOCS):
            relative = pathlib.PurePosixPath(_relative(page, here))
            return f"[{label}]({relative}{'#' + anchor if anchor else ''})"
        if not file.exists():
            return match[0]  # Sphinx will say so
        name = file.relative_to(ROOT)
        return label if label.strip("`") == str(name) else f"{label} (`{name}`)"

    return _LINK.sub(link, text)


def _relative(path: pathlib.Path, start: pathlib.Path) -> str:
    import os.path  # pathlib walks up from Python 3.12 on

    return os.path.relpath(path, start)


def _navigation(index: str) -> str:
    """index.md's sections and lists as Sphinx's navigation: hidden toctrees, so that a page is listed once.

    index: Markdown, "## SECTION" and "- [title](page.md): ..." below it. A page that is in no list is a warning.
    """
    trees: list[str] = []
    for section in re.split(r"^## ", index, flags=re.M)[1:]:
        caption, _, body = section.partition("\n")
        pages = re.findall(r"^- \[[^\]]*\]\(([^)#]+)\.md\)", body, flags=re.M)
        trees.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]))
    return "\n\n".join(trees)


def _on_source_read(app: Any, name: str, content: list[str]) -> None:
    source = FOREIGN.get(name, DOCS / f"{name}.md")
    if source.exists():
        content[0] = _rewritten(content[0], source)
    if name == "index":
        content[0] += "\n" + _navigation(content[0]) + "\n"


def _on_inited(app: Any) -> None:
    """Copies of foreign READMEs, where Sphinx looks for pages; written only when they change."""
    for name, file in FOREIGN.items():
        page = DOCS / f"{name}.md"
        if not file.exists():
            page.unlink(missing_ok=True)
            continue
        page.parent.mkdir(parents=True, exist_ok=True)
        if not page.exists() or page.read_text() != file.read_text():
            page.write_text(file.read_text())


def _on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """`|R|` is a norm in our docstrings, not reST's substitution; the signs outside backticks are escaped."""
    for number, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [re.sub(r"(?<!\\)\|", r"\\|", part) for part in parts[::2]]
        lines[number] = "`".join(parts)


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("builder-inited", _on_inited)
    app.connect("source-read", _on_source_read)
    app.connect("autodoc-process-docstring", _on_docstring)
