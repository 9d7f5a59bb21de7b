"""Reports of runs: what is read from whole, open, torn, resumed and diverged runs, and the page that is made of it."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lowrank_ds import cli
from lowrank_ds.report import figures, page
from lowrank_ds.report.runs import differences, read_run, read_runs

TOKENS = 100  # a step


def train(step: int, loss: float, speed: float = 50.0) -> dict[str, Any]:
    """A record of pretrain.py: at 50 tokens/s a step of 100 tokens takes 2 s."""
    return {"kind": "train", "step": step, "loss": loss, "lr": 0.1, "tokens": step * TOKENS, "tokens_per_s": speed}


def valid(step: int, perplexity: float) -> dict[str, Any]:
    """A record of an evaluation."""
    return {"kind": "valid", "step": step, "perplexity": perplexity}


def watched(step: int, energy: float) -> dict[str, Any]:
    """A record of diagnostics.jsonl: one of two matrices has a limiter, which cut in 3 of 10 steps."""
    summary = {"captured_energy_mean": energy, "captured_energy_min": energy / 2, "limiter_hits": 3, "steps": 10}
    matrices = {"a": {"limiter_hits": 3, "steps": 10}, "b": {"limiter_hits": None, "steps": 10}}
    return {"step": step, "summary": summary, "matrices": matrices}


SUMMARY = {
    "optimizer": "FiraAdamW", "lr": 0.01, "steps": 40, "tokens": 4000, "perplexity": 20.0, "engine": "fsdp2",
    "optimizer_state_bytes_per_rank": [3 << 20, 4 << 20], "peak_memory_bytes_per_rank": [90 << 20, 80 << 20],
    "state_moments_bytes_per_rank": [2 << 20, 3 << 20], "state_projectors_bytes_per_rank": [1 << 20, 1 << 20],
    "state_other_bytes_per_rank": [64, 64], "optimizer_ms_median": 4.0, "step_ms_median": 31.5, "tokens_per_s": 50.0,
}  # fmt: skip
ARGUMENTS = {"optimizer": "FiraAdamW", "lr": 0.01, "rank": 8, "optimizer_args": {"update_proj_gap": 50}, "seed": 0,
             "output": "somewhere", "run": {"--rank": 8}, "ds_config": None}  # fmt: skip


def make(folder: Path, records: list[dict], summary: dict | None = SUMMARY, arguments: dict | None = ARGUMENTS) -> Path:
    """A run directory."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, content in (("summary", summary), ("arguments", arguments)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


GOOD = [train(10, 5.0), valid(10, 140.0), train(20, 4.0, 25.0), train(30, 3.5), train(40, 3.1), valid(40, 20.0)]


# -- reading ----------------------------------------------------------------------------------------------------------
def test_a_finished_run(tmp_path: Path) -> None:
    """Curves against steps, tokens and seconds; the state."""
    run = read_run(make(tmp_path / "a", GOOD), "a")
    assert (run.loss.steps, run.loss.y, run.loss.tokens) == (
        [10, 20, 30, 40],
        [5.0, 4.0, 3.5, 3.1],
        [1e3, 2e3, 3e3, 4e3],
    )
    assert run.loss.seconds == [20, 60, 80, 100]
    assert (run.perplexity.steps, run.perplexity.y) == ([10, 40], [140.0, 20.0])
    assert (run.perplexity.seconds, run.perplexity.tokens) == ([20, 100], [1e3, 4e3])
    assert (run.state, run.diverged, run.notes) == ("finished", None, ())
    assert figures.memory_of(run)["optimizer_state"] == 4 << 20 and figures.memory_of(run)["peak_memory"] == 90 << 20


def test_evaluations_between_records(tmp_path: Path) -> None:
    """Their tokens and times lie between those of the training records around them; before any, they are not known."""
    run = read_run(
        make(tmp_path / "a", [valid(5, 200.0), train(10, 5.0), valid(15, 100.0), train(20, 4.0), valid(30, 9.0)]), "a"
    )
    assert run.perplexity.tokens[:2] == [500, 1500] and run.perplexity.seconds[:2] == [10, 30]
    assert math.isnan(run.perplexity.tokens[2]) and run.perplexity.y[2] == 9.0


