"""The time of making a new basis, and how much of the gradient it captures."""

from __future__ import annotations

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
    """Of one measurement. package: whether galore-torch takes part."""

    shape: tuple[int, int]
    rank: int
    dtype: torch.dtype
    device: torch.device
    rounds: int
    package: bool


def decaying(shape: tuple[int, int], seed: int) -> Tensor:
    """A random fp32 matrix (m, n) with singular values i ** DECAY, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    k = min(shape)
    left, right = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in shape)
    return (left * torch.arange(1, k + 1, dtype=torch.float32).pow(DECAY)) @ right.T


def pair(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two gradients (m, n) of such a spectrum, the second the first with CHANGED of it replaced."""
    first = decaying(shape, 0)
    return first, (1 - CHANGED) * first + CHANGED * decaying(shape, 1)


def captured(subject: Subject, grad: Tensor, best: float) -> float:
    """|B^T G|^2 (or |G B|^2) of the subspace that the stored basis spans, as a share of the best r-dimensional one's."""
    kept = subject.optimizer.state[subject.params["w"]]["projector"]
    basis = getattr(kept, "ortho_matrix", kept).double().cpu()  # galore-torch keeps an object
    grad = grad.double().cpu()
    basis = basis if basis.shape[0] in grad.shape and basis.shape[0] >= basis.shape[1] else basis.T
    basis = torch.linalg.qr(basis[:, basis.square().sum(0) > 0]).Q  # stored in bf16 it is not quite orthonormal
    left = grad.shape[0] < grad.shape[1]  # proj_type "std"
    return ((basis.T @ grad) if left else (grad @ basis)).square().sum().item() / best


def measure(settings: Settings, clock: Clock) -> dict[str, Any]:
    """{"rows": one a method, "default": ours when none is named, "package_ms", ...}.

    A refresh is a step that makes a new basis, less a step that does not; both are taken in the same rounds. "cold" is
    the first step of a fresh optimizer, "warm" one whose basis is of the gradient before, of which CHANGED is new.
    """
    grads = [g.to(settings.device, settings.dtype) for g in pair(settings.shape)]
    best = torch.linalg.svdvals(grads[1].float().cpu())[: settings.rank].double().square().sum().item()
    package = [c for c in ALL if c.name == _PACKAGE and settings.package]
    subjects = {f"{m} warm": _subject(with_subspace(m), settings, grads[0], 1) for m in METHODS}
    subjects |= {_PACKAGE: _subject(c, settings, grads[0], 1) for c in package}
    steady = {"steady": _subject(with_subspace("power"), settings, grads[0], NEVER)}
    steady |= {f"{_PACKAGE} steady": _subject(c, settings, grads[0], NEVER) for c in package}
    for subject in (*subjects.values(), *steady.values()):
        subject.first_step()
    samples, shares = _rounds(subjects, steady, grads, settings, clock, best)
    rows = [_row(name, samples, shares, clock) for name in (*subjects, "power cold") if name in samples]
    for row in rows:
        _compare(row, rows)
    peaks = {name: subject.peak() / grads[0].nbytes for name, subject in subjects.items()}
    for row in rows:
        row["peak"] = peaks.get(row["name"])
    return {"rows": rows, "default": GaLoreAdamW.OPTIONS["subspace"], "changed": CHANGED, "decay": DECAY}


def _subject(contender: Contender, settings: Settings, grad: Tensor, gap: int) -> Subject:
    params = parameters({"w": settings.shape}, settings.dtype, settings.device)
    return Subject(contender, params, {"w": grad}, ["w"], settings.rank, gap)


def _rounds(
    subjects: dict[str, Subject], steady: dict[str, Subject], grads: list[Tensor], settings: Settings, clock: Clock,
    best: float,
) -> tuple[dict[str, Samples], dict[str, float]]:  # fmt: skip
    """Times of all, and the captured share of each method's basis after its last refresh (on the second gradient)."""
    everyone, shares = {**subjects, **steady}, {}
    cold: dict[str, Subject] = {}

    def prepare(name: str, number: int) -> None:
        if name == "power cold":
            subject = cold[name] = _subject(with_subspace("power"), settings, grads[1], 1)
        else:
            subject = everyone[name]
            subject.grads = {"w": grads[number % 2]}  # each time CHANGED of it is new
        subject.prepare()

    def step(name: str) -> None:
        (cold if name == "power cold" else everyone)[name].step()

    calls = {name: (lambda name=name: step(name)) for name in (*everyone, "power cold")}
    few = {name: _SLOW for name in ("svd warm", _PACKAGE)}
    samples = interleave(calls, clock, settings.rounds, warmup=0, prepare=prepare, few=few)
    for name in (*subjects, "power cold"):
        subject = (cold if name == "power cold" else everyone)[name]
        if subject.grads["w"] is not grads[1]:  # of an odd number of rounds
            subject.grads = {"w": grads[1]}
            subject.prepare()
            subject.step()
        shares[name] = captured(subject, grads[1], best)
    return samples, shares


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
