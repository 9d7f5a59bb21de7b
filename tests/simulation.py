"""A group of ranks inside one process: serves the requests of `layout` generators by passing tensors directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowrank_ds.collectives import _gather_moves, _gathered
from lowrank_ds.layout import Flat, Layout
from lowrank_ds.requests import Exchange, Gather, Steps, Sum


def cuts_of(numel: int, places: list[int]) -> tuple[int, ...]:
    """Cuts at the given places (any order, any size) of a string of `numel` entries."""
    return (0, *sorted(min(p, numel) for p in places), numel)


def layouts(shape: tuple[int, int], cuts: tuple[int, ...]) -> list[Flat]:
    """The layout as each rank sees it."""
    return [Flat(shape, cuts, rank, group="simulated") for rank in range(len(cuts) - 1)]


def run_ranks(all_layouts: list[Layout], make: Callable[[Layout], Steps]) -> tuple[list[Any], int]:
    """(result of `make(layout)` on each rank, number of rounds), the generators advanced in lock-step."""
    steps = [make(layout) for layout in all_layouts]
    answers: list[Any] = [None] * len(steps)
    results, rounds = [None] * len(steps), 0
    while True:
        requests, ended = [], 0
        for rank, generator in enumerate(steps):
            try:
                requests.append(generator.send(answers[rank]))
            except StopIteration as stop:
                results[rank], ended = stop.value, ended + 1
        if ended:
            assert ended == len(steps), "ranks left the lock-step: some ended while others still ask"
            return results, rounds
        rounds += 1
        answers = _serve(all_layouts, requests)


def _serve(all_layouts: list[Layout], requests: list[Any]) -> list[Any]:
    if isinstance(requests[0], tuple):
        parts = [_serve(all_layouts, [r[i] for r in requests]) for i in range(len(requests[0]))]
        return [tuple(part[rank] for part in parts) for rank in range(len(requests))]
    kinds = {type(r) for r in requests}
    assert len(kinds) == 1, f"ranks ask for different things in one round: {kinds}"
    if kinds == {Sum}:
        total = sum(r.tensor for r in requests)
        return [total.clone() for _ in requests]
    moves = [_gather_moves(r) if isinstance(r, Gather) else r for r in requests]
    answers = [{j: _delivered(moves, j, i) for j in move.receives} for i, move in enumerate(moves)]
    for i, move in enumerate(moves):
        assert set(move.sends) == {j for j, other in enumerate(moves) if i in other.receives}
    if kinds == {Gather}:
        return [_gathered(r, a) for r, a in zip(requests, answers, strict=True)]
    return answers


def _delivered(moves: list[Exchange], source: int, target: int) -> torch.Tensor:
    sent = moves[source].sends[target].reshape(-1)
    assert sent.numel() == moves[target].receives[source], "sender and receiver disagree about the size"
    return sent.clone()
