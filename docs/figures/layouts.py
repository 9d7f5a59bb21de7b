"""Draws the figures of docs/layouts.md.

python docs/figures/layouts.py [FOLDER]     (default: docs/images)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import FancyArrowPatch, Rectangle  # noqa: E402

RANKS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito's, told apart with any colour vision
INK = "#222222"
SHAPE = (4, 7)  # of every matrix drawn: m rows, n columns
WIDTH = 2  # r


def matrix(
    axes: Any,
    left: float,
    top: float,
    shape: tuple[int, int],
    rank_of: Callable[[int, int], tuple[int, ...]],
    title: str,
) -> None:
    """Draw a matrix of unit squares.

    Args:
        left, top: its upper left corner; y grows downwards.
        shape: (rows, columns).
        rank_of: (row, column) -> the ranks that hold the entry, one or two.
        title: above it.
    """
    for row in range(shape[0]):
        for column in range(shape[1]):
            square(axes, left + column, top + row, rank_of(row, column))
    axes.text(left + shape[1] / 2, top - 0.35, title, ha="center", va="bottom", color=INK, fontsize=11)


def square(axes: Any, x: float, y: float, ranks: tuple[int, ...]) -> None:
    """An entry: the colours and numbers of those who hold it, side by side."""
    for place, rank in enumerate(ranks):
        wide = 1 / len(ranks)
        axes.add_patch(Rectangle((x + place * wide, y), wide, 1, facecolor=RANKS[rank], edgecolor="none"))
        colour = "white" if rank in (0, 2) else INK
        centre = {"ha": "center", "va": "center", "fontsize": 10, "fontweight": "bold"}
        axes.text(x + (place + 0.5) * wide, y + 0.5, str(rank), color=colour, **centre)
    axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor="white", linewidth=1.5))


def frame(axes: Any, left: float, top: float, columns: int) -> None:
    """A frame around one row."""
    axes.add_patch(Rectangle((left, top), columns, 1, fill=False, edgecolor=INK, linewidth=2))


def sign(axes: Any, x: float, y: float, text: str) -> None:
    """A sign between two matrices."""
    axes.text(x, y, text, ha="center", va="center", fontsize=15, color=INK)


def note(axes: Any, x: float, y: float, text: str, **how: Any) -> None:
    """Text below or beside a matrix."""
    axes.text(x, y, text, **({"ha": "left", "va": "top", "color": INK, "fontsize": 10, "linespacing": 1.35} | how))


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow between two points."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1.2))


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """(figure, axes) of width x height squares."""
    figure, axes = pyplot.subplots(figsize=(width * 0.37, height * 0.37))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def flat(row: int, column: int) -> tuple[int, ...]:
    """The cuts (0, 10, 21, 28) of the page."""
    entry = row * SHAPE[1] + column
    return (sum(entry >= cut for cut in (10, 21)),)


def rows(row: int, column: int) -> tuple[int, ...]:
    """FSDP2 on two ranks."""
    return (row // 2,)


def tiles(row: int, column: int) -> tuple[int, ...]:
    """FSDP x rowwise tensor parallel, 2 x 2."""
    return (2 * (row // 2) + (column >= 4),)


CUTS = (
    (flat, "ZeRO, FSDP1: flat, 3 ranks",
     "The row-major string of\nentries is cut, here after\n10 and 21 of 28. Row 1\nlies on two ranks."),
    (rows, "FSDP2: rows, 2 ranks",
     "Rows are whole. Blocks are\nuneven, or empty, where\nrows do not divide."),
    (tiles, "FSDP2 x TP, 2 x 2",
     "Rows over data-parallel\nranks, columns over tensor-\nparallel ones. Every row\nlies on two ranks."),
)  # fmt: skip


def draw_cuts() -> Any:
    """Who holds which entry, three ways."""
    figure, axes = canvas(26.5, 8.2)
    for place, (rank_of, title, lines) in enumerate(CUTS):
        left = 0.6 + 9.1 * place
        matrix(axes, left, 1.4, SHAPE, rank_of, title)
        note(axes, left, 5.7, lines)
    frame(axes, 0.6, 2.4, SHAPE[1])
    return figure


RIGHT = (
    (1.4, rows, lambda i, j: rows(i, 0), 2, "FSDP2, 2 ranks",
     "Each rank multiplies its own rows.\nR and its moments stay with them.\n\n"
     "Sent: Q, whose even parts are\ngathered (n r numbers)."),
    (10.6, flat, lambda i, j: (0, 1) if i == 1 else flat(i, 0), 3, "flat, 3 ranks",
     "Row 1 is cut: ranks 0 and 1 each\nhave a part of its sum in R, and\nboth keep its moments.\n\n"
     "Sent: Q as above, and r numbers\nof each cut row."),
)  # fmt: skip


def draw_right() -> Any:
    """The right side, R = G Q, under row blocks and under a flat cut."""
    figure, axes = canvas(23, 18.2)
    for top, rank_of, kept, world, where, say in RIGHT:
        matrix(axes, 0.6, top, SHAPE, rank_of, f"G (m x n), {where}")
        sign(axes, 8.3, top + 2, "\u00b7")
        matrix(axes, 9, top, (SHAPE[1], WIDTH), lambda i, j, w=world: (i * w // SHAPE[1],), "Q (n x r)")
        sign(axes, 11.7, top + 2, "=")
        matrix(axes, 12.4, top, (SHAPE[0], WIDTH), kept, "R (m x r)")
        note(axes, 15.4, top, say)
    frame(axes, 0.6, RIGHT[1][0] + 1, SHAPE[1])
    frame(axes, 12.4, RIGHT[1][0] + 1, WIDTH)
    return figure


def draw_left() -> Any:
    """The left side, R = G^T P, under row blocks: partial sums are exchanged."""
    figure, axes = canvas(27, 9.2)
    matrix(axes, 0.6, 1.6, (SHAPE[1], SHAPE[0]), lambda i, j: rows(j, i), "G$^T$ (n x m)")
    sign(axes, 5.3, 3.6, "\u00b7")
    matrix(axes, 6, 1.6, (SHAPE[0], WIDTH), rows, "P (m x r)")
    sign(axes, 8.7, 3.6, "=")
    for rank, left in enumerate((9.4, 12.4)):
        matrix(axes, left, 1.6, (SHAPE[1], WIDTH), lambda i, j, r=rank: (r,), "")
    sign(axes, 11.9, 3.6, "+")
    axes.text(11.9, 1.25, "a sum on each rank", ha="center", va="bottom", fontsize=11, color=INK)
    arrow(axes, (14.7, 3.6), (16.1, 3.6))
    matrix(axes, 16.4, 1.6, (SHAPE[1], WIDTH), lambda i, j: (int(i >= 4),), "R (n x r)")
    note(axes, 19.4, 1.6, "Each rank completes an even part\nof R and keeps its moments.\n\n"
         "Sent: sums one way, directions N\nback (2 n r numbers). P lies with\nG's rows and is not sent.")  # fmt: skip
    return figure


FIGURES = {"layout_cuts": draw_cuts, "layout_right": draw_right, "layout_left": draw_left}


def draw(folder: Path, kind: str = "svg") -> list[Path]:
    """Write every figure into `folder`; kind: svg or png. Answers the files."""
    matplotlib.rcParams.update({"svg.hashsalt": "lowrank_ds", "font.family": "DejaVu Sans"})
    files = []
    for name, make in FIGURES.items():
        figure = make()
        files.append(folder / f"{name}.{kind}")
        figure.savefig(
            files[-1], facecolor="white", **({"metadata": {"Date": None}} if kind == "svg" else {"dpi": 110})
        )
        pyplot.close(figure)
    return files


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "images"
    for file in draw(target):
        print(file)
