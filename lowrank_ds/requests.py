"""What the mathematics may ask of the other ranks, and how a single process answers.

The mathematics of a matrix is a generator. Where it needs other ranks it yields a `Sum`, a `Gather`, an `Exchange`, or
a tuple of them, and is sent the answers; it never sees a process group. `collectives.run` serves many matrices at once;
`finish_alone` serves a matrix that one rank holds completely.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lowrank_ds.axis import Axis

Steps = Generator[Any, Any, Any]  # yields requests, is sent their answers, returns a result


@dataclass(frozen=True)
class Sum:
    """Ask for the sum of `tensor` over all ranks of the group (every rank passes the same shape)."""

    tensor: Tensor


@dataclass(frozen=True)
class Gather:
    """Ask for the lines of a (total, ...) tensor that this rank touches; its keepers pass what they keep (`Axis`)."""

    chunk: Tensor
    axis: Axis


@dataclass(frozen=True)
class Exchange:
    """Ask to send `sends[j]` to rank j and to receive `receives[j]` entries (fp32, 1-D) from rank j."""

    sends: Mapping[int, Tensor]
    receives: Mapping[int, int]


def ask(request: Any) -> Steps:
    """A generator that asks once and answers what it is told."""
    return (yield request)


def together(*parts: Steps) -> Steps:
    """Advance several generators side by side, asking for all they need in one round. Answers their results."""
    results: list[Any] = [None] * len(parts)
    answers: dict[int, Any] = dict.fromkeys(range(len(parts)))
    while answers:
        requests = {}
        for i, answer in answers.items():
            try:
                requests[i] = parts[i].send(answer)
            except StopIteration as stop:
                results[i] = stop.value
        answers = dict(zip(requests, (yield tuple(requests.values())), strict=True)) if requests else {}
    return results


def finish_alone(steps: Steps) -> Any:
    """Run a generator of a matrix that one rank holds: every request is answered by what was asked with."""
    answer = None
    try:
        while True:
            answer = _answer_alone(steps.send(answer))
    except StopIteration as stop:
        return stop.value


def _answer_alone(request: Any) -> Any:
    if isinstance(request, tuple):
        return tuple(_answer_alone(part) for part in request)
    if isinstance(request, Exchange):
        return {}
    return request.tensor if isinstance(request, Sum) else request.chunk
