"""Figures of reports: matplotlib without a display, colours that colour-blind people tell apart, and dashes besides."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lowrank_ds.report.runs import Curve, Run

# Okabe and Ito's colours that are dark enough for lines on white; the dashes tell runs apart in grey, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)))
MARKERS = "osD^vPX"
SEEN = 0.001  # of the longest bar: what is shorter is drawn and named by nobody
LEGEND_ROW = 0.21  # inches
POINTS = 1500  # of a curve; more than a screen shows
_STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#777777", "figure.facecolor": "white", "svg.fonttype": "path",
    "svg.hashsalt": "lowrank_ds", "legend.frameon": False, "lines.linewidth": 1.6, "axes.unicode_minus": False,
}  # fmt: skip


class Missing(RuntimeError):
    """A package that only reports need is not installed; the message says which, and how to get it."""


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files.

    Raises:
        Missing: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise Missing(
            "this command draws with matplotlib, which is not installed: pip install 'lowrank_ds[report]' "
            "(or pip install matplotlib)"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


@contextlib.contextmanager
def panels(count: int, height: float = 3.4, width: float = 12.0) -> Iterator[tuple[Any, Sequence[Any]]]:
    """(figure, its `count` axes side by side), in our style; closed afterwards. height, width: inches."""
    plt = pyplot()
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, count, figsize=(width, height), squeeze=False, layout="constrained")
        try:
            yield figure, list(axes[0])
        finally:
            plt.close(figure)


def saved(figure: Any, png: Path | None) -> str:
    """The figure as inline SVG that fills the page's width; also written as PNG if a path is given."""
    if png is not None:
        figure.savefig(png, dpi=130)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    return re.sub(r'\s(width|height)="[^"]*"', "", head) + ' role="img">' + rest


def look(index: int) -> dict[str, Any]:
    """Colour and dashes of the index-th run."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def marker_of(index: int, points: int, size: float) -> dict[str, Any]:
    """The index-th run's marker, on at most 20 of its points."""
    return {"marker": MARKERS[index % len(MARKERS)], "markersize": size, "markevery": max(1, math.ceil(points / 20))}


def short(name: str, size: int = 48) -> str:
    """A name of at most `size` letters, without its middle."""
    half = (size - 1) // 2
    return name if len(name) <= size else f"{name[:half]}…{name[-(size - 1 - half) :]}"


def legend(figure: Any, axes: Any) -> None:
    """One legend for all panels, above them, so that it covers nothing; the figure grows with its rows."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        width, height = figure.get_size_inches()
        longest = max(map(len, labels))
        rows = math.ceil(len(labels) / max(1, int(130 / 12 * width) // (longest + 7)))
        columns = math.ceil(len(labels) / rows)  # rows of about one length
        figure.set_size_inches(width, height + LEGEND_ROW * (rows - 1))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=3.2)


# -- axes -------------------------------------------------------------------------------------------------------------
def clock(longest: float) -> tuple[float, str]:
    """(seconds of a unit, its name) for times up to `longest` seconds."""
    for seconds, name in ((3600.0, "hours"), (60.0, "minutes")):
        if longest >= 3 * seconds:
            return seconds, name
    return 1.0, "seconds"


def thousands(axis: Any) -> None:
    """Ticks as 500, 20K, 3M, 1.5B."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def count(value: float) -> str:
    """1500 -> "1.5K", 3e9 -> "3B"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:g}"


def _thin(values: Sequence[Any]) -> list[Any]:
    """At most POINTS of them, the last among them."""
    step = math.ceil(len(values) / POINTS)
    return list(values[::step]) + ([values[-1]] if step > 1 and (len(values) - 1) % step else [])


# -- curves -----------------------------------------------------------------------------------------------------------
def curves(runs: Sequence[Run], pick: Callable[[Run], Curve], label: str, png: Path | None, log: bool = False) -> str:
    """A quantity against steps, tokens and time of training: three panels with one scale. "" without a number."""
    drawn = [(i, run, pick(run)) for i, run in enumerate(runs) if pick(run).finite]
    if not drawn:
        return ""
    times = [s for *_, curve in drawn for s in curve.seconds if math.isfinite(s)]
    unit, name = clock(max(times, default=0.0))
    with panels(3) as (figure, axes):
        for i, run, curve in drawn:
            seconds = [s / unit for s in curve.seconds]
            for axis, x in zip(axes, (curve.steps, curve.tokens, seconds), strict=True):
                _line(axis, x, curve.y, i, run.name, marked=log or len(curve.finite) == 1)
        for axis, title in zip(axes, ("steps", "tokens", f"training time ({name})"), strict=True):
            axis.set(xlabel=title, ylim=_limits([curve for *_, curve in drawn], log), xlim=(0, None))
        axes[0].set_ylabel(label)
        for axis in axes:
            _scale(axis, log)
        for axis in axes[:2]:
            thousands(axis.xaxis)
        legend(figure, axes[0])
        return saved(figure, png)


def _line(axis: Any, x: Sequence[float], y: Sequence[float], index: int, name: str, marked: bool) -> None:
    """One run's curve; a cross where it stops being finite."""
    end = next((i for i, value in enumerate(y) if not math.isfinite(value)), len(y))
    marker = marker_of(index, len(y), 5) if marked else {}
    axis.plot(_thin(x[: max(end, 1)]), _thin(y[: max(end, 1)]), label=short(name), **look(index), **marker)
    if end < len(y) and end:
        axis.plot(x[end - 1], y[end - 1], "x", color=look(index)["color"], markersize=10, markeredgewidth=2.5)


