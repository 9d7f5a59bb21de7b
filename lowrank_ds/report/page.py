"""One self-contained HTML page about runs: no script, no font, no file beside it is needed."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_ds.report import figures
from lowrank_ds.report.runs import Run, differences, number

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto; max-width: 1280px;
       padding: 0 1.2rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p.why { color: #555; margin: .2rem 0 .6rem; max-width: 75ch }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #e3e3e3 }
th { border-bottom: 2px solid #999; vertical-align: bottom; white-space: normal }
td.text, th.text { text-align: left }
td.long { white-space: normal; min-width: 9rem; max-width: 22rem; overflow-wrap: anywhere }
td.run { white-space: normal; min-width: 9rem; max-width: 15rem; overflow-wrap: anywhere }
td.bad { color: #a32900; font-weight: 600 } td.unset { color: #767676 }
svg { width: 100%; height: auto; display: block } figure { margin: 0 }
.run svg { display: inline-block; width: 2.6rem; height: .8rem; margin-right: .5rem; vertical-align: middle }
ul.notes { color: #555; padding-left: 1.2rem; margin: .6rem 0 }
@media print { h2 { break-after: avoid } figure, table { break-inside: avoid } }
"""
_DASH_ARRAYS = ("", "6 3", "8 3 2 3", "2 3", "9 3 2 3 2 3")


def build(runs: Sequence[Run], title: str, folder: Path | None = None) -> str:
    """The page's HTML. folder: where its figures are also written as PNG files (None: nowhere)."""
    for name, *_ in _FIGURES if folder else ():
        (folder / f"{name}.png").unlink(missing_ok=True)  # of a report before, if this one has none
    parts = [section("Results", "", _summary(runs) + _notes(runs))]
    for name, heading, why, draw in _FIGURES:
        svg = draw(runs, folder / f"{name}.png" if folder else None)
        parts.append(section(heading, why if svg else _ABSENT[name], figure(svg, heading) if svg else ""))
    parts.append(section(*_differences(runs)))
    names = ", ".join(run.name for run in runs)
    return page(title, f"{len(runs)} run{'s' * (len(runs) > 1)}: {names}", parts)


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """A whole document of sections that are HTML already."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_CSS}</style></head>\n<body>\n'
        f'<h1>{html.escape(title)}</h1>\n<p class="why">{html.escape(subtitle)}</p>\n'
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def section(heading: str, why: str, content: str) -> str:
    said = f'<p class="why">{html.escape(why)}</p>\n' if why else ""
    return f"<section><h2>{html.escape(heading)}</h2>\n{said}{content}</section>"


def figure(svg: str, heading: str) -> str:
    return f'<figure aria-label="{html.escape(heading)}">{svg}</figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """A table. head: plain texts. rows: cells, "<td...>" or plain texts. text: columns on the left that hold words."""
    top = "".join(f"<th{' class=text' if i < text else ''}>{html.escape(h)}</th>" for i, h in enumerate(head))
    lines = []
    for row in rows:
        cells = [
            cell if cell.startswith("<td") else f"<td{' class=text' if i < text else ''}>{html.escape(cell)}</td>"
            for i, cell in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{top}</tr>\n' + "\n".join(lines) + "\n</table></div>\n"


# -- results ----------------------------------------------------------------------------------------------------------
_HEAD = ("run", "state", "optimizer", "lr", "steps", "tokens", "training loss", "held-out perplexity", "lowest",
         "optimizer state", "peak memory", "optimizer of step, ms", "tokens/s", "training time")  # fmt: skip


def _summary(runs: Sequence[Run]) -> str:
    """The table of results, a line for each run."""
    return table(_HEAD, [[_name(i, run), *_results(run)] for i, run in enumerate(runs)], text=3)


def _name(index: int, run: Run) -> str:
    """A run's cell: how its curves look, and its name."""
    colour = figures.COLOURS[index % len(figures.COLOURS)]
    dashes = _DASH_ARRAYS[index % len(_DASH_ARRAYS)]
    line = f'<line x1="0" y1="5" x2="40" y2="5" stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes}"/>'
    chip = f'<svg viewBox="0 0 40 10" aria-hidden="true">{line}</svg>'
    return f'<td class="text run" title="{html.escape(str(run.path))}">{chip}{html.escape(run.name)}</td>'


