"""The time of making a new basis, and how much of the gradient it captures."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_ds import GaLoreAdamW
from lowrank_ds.bench.clock import Clock, Samples, interleave, summary
from lowrank_ds.bench.contenders import ALL, NEVER, Contender, with_subspace
from lowrank_ds.bench.subjects import Subject, parameters

METHODS = ("svd", "randomized", "power")
CHANGED = 0.15  # of the gradient, from one refresh to the next
DECAY = -0.7  # singular values are i ** DECAY
_SLOW = 2  # rounds of exact SVDs
_PACKAGE = "galore-torch"


@dataclass(frozen=True)
class Settings:
    """Of one measurement. exact: whether SVDs are timed; package: whether galore-torch takes part."""

    shape: tuple[int, int]
    rank: int
    dtype: torch.dtype
    device: torch.device
    rounds: int
    exact: bool
    package: bool


def decaying(shape: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """A random fp32 matrix (m, n) with singular values i ** DECAY."""
    generator = torch.Generator().manual_seed(seed)
    k = min(shape)
    left, right = (torch.linalg.qr(torch.randn(d, k, generator=generator).to(device)).Q for d in shape)
    return (left * torch.arange(1, k + 1, dtype=torch.float32, device=device).pow(DECAY)) @ right.T


@functools.lru_cache(maxsize=1)
def pair(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Two gradients (m, n) of such a spectrum, the second the first with CHANGED of it replaced, and its energies.

    The energies are the second's squared singular values (min(m, n),), largest first, by way of its fp64 Gram matrix.
    """
    first = decaying(shape, 0, device)
    second = (1 - CHANGED) * first + CHANGED * decaying(shape, 1, device)
    short = (second if shape[0] <= shape[1] else second.T).double()
    return first, second, torch.linalg.eigvalsh(short @ short.T).flip(0)


def captured(subject: Subject, grad: Tensor, best: float) -> float:
    """Energy of G in the subspace that the stored basis spans, |B^T G|^2 or |G B|^2, as a share of the best one's."""
    kept = subject.optimizer.state[subject.params["w"]]["projector"]
    basis, grad = getattr(kept, "ortho_matrix", kept).double(), grad.double()  # galore-torch keeps an object
    basis = basis if basis.shape[0] >= basis.shape[1] else basis.T
    basis = torch.linalg.qr(basis[:, basis.square().sum(0) > 0]).Q  # stored in bf16 it is not quite orthonormal
    left = grad.shape[0] < grad.shape[1]  # proj_type "std"
    return ((basis.T @ grad) if left else (grad @ basis)).square().sum().item() / best


def measure(settings: Settings, clock: Clock) -> dict[str, Any]:
    """{"rows": one a method, "default": ours when none is named, "changed", "decay"}.

    A refresh is a step that makes a new basis, less a step that does not; both are taken in the same rounds. "cold" is
    the first step of a fresh optimizer, "warm" one whose basis is of the gradient before, of which CHANGED is new.
    """
    *pure, energies = pair(settings.shape, settings.device)
    grads = [g.to(settings.dtype) for g in pure]
    best = energies[: settings.rank].sum().item()
    package = [c for c in ALL if c.name == _PACKAGE and settings.package]
    methods = [m for m in METHODS if m != "svd" or settings.exact]
    subjects = {f"{m} warm": _subject(with_subspace(m), settings, grads[0], 1) for m in methods}
    steady = {"steady": _subject(with_subspace("power"), settings, grads[0], NEVER)}
    for contender in package:
        subjects[_PACKAGE] = _subject(contender, settings, grads[0], 1)
        steady[f"{_PACKAGE} steady"] = _subject(contender, settings, grads[0], NEVER)
    for subject in (*subjects.values(), *steady.values()):
        subject.first_step()
    shares = _shares(subjects, grads[1], best)
    samples, cold = _rounds(subjects, steady, grads, settings, clock)
    shares["power cold"] = captured(cold, grads[1], best)
    rows = [_row(name, samples, shares, clock) for name in (*subjects, "power cold")]
    for row in rows:
        _compare(row, rows)
        subject = subjects.get(row["name"])
        row["peak"] = None if subject is None else subject.peak() / grads[0].nbytes
    return {"rows": rows, "default": GaLoreAdamW.OPTIONS["subspace"], "changed": CHANGED, "decay": DECAY}


def _shares(subjects: dict[str, Subject], grad: Tensor, best: float) -> dict[str, float]:
    """What each method's second basis captures, the first being of another gradient."""
    shares = {}
    for name, subject in subjects.items():
        subject.grads = {"w": grad}
        subject.prepare()
        subject.step()
        shares[name] = captured(subject, grad, best)
    return shares


def _subject(contender: Contender, settings: Settings, grad: Tensor, gap: int) -> Subject:
    params = parameters({"w": settings.shape}, settings.dtype, settings.device)
    return Subject(contender, params, {"w": grad}, ["w"], settings.rank, gap)


def _rounds(
    subjects: dict[str, Subject], steady: dict[str, Subject], grads: list[Tensor], settings: Settings, clock: Clock
) -> tuple[dict[str, Samples], Subject]:
    """Times of all, and the last optimizer whose first step was timed (on the second gradient)."""
    everyone = {**subjects, **steady}

    def prepare(name: str, number: int) -> None:
        if name == "power cold":
            everyone[name] = _subject(with_subspace("power"), settings, grads[1], 1)
        else:
            everyone[name].grads = {"w": grads[number % 2]}  # each time CHANGED of it is new
        everyone[name].prepare()

    calls = {name: (lambda name=name: everyone[name].step()) for name in (*everyone, "power cold")}
    few = {name: _SLOW for name in ("svd warm", _PACKAGE)}
    samples = interleave(calls, clock, settings.rounds, warmup=0, prepare=prepare, few=few)
    return samples, everyone["power cold"]


def _row(name: str, samples: dict[str, Samples], shares: dict[str, float], clock: Clock) -> dict[str, Any]:
    """One method's figures: its steps less the median steady one."""
    base = "galore-torch steady" if name == _PACKAGE else "steady"
    without = {kind: summary(values)["median"] for kind, values in samples[base].items()}
    times = {kind: summary([v - without[kind] for v in values]) for kind, values in samples[name].items()}
    return {"name": name, "times": times, "steady_ms": without[clock.main], "captured": shares[name]}


def _compare(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add how many times faster than the package the refresh is, by medians and by minima."""
    package = next((r for r in rows if r["name"] == _PACKAGE), None)
    row["times_faster"] = None
    if package is None or row is package:
        return
    main = "device" if "device" in row["times"] else "cpu"
    theirs, mine = package["times"][main], row["times"][main]
    row["times_faster"] = {kind: theirs[kind] / max(mine[kind], 1e-6) for kind in ("median", "min")}
