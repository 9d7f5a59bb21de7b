"""Plans beside what real runs and fake ones take: python -m tests.planning [--fake] [--only NAME ...]

Real: small LLaMAs on 2 and 4 gloo processes of this machine, every storage tracked from the first on, the worst moment
of the third step (an ordinary one). Fake: LLaMA-7B and 70B dimensions on up to 512 ranks (`lowrank-ds plan --simulate`;
minutes each).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from typing import Any

import torch

import lowrank_ds
from lowrank_ds.bench.counting import counting
from lowrank_ds.bench.tracking import Tracker
from lowrank_ds.plan import Planner, Settings, Zero, models, simulate
from tests.cluster import launch, quiet_deepspeed

# Nothing divides by 2 or 4 but what must (heads).
SMALL = {
    "model_type": "llama", "vocab_size": 509, "hidden_size": 132, "intermediate_size": 357, "num_hidden_layers": 4,
    "num_attention_heads": 3, "num_key_value_heads": 1,
}  # fmt: skip
TIED = SMALL | {"tie_word_embeddings": True, "vocab_size": 2003, "num_hidden_layers": 1}
# of the size of a layer, so that buckets are reduced and prefetches end
BUCKETS = Zero(100_000, False, 60_000, 1_000, 400_000, 100_000)


def small(**changes: Any) -> Settings:
    """A small configuration on two ranks."""
    given = {"config": SMALL, "recipe": "fira", "rank": 16, "gpus": 2, "seq": 48, "micro_batch": 2, "zero": BUCKETS}
    return Settings(**(given | changes))


CELLS: dict[str, Settings] = {
    "ddp": small(engine="ddp"),
    "ddp, checkpointed": small(engine="ddp", checkpointing=True),
    "ddp, tied": small(engine="ddp", config=TIED),
    "zero1": small(engine="zero1"),
    "zero2": small(engine="zero2"),
    "zero2, long": small(engine="zero2", seq=256),
    "zero2, fp32": small(engine="zero2", dtype="fp32"),
    "zero3": small(engine="zero3"),
    "zero3, default buckets, checkpointed": small(
        engine="zero3", checkpointing=True, zero=dataclasses.replace(Zero(), reduce_bucket_size=500_000)
    ),
    "zero3, layer-wise": small(engine="zero3", layerwise=True),
    "fsdp2": small(),
    "fsdp2, checkpointed": small(checkpointing=True),
    "fsdp2, tied": small(config=TIED),
    "zero2, tied": small(engine="zero2", config=TIED),
    "zero3, tied": small(engine="zero3", config=TIED),
    "fsdp2, long": small(seq=512),
    "fsdp2, long, checkpointed": small(seq=512, checkpointing=True),
    "fsdp2, fp32": small(dtype="fp32"),
    "fsdp2, layer-wise": small(layerwise=True),
    "fsdp2, layer-wise, checkpointed": small(layerwise=True, checkpointing=True),
    "fsdp2, galore, 8 bits": small(recipe="q_galore"),
    "fsdp2, apollo": small(recipe="apollo"),
    "fsdp2, flora": small(recipe="flora"),
    "hsdp": small(engine="hsdp", gpus=4, shard=2),
    "hsdp, layer-wise, checkpointed": small(engine="hsdp", gpus=4, shard=2, layerwise=True, checkpointing=True),
}


class Allocated(Tracker):
    """Storages that take memory: DeepSpeed keeps a meta tensor of each parameter."""

    def _see(self, storage: torch.UntypedStorage) -> int:
        return -1 if storage.device.type == "meta" else super()._see(storage)


# -- one rank of a real run -------------------------------------------------------------------------------------------
def run_cells(rank: int, world: int, names: list[str], cells: dict[str, Settings]) -> dict[str, dict[str, int]]:
    """{name: what was tracked on this rank}."""
    return {name: run_cell(rank, world, cells[name]) for name in names}


def run_cell(rank: int, world: int, settings: Settings) -> dict[str, Any]:
    """Three steps; {"total" at the worst moment of the third, and what it was, "weights", "state", our traffic}."""
    torch.manual_seed(0)
    gc.collect()
    gc.disable()  # what only the cycle collector would free counts
    tracker = Allocated()
    try:
        with simulate.blocks_of_a_gpu(), tracker:
            train, weights, optimizer, close = _ENGINES[settings.engine.rstrip("12")](settings, world)
            for _ in range(3):
                before = tracker.now()
                with counting() as sent:
                    train(torch.randint(0, 509, (settings.micro_batch, settings.seq)))
            held = weights()
        tracker.name("weights", held)
        leaves = torch.utils._pytree.tree_leaves(dict(optimizer.state))
        tracker.name("state", [t for t in leaves if isinstance(t, torch.Tensor)])
        peak = tracker.peak(before)
        found = {"total": peak.total, "weights": _storages(held), "state": lowrank_ds.state_bytes(optimizer)}
        found |= {"at": peak.at, "calls": _dashed(sent.kinds), "bytes": _dashed(sent.bytes_of)}
        close()
    finally:
        gc.enable()
    return found


def _dashed(counts: dict[str, int]) -> dict[str, int]:
    return {kind.replace("_", "-"): count for kind, count in counts.items()}


def _storages(tensors: list[torch.Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _plain(settings: Settings, world: int) -> tuple:
    """DDP, FSDP2 or HSDP: (train on tokens, weights held, optimizer, end)."""
    model = simulate.build_model(settings, None)
    if settings.engine == "ddp":
        wrapped: Any = torch.nn.parallel.DistributedDataParallel(model)
    else:
        wrapped = simulate.shard(model, _mesh(settings))
    optimizer = simulate.build_optimizer(settings, wrapped)
    if settings.layerwise:
        lowrank_ds.layerwise(wrapped, optimizer)

    def train(tokens: torch.Tensor) -> None:
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train, lambda: [lowrank_ds.engines.local(p) for p in model.parameters()], optimizer, lambda: None


def _mesh(settings: Settings) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if settings.shards == settings.world:
        return init_device_mesh("cpu", (settings.world,))
    sizes = settings.world // settings.shards, settings.shards
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))


def _zero(settings: Settings, world: int) -> tuple:
    """DeepSpeed: the same."""
    deepspeed = quiet_deepspeed()
    options = settings.arguments | ({"layerwise": True} if settings.layerwise else {})
    config = {
        "train_micro_batch_size_per_gpu": settings.micro_batch, "gradient_clipping": 0.0,
        "bf16": {"enabled": settings.dtype == "bf16"},
        "optimizer": {"type": settings.algorithm.__name__, "params": options},
        "zero_optimization": {"stage": int(settings.engine[-1]), **dataclasses.asdict(settings.zero)},
    }  # fmt: skip
    engine = deepspeed.initialize(model=simulate.build_model(settings, None), config=config)[0]

    def train(tokens: torch.Tensor) -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()

    def weights() -> list[torch.Tensor]:
        return [getattr(p, "ds_tensor", p.data) for p in engine.module.parameters()]

    return train, weights, engine.optimizer if settings.layerwise else engine.basic_optimizer, engine.destroy


_ENGINES = {"ddp": _plain, "fsdp": _plain, "hsdp": _plain, "zero": _zero, "zero3": _zero}


# -- the table --------------------------------------------------------------------------------------------------------
def measured(names: list[str], cells: dict[str, Settings] = CELLS) -> dict[str, list[dict[str, int]]]:
    """{name: what each rank tracked}: one launch for each number of ranks."""
    found: dict[str, list[dict[str, int]]] = {}
    for world in sorted({cells[name].world for name in names}):
        alike = [name for name in names if cells[name].world == world]
        ranks = launch(world, run_cells, alike, cells, timeout=3000)
        found |= {name: [rank[name] for rank in ranks] for name in alike}
    return found


def row(name: str, settings: Settings, tracked: dict[str, int]) -> str:
    """A line of the table: planned and tracked."""
    plan = Planner(settings).plan()
    cells = [name]
    for planned, real in (
        (plan.peak.at["weights"], tracked["weights"]), (sum(plan.state.values()), tracked["state"]),
        (plan.total, tracked["total"]),
    ):  # fmt: skip
        cells += [f"{planned:,}", f"{real:,}", f"{planned / real - 1:+.2%}"]
    return "| " + " | ".join([*cells, plan.peak.name]) + " |"


FAKE: dict[str, Settings] = {
    "7B, Fira, 8 ranks": Settings(models.PRESETS["llama_7b"], rank=1024, checkpointing=True),
    "7B, Fira, layer-wise, 8 ranks": Settings(
        models.PRESETS["llama_7b"], rank=1024, checkpointing=True, layerwise=True
    ),
    "7B, Fira, 64 ranks": Settings(models.PRESETS["llama_7b"], rank=1024, nodes=8, checkpointing=True),
    "7B, Fira, 64 ranks, all activations": Settings(models.PRESETS["llama_7b"], rank=1024, nodes=8),
    "7B, Fira, HSDP 8 x 8": Settings(models.PRESETS["llama_7b"], rank=1024, nodes=8, engine="hsdp", checkpointing=True),
    "70B dimensions, 8 layers, Fira, 512 ranks": Settings(
        models.PRESETS["llama_70b"] | {"num_hidden_layers": 8}, rank=512, nodes=64, checkpointing=True
    ),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fake", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    given = parser.parse_args()
    columns = [
        "",
        *(f"{what}, {who}" for what in ("weights", "state", "total") for who in ("plan", "run", "difference")),
    ]
    print("| " + " | ".join([*columns, "worst moment"]) + " |\n" + "|---" * 11 + "|")
    if given.fake:
        for name in given.only or FAKE:
            found = simulate.in_a_process(FAKE[name])
            print(row(name, FAKE[name], found), f"{found['seconds']:.0f} s", flush=True)
        return
    names = given.only or list(CELLS)
    for name, ranks in measured(names).items():
        print(row(name, CELLS[name], max(ranks, key=lambda found: found["total"])), flush=True)


if __name__ == "__main__":
    main()
