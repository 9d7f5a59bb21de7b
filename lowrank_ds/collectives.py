"""The only code that talks to `torch.distributed` during a step.

`run_all` advances the generators of many matrices in lock-step and serves all requests of a round with one all-gather
(what all ranks need whole), one all-to-all (what moves between some) and one all-reduce per dtype (what is summed):
the number of collectives does not depend on depth. Every rank of the group must run the same matrices in the same
order, also those it holds nothing of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_ds import failures
from lowrank_ds.requests import Exchange, Gather, Steps, Sum, finish_alone


class Task(NamedTuple):
    """The generator of one matrix, how ranks share it, how many numbers its round keeps alive, and its name."""

    layout: Any  # a Layout or a Mirror: what has a group
    steps: Steps
    size: int
    name: str = ""


class _Run:
    """Generators of matrices that share one process group, advanced in lock-step.

    The first requests are on their way when this is built; `finish` answers them and all that follow.
    """

    def __init__(self, tasks: Sequence[Task], device: torch.device) -> None:
        self.tasks, self.device, self.group = tasks, device, tasks[0].layout.group
        self.results: list[Any] = [None] * len(tasks)
        self._advance(dict.fromkeys(range(len(tasks))))

    def _advance(self, answers: dict[int, Any]) -> None:
        requests = {}
        for i, answer in answers.items():
            try:
                requests[i] = self.tasks[i].steps.send(answer)
            except StopIteration as stop:
                self.results[i] = stop.value
        names = [task.name for task in self.tasks]
        self.arrive = _issue(requests, self.group, self.device, names) if requests else None

    def finish(self) -> list[Any]:
        """The results, in order."""
        while self.arrive is not None:
            arrive, self.arrive = self.arrive, None
            answers = arrive()
            del arrive  # and the buffers it holds
            self._advance(answers)
        return self.results


def _issue(
    requests: dict[int, Any], group: Any, device: torch.device, names: Sequence[str]
) -> Callable[[], dict[int, Any]]:
    """Start one round, at most one collective of each kind (all-reduce: one per dtype). Answers how to wait for it.

    names: of all matrices, by the number in `requests`.
    """
    single = {(i, *path): item for i, request in requests.items() for path, item in _leaves(request)}
    sums = {key: item.tensor for key, item in single.items() if isinstance(item, Sum)}
    gathers = {key: item for key, item in single.items() if isinstance(item, Gather)}
    common = {key: item for key, item in gathers.items() if item.axis.everywhere}
    few = {key: item for key, item in gathers.items() if not item.axis.everywhere}
    moves = {key: item for key, item in single.items() if isinstance(item, Exchange)}
    moves |= {key: _gather_moves(item) for key, item in few.items()}
    about = _Round(group, names)
    waiting = [_all_reduce(sums, dtype, about) for dtype in sorted({t.dtype for t in sums.values()}, key=str)]
    waiting += [_all_gather(common, about, device)] if common else []
    waiting += [_all_to_all(moves, about, device)] if moves else []

    def arrive() -> dict[int, Any]:
        answers: dict[Any, Any] = {}
        for wait in waiting:
            answers |= wait()
        answers |= {key: _gathered(item, answers[key]) for key, item in few.items()}
        return {i: _shaped(request, answers, (i,)) for i, request in requests.items()}

    return arrive


class _Round(NamedTuple):
    """Starts the collectives of one round, and says whose numbers were on their way when one of them fails."""

    group: Any
    names: Sequence[str]

    def start(self, keys: Iterable[Any], collective: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
        """Start one collective for the requests `keys`. Answers how to wait for it."""
        try:
            work = collective(*arguments, group=self.group, async_op=True)
        except dist.DistError as error:
            raise self._failure(keys, collective, error) from error

        def wait() -> None:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._failure(keys, collective, error) from error

        return wait

    def _failure(self, keys: Iterable[Any], collective: Callable[..., Any], error: Exception) -> failures.RankError:
        return _lost(collective.__name__, self.group, (self.names[key[0]] for key in keys), error)


def _lost(collective: str, group: Any, names: Iterable[str], error: Exception) -> failures.RankError:
    """The error that says which collective failed, over whom and for what."""
    what, named = _KINDS.get(collective, collective), failures.some(names)
    try:
        ranks, rank = dist.get_process_group_ranks(group), dist.get_rank()
    except (RuntimeError, ValueError, KeyError):  # the group is gone by now
        ranks, rank = None, None
    return failures.lost(f"the {what}{f' for {named}' if named else ''}", ranks, rank, error)


_KINDS = {
    "all_reduce": "all-reduce",
    "all_gather_single": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_to_all_single": "all-to-all",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
}


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the only one, or the first of several."""
    return not dist.is_initialized() or dist.get_rank() == 0


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


def _all_reduce(sums: dict[Any, Tensor], dtype: torch.dtype, about: _Round) -> Callable[[], dict[Any, Tensor]]:
    keys = [key for key, t in sums.items() if t.dtype == dtype]
    flat = torch.cat([sums[key].reshape(-1) for key in keys])
    moved = flat.to(_wire(flat.device, about.group))
    arrive = about.start(keys, dist.all_reduce, moved)

    def wait() -> dict[Any, Tensor]:
        arrive()
        parts = moved.to(flat.device).split([sums[key].numel() for key in keys])
        return {key: part.view(sums[key].shape) for key, part in zip(keys, parts, strict=True)}

    return wait


