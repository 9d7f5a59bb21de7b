"""How well low-rank training goes, matrix by matrix: captured energy, overlap of subspaces, limiter, update sizes.

    monitor = lowrank_ds.Diagnostics(optimizer)
    ...                                          # train
    report = monitor.collect()                   # on all ranks; since the last time
    monitor.jsonl("diagnostics.jsonl", step)     # the same, written by the first rank

Sums are made on the device during the step (`observe.py`) and added over the ranks when they are collected: one
collective for each group of ranks that shares matrices (one in all, but on meshes of several kinds) and one read by the
host, however many matrices and steps. What the numbers mean: docs/diagnostics.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_ds import engines, params, scaling
from lowrank_ds.collectives import Task, is_first, run_all
from lowrank_ds.observe import NUMBERS, Sink
from lowrank_ds.optimizer import LowRankOptimizer
from lowrank_ds.projection import side_name
from lowrank_ds.recipe import Recipe
from lowrank_ds.requests import Sum, ask
from lowrank_ds.slots import Slot

_MEANS = ("captured_energy", "overlap", "update_rms")
_BUCKET = 1 << 22  # numbers of scaling factors summed at a time
_TOTALS = ("limiter_hits", "skipped_updates", "skipped_refreshes")


class _Matrix(NamedTuple):
    """A projected matrix, wherever its entries are. shape: (m, n). holders: who shares them."""

    name: str
    shape: tuple[int, int]
    holders: engines.Sharers
    recipe: Recipe

    @property
    def lines(self) -> int:
        """How many lines it has: rows when columns are compressed, else columns."""
        return self.shape[0 if side_name(self.recipe.subspace.proj_type, self.shape) == "right" else 1]


@dataclasses.dataclass(frozen=True)
class Report:
    """The diagnostics of one interval.

    The numbers of a matrix, None where there is none in this interval or for this algorithm:

    - captured_energy: sum |R|^2 / sum |G|^2, how much of the gradient the subspace holds, in [0, 1].
    - overlap: mean |B_old^T B_new|_F^2 / r over the interval's refreshes, in [0, 1]. (With a 4-bit projector, which is
      not quite orthonormal, both may exceed 1 by some percent.)
    - update_rms: root mean square of the change of an entry in a step, learning rate in, weight decay left out.
    - limiter_hits: steps in which Fira's or APOLLO's limiter cut; steps: that there were.
    - skipped_updates, skipped_refreshes: because a gradient was not finite (a refresh: or all zero).

    Attributes:
        matrices: {name of the matrix: numbers}.
        summary: {"captured_energy_mean", "captured_energy_min", "overlap_mean", "overlap_min", "update_rms_mean",
            "update_rms_min", "limiter_hits", "skipped_updates", "skipped_refreshes", "steps"}: means and minima over
            the matrices that have the number, sums of counts, the largest number of steps; keys without a number left
            out.
    """

    matrices: dict[str, dict[str, Any]]
    summary: dict[str, float]


class Diagnostics:
    """Watches one optimizer of this package, from now until `remove()`. Build it on all ranks.

    Args:
        optimizer: ours, or what an engine wrapped around it (DeepSpeed's engine or optimizer, accelerate's).
        compare_scaling: also compare scaling factors with those of full-rank Adam (`scaling_factors`). It keeps
            Adam's moments of full size for each projected matrix, and adds a collective to each step.

    Raises:
        TypeError: there is none of this package's optimizers in it.
        ValueError: it projects nothing; or, with `compare_scaling`, it has no scaling factors.
        RuntimeError: it is watched already.
    """

    def __init__(self, optimizer: Any, compare_scaling: bool = False) -> None:
        self.optimizer = _ours(optimizer)
        if not self.optimizer._projected:
            raise ValueError(
                f"Diagnostics: {type(self.optimizer).__name__} projects no matrix (rank=None, or a LOMO): there is no "
                "subspace to say anything about."
            )
        if self.optimizer._observer is not None:
            raise RuntimeError("Diagnostics: this optimizer is watched already; use that object, or remove() it.")
        self.scaling = compare_scaling
        self._sinks: dict[str, Sink] = {}
        for group in self.optimizer.param_groups if compare_scaling else ():
            if not self.optimizer._projected.isdisjoint(group["param_names"]):
                scaling.check(self.optimizer.recipe(group))
        self.optimizer._observer = self

    def remove(self) -> None:
        """Stop watching; what was not collected is gone."""
        self.optimizer._observer = None
        self._sinks.clear()

    # -- in the step --------------------------------------------------------------------------------------------------
    def sink(self, slot: Slot) -> Sink | None:
        """Where the step of a matrix leaves its numbers; None for a parameter that is not projected."""
        if not slot.projected:
            return None
        if slot.name not in self._sinks:
            device = engines.local(slot.host).device
            factors = scaling.Factors(slot.layout, device) if self.scaling else None
            self._sinks[slot.name] = Sink(slot.layout, device, factors)
        return self._sinks[slot.name]

    # -- between steps ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def collect(self) -> Report:
        """The numbers since the last time, the same on all ranks; all must call it. Starts a new interval."""
        watched = list(self._watched())
        parts: dict[Any, list[_Matrix]] = {}
        for matrix in watched:
            parts.setdefault(matrix.holders, []).append(matrix)
        if not watched:
            return _report({})
        device = next((sink.sums.device for sink in self._sinks.values()), torch.device("cpu"))
        tasks = []
        for holders, matrices in parts.items():
            own = torch.stack([self._sums(matrix.name, device) for matrix in matrices])
            tasks.append(Task(holders, ask(Sum(own)), own.numel(), "diagnostics"))
        rows = torch.cat(run_all(tasks, device, 1)).tolist()
        for sink in self._sinks.values():
            sink.sums.zero_()
        ordered = [matrix for matrices in parts.values() for matrix in matrices]
        known = {m.name: dict(zip(NUMBERS, row, strict=True)) for m, row in zip(ordered, rows, strict=True)}
        seen = [m for m in watched if known[m.name]["steps"] or known[m.name]["refused"]]
        return _report({m.name: _numbers(known[m.name], m) for m in seen})

    @torch.no_grad()
    def scaling_factors(self) -> dict[str, dict[str, Tensor]]:
        """{matrix: {"low": (lines,), "full": (lines,)}}: mean factor of each line over the steps since the last time.

        fp64, on the CPU, the same on all ranks; all must call it. low: phi(R), which Fira and APOLLO scale by; full:
        phi(G) (`scaling.py`). Lines are rows when columns are compressed, else columns. Matrices without a step are
        left out.

        Raises:
            RuntimeError: `compare_scaling` was not asked for.
        """
        if not self.scaling:
            raise RuntimeError("scaling_factors(): build Diagnostics(optimizer, compare_scaling=True) before training.")
        watched = list(self._watched())
        device = next((sink.sums.device for sink in self._sinks.values()), torch.device("cpu"))
        tasks = []
        for matrix in watched:
            own = torch.zeros(2 * max(matrix.shape) + 1, dtype=torch.float64, device=device)
            sink = self._sinks.get(matrix.name)
            if sink is not None:
                own += sink.scaling.flat().to(device) * sink.counts  # all sharers know it whole: one of them tells
                sink.scaling.clear()
            tasks.append(Task(matrix.holders, ask(Sum(own)), own.numel(), "scaling factors"))
        found = {}
        for matrix, told in zip(watched, run_all(tasks, device, _BUCKET), strict=True):
            *sums, steps = told.cpu().split([max(matrix.shape)] * 2 + [1])
            if steps > 0:
                low, full = (part[: matrix.lines] / steps for part in sums)
                found[matrix.name] = {"low": low, "full": full}
        return found

    def _sums(self, name: str, device: torch.device) -> Tensor:
        """What this rank has of a matrix (len(NUMBERS),): zeros if it holds nothing of it."""
        if name in self._sinks:
            return self._sinks[name].sums.to(device)
        return torch.zeros(len(NUMBERS), dtype=torch.float64, device=device)

    def _watched(self) -> Iterator[_Matrix]:
        """The projected matrices, in the order of the param groups, also those held elsewhere: the same on all ranks.

        (Under ZeRO-1/2 a rank knows nothing of what others hold, but the names.)
        """
        optimizer = self.optimizer
        for group in optimizer.param_groups:
            hosts, names, recipe = group["params"], group["param_names"], optimizer.recipe(group)
            own = len(names) == len(hosts)  # else an engine keeps them in tensors of its own (and none between steps)
            for index, name in enumerate(names):
                if name in optimizer._projected:
                    holders = engines.holders(hosts[index] if own else None, optimizer._originals[name]())
                    count, m, n = params.matrices(optimizer._shapes[name], group["matricize"])
                    for i in range(count):
                        yield _Matrix(name if count == 1 else f"{name}[{i}]", (m, n), holders, recipe)

    def jsonl(self, path: str | Path, step: int, report: Report | None = None) -> Report:
        """Collect, and let the first rank append {"step", "summary", "matrices"} as a line of JSON to a file.

        Call it on all ranks. report: what to write instead of collecting.
        """
        report = self.collect() if report is None else report
        if is_first():
            line = {"step": step, "summary": report.summary, "matrices": report.matrices}
            with Path(path).open("a") as file:
                file.write(json.dumps(line) + "\n")
        return report

    def tensorboard(self, writer: Any, step: int, report: Report | None = None, matrices: bool = False) -> Report:
        """Collect, and hand the summary to `writer.add_scalar` as "lowrank/<number>".

        Call it on all ranks. writer: a SummaryWriter; None on ranks that write nothing. report: see `jsonl`.
        matrices: write each matrix' numbers too, as "lowrank/<matrix>/<number>".
        """
        report = self.collect() if report is None else report
        if writer is not None:
            own = {
                f"{name}/{key}": value for name, numbers in report.matrices.items() for key, value in numbers.items()
            }
            for key, value in (report.summary | (own if matrices else {})).items():
                if value is not None:
                    writer.add_scalar(f"lowrank/{key}", value, step)
        return report


def _ours(optimizer: Any) -> LowRankOptimizer:
    """The optimizer of this package in what engines wrapped around it."""
    inner, seen = optimizer, []
    while not isinstance(inner, LowRankOptimizer):
        seen.append(type(inner).__name__)
        following = getattr(inner, "optimizer", None)
        if following is None or following is inner or len(seen) > 8:
            raise TypeError(
                "Diagnostics takes an optimizer of lowrank_ds, or an engine's wrapper of one; got "
                f"{' around '.join(seen)}."
            )
        inner = following
    return inner


def _numbers(sums: Mapping[str, float], matrix: _Matrix) -> dict[str, Any]:
    """A matrix' entry in the report, from its sums over the ranks."""
    updates, limited = sums["steps"] - sums["skipped"], getattr(matrix.recipe.residual, "growth", None)
    return {
        "captured_energy": sums["projected"] / sums["gradient"] if sums["gradient"] > 0 else None,
        "overlap": sums["overlap"] / sums["compared"] if sums["compared"] else None,
        "update_rms": math.sqrt(sums["update"] / (math.prod(matrix.shape) * updates)) if updates > 0 else None,
        "limiter_hits": None if limited is None or math.isinf(limited) else round(sums["limited"]),
        "steps": round(sums["steps"]),
        "skipped_updates": round(sums["skipped"]),
        "skipped_refreshes": round(sums["refused"]),
    }


def _report(matrices: dict[str, dict[str, Any]]) -> Report:
    summary: dict[str, float] = {}
    for key in _MEANS:
        found = [numbers[key] for numbers in matrices.values() if numbers[key] is not None]
        if found:
            summary |= {f"{key}_mean": sum(found) / len(found), f"{key}_min": min(found)}
    for key in _TOTALS:
        counts = [numbers[key] for numbers in matrices.values() if numbers[key] is not None]
        if counts:
            summary[key] = sum(counts)
    summary["steps"] = max((numbers["steps"] for numbers in matrices.values()), default=0)
    return Report(matrices, summary)
