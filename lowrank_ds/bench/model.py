"""`lowrank-ds bench model`: all parameters of a LLaMA on one process, random gradients, refreshes included."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ds
from lowrank_ds.bench import gemms, held, llama
from lowrank_ds.bench.clock import Clock, interleave, ratio, summaries, summary
from lowrank_ds.bench.contenders import BASE, NEVER, Contender, choose, split, with_subspace
from lowrank_ds.bench.subjects import Subject, fingerprint, gradients, parameters

_SKIPPED = ("ApolloMini", "apollo-torch mini")  # measured where they are named
_METHODS = {"GaLoreAdamW": lowrank_ds.GaLoreAdamW, "FiraAdamW": lowrank_ds.FiraAdamW}
_GEMMS, _REST = "GEMMs of GaLoreAdamW", "fused AdamW of the rest"
_EXACT = {"galore-torch", "fira"}  # each refresh an exact SVD of every matrix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this sub-command."""
    add = parser.add_argument
    add(
        "--model", default=None, metavar="FILE", help="HF config of a LLaMA (default: ds_configs/models/llama_60m.json)"
    )
    add("--rank", type=int, default=128, help="of the subspaces (default 128, as published for 60M)")
    add("--gap", type=int, default=200, help="steps between refreshes that their time is spread over (default 200)")
    add("--refresh-rounds", type=int, default=3, help="refreshes timed, exact SVDs once (default 3)")
    add("--subspaces", nargs="+", choices=("svd", "randomized", "power"), default=None, help="of GaLore and Fira "
        "(default: their default and svd)")  # fmt: skip


def run(given: argparse.Namespace) -> dict[str, Any]:
    """{"settings", "rows", "floor", "missing"}."""
    if given.gap < 1 or given.refresh_rounds < 1:
        raise ValueError("--gap and --refresh-rounds must be at least 1")
    shapes = llama.parameter_shapes(llama.read_config(given.model, "llama_60m"))
    inner = llama.projected(shapes)
    wanted = [c for c in choose(given.only, given.packages, torch.float32) if given.only or c.name not in _SKIPPED]
    contenders, missing = split(wanted)
    device = torch.device(given.device)
    params, grads = parameters(shapes, torch.float32, device), gradients(shapes, torch.float32, device)
    cell = Cell(params, grads, inner, given.rank, Clock(device, given.threads), given.refresh_rounds)
    before = fingerprint(grads)
    rows, floor = _rows(cell, contenders, given)
    if fingerprint(grads) != before:
        raise RuntimeError("a contender changed the gradients that all share: the times are not comparable")
    settings = {"model": given.model or "llama_60m", "rank": given.rank, "gap": given.gap,
                "parameters": sum(p.numel() for p in params.values()), "matrices": len(inner)}  # fmt: skip
    return {"settings": settings, "rows": rows, "floor": floor, "missing": missing}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What all contenders share: weights, gradients, names of what is projected, rank, clock and refreshes timed."""

    params: dict[str, nn.Parameter]
    grads: dict[str, Tensor]
    inner: Sequence[str]
    rank: int
    clock: Clock
    refreshes: int

    def subject(self, contender: Contender, gap: int) -> Subject:
        """A contender on them."""
        return Subject(contender, self.params, self.grads, self.inner, self.rank, gap)

    def refresh(self, contender: Contender, times: int) -> dict[str, float]:
        """Milliseconds of {"cold", "warm"}: a first step, and the median of later ones that all make new bases."""
        subject, main = self.subject(contender, 1), self.clock.main
        cold = subject.first_step(self.clock.time)[main]
        later = []
        for _ in range(times):
            subject.prepare()
            later.append(self.clock.time(subject.step)[main])
        return {"cold": cold, "warm": summary(later)["median"] if later else cold}


def _rows(
    cell: Cell, contenders: Sequence[Contender], given: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The contenders' figures, and the floor's."""
    subjects, first = {}, {}
    for contender in contenders:
        subject = subjects[contender.name] = cell.subject(contender, NEVER)
        first[contender.name] = subject.first_step(cell.clock.time)[cell.clock.main]
        given.progress(f"{contender.name}: first step {first[contender.name]:.0f} ms")
    calls = {name: subject.step for name, subject in subjects.items()} | _floor(cell, subjects)

    def prepare(name: str, _: int) -> None:
        if name in subjects:
            subjects[name].prepare()

    samples = interleave(calls, cell.clock, given.rounds, prepare=prepare)
    state = {name: held.count(subject.optimizer)["held"] for name, subject in subjects.items()}
    subjects.clear()
    calls.clear()  # and with them the states: refreshes are timed on fresh ones
    floor = {name: summaries(samples[name]) for name in (_GEMMS, _REST) if name in samples}
    rows = []
    for contender in contenders:
        times, main = samples[contender.name], cell.clock.main
        base = {
            "name": contender.name, "kind": contender.kind, "rival": contender.rival, "times": summaries(times),
            "to_fused": ratio(times[main], samples[BASE][main]), "state_bytes": state[contender.name],
        }  # fmt: skip
        steady, fused = summary(times[main])["median"], summary(samples[BASE][main])["median"]
        for method, found in _refreshes(cell, contender, first[contender.name], given):
            more = {kind: max(0.0, value - steady) for kind, value in found.items()}
            whole = steady + more.get("warm", 0.0) / given.gap
            rows.append({**base, "method": method, "refresh_ms": more, "amortised_ms": whole,
                         "amortised_to_fused": whole / fused})  # fmt: skip
            given.progress(f"{contender.name} {method or ''} done")
    return rows, floor


def _floor(cell: Cell, subjects: dict[str, Subject]) -> dict[str, Callable[[], None]]:
    """What a GaLore step cannot be quicker than: its own matrix products, and fused AdamW on all the other weights."""
    if "GaLoreAdamW" not in subjects:
        return {}
    subject = subjects["GaLoreAdamW"]
    subject.prepare()
    products = gemms.record(subject.step)
    rest = {name: nn.Parameter(p.detach().clone()) for name, p in cell.params.items() if name not in set(cell.inner)}
    for name, p in rest.items():
        p.grad = cell.grads[name]
    fused = torch.optim.AdamW(rest.values(), lr=1e-3, fused=True)
    return {_GEMMS: gemms.replay(products), _REST: fused.step}


def _refreshes(cell: Cell, contender: Contender, first: float, given: argparse.Namespace):
    """(method, times of a step that makes all bases) of a contender, each way it can make them."""
    if contender.kind == "torch":
        return [(None, {})]
    if contender.name in _EXACT:  # about a minute: the first step has to do
        return [(None, {"cold": first, "warm": first})]
    if contender.name not in _METHODS:
        return [(None, cell.refresh(contender, cell.refreshes))]
    cls = _METHODS[contender.name]
    methods = given.subspaces or dict.fromkeys((cls.OPTIONS["subspace"], "svd"))
    return [(m, cell.refresh(with_subspace(m, cls), 1 if m == "svd" else cell.refreshes)) for m in methods]