def _all_gather(gathers: dict[Any, Gather], about: _Round, device: torch.device) -> Callable[[], dict[Any, Tensor]]:
    """What every rank touches: every rank sends one message, padded where the kept parts are uneven."""
    world, wire = dist.get_world_size(about.group), _wire(device, about.group)
    widths, parts = [], []
    for item in gathers.values():
        flat = item.chunk.reshape(-1).float()
        width = max(b - a for a, b in item.axis.kept) * item.chunk.shape[1:].numel()
        parts += [flat, flat.new_zeros(width - flat.numel())] if width > flat.numel() else [flat]
        widths.append(width)
    outgoing = torch.cat(parts).to(wire)
    incoming = torch.empty(world * outgoing.numel(), dtype=torch.float32, device=wire)
    # torch 2.13 renamed it and warns about the old name.
    all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    arrive = about.start(gathers, all_gather, incoming, outgoing)

    def wait(_alive: Tensor = outgoing) -> dict[Any, Tensor]:
        arrive()
        columns = incoming.to(device).view(world, -1).split(widths, 1)
        return {key: _unpadded(item, column) for (key, item), column in zip(gathers.items(), columns, strict=True)}

    return wait


def _unpadded(item: Gather, column: Tensor) -> Tensor:
    """The lines (total, ...) of one gather out of what each rank sent (world, width)."""
    rest, spans = item.chunk.shape[1:], item.axis.kept
    if any(b - a != spans[0][1] for a, b in spans) or list(spans) != sorted(set(spans)):  # padded, out of order, twice
        column = torch.cat([column[j, : (b - a) * rest.numel()] for (a, b), j in _in_order(spans)])
    return column.reshape(item.axis.total, *rest)


def _in_order(spans: tuple[tuple[int, int], ...]) -> list[tuple[tuple[int, int], int]]:
    """(interval, a rank that keeps it) by the interval's place; each interval once, although several may keep it."""
    return sorted({span: rank for rank, span in enumerate(spans)}.items())


def _all_to_all(moves: dict[Any, Exchange], about: _Round, device: torch.device) -> Callable[[], dict[Any, Any]]:
    world = dist.get_world_size(about.group)
    sends = [[x.sends[j].reshape(-1).float() for x in moves.values() if j in x.sends] for j in range(world)]
    input_splits = [sum(t.numel() for t in parts) for parts in sends]
    output_splits = [sum(x.receives.get(j, 0) for x in moves.values()) for j in range(world)]
    wire = _wire(device, about.group)
    outgoing = torch.cat([torch.empty(0, dtype=torch.float32, device=device), *itertools.chain(*sends)]).to(wire)
    incoming = torch.empty(sum(output_splits), dtype=torch.float32, device=wire)
    arrive = about.start(moves, dist.all_to_all_single, incoming, outgoing, output_splits, input_splits)

    def wait(_alive: Tensor = outgoing) -> dict[Any, dict[int, Tensor]]:
        arrive()
        per_rank, offsets = incoming.to(device).split(output_splits), [0] * world
        answers: dict[Any, dict[int, Tensor]] = {}
        for key, move in moves.items():
            answers[key] = {}
            for j, size in move.receives.items():
                answers[key][j] = per_rank[j][offsets[j] : offsets[j] + size]
                offsets[j] += size
        return answers

    return wait


def run_all(tasks: Iterable[Task], device: torch.device, budget: int) -> list[Any]:
    """Run tasks of any groups: whole matrices one by one, shared ones together in buckets of about `budget` numbers.

    The bucket limits what is alive at once (gathered bases and directions, gradients on their way to be factorised).
    The first requests of a bucket travel while the bucket before it computes. Every rank cuts the same buckets.

    Everything is computed as it is written: an autocast that is on outside (updates inside a backward that recomputes
    activations) would make bf16 products of fp32 numbers.
    """
    with torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False):  # (meta: plans)
        return _run_all(list(tasks), device, budget)


def _run_all(tasks: list[Task], device: torch.device, budget: int) -> list[Any]:
    results: list[Any] = [None] * len(tasks)
    buckets: dict[Any, list[list[int]]] = {}
    for i, task in enumerate(tasks):
        if not task.layout.shared:
            results[i] = finish_alone(task.steps)
            continue
        queue = buckets.setdefault(task.layout.group, [[]])
        if queue[-1] and sum(tasks[j].size for j in queue[-1]) + task.size > budget:
            queue.append([])
        queue[-1].append(i)
    previous: tuple[list[int], _Run] | None = None
    for bucket in itertools.chain(*buckets.values()):
        started = bucket, _Run([tasks[i] for i in bucket], device)
        _collect(previous, results)
        previous = started
    _collect(previous, results)
    return results


def _collect(started: tuple[list[int], _Run] | None, results: list[Any]) -> None:
    """Finish a bucket and put its results in their places."""
    if started is not None:
        for i, result in zip(started[0], started[1].finish(), strict=True):
            results[i] = result


def mean_scattered(whole: Tensor, group: Any, what: str = "") -> Tensor:
    """This rank's part (numel / world,) of the mean over the ranks of `whole` (numel,), which is spoiled.

    numel must divide evenly. What a layer-wise engine does with a gradient as soon as the backward has it; it divides
    before it sums, as DeepSpeed does, so that both round alike. what: it is, for the error when a rank is gone.
    """
    world, wire = dist.get_world_size(group), _wire(whole.device, group)
    part = torch.empty(whole.numel() // world, dtype=whole.dtype, device=wire)
    # torch 2.13 renamed it and warns about the old name.
    reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    try:
        reduce_scatter(part, whole.div_(world).to(wire), group=group)
    except RuntimeError as error:
        raise _lost(reduce_scatter.__name__, group, [what], error) from error
    return part.to(whole.device)
