"""What the doctor needs of `torch.distributed`: the launcher's store, a process group, and times of its links."""

from __future__ import annotations

import datetime
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_ds.launching import Place

SMALL, REPEATS = 8, 20  # bytes and repetitions of what is timed for latency
BEST = 2  # repetitions of what is timed for bandwidth
ON_ONE_HOST = 8  # ranks whose links are timed pair by pair where there is one host only


class WireError(RuntimeError):
    """The store, or a rank, cannot be reached; the text says which and what to do."""


class Channel:
    """Small values between ranks, as JSON in the store that the launcher or rank 0 keeps at MASTER_ADDR:MASTER_PORT.

    Raises:
        WireError: it cannot be reached within `timeout` seconds.
    """

    def __init__(self, place: Place, timeout: float) -> None:
        self.place = place
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"lowrank_ds.doctor/{attempt}", _open(place, timeout))

    def tell(self, topic: str, value: Any) -> None:
        """Say something to whoever asks this rank about `topic`.

        Raises:
            WireError: the store is gone.
        """
        try:
            self.store.set(f"{topic}/{self.place.rank}", json.dumps(value))
        except dist.DistError as error:
            raise WireError(f"the store, and so rank 0, has ended ({_first_line(error)}): see its output") from None

    def hear(self, topic: str, rank: int, seconds: float) -> Any:
        """What `rank` says.

        Raises:
            WireError: nothing in time, or the store is gone.
        """
        key = f"{topic}/{rank}"
        try:
            if not self.store.check([key]):
                self.store.wait([key], datetime.timedelta(seconds=max(seconds, 0.01)))
            return json.loads(self.store.get(key))
        except dist.DistError as error:
            raise WireError(
                f"rank {rank} said nothing within {seconds:g} s, or has ended ({_first_line(error)}): see its output"
            ) from None

    def hear_all(self, topic: str, seconds: float, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """{rank: what it says}, of those of `ranks` (None: all) who say something in time."""
        deadline, found = time.monotonic() + seconds, {}
        for rank in range(self.place.world) if ranks is None else ranks:
            left = deadline - time.monotonic()
            try:
                if left > 0 or self.store.check([f"{topic}/{rank}"]):
                    found[rank] = self.hear(topic, rank, left)
            except (WireError, dist.DistError):
                continue
        return found


def _open(place: Place, timeout: float) -> dist.Store:
    if place.world == 1:
        return dist.HashStore()
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun keeps the store itself
    mine = place.rank == 0 and not agent
    limit = datetime.timedelta(seconds=timeout)
    try:
        return dist.TCPStore(place.address, place.port, is_master=mine, timeout=limit, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        where = f"{place.address}:{place.port}"
        if mine:
            text = f"rank 0 cannot listen on {where}. Is the port in use? Choose another MASTER_PORT"
        else:
            text = (
                f"rank {place.rank} on {socket.gethostname()} cannot reach rank 0 at {where} within {timeout:g} s. Has "
                "rank 0 started, with the same MASTER_ADDR and MASTER_PORT? Is MASTER_ADDR an address of its host for "
                "this one (see /etc/hosts), and does a firewall let the port through?"
            )
        raise WireError(f"{text} [{_first_line(error)}]") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def join(channel: Channel, device: torch.device, timeout: float) -> str:
    """Make the default process group, as training would. Returns its backend.

    Raises:
        WireError: torch cannot, or its sum over all ranks is wrong.
    """
    place, backend = channel.place, "nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # or NCCL's watchdog ends the process after a timeout
    store = dist.PrefixStore("group", channel.store)
    limit = datetime.timedelta(seconds=timeout)
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=limit)
        total = torch.tensor([place.rank + 1.0, 1.0], device=device)
        dist.all_reduce(total)
        found = total.tolist()
    except (RuntimeError, ValueError) as error:
        raise WireError(f"a process group ({backend}) cannot be made or used: {_first_line(error)}") from None
    if found != [place.world * (place.world + 1) / 2, place.world]:
        raise WireError(f"{backend}'s sum over all ranks is wrong: {found} of {place.world} ranks")
    return backend


def leave() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(machines: Sequence[str], device: torch.device, size: int) -> dict[str, Any]:
    """Times of all ranks together and of pairs, seconds; collective.

    Args:
        machines: of each rank; one rank of each is timed against one of each other, or ranks of the only one.
        size: bytes of what is timed for bandwidth.

    Returns:
        {"all_reduce": {bytes: seconds}, "broadcast": {bytes: seconds}, "pairs": [[rank, other, latency, seconds], ...]}
        for this rank's pairs with higher ranks: of the small message one way, and of the large one one way.

    Raises:
        WireError: a collective failed, most likely because a rank is gone.
    """
    small, large = (torch.ones(max(1, n // 4), device=device) for n in (SMALL, size))
    try:
        found: dict[str, Any] = {}
        for name, call in {"all_reduce": dist.all_reduce, "broadcast": lambda x: dist.broadcast(x, 0)}.items():
            times = {SMALL: _median(call, small), size: _best(call, large)}
            found[name] = {str(count): seconds for count, seconds in times.items()}
        found["pairs"] = _pairs(players(machines), small, large)
        dist.barrier()
    except RuntimeError as error:
        raise WireError(f"timing the links failed: {_first_line(error)}") from None
    return found


def players(machines: Sequence[str]) -> list[int]:
    """The ranks that are timed in pairs: the first of each host, or the first few of the only one."""
    firsts = [machines.index(machine) for machine in dict.fromkeys(machines)]
    return firsts if len(firsts) > 1 else list(range(min(len(machines), ON_ONE_HOST)))


def rounds(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Every pair once, in rounds in which each rank has one partner at most (the circle method of tournaments)."""
    seats: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def _pairs(ranks: Sequence[int], small: Tensor, large: Tensor) -> list[list]:
    """[rank, other, seconds of small, seconds of large] of this rank's pairs; pairs of a round at the same time."""
    me, found = dist.get_rank(), []
    for pairs in rounds(ranks):
        dist.barrier()
        for pair in pairs:
            if me in pair:
                other = pair[0] if me == pair[1] else pair[1]
                call = lambda x, other=other: _there_and_back(x, other, me < other)
                times = [_median(call, small, together=False) / 2, _best(call, large, together=False) / 2]
                if me < other:
                    found.append([me, other, *times])
    return found


def _there_and_back(x: Tensor, other: int, first: bool) -> None:
    if first:
        dist.send(x, other)
        dist.recv(x, other)
    else:
        dist.recv(x, other)
        dist.send(x, other)


def _median(call: Callable[[Tensor], Any], x: Tensor, together: bool = True) -> float:
    return statistics.median(_times(call, x, REPEATS, together))


def _best(call: Callable[[Tensor], Any], x: Tensor, together: bool = True) -> float:
    return min(_times(call, x, BEST, together))


def _times(call: Callable[[Tensor], Any], x: Tensor, repeats: int, together: bool) -> list[float]:
    """Seconds of each call but the first, which makes connections where it is the first of its kind."""
    times = []
    for _ in range(repeats + (repeats > BEST)):
        if together:
            dist.barrier()
        _settle(x.device)
        start = time.perf_counter()
        call(x)
        _settle(x.device)
        times.append(time.perf_counter() - start)
    return times[repeats > BEST :]


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
