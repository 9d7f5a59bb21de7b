"""Time: contenders that take turns in one process, and what their times have in common."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Samples = dict[str, list[float]]  # {"wall" | "cpu" | "device": milliseconds, one a round}


class Clock:
    """Milliseconds of one call: "wall", "cpu" and, on CUDA, "device".

    cpu: this thread's time, which other processes cannot stretch as they do wall time; with several threads all of
    this process'. device: between two CUDA events around the call; wall then includes waiting for the device.

    Args:
        device: where the work happens.
        threads: how many the call computes with.
    """

    def __init__(self, device: torch.device, threads: int = 1) -> None:
        self.on_cuda = device.type == "cuda"
        self._cpu = time.thread_time if threads == 1 or self.on_cuda else time.process_time

    @property
    def main(self) -> str:
        """The time that figures are made of: the device's, or the CPU's."""
        return "device" if self.on_cuda else "cpu"

    def time(self, call: Callable[[], object]) -> dict[str, float]:
        """Milliseconds of one call, the device's work included."""
        if self.on_cuda:
            return self._time_on_cuda(call)
        wall, cpu = time.perf_counter(), self._cpu()
        call()
        return {"wall": (time.perf_counter() - wall) * 1e3, "cpu": (self._cpu() - cpu) * 1e3}

    def _time_on_cuda(self, call: Callable[[], object]) -> dict[str, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), self._cpu()
        begin.record()
        call()
        end.record()
        cpu = self._cpu() - cpu  # what the host was busy with; waiting is not part of it
        torch.cuda.synchronize()
        wall = time.perf_counter() - wall
        return {"wall": wall * 1e3, "cpu": cpu * 1e3, "device": begin.elapsed_time(end)}


def interleave(
    calls: Mapping[str, Callable[[], object]],
    clock: Clock,
    rounds: int,
    warmup: int = 1,
    prepare: Callable[[str, int], object] | None = None,
    few: Mapping[str, int] | None = None,
) -> dict[str, Samples]:
    """Time every call once a round, in an order that changes from round to round.

    Args:
        calls: {name: what is timed}.
        rounds: how many are kept.
        warmup: rounds before them that are not.
        prepare: called, untimed, with (name, round) before each call.
        few: {name: rounds} of calls that take too long for all of them.
    """
    found: dict[str, Samples] = {name: {} for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    for number in range(-warmup, rounds):
        shuffle(order)
        for name in order:
            if number >= (few or {}).get(name, rounds):
                continue
            if prepare is not None:
                prepare(name, number)
            for kind, value in clock.time(calls[name]).items():
                if number >= 0:
                    found[name].setdefault(kind, []).append(value)
    return found


def summary(values: Sequence[float]) -> dict[str, float]:
    """{"min", "q1", "median", "q3", "mean", "n"} of some numbers, at least one."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"min": min(values), "q1": q1, "median": median, "q3": q3, "mean": statistics.fmean(values),
            "n": len(values)}  # fmt: skip


def summaries(samples: Samples) -> dict[str, dict[str, float]]:
    """`summary` of each kind of time."""
    return {kind: summary(values) for kind, values in samples.items()}


def ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """{"median", "min"}: median to median and minimum to minimum."""
    pairs = {"median": (statistics.median(values), statistics.median(base)), "min": (min(values), min(base))}
    return {kind: above / max(below, 1e-9) for kind, (above, below) in pairs.items()}
