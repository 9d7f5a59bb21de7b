"""What the measured times of links say."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from lowrank_ds.doctor.findings import Facts, Finding, warning

SLOW = 0.5  # of the median's bandwidth
LATE = 5.0  # times the median pair's latency
_LOOK = (
    "Look at the cable, switch port and interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME): the slowest link sets the "
    "pace of every collective"
)


def pairs_of(told: dict[int, dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """The pairs that all ranks timed, the slowest first: {"ranks", "latency": seconds, "rate": bytes per second}."""
    found = [
        {"ranks": [a, b], "latency": latency, "rate": size / seconds}
        for links in told.values()
        for a, b, latency, seconds in links["pairs"]
    ]
    return sorted(found, key=lambda pair: pair["rate"])


def check(ranks: Sequence[Facts], pairs: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Hosts all of whose links are slow, then single slow links between the others; three hosts are needed to tell."""
    best: dict[int, float] = {}
    for pair in pairs:
        best |= {rank: max(best.get(rank, 0.0), pair["rate"]) for rank in pair["ranks"]}
    if len(best) < 3:
        return
    usual = statistics.median(best.values())
    slow = [rank for rank in sorted(best) if best[rank] < SLOW * usual]
    for rank in slow:
        yield warning(
            f"all links of rank {rank} ({ranks[rank]['host']}) are slow: {gbit(best[rank])} at best, where the median "
            f"is {gbit(usual)}",
            _LOOK,
            [rank],
        )
    yield from _single(ranks, [pair for pair in pairs if not set(pair["ranks"]) & set(slow)])


def _single(ranks: Sequence[Facts], pairs: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    if len(pairs) < 3:
        return
    rate = statistics.median(pair["rate"] for pair in pairs)
    latency = statistics.median(pair["latency"] for pair in pairs)
    for pair in pairs:
        if pair["rate"] < SLOW * rate or pair["latency"] > LATE * latency:
            yield warning(
                f"the link {_between(ranks, pair)} is slow: {_speed(pair)}; the median pair has {milli(latency)} and "
                f"{gbit(rate)}",
                _LOOK,
                pair["ranks"],
            )


def describe(ranks: Sequence[Facts], links: dict[str, Any]) -> list[str]:
    """Lines of the report. links: {"backend", "all_reduce", "broadcast", "pairs"}."""
    lines = []
    for name in ("all_reduce", "broadcast"):
        times = ", ".join(f"{amount(int(size))} in {milli(seconds)}" for size, seconds in links[name].items())
        lines.append(f"{name.replace('_', '-')} over all ranks ({links['backend']}): {times}")
    pairs = links["pairs"]
    if pairs:
        rate = statistics.median(pair["rate"] for pair in pairs)
        latency = statistics.median(pair["latency"] for pair in pairs)
        lines.append(f"{len(pairs)} pair(s), one way: median {milli(latency)} and {gbit(rate)}")
        lines.append(f"slowest {_between(ranks, pairs[0])}: {_speed(pairs[0])}")
    return lines


def _between(ranks: Sequence[Facts], pair: dict[str, Any]) -> str:
    a, b = pair["ranks"]
    return f"between rank {a} ({ranks[a]['host']}) and rank {b} ({ranks[b]['host']})"


def _speed(pair: dict[str, Any]) -> str:
    return f"{milli(pair['latency'])} and {gbit(pair['rate'])}"


def milli(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def gbit(rate: float) -> str:
    """Bytes per second for people."""
    return f"{8 * rate / 1e9:.3g} Gbit/s"


def amount(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**20:g} MiB" if size >= 1 << 20 else f"{size} B"
