"""The only code that talks to `torch.distributed` during a step.

`run` advances the generators of many matrices in lock-step and serves all requests of a round with one all-gather
(chunks that all ranks hold), one all-to-all (what moves between some) and one all-reduce per dtype (what is summed):
the number of collectives does not depend on depth. Every rank of the group must run the same matrices in the same
order, also those it holds nothing of.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_ds.layout import Layout
from lowrank_ds.requests import Exchange, Gather, Steps, Sum, finish_alone


def run(tasks: Sequence[tuple[Layout, Steps]], device: torch.device) -> list[Any]:
    """Advance generators of matrices that share one process group in lock-step; their results in order.

    Every rank of the group must pass the same matrices in the same order, also those it holds nothing of.
    """
    results: list[Any] = [None] * len(tasks)
    group = tasks[0][0].group
    pending = {i: None for i in range(len(tasks))}
    while pending:
        requests = {}
        for i, answer in pending.items():
            try:
                requests[i] = tasks[i][1].send(answer)
            except StopIteration as stop:
                results[i] = stop.value
        pending = _serve({i: (tasks[i][0], r) for i, r in requests.items()}, group, device)
    return results


def _serve(requests: dict[int, tuple[Layout, Any]], group: Any, device: torch.device) -> dict[int, Any]:
    """Answer one round of requests, at most one collective of each kind (all-reduce: one per dtype)."""
    single = {
        (i, *path): (layout, item) for i, (layout, request) in requests.items() for path, item in _leaves(request)
    }
    sums = {key: item.tensor for key, (_, item) in single.items() if isinstance(item, Sum)}
    gathers = {key: item for key, (_, item) in single.items() if isinstance(item, Gather)}
    common = {key: item for key, item in gathers.items() if item.axis.everywhere}
    few = {key: item for key, item in gathers.items() if not item.axis.everywhere}
    moves = {key: item for key, (_, item) in single.items() if isinstance(item, Exchange)}
    moves |= {key: _gather_moves(item) for key, item in few.items()}
    answers: dict[Any, Any] = _all_reduce(sums, group) | (_all_gather(common, group, device) if common else {})
    answers |= _all_to_all(moves, group, device) if moves else {}
    answers |= {key: _gathered(item, answers[key]) for key, item in few.items()}
    return {i: _shaped(request, answers, (i,)) for i, (_, request) in requests.items()}


def _leaves(request: Any, path: tuple[int, ...] = ()) -> Iterable[tuple[tuple[int, ...], Any]]:
    """The single requests in nested tuples of them, with their places."""
    if not isinstance(request, tuple):
        return [(path, request)]
    return [leaf for i, part in enumerate(request) for leaf in _leaves(part, (*path, i))]


def _shaped(request: Any, answers: Mapping[Any, Any], path: tuple[int, ...]) -> Any:
    """The answers in the shape of the request."""
    if not isinstance(request, tuple):
        return answers[path]
    return tuple(_shaped(part, answers, (*path, i)) for i, part in enumerate(request))


def _gather_moves(item: Gather) -> Exchange:
    """A gather as point-to-point moves: kept lines go to all who touch them."""
    axis, width = item.axis, item.chunk.shape[1:].numel()
    receives = {j: (lines.stop - lines.start) * width for j, lines in axis.outgoing.items()}
    return Exchange({j: item.chunk[lines] for j, lines in axis.incoming.items()}, receives)


def _gathered(item: Gather, answer: dict[int, Tensor]) -> Tensor:
    """The touched lines out of the pieces that arrived and those kept here."""
    axis, rest = item.axis, item.chunk.shape[1:]
    if axis.window.stop == axis.window.start:  # nothing here needs the values; the shape avoids special cases
        return item.chunk.new_zeros(()).expand(axis.total, *rest)
    out = item.chunk.new_empty(axis.window.stop - axis.window.start, *rest)
    out[axis.here[0]] = item.chunk[axis.here[1]]
    for j, lines in axis.outgoing.items():
        out[lines] = answer[j].view(-1, *rest)
    return out


def _wire(device: torch.device, group: Any) -> torch.device:
    """The device a collective of `group` works on (an offloaded state lives on CPU, NCCL only moves CUDA memory)."""
    backend = dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend and device.type == "cpu" else device


def _all_reduce(sums: dict[Any, Tensor], group: Any) -> dict[Any, Tensor]:
    answers = {}
    for dtype in sorted({t.dtype for t in sums.values()}, key=str):
        keys = [key for key, t in sums.items() if t.dtype == dtype]
        flat = torch.cat([sums[key].reshape(-1) for key in keys])
        moved = flat.to(_wire(flat.device, group))
        dist.all_reduce(moved, group=group)
        parts = moved.to(flat.device).split([sums[key].numel() for key in keys])
        answers |= {key: part.view(sums[key].shape) for key, part in zip(keys, parts, strict=True)}
    return answers


def _all_gather(gathers: dict[Any, Gather], group: Any, device: torch.device) -> dict[Any, Tensor]:
    """What every rank touches: every rank sends one message, padded where the kept parts are uneven."""
    world, wire = dist.get_world_size(group), _wire(device, group)
    widths, parts = [], []
    for item in gathers.values():
        flat = item.chunk.reshape(-1).float()
        width = max(b - a for a, b in item.axis.kept) * item.chunk.shape[1:].numel()
        parts += [flat, flat.new_zeros(width - flat.numel())] if width > flat.numel() else [flat]
        widths.append(width)
    outgoing = torch.cat(parts).to(wire)
    incoming = torch.empty(world * outgoing.numel(), device=wire)
    # torch 2.13 renamed it and warns about the old name.
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(incoming, outgoing, group=group)
    columns = incoming.to(device).view(world, -1).split(widths, 1)
    answers = {}
    for (key, item), column in zip(gathers.items(), columns, strict=True):
        rest, spans = item.chunk.shape[1:], item.axis.kept
        if any(b - a != spans[0][1] for a, b in spans) or list(spans) != sorted(spans):  # padded, or out of order
            column = torch.cat([column[j, : (b - a) * rest.numel()] for j, (a, b) in _in_order(spans)])
        answers[key] = column.reshape(item.axis.total, *rest)
    return answers


def _in_order(spans: tuple[tuple[int, int], ...]) -> list[tuple[int, tuple[int, int]]]:
    """(rank, interval) by the interval's place."""
    return sorted(enumerate(spans), key=lambda pair: pair[1])


