"""What a run directory says: curves without repeated steps, facts, settings, and what is missing. No torch needed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LEFT_OUT = (  # say nothing of the training
    "config", "output", "local_rank", "run", "ds_config", "cache_dir", "resume", "log_every", "diagnostics_every",
    "scaling_every", "save_every", "keep_last", "timeout",
)  # fmt: skip
_MEASURED = ("world_size", "device")  # only in summary.json: a run that has none says nothing of them


@dataclass(frozen=True)
class Curve:
    """Numbers y against steps, tokens and seconds of training, lists of one length; NaN where one is not known.

    seconds: evaluation and saving left out.
    """

    steps: list[int] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    @property
    def finite(self) -> list[float]:
        """The finite y."""
        return [value for value in self.y if math.isfinite(value)]


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        name: how it is called in the report. path: where it is.
        loss: mean training loss of each interval (nats a token). perplexity: held-out.
        summary, arguments: summary.json and arguments.json, {} where there is none.
        diagnostics: [(step, summary of the interval)], see `lowrank_ds.Diagnostics`; with "limiter_share", the part of
            all updates of matrices that have a limiter in which it cut.
        diverged: the first step with a loss that is not finite; None: there is none.
        notes: what is missing, torn or repeated, each a sentence for the reader.
    """

    name: str
    path: Path
    loss: Curve
    perplexity: Curve
    summary: dict[str, Any]
    arguments: dict[str, Any]
    diagnostics: list[tuple[int, dict[str, float]]]
    diverged: int | None
    notes: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether it has got to its end: summary.json comes last."""
        return bool(self.summary)

    @property
    def state(self) -> str:
        """One word, or a few, for a table."""
        last = f" at step {self.loss.steps[-1]:,}" if self.loss.steps else ""
        return (
            f"diverged at step {self.diverged:,}" if self.diverged else "finished" if self.finished else f"open{last}"
        )

    def settings(self) -> dict[str, Any]:
        """{name: value} of what decides the training, flat, for comparison; outputs and what is logged left out.

        A ds_config's optimizer parameters and flags of the same name come together as the value in force; model, text
        and tokenizer are what they are (settings, sizes, checksums) rather than where they lie, if the run recorded it.
        """
        given = {key: value for key, value in self.arguments.items() if key not in _LEFT_OUT}
        told = {key.lstrip("-"): value for key, value in (self.arguments.get("run") or {}).items()}
        config = self.arguments.get("ds_config") or {}
        in_force = {name: told[flag] for flag, name in _IN_FORCE.items() if flag in told}
        if self.summary.get("optimizer"):
            in_force["optimizer"] = self.summary["optimizer"]
        flat = _flatten(given | in_force)
        flat |= _flatten(config.get("zero_optimization") or {}, "zero_optimization.")
        flat |= {name: self.summary[name] for name in _MEASURED if name in self.summary}
        if "engine" in self.summary:
            flat.setdefault("engine", self.summary["engine"])
        return flat


_IN_FORCE = {
    "optimizer": "optimizer", "optimizer-args": "optimizer_args", "lr": "lr", "rank": "rank", "dtype": "dtype",
    "batch-size": "batch_size", "gradient-clipping": "gradient_clipping", "model": "model", "tokenizer": "tokenizer",
    "train-data": "train_data", "valid-data": "valid_data",
}  # fmt: skip


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, part in value.items():
        if isinstance(part, dict):
            flat |= _flatten(part, f"{prefix}{key}.")
        else:
            flat[prefix + key] = part
    return flat


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """{setting: its value in each run} of those that are not the same in all (all of them for one run).

    A run whose arguments.json is missing says nothing and makes no difference; None: not set.
    """
    told = [run.settings() if run.arguments or run.summary else None for run in runs]
    names = sorted({name for settings in told if settings for name in settings})
    rows = {name: [None if settings is None else settings.get(name) for settings in told] for name in names}
    if len(runs) == 1:
        return {name: values for name, values in rows.items() if values != [None]}
    found = {}
    for name, values in rows.items():
        known = [values[i] for i, run in enumerate(runs) if (run.summary if name in _MEASURED else told[i])]
        if any(value != known[0] for value in known):
            found[name] = values
    return found


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these directories, named by their last part, or by as many as tell them apart.

    Raises:
        ValueError: a path is no directory, has nothing of a run in it, or is given twice.
    """
    resolved = [Path(path).resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError("a run directory is given twice; name each once")
    depth = next(d for d in range(1, 100) if len({path.parts[-d:] for path in resolved}) == len(resolved))
    return [read_run(path, "/".join(full.parts[-depth:])) for path, full in zip(paths, resolved, strict=True)]


def read_run(path: Path, name: str) -> Run:
    """One run directory; anything may be missing but not everything.

    Raises:
        ValueError: it is no directory, or has none of a run's files.
    """
    path, notes = Path(path), []
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; give the --output of launch/pretrain.py")
    records = _lines(path / "metrics.jsonl", notes)
    summary, arguments = (_object(path / f"{part}.json", notes) for part in ("summary", "arguments"))
    if not records and not summary and not arguments:
        raise ValueError(
            f"{path}: has no metrics.jsonl, summary.json or arguments.json: not a run. Give the --output of "
            "launch/pretrain.py"
        )
    train = _without_repeats([r for r in records if r.get("kind") == "train" and "loss" in r], notes)
    valid = _without_repeats([r for r in records if r.get("kind") == "valid" and "perplexity" in r], [])
    loss, seconds = _loss_curve(train)
    watched = _without_repeats(_lines(path / "diagnostics.jsonl", notes, optional=True), [])
    diagnostics = [(r["step"], _interval(r)) for r in watched if isinstance(r.get("summary"), dict)]
    diverged = next((s for s, y in zip(loss.steps, loss.y, strict=True) if not math.isfinite(y)), None)
    perplexity = _valid_curve(valid, loss, seconds)
    return Run(name, path, loss, perplexity, summary, arguments, diagnostics, diverged, tuple(notes))


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, in the order of steps, repeats and torn lines left out; [] without the file."""
    return _without_repeats(_lines(path, notes, optional=True), notes)


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; {} and a note where there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        notes.append(f"{path.name} is missing" + (": the run has not finished" if path.stem == "summary" else ""))
        return {}
    except ValueError:
        notes.append(f"{path.name} is not valid JSON and is left out")
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path, notes: list[str], optional: bool = False) -> list[dict[str, Any]]:
    """Records of a JSON-lines file that have a step; torn lines are counted in a note."""
    if not path.exists():
        notes.extend([] if optional else [f"{path.name} is missing: there are no curves"])
        return []
    found, torn = [], 0
    for line in filter(str.strip, path.read_text(errors="replace").splitlines()):
        try:
            record = json.loads(line)
            found.append({**record, "step": int(record["step"])})
        except (ValueError, KeyError, TypeError):
            torn += 1
    if torn:
        notes.append(f"{path.name}: {torn} torn line{'s' * (torn > 1)} left out")
    return found


def _without_repeats(records: list[dict[str, Any]], notes: list[str]) -> list[dict[str, Any]]:
    """Records in the order of steps. A resumed run that goes back supersedes what came after that step before."""
    kept: list[dict[str, Any]] = []
    back = []
    for record in records:
        if kept and record["step"] <= kept[-1]["step"]:
            back.append(record["step"])
            while kept and kept[-1]["step"] >= record["step"]:
                kept.pop()
        kept.append(record)
    if back:
        steps = ", ".join(f"{step:,}" for step in back[:4]) + (", ..." if len(back) > 4 else "")
        notes.append(f"resumed: steps from {steps} on were done again; the later records count")
    return kept


def _interval(record: dict[str, Any]) -> dict[str, float]:
    """The summary of a record of diagnostics.jsonl, and the share of updates that the limiter cut."""
    summary = record["summary"]
    limited = [m for m in (record.get("matrices") or {}).values() if m.get("limiter_hits") is not None]
    steps = sum(m["steps"] for m in limited)
    return {**summary, "limiter_share": sum(m["limiter_hits"] for m in limited) / steps} if steps else summary


def number(value: Any) -> float:
    """A JSON value as a float; NaN if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _loss_curve(train: list[dict[str, Any]]) -> tuple[Curve, list[float]]:
    """(the loss, seconds of training until each record): intervals' tokens over their speed, added up."""
    seconds, total, before = [], 0.0, 0.0
    for record in train:
        tokens, speed = number(record.get("tokens")), number(record.get("tokens_per_s"))
        total += (tokens - before) / speed if speed > 0 else math.nan
        before = tokens
        seconds.append(total)
    tokens = [number(r.get("tokens")) for r in train]
    return Curve([r["step"] for r in train], tokens, seconds, [number(r["loss"]) for r in train]), seconds


def _valid_curve(valid: list[dict[str, Any]], loss: Curve, seconds: list[float]) -> Curve:
    """Perplexities, with tokens and seconds from the training records around them."""
    steps = [r["step"] for r in valid]
    tokens = [_between(step, loss.steps, loss.tokens) for step in steps]
    times = [_between(step, loss.steps, seconds) for step in steps]
    return Curve(steps, tokens, times, [number(r["perplexity"]) for r in valid])


def _between(step: int, steps: Sequence[int], values: Sequence[float]) -> float:
    """The value at `step`, linear between records (and from 0 at step 0); NaN beyond the last."""
    before, at = 0, 0.0
    for known, value in zip(steps, values, strict=True):
        if step <= known:
            return at + (value - at) * (step - before) / (known - before)
        before, at = known, value
    return math.nan
