"""Step time and bytes between two hosts with whole gradients and with coordinates on the wire (`reduce_in_subspace`).

    python -m tests.benchmarks.wire [--rate 100mbit] [--steps 6] [--rank 32]     # root; the table of docs/replicas.md

Two simulated hosts (network namespaces, tests/multinode/hosts.py), two ranks on each, gloo, each host's link shaped
to `--rate` ("none": not shaped). A LLaMA of 4 layers, 256 wide, GaLore (power); DDP, and HSDP with the shards in a host
and the replicas across. The first step makes the bases and is shown apart; of the others the fastest and the median
are. Bytes are those the host's network card sent for a step, both ranks; "link": how long the shaped link takes for
them; "asked": what a rank gave to all-reduces over replicas.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lowrank_ds
from tests.cluster import tiny_llama

WORLD, PER_HOST = 4, 2
SIZES = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
WIRES: dict[str, Any] = {"G": None, "R": {}, "R, bf16": {"wire_dtype": torch.bfloat16}}


def wrapped(engine: str) -> Any:
    """The model under DDP, or under HSDP with the ranks of a host as shards."""
    model = tiny_llama(**SIZES)
    if engine == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD // PER_HOST, PER_HOST), mesh_dim_names=("replicate", "shard"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sent() -> int:
    """Bytes that this host's network card has sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == os.environ["GLOO_SOCKET_IFNAME"]:
            return int(numbers.split()[8])
    raise OSError(f"no {os.environ['GLOO_SOCKET_IFNAME']} in /proc/self/net/dev")


def measured(engine: str, wire: Any, steps: int, rank: int) -> dict[str, Any]:
    """Seconds and bytes of each step, and weights at the end (a checksum)."""
    model = wrapped(engine)
    groups = lowrank_ds.param_groups(model, rank=rank, target_modules=["self_attn", "mlp"])
    optimizer = lowrank_ds.GaLoreAdamW(groups, lr=1e-3, update_proj_gap=10_000)
    handle = None if wire is None else lowrank_ds.reduce_in_subspace(model, optimizer, **wire)
    generator = torch.Generator().manual_seed(dist.get_rank())
    found: dict[str, Any] = {"seconds": [], "bytes": []}
    for _ in range(steps + 1):
        batch = torch.randint(0, SIZES["vocab_size"], (2, 64), generator=generator)
        dist.barrier()
        start, before = time.perf_counter(), sent()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        found["seconds"].append(time.perf_counter() - start)
        found["bytes"].append(sent() - before)
    found["asked"] = None if handle is None else handle.traffic._asdict()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]
    found["weights"] = float(sum(p.double().square().sum() for p in whole))
    return found


def work(steps: int, rank: int, file: str) -> None:
    """One rank: all rows, one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [
        {"engine": engine, "wire": name, **measured(engine, wire, steps, rank)}
        for engine in ("ddp", "hsdp")
        for name, wire in WIRES.items()
    ]
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def on_hosts(rate: str, steps: int, rank: int) -> list[dict[str, Any]]:
    """Run `work` on two hosts whose links are shaped."""
    from tests.multinode.hosts import INTERFACE, Hosts

    with Hosts(2) as hosts, tempfile.TemporaryDirectory() as folder:
        if rate != "none":
            for name in hosts.names:
                hosts.shape(name, rate)
        file, log = Path(folder) / "rows.json", Path(folder) / "log"
        command = [sys.executable, "-m", "tests.benchmarks.wire", "--work", file, "--steps", steps, "--rank", rank]
        shared = {
            "WORLD_SIZE": WORLD, "MASTER_ADDR": hosts.address(hosts.names[0]), "MASTER_PORT": 29517,
            "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        started = [
            hosts.start(hosts.names[i // PER_HOST], command, log, RANK=i, LOCAL_RANK=i % PER_HOST, **shared)
            for i in range(WORLD)
        ]
        if any([process.wait() for process in started]):
            raise SystemExit(log.read_text())
        return json.loads(file.read_text())


def table(rows: list[dict[str, Any]], rate: str) -> str:
    """The rows in Markdown."""
    from tests.multinode.hosts import bits_per_second

    lines = [
        "| engine | on the wire | step, s: fastest (median) | refresh step, s | MB sent by a host, step | link, s | "
        "MB, refresh step | asked, MB: coordinates + whole | projected matrices: whole / coordinates |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds, sizes, asked = row["seconds"], row["bytes"], row["asked"]
        told, ratio = "", ""
        if asked is not None:
            scale = 2 if "bf16" in row["wire"] else 1
            told = f"{asked['coordinates'] / 1e6:.2f} + {asked['whole'] / 1e6:.2f}"
            ratio = f"{(asked['without'] - scale * asked['whole']) / asked['coordinates']:.1f}"
        moved = statistics.median(sizes[1:])
        link = "" if rate == "none" else f"{8 * moved / bits_per_second(rate):.2f}"
        lines.append(
            f"| {row['engine']} | {row['wire']} | {min(seconds[1:]):.2f} ({statistics.median(seconds[1:]):.2f}) | "
            f"{seconds[0]:.2f} | {moved / 1e6:.2f} | {link} | {sizes[0] / 1e6:.2f} | {told} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", default="100mbit", help="of each host's link, in tc's units; \"none\": not shaped")
    parser.add_argument("--steps", type=int, default=6, help="beside the first")
    parser.add_argument("--rank", type=int, default=32, help="of the subspaces")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.steps, args.rank, args.work)
        return
    rows = on_hosts(args.rate, args.steps, args.rank)
    print(f"rate {args.rate}, rank {args.rank}, {args.steps} steps\n\n{table(rows, args.rate)}")
    sums = {row["weights"] for row in rows if "bf16" not in row["wire"]}
    print(f"\nweights (sums of squares): {sorted(sums)}")


if __name__ == "__main__":
    main()