def _all_to_all(moves: dict[Any, Exchange], group: Any, device: torch.device) -> dict[Any, dict[int, Tensor]]:
    world = dist.get_world_size(group)
    sends = [[x.sends[j].reshape(-1).float() for x in moves.values() if j in x.sends] for j in range(world)]
    input_splits = [sum(t.numel() for t in parts) for parts in sends]
    output_splits = [sum(x.receives.get(j, 0) for x in moves.values()) for j in range(world)]
    wire = _wire(device, group)
    outgoing = torch.cat([torch.empty(0, device=device), *itertools.chain(*sends)]).to(wire)
    incoming = torch.empty(sum(output_splits), device=wire)
    dist.all_to_all_single(incoming, outgoing, output_splits, input_splits, group=group)
    per_rank = incoming.to(device).split(output_splits)
    offsets = [0] * world
    answers: dict[Any, dict[int, Tensor]] = {}
    for key, move in moves.items():
        answers[key] = {}
        for j, size in move.receives.items():
            answers[key][j] = per_rank[j][offsets[j] : offsets[j] + size]
            offsets[j] += size
    return answers


def run_all(tasks: Iterable[tuple[Layout, Steps]], device: torch.device, budget: int) -> list[Any]:
    """Run tasks of any groups: whole matrices one by one, shared ones together in buckets of <= `budget` entries.

    The bucket limits what is alive at once (gathered bases and directions); it is counted in matrix entries so
    that every rank cuts the same buckets.
    """
    tasks = list(tasks)
    results: list[Any] = [None] * len(tasks)
    buckets: dict[Any, list[list[int]]] = {}
    for i, (layout, steps) in enumerate(tasks):
        if not layout.shared:
            results[i] = finish_alone(steps)
            continue
        queue = buckets.setdefault(layout.group, [[]])
        if queue[-1] and sum(_size(tasks[j][0]) for j in queue[-1]) + _size(layout) > budget:
            queue.append([])
        queue[-1].append(i)
    for bucket in itertools.chain(*buckets.values()):
        for i, result in zip(bucket, run([tasks[i] for i in bucket], device), strict=True):
            results[i] = result
    return results


def _size(layout: Layout) -> int:
    return layout.shape[0] * layout.shape[1]