def _limits(drawn: Sequence[Curve], log: bool) -> tuple[float, float]:
    """A range of y that leaves out the steep start, but nothing that comes later."""
    low = min(min(curve.finite) for curve in drawn)
    later = [max(curve.finite[len(curve.finite) // 20 :]) for curve in drawn]
    if log:
        return low / 1.08, max(later) * 1.08
    margin = 0.05 * (max(later) - low) or 0.5
    return low - margin, max(later) + margin


def _scale(axis: Any, log: bool) -> None:
    """Logarithmic with plain numbers, if asked for."""
    if log:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axis.set_yscale("log")
        low, high = axis.get_ylim()
        narrow = high / low < 12  # then ticks at 1, 2, 5 are too few
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8) if narrow else (1, 2, 5), numticks=20))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


# -- subspaces --------------------------------------------------------------------------------------------------------
_WATCHED = (  # (key, title, key of a dashed second curve)
    ("captured_energy_mean", "captured energy (% of |G|²)", "captured_energy_min"),
    ("overlap_mean", "overlap of old and new basis (%)", "overlap_min"),
    ("limiter_share", "updates cut by the limiter (%)", None),
)


def subspaces(runs: Sequence[Run], png: Path | None) -> str:
    """Captured energy, overlap at refreshes and limiter hits against steps; "" where no run has diagnostics."""
    found = [row for row in _WATCHED if any(row[0] in numbers for run in runs for _, numbers in run.diagnostics)]
    if not found:
        return ""
    last = max(step for run in runs for step, _ in run.diagnostics)
    with panels(len(found), width=4.0 * max(2, len(found))) as (figure, axes):
        for axis, (key, title, lowest) in zip(axes, found, strict=True):
            for i, run in enumerate(runs):
                for which, style in ((key, {"label": short(run.name)}), (lowest, {"linewidth": 0.8, "alpha": 0.8})):
                    points = [(step, 100 * numbers[which]) for step, numbers in run.diagnostics if which in numbers]
                    if points:
                        marker = marker_of(i, min(len(points), POINTS), 4 if which == key else 2)
                        axis.plot(*zip(*_thin(points), strict=True), **{**look(i), **marker, **style})
            axis.set(title=title, xlabel="steps", ylim=(0, None), xlim=(0, 1.03 * last))
            thousands(axis.xaxis)
        labelled = max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
        legend(figure, labelled)
        return saved(figure, png)


# -- memory -----------------------------------------------------------------------------------------------------------
_KINDS = (  # (of memory_of, label, colour, hatch)
    ("state_moments", "moments", "#0072B2", ""), ("state_projectors", "projectors", "#E69F00", "///"),
    ("state_other", "other state", "#009E73", "..."),
)  # fmt: skip


def memory_of(run: Run) -> dict[str, float]:
    """Bytes on the rank that has most: "state", "peak", and the state's kinds where they were recorded."""
    found = {}
    for key in ("optimizer_state", "peak_memory", *(kind for kind, *_ in _KINDS)):
        ranks = run.summary.get(f"{key}_bytes_per_rank")
        if ranks:
            found[key] = float(max(ranks))
    return found


def byte_unit(largest: float) -> tuple[float, str]:
    """(bytes of a unit, its name) for sizes up to `largest`."""
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if largest >= 2**power:
            return float(2**power), name
    return 1.0, "bytes"


def memory(runs: Sequence[Run], png: Path | None) -> str:
    """Optimizer state by kind, and its share of the peak, a bar for each run; "" where no run tells."""
    told = [(run.name, memory_of(run)) for run in runs if memory_of(run)]
    if not told:
        return ""
    for _, sizes in told:
        state = sizes.get("optimizer_state", 0.0)
        sizes["rest"] = max(0.0, sizes.get("peak_memory", state) - state)
        if "state_moments" not in sizes:  # a run from before they were told apart
            sizes["undivided"] = state
    with panels(2, height=2.0 + 0.42 * len(told)) as (figure, (left, right)):
        _bars(left, told, (*_KINDS, ("undivided", "not divided", "#999999", "")), "optimizer_state", "optimizer state")
        parts = (("optimizer_state", "optimizer state", "#0072B2", ""),
                 ("rest", "all else (weights, gradients, activations, program)", "#bbbbbb", ""))  # fmt: skip
        _bars(right, told, parts, "peak_memory", "peak memory")
        right.set_yticklabels([])
        for axis, place in ((left, "left"), (right, "right")):
            figure.legend(*axis.get_legend_handles_labels(), loc=f"outside lower {place}", ncols=4, fontsize=9)
        return saved(figure, png)


def _bars(axis: Any, told: Sequence[tuple[str, dict]], parts: Sequence[tuple], total: str, title: str) -> None:
    """Stacked horizontal bars of those parts that any run has, with the totals beside them."""
    unit, name = byte_unit(max(sizes.get(total, 0.0) for _, sizes in told))
    rows, starts = range(len(told)), [0.0] * len(told)
    for key, label, colour, hatch in parts:
        widths = [sizes.get(key, 0.0) / unit for _, sizes in told]
        if max(widths) > SEEN * max(sizes.get(total, 0.0) / unit for _, sizes in told):
            axis.barh(rows, widths, 0.62, starts, label=label, color=colour, hatch=hatch, edgecolor="white")
        starts = [a + b for a, b in zip(starts, widths, strict=True)]
    for row, (_, sizes) in enumerate(told):
        size = sizes.get(total, 0.0) / unit
        digits = 2 if size < 10 else 1 if size < 100 else 0
        text = f" {size:,.{digits}f} {name}" if size else " not recorded"
        axis.text(starts[row], row, text, va="center", fontsize=9)
    axis.set(title=f"{title} of the fullest rank", xlabel=name, yticks=rows, xlim=(0, 1.22 * max(starts) or 1))
    axis.set_yticklabels([short(run, 36) for run, _ in told])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
