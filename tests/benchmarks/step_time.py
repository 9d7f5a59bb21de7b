"""Time of one optimizer step and one refresh per matrix, ours beside torch's AdamW and the published packages.

    python -m tests.benchmarks.step_time [--device cuda] [--dtype bfloat16] [--shapes 1024x4096 2048x2048] [--rank 128]

All optimizers run interleaved in one process on the same gradients; medians over rounds, and ratios to fused AdamW.
Packages that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import lowrank_ds


def ours(cls: type, **options: object) -> Callable:
    """A builder of one of our optimizers for one matrix."""
    return lambda p, rank: cls([("w", p)], lr=1e-4, **{"rank": rank, **options})


def package(module: str, name: str, **options: object) -> Callable | None:
    """A builder of a published optimizer, None if it is not installed."""
    try:
        cls = getattr(__import__(module), name)
    except ImportError:
        return None
    return lambda p, rank: cls([{"params": [p], "rank": rank, "proj_type": "std", **options}], lr=1e-4)


def contenders() -> dict[str, Callable | None]:
    """Everything that is timed."""
    never = 10**9
    fused = lambda p, rank: torch.optim.AdamW([p], lr=1e-4, fused=True)
    galore, apollo = {"update_proj_gap": never, "scale": 0.25}, {"update_proj_gap": never, "scale": 1.0}
    return {
        "torch AdamW fused": fused,
        "GaLoreAdamW": ours(lowrank_ds.GaLoreAdamW, update_proj_gap=never),
        "GaLoreAdamW power": ours(lowrank_ds.GaLoreAdamW, update_proj_gap=never, subspace="power"),
        "galore-torch": package("galore_torch", "GaLoreAdamW", **galore),
        "FiraAdamW": ours(lowrank_ds.FiraAdamW, update_proj_gap=never),
        "fira": package("fira", "FiraAdamW", update_proj_gap=never, alpha=0.25),
        "ApolloAdamW": ours(lowrank_ds.ApolloAdamW, update_proj_gap=never),
        "apollo-torch": package("apollo_torch", "APOLLOAdamW", proj="random", scale_type="channel", **apollo),
        "ApolloMini": ours(lowrank_ds.ApolloMini, update_proj_gap=never, rank=1),
        "Flora": ours(lowrank_ds.Flora, kappa=never),
    }


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, device work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def measure(shape: tuple[int, int], rank: int, device: torch.device, dtype: torch.dtype, rounds: int) -> list[tuple]:
    """(name, first step, median step, spread, state bytes, ratio to fused AdamW) for each contender."""
    torch.manual_seed(0)
    grad = torch.randn(shape, device=device, dtype=dtype)
    built = {}
    for name, make in contenders().items():
        if make is None:
            continue
        p = nn.Parameter(torch.randn(shape, device=device, dtype=dtype))
        p.grad = grad.clone()
        built[name] = make(p, rank)
    first = {name: timed(optimizer.step, device) for name, optimizer in built.items()}
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(rounds):
        for name, optimizer in built.items():
            times[name].append(timed(optimizer.step, device))
    base = statistics.median(times["torch AdamW fused"])
    rows = []
    for name, series in times.items():
        middle = statistics.median(series)
        spread = statistics.quantiles(series, n=4)[2] - statistics.quantiles(series, n=4)[0]
        rows.append((name, first[name], middle, spread, lowrank_ds.state_bytes(built[name]), middle / base))
    return rows


def header(device: torch.device) -> str:
    """Device, versions, commit and command."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    packages = ("galore-torch", "fira", "apollo-torch")
    versions = [f"{p} {v}" for p in packages if (v := _version(p))] or ["no published packages installed"]
    return (
        f"{name}; torch {torch.__version__}; {', '.join(versions)}; commit {commit or 'unknown'}; {' '.join(sys.argv)}"
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Print one Markdown table per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", default=["1024x4096", "4096x1024", "2048x2048"])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    device = torch.device(given.device)
    print(header(device))
    for text in given.shapes:
        shape = tuple(int(part) for part in text.split("x"))
        print(f"\n### {text}, rank {given.rank}, {given.dtype}\n")
        print("| optimizer | first step (refresh) ms | step ms | quartile spread | state MiB | x fused AdamW |")
        print("|---|---|---|---|---|---|")
        for name, first, middle, spread, size, ratio in measure(
            shape, given.rank, device, getattr(torch, given.dtype), given.rounds
        ):
            print(f"| {name} | {first:.2f} | {middle:.3f} | {spread:.3f} | {size / 2**20:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