def test_a_resumed_run(tmp_path: Path) -> None:
    """Steps that were done again count once, as the later process did them; a torn line is left out. Both are said."""
    folder = make(tmp_path / "a", [train(10, 5.0), train(20, 4.0), train(30, 3.0), valid(30, 33.0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st\n')
        file.writelines(json.dumps(record) + "\n" for record in (train(20, 4.5), train(30, 3.6), valid(30, 36.0)))
    run = read_run(folder, "a")
    assert (run.loss.steps, run.loss.y) == ([10, 20, 30], [5.0, 4.5, 3.6])
    assert run.loss.seconds == [20, 40, 60] and run.perplexity.y == [36.0]
    assert any("torn" in note for note in run.notes) and any("resumed" in note and "20" in note for note in run.notes)


def test_a_diverged_and_an_open_run(tmp_path: Path) -> None:
    """NaN ends the curve and is said; so is what is missing."""
    run = read_run(make(tmp_path / "a", [train(10, 5.0), train(20, math.nan)], summary=None, arguments=None), "a")
    assert (run.state, run.diverged, run.loss.finite) == ("diverged at step 20", 20, [5.0])
    assert run.notes == ("summary.json is missing: the run has not finished", "arguments.json is missing")
    assert read_run(make(tmp_path / "b", GOOD[:3], summary=None), "b").state == "open at step 20"


def test_diagnostics(tmp_path: Path) -> None:
    """The limiter's share is of the updates of matrices that have one; a torn file takes nothing else with it."""
    folder = make(tmp_path / "a", GOOD)
    (folder / "diagnostics.jsonl").write_text(
        json.dumps(watched(10, 0.6)) + "\n" + json.dumps(watched(20, 0.5)) + '\n{"st'
    )
    run = read_run(folder, "a")
    assert [(step, numbers["captured_energy_mean"], numbers["limiter_share"]) for step, numbers in run.diagnostics] == [
        (10, 0.6, 0.3), (20, 0.5, 0.3),
    ]  # fmt: skip


def test_differences(tmp_path: Path) -> None:
    """Only what differs, what is in force before what was given, texts by what is in them; what is unknown is none."""
    text, other = {"--train-data": {"tokens": 5, "crc32": 7}}, {"update_proj_gap": 200}
    first = {**ARGUMENTS, "engine": "fsdp2", "train_data": "here", "run": text}
    second = {
        **first,
        "engine": "ddp",
        "lr": None,
        "output": "elsewhere",
        "optimizer_args": other,
        "train_data": "there",
    }
    runs = read_runs([
        make(tmp_path / "a", GOOD, {**SUMMARY, "world_size": 2}, first),
        make(tmp_path / "b", GOOD, {**SUMMARY, "world_size": 2}, {**second, "run": {**text, "--lr": 0.02}}),
        make(tmp_path / "c", GOOD, None, None), make(tmp_path / "open", GOOD, None, first),
    ])  # fmt: skip
    assert differences(runs) == {
        "engine": ["fsdp2", "ddp", None, "fsdp2"], "lr": [0.01, 0.02, None, 0.01],
        "optimizer_args.update_proj_gap": [50, 200, None, 50],
    }  # fmt: skip
    assert differences(runs[:1])["rank"] == [8] and differences(runs[:1])["train_data.crc32"] == [7]
    assert differences([runs[0], runs[0]]) == {}


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    """The last part of the path, or as many as it takes."""
    paths = [make(tmp_path / "x" / "run", GOOD), make(tmp_path / "y" / "run", GOOD)]
    assert [run.name for run in read_runs(paths)] == ["x/run", "y/run"]
    assert [run.name for run in read_runs(paths[:1])] == ["run"]


# -- the page ---------------------------------------------------------------------------------------------------------
class Elements(HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def all_kinds(folder: Path) -> list[Path]:
    """A good run with diagnostics, a diverged one, an old one, and one that only has arguments."""
    good = make(folder / "good <i>", GOOD)
    (good / "diagnostics.jsonl").write_text(json.dumps(watched(10, 0.6)) + "\n")
    bad = make(folder / "bad", [train(10, 6.0), valid(10, 400.0), train(20, math.inf)], None, {**ARGUMENTS, "lr": 9.0})
    old = {key: value for key, value in SUMMARY.items() if not key.startswith("state_")}
    (folder / "just begun").mkdir()
    (folder / "just begun" / "arguments.json").write_text(json.dumps(ARGUMENTS))
    return [good, bad, make(folder / "old", GOOD[:1], old, None), folder / "just begun"]


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Self-contained, with all figures, inline and as PNG; names are escaped; a second report replaces the first."""
    paths, out = all_kinds(tmp_path / "runs"), tmp_path / "new" / "report.html"
    assert cli.main(["report", *map(str, paths), "--output", str(out), "--title", "A & B"]) == 0
    assert "bad: summary.json is missing" in capsys.readouterr().out
    text = out.read_text()
    found = Elements(text)
    tags = [tag for tag, _ in found.tags]
    assert tags.count("figure") == 4 and not {"script", "link", "img", "iframe", "i"} & set(tags)
    assert "@import" not in text
    for drawing in re.findall("<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawing)
    links = [v for _, a in found.tags for k, v in a.items() if k in ("href", "src", "xlink:href")]
    assert all(value.startswith("#") for value in links)
    assert "A & B" in found.text and "good <i>" in found.text and "diverged at step 20" in found.text
    assert "0.01" in found.text and "9.0" in found.text and "4.00 MiB" in found.text and "1 min 40 s" in found.text
    pngs = sorted((tmp_path / "new" / "report").glob("*.png"))
    assert [path.stem for path in pngs] == ["loss", "memory", "perplexity", "subspaces"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pngs)
    assert cli.main(["report", str(paths[3]), "--output", str(out)]) == 0  # one run, with nothing to draw
    assert (
        "<figure" not in out.read_text()
        and "--diagnostics-every" in out.read_text()
        and "update_proj_gap" in out.read_text()
    )
    assert not list((tmp_path / "new" / "report").glob("*.png"))


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Any) -> Any:
    """The axes of a figure as `draw()` left them."""
    kept: list = []
    saved = figures.saved
    monkeypatch.setattr(figures, "saved", lambda figure, png: kept.append(_measured(figure)) or saved(figure, png))
    draw()
    return kept[0]


def _measured(figure: Any) -> tuple[dict, list]:
    """({label: (x, y) of its line in each panel}, boxes of legends and panels)."""
    figure.canvas.draw()
    lines: dict[str, list] = {}
    for axis in figure.axes:
        for line in axis.get_lines():
            lines.setdefault(line.get_label(), []).append((list(line.get_xdata()), list(line.get_ydata())))
    boxes = [legend.get_window_extent() for legend in figure.legends] + [a.get_tightbbox() for a in figure.axes]
    return lines, boxes


def test_curves_show_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run's loss against steps, tokens and seconds; nothing lies over anything else, also with many long names."""
    names = [f"a_rather_long_name_of_a_run_number_{i}" for i in range(9)]
    runs = read_runs([make(tmp_path / name, GOOD) for name in names])
    lines, boxes = drawn(monkeypatch, lambda: page._loss(runs, None))
    (steps, loss), (tokens, _), (seconds, _) = lines[figures.short(names[0])]
    assert steps == [10, 20, 30, 40] and loss == [5.0, 4.0, 3.5, 3.1] and tokens[-1] == 4000
    assert seconds == [20, 60, 80, 100]  # below three minutes: in seconds
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    _, alone = drawn(monkeypatch, lambda: page._loss(runs[:1], None))
    assert boxes[-1].height > 0.97 * alone[-1].height  # the figure has grown, not the panels shrunk
    assert len({(figures.look(i)["color"], str(figures.look(i)["linestyle"])) for i in range(35)}) == 35


def test_long_curves_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run keeps its first and last point; the picture is not cut where the loss rises late."""
    records = [train(i, 9.0 if i < 5 else 3.0 + (i > 9000)) for i in range(1, 10_001)]
    run = read_run(make(tmp_path / "a", records), "a")
    lines, _ = drawn(monkeypatch, lambda: page._loss([run], None))
    steps, loss = lines["a"][0]
    assert len(steps) <= figures.POINTS + 1 and (steps[0], steps[-1]) == (1, 10_000) and loss[-1] == 4.0
    low, high = figures._limits([run.loss], log=False)
    assert 2.9 < low < 3.0 and 4.0 < high < 4.2


def test_messages(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong and what to do; exit code 2 and no page."""
    run, out = make(tmp_path / "a", GOOD), tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([tmp_path / "none"], "none: no such directory"),
        ([tmp_path / "empty"], "empty: has no metrics.jsonl, summary.json or arguments.json"),
        ([run, run], "given twice"),
    ):
        assert cli.main(["report", *map(str, paths), "--output", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["report", str(run), "--output", str(tmp_path / "report")]) == 2
    assert "needs a name that ends in .html" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(run), "--output", str(out)]) == 2
    assert "matplotlib, which is not installed: pip install 'lowrank_ds[report]'" in capsys.readouterr().err
    assert not out.exists()
