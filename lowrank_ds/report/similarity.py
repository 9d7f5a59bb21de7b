"""How alike scaling factors are at low and at full rank: Spearman's and Kendall's rank correlations (Fira, 2410.01623).

Input is what `launch/pretrain.py --scaling-every N` wrote (`lowrank_ds/scaling.py`). A factor is averaged over training
first, as the paper does; then its order is compared among all matrices ("matrix", the mean over a matrix' lines) and
among all lines of all matrices ("line", the paper's column level). "within" is the same inside each matrix, where
it does not help that some matrices have larger factors than others.
"""

from __future__ import annotations

import csv
import html
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_ds.report import figures, page
from lowrank_ds.report.runs import read_lines

FILE = "scaling.jsonl"
LEVELS = {"matrix": "matrices", "line": "lines of all matrices"}
TITLES = {"matrix": "matrices", "line": "their lines"}


@dataclass(frozen=True)
class Similarity:
    """The analysis of one run, or of two.

    Attributes:
        source: where the factors come from, in words.
        low, full: {matrix: mean factor of each line (lines,)}; the same lines in both.
        levels: {"matrix", "line": {"spearman", "spearman_p", "kendall", "kendall_p", "count"}}.
        within: {matrix: {"spearman", "kendall"}} over its lines; None where all are equal.
        course: [{"step", "matrix", "line"}]: Spearman's of single records.
        notes: what the reader must know.
    """

    source: str
    low: dict[str, np.ndarray]
    full: dict[str, np.ndarray]
    levels: dict[str, dict[str, float]]
    within: dict[str, dict[str, float | None]]
    course: list[dict[str, float]]
    notes: tuple[str, ...]

    def matrix_means(self) -> tuple[np.ndarray, np.ndarray]:
        """(matrices,) each: the mean over lines, low and full."""
        return tuple(np.array([values.mean() for values in side.values()]) for side in (self.low, self.full))

    def lines(self) -> tuple[np.ndarray, np.ndarray]:
        """(all lines,) each: low and full."""
        return tuple(np.concatenate(list(side.values())) for side in (self.low, self.full))

    def ratio(self) -> np.ndarray:
        """(matrices,): phi(R) / phi(G), of the means over lines."""
        low, full = self.matrix_means()
        return low / full

    def middle(self, which: str) -> float | None:
        """The median over matrices of Spearman's ("spearman") or Kendall's within them; None without any."""
        found = [values[which] for values in self.within.values() if values[which] is not None]
        return float(np.median(found)) if found else None


# -- analysis ---------------------------------------------------------------------------------------------------------
def analyse(run: Path, full_run: Path | None = None, sample: int = 0, from_step: int = 0) -> Similarity:
    """Compare the low-rank factors of `run` with full-rank ones: its own, or those of `full_run`.

    Args:
        sample: use so many lines of each matrix, the same in all; 0: all.
        from_step: leave out records of earlier steps.

    Raises:
        ValueError: factors are missing, or the runs have no matrices of the same shape in common.
        figures.Missing: scipy is not installed.
    """
    notes: list[str] = []
    lows, fulls = (_series(path, side, from_step, notes) for path, side in ((run, "low"), (full_run or run, "full")))
    names = [n for n in lows[1] if n in fulls[1] and lows[1][n].shape[1] == fulls[1][n].shape[1]]
    if len(names) < 2:
        raise ValueError(
            f"{run} and {full_run or 'itself'} have {len(names)} matrices of one name and shape in common, and "
            "correlations need 2: give two runs of one model"
        )
    left_out = (lows[1].keys() | fulls[1].keys()) - set(names)
    if left_out:
        notes.append(f"{len(left_out)} matrices are in one run only, or of other shapes: {', '.join(sorted(left_out))}")
    pick = _sampled([lows[1][name].shape[1] for name in names], sample)
    low, full = ({n: _mean(steps, series[n])[pick] for n in names} for steps, series in (lows, fulls))
    values = (tuple(np.array([v.mean() for v in side.values()]) for side in (low, full)),
              tuple(np.concatenate(list(side.values())) for side in (low, full)))  # fmt: skip
    levels = {level: correlations(*pair) for level, pair in zip(LEVELS, values, strict=True)}
    within = {name: _inside(low[name], full[name]) for name in names}
    source = (
        f"low and full rank from the same gradients, {run}"
        if full_run is None
        else f"low rank {run}, full rank {full_run}"
    )
    return Similarity(source, low, full, levels, within, _course(lows, fulls, names, pick), tuple(notes))


