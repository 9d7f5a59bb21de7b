"""`lowrank-ds bench micro`: step, refresh, state and temporaries of one matrix."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch

from lowrank_ds.bench import gemms, held, refresh
from lowrank_ds.bench.clock import Clock, interleave, ratio, summaries
from lowrank_ds.bench.contenders import BASE, NEVER, Contender, choose, split
from lowrank_ds.bench.subjects import Subject, gradients, parameters

SHAPES = ("1024x4096", "4096x1024", "2048x2048", "4096x11008")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_EXACT_LIMIT = 2048  # on a CPU an exact SVD of more takes minutes a time: left out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this sub-command."""
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="MxN", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--ranks", nargs="+", type=int, default=[128, 256], help="default: 128 256")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of weights and gradients")
    parser.add_argument("--refresh-rounds", type=int, default=6, help="0: do not measure refreshes (default 6)")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """{"results": one entry a shape, rank and dtype, "missing"}."""
    shapes = [parse_shape(text) for text in given.shapes]
    for shape in shapes:
        for rank in given.ranks:
            if not 1 <= rank <= min(shape):
                raise ValueError(f"--ranks {rank} does not fit --shapes {shape[0]}x{shape[1]}: 1 to {min(shape)}")
    device, clock = torch.device(given.device), Clock(torch.device(given.device), given.threads)
    missing: list[str] = []
    results = []
    for dtype in given.dtypes:
        present, absent = split(choose(given.only, given.packages, DTYPES[dtype]))
        missing += [text for text in absent if text not in missing]
        for shape in shapes:
            for rank in given.ranks:
                cell = measure(present, shape, rank, DTYPES[dtype], device, clock, given.rounds)
                if given.refresh_rounds:
                    exact = min(shape) <= _EXACT_LIMIT or device.type == "cuda"
                    galore = exact and any(c.name == "galore-torch" for c in present)
                    settings = refresh.Settings(shape, rank, DTYPES[dtype], device, given.refresh_rounds, exact, galore)
                    cell["refresh"] = refresh.measure(settings, clock)
                results.append({"shape": list(shape), "rank": rank, "dtype": dtype, **cell})
                given.progress(f"{dtype} {shape[0]}x{shape[1]} rank {rank} done")
    return {"results": results, "missing": missing}


def parse_shape(text: str) -> tuple[int, int]:
    """ "1024x4096" to (1024, 4096). Raises ValueError."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) >= 2 for part in parts):
        raise ValueError(f"--shapes {text!r}: must be rows x columns, such as 1024x4096")
    return int(parts[0]), int(parts[1])


def measure(
    contenders: Iterable[Contender], shape: tuple[int, int], rank: int, dtype: torch.dtype, device: torch.device,
    clock: Clock, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """{"rows", "best_layout", "best_floor"} of one cell.

    Every contender has weights of its own; our steps' own products run alone in the same rounds.
    """
    subjects, first, about = {}, {}, {}
    for contender in contenders:
        params, grads = (make({"w": shape}, dtype, device) for make in (parameters, gradients))
        subject = subjects[contender.name] = Subject(contender, params, grads, ["w"], rank, NEVER)
        first[contender.name] = subject.first_step(clock.time)[clock.main]
    layout, best = gemms.best_layout(shape, rank, dtype, device, clock)
    floors = {"best": best}
    for name in (c for c, subject in subjects.items() if subject.contender.kind == "ours"):
        products = _products(subjects[name])  # dropped at once: they keep the step's temporaries alive
        about[name] = _about(products, shape, rank)
        floors |= {_floor(name): gemms.replay(products)} if products else {}
    calls = {name: subject.step for name, subject in subjects.items()}

    def prepare(name: str, _: int) -> None:
        if name in subjects:
            subjects[name].prepare()

    samples = interleave(calls | floors, clock, rounds, warmup=2, prepare=prepare)
    rows = [_row(subject, samples, clock, shape, rank, first[name]) for name, subject in subjects.items()]
    for row in rows:
        row["products"] = about.get(row["name"])
    return {"rows": rows, "best_layout": layout, "best_floor": summaries(samples["best"])}


def _floor(name: str) -> str:
    return f"floor of {name}"


def _products(subject: Subject) -> list[gemms.Product]:
    subject.prepare()
    return gemms.record(subject.step)


def _about(products: list[gemms.Product], shape: tuple[int, int], rank: int) -> dict[str, float] | None:
    """How many products, and their arithmetic in units of one of m x n by r."""
    if not products:
        return None
    large = 2 * shape[0] * shape[1] * rank
    return {"calls": len(products), "large": round(sum(p.flops for p in products) / large, 3)}


def _row(subject: Subject, samples: dict, clock: Clock, shape: tuple[int, int], rank: int, first: float) -> dict:
    """One contender's figures."""
    contender, main = subject.contender, clock.main
    times = samples[contender.name]
    weight = next(iter(subject.params.values()))
    expected = held.formula(contender.name, shape, rank, weight.element_size())
    state = held.count(subject.optimizer)
    held.check(contender.name, state["held"], expected)

    def compared(other: str | None) -> dict[str, float] | None:
        return ratio(times[main], samples[other][main]) if other in samples else None

    rival = compared(contender.rival)
    return {
        "name": contender.name, "kind": contender.kind, "first_ms": first, "times": summaries(times),
        "to_fused": compared(BASE), "to_floor": compared(_floor(contender.name)),
        "to_best_floor": compared("best") if contender.name.startswith(("GaLoreAdamW", "FiraAdamW")) else None,
        "floor": summaries(samples[_floor(contender.name)]) if _floor(contender.name) in samples else None,
        "rival": contender.rival if rival else None,
        "times_faster": {kind: 1 / value for kind, value in rival.items()} if rival else None,
        "state": {**state, "formula": expected}, "peak_step": subject.peak() / weight.nbytes,
    }  # fmt: skip