def _results(run: Run) -> list[str]:
    """The other cells of a run's line; "–" where nothing is known."""
    summary, settings, sizes = run.summary, run.settings(), figures.memory_of(run)
    bad = "bad " if run.diverged else ""
    perplexity = run.perplexity.y[-1] if run.perplexity.y else number(summary.get("perplexity"))
    tokens = run.loss.tokens[-1] if run.loss.tokens else number(summary.get("tokens"))
    steps = run.loss.steps[-1] if run.loss.steps else summary.get("steps")
    times = " of ".join(_number(summary.get(f"{what}_ms_median"), ",.1f") for what in ("optimizer", "step"))
    return [
        f'<td class="{bad}text">{html.escape(run.state)}</td>',
        str(settings.get("optimizer") or "–"),
        _number(settings.get("lr"), "g"),
        _number(steps, ",.0f"),
        figures.count(tokens) if math.isfinite(tokens) else "–",
        "not finite" if run.diverged else _number(run.loss.y[-1] if run.loss.y else None, ".4f"),
        _number(perplexity, ",.2f"),
        _number(min(run.perplexity.finite, default=None), ",.2f"),
        *(size_text(sizes.get(key)) for key in ("optimizer_state", "peak_memory")),
        times if "step_ms_median" in summary else "–",
        _number(summary.get("tokens_per_s"), ",.0f"),
        duration(run.loss.seconds[-1] if run.loss.seconds else None),
    ]


def _number(value: Any, style: str) -> str:
    """A number for people; "–" for none, "∞" for one that has overflowed."""
    value = math.nan if value is None else number(value)
    if math.isnan(value):
        return "–"
    return f"{value:{style}}" if math.isfinite(value) else "∞"


def size_text(bytes_: float | None) -> str:
    """1536 -> "1.50 KiB"."""
    if bytes_ is None:
        return "–"
    unit, name = figures.byte_unit(bytes_)
    return f"{bytes_ / unit:.2f} {name}" if unit > 1 else f"{bytes_:.0f} bytes"


def duration(seconds: float | None) -> str:
    """3725 -> "1 h 02 min"."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _notes(runs: Sequence[Run]) -> str:
    """What the reader must know of each run's files."""
    notes = []
    for run in runs:
        found = list(run.notes)
        if run.diverged:
            found.append(f"the loss is not finite at step {run.diverged:,}; its curves end there with a cross")
        notes += [f"<li><b>{html.escape(run.name)}</b>: {html.escape(note)}</li>" for note in found]
    return f'<ul class="notes">{"".join(notes)}</ul>' if notes else ""


# -- figures ----------------------------------------------------------------------------------------------------------
def _loss(runs: Sequence[Run], png: Path | None) -> str:
    return figures.curves(runs, lambda run: run.loss, "training loss (nats/token)", png)


def _perplexity(runs: Sequence[Run], png: Path | None) -> str:
    return figures.curves(runs, lambda run: run.perplexity, "held-out perplexity", png, log=True)


_FIGURES = (
    ("loss", "Training loss", "Mean over the steps since the last record. The steep start may lie above the picture. "
     "Training time leaves out evaluation and saving.", _loss),
    ("perplexity", "Held-out perplexity", "exp of the mean loss on held-out text; logarithmic scale.", _perplexity),
    ("memory", "Memory", "As measured, of the rank that has most. Moments and projectors are what the optimizer keeps "
     "between steps; the peak on a CPU is the whole program's.", figures.memory),
    ("subspaces", "Subspaces", "From diagnostics.jsonl. Solid: mean over matrices; thin: the lowest matrix. What the "
     "numbers mean: docs/diagnostics.md.", figures.subspaces),
)  # fmt: skip
_ABSENT = {
    "loss": "No run has a finite training loss in metrics.jsonl.",
    "perplexity": "No run was evaluated (--eval-every N, or its end).",
    "memory": "No run says: memory is in summary.json, which a run writes when it is finished.",
    "subspaces": "No run has diagnostics.jsonl (--diagnostics-every N).",
}


# -- settings ---------------------------------------------------------------------------------------------------------
def _differences(runs: Sequence[Run]) -> tuple[str, str, str]:
    """(heading, explanation, table) of what was set differently; of one run all that was set."""
    rows = differences(runs)
    if not rows:
        return "Settings", "The runs' settings are the same, or not recorded (arguments.json).", ""
    heading = "Settings that differ" if len(runs) > 1 else "Settings"
    why = "From arguments.json and summary.json; paths of outputs and caches are left out." + (
        " All other settings are the same in all runs." if len(runs) > 1 else ""
    )
    lines = [[name, *(_value(value) for value in values)] for name, values in rows.items()]
    return heading, why, table(["setting", *(run.name for run in runs)], lines, text=1 + len(runs))


def _value(value: Any) -> str:
    """A setting's cell."""
    if value is None:
        return '<td class="text unset">–</td>'
    return f'<td class="text long">{html.escape(value if isinstance(value, str) else json.dumps(value))}</td>'
