"""The command line of `lowrank-ds report` and `lowrank-ds similarity`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lowrank_ds.report.figures import Missing, pyplot


def add_report(parser: argparse.ArgumentParser) -> None:
    """The flags of `report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="an --output of launch/pretrain.py")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE.html",
                        help="the page; figures go beside it, into FILE/ as PNG (default report.html)")  # fmt: skip
    parser.add_argument("--title", default="Training runs", help="of the page")


def add_similarity(parser: argparse.ArgumentParser) -> None:
    """The flags of `similarity`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a low-rank run made with --scaling-every N")
    parser.add_argument("full", type=Path, nargs="?", metavar="FULL", help="a full-rank run of the same model and "
                        "data, with --scaling-every (default: the full-rank factors that RUN recorded)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("similarity"), metavar="FOLDER",
                        help="for similarity.json, matrices.csv, lines.csv, PNGs and similarity.html")  # fmt: skip
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="use N lines of each matrix, the same in "
                        "all, as the paper's 100 (default 0: all lines)")  # fmt: skip
    parser.add_argument("--from-step", type=int, default=0, metavar="S", help="leave out what ended before step S")


def report(given: argparse.Namespace) -> int:
    """Write the page and its PNGs; 2 with a reason where that is impossible."""
    from lowrank_ds.report import page, runs

    try:
        pyplot()
        found = runs.read_runs(given.runs)
        folder = given.output.with_suffix("")
        if folder == given.output:
            raise ValueError(f"--output {given.output}: needs a name that ends in .html")
        folder.mkdir(parents=True, exist_ok=True)
        given.output.write_text(page.build(found, given.title, folder), encoding="utf-8")
    except (ValueError, OSError, Missing) as error:
        print(f"lowrank-ds report: {error}", file=sys.stderr)
        return 2
    for run in found:
        for note in run.notes:
            print(f"{run.name}: {note}")
    pictures = ", ".join(sorted(path.name for path in folder.glob("*.png")))
    print(f"{given.output} ({given.output.stat().st_size / 1024:.0f} KiB), {folder}/: {pictures}")
    return 0


def similarity(given: argparse.Namespace) -> int:
    """Analyse, print the table, write everything; 2 with a reason where that is impossible."""
    from lowrank_ds.report import similarity as analysis

    try:
        pyplot()
        found = analysis.analyse(given.run, given.full, given.sample, given.from_step)
        analysis.write(found, given.output)
    except (ValueError, OSError, Missing) as error:
        print(f"lowrank-ds similarity: {error}", file=sys.stderr)
        return 2
    print(analysis.text(found))
    print(f"{given.output}/: similarity.html, similarity.json, matrices.csv, lines.csv, similarity.png, lines.png")
    return 0