def _series(path: Path, side: str, from_step: int, notes: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(steps (records + 1,) with the start of the first interval in front, {matrix: factors (records, lines)})."""
    records = read_lines(Path(path) / FILE, notes)
    if not records:
        raise ValueError(f"{path}: has no {FILE}; train it with launch/pretrain.py --scaling-every N")
    first = 0
    while records and records[0]["step"] < from_step:
        first = records.pop(0)["step"]
    if not records:
        raise ValueError(f"{path}: all of {FILE} ends before --from-step {from_step}")
    names = [n for n, both in records[0]["matrices"].items() if side in both]
    if not names:
        raise ValueError(
            f"{path}: {FILE} has no {side}-rank factors: "
            + ("it is a full-rank run; give a low-rank one first" if side == "low" else "give a full-rank run")
        )
    whole = [n for n in names if all(side in r["matrices"].get(n, {}) for r in records)]
    if len(whole) < len(names):
        notes.append(f"{path}: {len(names) - len(whole)} matrices are not in every record and are left out")
    return (np.array([first, *(r["step"] for r in records)]),
            {n: np.array([r["matrices"][n][side] for r in records]) for n in whole})  # fmt: skip


def _mean(steps: np.ndarray, series: np.ndarray) -> np.ndarray:
    """Mean over training (lines,): records (records, lines) weighted by the steps they are means of."""
    return np.average(series, axis=0, weights=np.diff(steps))


def _sampled(lines: list[int], sample: int) -> np.ndarray | slice:
    """Which lines to use, the same of every matrix: `sample` of those that all have."""
    if not sample:
        return slice(None)
    if sample > min(lines):
        raise ValueError(
            f"--sample {sample}: the smallest matrix has {min(lines)} lines; give at most as many, or 0 for all"
        )
    return np.sort(np.random.default_rng(0).choice(min(lines), sample, replace=False))


def correlations(low: np.ndarray, full: np.ndarray) -> dict[str, float]:
    """Spearman's rho and Kendall's tau-b of two (n,) arrays with their p-values, and n."""
    stats = _scipy_stats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant input: NaN says it
        spearman, kendall = stats.spearmanr(low, full), stats.kendalltau(low, full)
    return {
        "spearman": float(spearman.statistic), "spearman_p": float(spearman.pvalue),
        "kendall": float(kendall.statistic), "kendall_p": float(kendall.pvalue), "count": len(low),
    }  # fmt: skip


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise figures.Missing(
            "rank correlations are scipy's, which is not installed: pip install 'lowrank_ds[report]' (or scipy)"
        ) from error
    return stats


def _inside(low: np.ndarray, full: np.ndarray) -> dict[str, float | None]:
    found = correlations(low, full)
    return {which: found[which] if np.isfinite(found[which]) else None for which in ("spearman", "kendall")}


def _course(lows: tuple, fulls: tuple, names: list[str], pick: np.ndarray | slice) -> list[dict[str, float]]:
    """Spearman's of each record that both have."""
    stats, course = _scipy_stats(), []
    places = {int(step): i for i, step in enumerate(fulls[0][1:])}
    for i, step in enumerate(lows[0][1:]):
        if int(step) in places:
            pairs = [(lows[1][n][i][pick], fulls[1][n][places[int(step)]][pick]) for n in names]
            means = [np.array([pair[side].mean() for pair in pairs]) for side in (0, 1)]
            lines = [np.concatenate([pair[side] for pair in pairs]) for side in (0, 1)]
            found = {
                level: float(stats.spearmanr(*both).statistic) for level, both in (("matrix", means), ("line", lines))
            }
            course.append({"step": int(step), **found})
    return course


# -- output -----------------------------------------------------------------------------------------------------------
def text(found: Similarity) -> str:
    """The result as an aligned table."""
    rows = [("level", "Spearman", "p", "Kendall", "p", "numbers")]
    rows += [(LEVELS[level], *_cells(values)) for level, values in found.levels.items()]
    inside = [found.middle(which) for which in ("spearman", "kendall")]
    shown = ["–" if value is None else f"{value:.4f}" for value in inside]
    rows.append(("lines within a matrix (median)", shown[0], "", shown[1], "", f"{len(found.within):,} matrices"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    low, middle, high = np.quantile(found.ratio(), [0.1, 0.5, 0.9])
    ratio = f"phi(R) / phi(G) of a matrix: median {middle:.3f}, 10 % to 90 % {low:.3f} to {high:.3f}"
    return "\n".join([found.source, "", lines[0], "-" * len(lines[0]), *lines[1:], "", ratio, *found.notes])


def _cells(values: Mapping[str, float]) -> tuple[str, ...]:
    p = [f"{values[key]:.1e}" if values[key] != 0 else "< 1e-300" for key in ("spearman_p", "kendall_p")]
    return f"{values['spearman']:.4f}", p[0], f"{values['kendall']:.4f}", p[1], f"{values['count']:,}"


def write(found: Similarity, folder: Path) -> None:
    """similarity.json, matrices.csv, lines.csv, similarity.png, lines.png and similarity.html in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    inside = {f"within_{which}_median": found.middle(which) for which in ("spearman", "kendall")}
    facts = {"source": found.source, **found.levels, **inside, "course": found.course, "notes": found.notes}
    (folder / "similarity.json").write_text(json.dumps(facts, indent=2) + "\n")
    with (folder / "matrices.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["matrix", "lines", "low", "full", "spearman", "kendall"])
        for name, values in found.within.items():
            low, full = found.low[name], found.full[name]
            rows.writerow([name, len(low), low.mean(), full.mean(), values["spearman"], values["kendall"]])
    with (folder / "lines.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["matrix", "line", "low", "full"])
        for name in found.within:
            rows.writerows(
                [name, i, *pair] for i, pair in enumerate(zip(found.low[name], found.full[name], strict=True))
            )
    drawn = [_scatter(found, folder / "similarity.png"), _detail(found, folder / "lines.png")]
    (folder / "similarity.html").write_text(_html(found, drawn), encoding="utf-8")


def _html(found: Similarity, drawn: list[str]) -> str:
    sections = [page.section("Result", "", f"<pre>{html.escape(text(found))}</pre>")]
    whys = (
        "A point is a matrix, or a line of one; on the dotted line both factors are the same.",
        "Left: Spearman's correlation inside each matrix. Right: of single records as training goes on.",
    )
    for heading, why, svg in zip(("Low against full rank", "Inside matrices, and over time"), whys, drawn, strict=True):
        sections.append(page.section(heading, why, page.figure(svg, heading)))
    return page.page("Similarity of scaling factors", found.source, sections)


def kind(name: str) -> str:
    """What a matrix is in its layer: "q_proj" of "model.layers.0.self_attn.q_proj.weight"."""
    parts = [part for part in name.split(".") if part != "weight" and not part.isdigit()]
    return parts[-1] if parts else name


def _scatter(found: Similarity, png: Path) -> str:
    """Both levels, low against full, coloured by the kind of matrix."""
    kinds = list(dict.fromkeys(map(kind, found.low)))
    with figures.panels(2, height=5.0, width=10.5) as (figure, axes):
        for axis, level in zip(axes, LEVELS, strict=True):
            for i, which in enumerate(kinds):
                own = [name for name in found.low if kind(name) == which]
                pair = [[v for n in own for v in (side[n] if level == "line" else [side[n].mean()])]
                        for side in (found.full, found.low)]  # fmt: skip
                size = {"s": 36, "alpha": 0.9} if level == "matrix" else {"s": 5, "alpha": 0.5}
                marker, colour = figures.MARKERS[i % len(figures.MARKERS)], figures.COLOURS[i % len(figures.COLOURS)]
                axis.scatter(*pair, marker=marker, color=colour, label=which, linewidths=0, rasterized=True, **size)
            _same_scales(axis)
            numbers = found.levels[level]
            axis.set(title=f"{TITLES[level]}: Spearman {numbers['spearman']:.3f}, Kendall {numbers['kendall']:.3f}",
                     xlabel="full rank  |D| / |G|", ylabel="low rank  |N| / |R|")  # fmt: skip
        figures.legend(figure, axes[0])
        return figures.saved(figure, png)


def _same_scales(axis: Any) -> None:
    """Logarithmic axes, and the line on which both are the same."""
    axis.set(xscale="log", yscale="log")
    (x0, x1), (y0, y1) = axis.get_xlim(), axis.get_ylim()
    ends = (min(x0, y0), max(x1, y1))
    axis.plot(ends, ends, ":", color="#555555", linewidth=1)
    axis.set(xlim=(x0, x1), ylim=(y0, y1))


def _detail(found: Similarity, png: Path) -> str:
    """Spearman's inside each matrix, by kind; and of single records over training."""
    kinds = list(dict.fromkeys(map(kind, found.low)))
    with figures.panels(2, height=3.8, width=10.5) as (figure, (left, right)):
        for i, which in enumerate(kinds):
            inside = [v["spearman"] for name, v in found.within.items() if kind(name) == which]
            values = [value for value in inside if value is not None]
            marker, colour = figures.MARKERS[i % len(figures.MARKERS)], figures.COLOURS[i % len(figures.COLOURS)]
            left.plot(values, [i] * len(values), marker, color=colour, markersize=6, alpha=0.8)
        left.set(title="inside a matrix", xlabel="Spearman over its lines", yticks=range(len(kinds)), yticklabels=kinds)
        left.axvline(0, color="#777777", linewidth=0.8)
        left.set_xlim(min(-0.05, left.get_xlim()[0]), 1.02)
        left.invert_yaxis()
        for i, level in enumerate(LEVELS):
            right.plot([c["step"] for c in found.course], [c[level] for c in found.course], label=LEVELS[level],
                       marker=figures.MARKERS[i], markersize=4, **figures.look(i))  # fmt: skip
        lowest = min([c[level] for c in found.course for level in LEVELS], default=0.0)
        right.set(title="single records", xlabel="steps", ylabel="Spearman", ylim=(min(0.0, lowest) - 0.02, 1.03))
        right.legend(loc="lower right")
        return figures.saved(figure, png)
