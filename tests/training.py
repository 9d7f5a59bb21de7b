"""Train the tiny LLaMA for a few steps under any engine; what the recipe x layout tests run on each rank."""

from __future__ import annotations

import copy
from typing import Any

import torch

import lowrank_ds
from tests.cluster import batches, quiet_deepspeed, share, tiny_llama

STEPS = 9
GAP = 4  # refreshes at steps 0, 4 and 8

# One row per recipe: (class, settings). rank 8 < every matrix' smaller side (12). Exact bases where no other is named.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "galore": ("GaLoreAdamW", {"update_proj_gap": GAP}),
    "galore right": ("GaLoreAdamW", {"update_proj_gap": GAP, "proj_type": "right", "weight_decay": 0.1}),
    "galore left": ("GaLoreAdamW", {"update_proj_gap": GAP, "proj_type": "left"}),
    "galore full": ("GaLoreAdamW", {"update_proj_gap": GAP, "proj_type": "full"}),
    # the refresh at step 4 is warm, that at step 8 cold
    "galore power rotate": (
        "GaLoreAdamW",
        {"update_proj_gap": GAP, "subspace": "power", "on_refresh": "rotate", "cold_every": 2},
    ),
    # lr 1e-3: right after a reset Adam's direction is all signs, and at 1e-2 one ulp in the initial weights moves the
    # one-process result by up to 3e-5
    "galore randomized reset": (
        "GaLoreAdamW",
        {"update_proj_gap": GAP, "subspace": "randomized", "on_refresh": "reset", "stagger": True, "lr": 1e-3},
    ),
    "galore adafactor": ("GaLoreAdafactor", {"update_proj_gap": GAP, "beta1": 0.9}),
    "fira": ("FiraAdamW", {"update_proj_gap": GAP}),
    "fira default": ("FiraAdamW", {"update_proj_gap": GAP, "subspace": None}),
    "fira paper": ("FiraAdamW", {"update_proj_gap": GAP, "residual": "paper", "proj_type": "reverse_std"}),
    "fira matrix": ("FiraAdamW", {"update_proj_gap": GAP, "scaling": "matrix", "subspace": "randomized"}),
    "apollo": ("ApolloAdamW", {"update_proj_gap": GAP}),
    "apollo svd": ("ApolloAdamW", {"update_proj_gap": GAP, "subspace": "svd", "proj_type": "reverse_std"}),
    # at lr 1e-2 this recipe is chaotic on the tiny model: one ulp in the initial weights moves the result by 8e-3
    "apollo mini": ("ApolloMini", {"update_proj_gap": GAP, "rank": 1, "lr": 1e-3}),
    "flora": ("Flora", {"kappa": GAP}),
    "flora unfactored": ("Flora", {"kappa": GAP, "factorize_second_moment": False, "proj_type": "left"}),
    "lomo": ("Lomo", {"rank": None, "lr": 0.1, "weight_decay": 0.01}),
    "adalomo": ("AdaLomo", {"rank": None, "weight_decay": 0.1}),
}


def settings_of(recipe: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """(class name, constructor settings) of a row of RECIPES."""
    name, own = RECIPES[recipe]
    exact = {"subspace": "svd"} if name.startswith(("GaLore", "Fira")) else {}
    return name, {"lr": 1e-2, "rank": 8, **exact, **own, **more}


def build(recipe: str, model: torch.nn.Module, **more: Any) -> torch.optim.Optimizer:
    """The recipe's optimizer on a model that no engine has taken over, or on a DDP-wrapped one."""
    name, settings = settings_of(recipe, **more)
    return getattr(lowrank_ds, name)(model.named_parameters(), **settings)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """{name: a copy of the whole weight}, gathered under ZeRO-3 and FSDP1 (by all ranks)."""
    from lowrank_ds.params import canonical

    if any(hasattr(p, "_fsdp_flattened") for p in model.parameters()):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {canonical(n): p.detach().float().clone() for n, p in model.named_parameters()}
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if partitioned:
        import deepspeed

        with deepspeed.zero.GatheredParameters(partitioned):
            return {canonical(n): p.detach().float().clone() for n, p in model.named_parameters()}
    return {canonical(n): _whole(p.detach()).float().clone() for n, p in model.named_parameters()}


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """The whole weight of a DTensor, on every rank."""
    if not hasattr(weight, "full_tensor"):
        return weight
    whole = weight.full_tensor()
    return whole.wait() if hasattr(whole, "wait") else whole


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """max |a - b| over all weights; NaN counts as infinite."""
    assert a.keys() == b.keys()
    differences = [(a[name] - b[name]).abs().max().item() for name in a]
    return max(d if d == d else float("inf") for d in differences)


def one_process(recipe: str, steps: int = STEPS, model: Any = None, **more: Any) -> dict[str, torch.Tensor]:
    """Weights after training on the whole batches in this process."""
    model = model or tiny_llama()
    optimizer = build(recipe, model, **more)
    for batch in batches(steps):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


def nudged(model: Any, seed: int = 0) -> Any:
    """The model itself, its weights changed in the last bit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 6e-8 * torch.randn(p.shape, generator=generator).sign())
    return model


def one_ulp_away(recipe: str) -> dict[str, torch.Tensor]:
    """One process from initial weights changed in the last bit: how much rounding alone moves this recipe."""
    return one_process(recipe, model=nudged(tiny_llama()))


def ddp(rank: int, world: int, recipe: str, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights after training under DistributedDataParallel."""
    model = torch.nn.parallel.DistributedDataParallel(tiny_llama())
    optimizer = build(recipe, model)
    for batch in batches(steps):
        mine = share(batch, rank, world)
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


def fsdp1_model(model: torch.nn.Module | None = None, **more: Any) -> torch.nn.Module:
    """The tiny LLaMA under FSDP1: one unit for the first decoder layer, one for the rest. `more`: FSDP's arguments.

    (A unit per layer would put all cuts of two ranks between rows.)
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import CustomPolicy

    model = tiny_llama() if model is None else model
    settings: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    if "auto_wrap_policy" not in more:
        settings["auto_wrap_policy"] = CustomPolicy(lambda module: module is model.model.layers[0])
    return FullyShardedDataParallel(model, **(settings | more))


def fsdp1_optimizer(recipe: str, model: torch.nn.Module, **more: Any) -> torch.optim.Optimizer:
    """The recipe's optimizer on an FSDP1-wrapped model."""
    name, settings = settings_of(recipe, **more)
    groups = lowrank_ds.param_groups(model, rank=settings.pop("rank"))
    return getattr(lowrank_ds, name)(groups, **settings)


def fsdp1(rank: int, world: int, recipe: str, steps: int = STEPS, **more: Any) -> dict[str, torch.Tensor]:
    """Weights after training under FSDP1; `more`: the recipe's settings."""
    model = fsdp1_model()
    optimizer = fsdp1_optimizer(recipe, model, **more)
    train_wrapped(model, optimizer, rank, world, steps)
    return weights_of(model)


def train_wrapped(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int, steps: int = STEPS
) -> None:
    """The plain loop over the global batches, split over ranks."""
    for batch in batches(steps):
        mine = share(batch, rank, world)
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def ds_config(recipe: str | None, stage: int, world: int, **more: Any) -> dict[str, Any]:
    """A ds_config that names the recipe's optimizer; `more` overrides top-level keys, `zero` the ZeRO section."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 200, **more.pop("zero", {})}
    config = {"train_micro_batch_size_per_gpu": 12 // world, "gradient_clipping": 0.0, "zero_optimization": zero}
    if recipe is not None:
        name, settings = settings_of(recipe, **more.pop("settings", {}))
        config["optimizer"] = {"type": name, "params": settings}
    return copy.deepcopy({**config, **more})


def zero_engine(recipe: str, stage: int, world: int, model: Any = None, **more: Any) -> Any:
    """A DeepSpeed engine whose ds_config names the optimizer."""
    deepspeed = quiet_deepspeed()
    config = ds_config(recipe, stage, world, **more)
    return deepspeed.initialize(model=model or tiny_llama(), config=config)[0]


def zero(rank: int, world: int, recipe: str, stage: int, steps: int = STEPS, **more: Any) -> dict[str, torch.Tensor]:
    """Weights after training under ZeRO `stage`."""
    engine = zero_engine(recipe, stage, world, **more)
    train_engine(engine, rank, world, steps)
    weights = weights_of(engine.module)
    engine.destroy()
    return weights


def train_engine(engine: Any, rank: int, world: int, steps: int = STEPS) -> None:
    """Drive a DeepSpeed engine over the global batches, split over ranks and micro-batches."""
    pieces = engine.gradient_accumulation_steps()
    for batch in batches(steps):
        for mine in share(batch, rank, world).chunk(pieces):
            engine.backward(engine(input_ids=mine, labels=mine).loss)
            engine.step()


# -- FSDP2, HSDP, tensor parallelism -----------------------------------------------------------------------------------
def mesh_of(kind: str, world: int) -> Any:
    """The device mesh of a kind of sharding: "fsdp2", "hsdp", "fsdp2 tp", "replicate"."""
    from torch.distributed.device_mesh import init_device_mesh

    if kind == "hsdp":
        return init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    if kind == "fsdp2 tp":
        return init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    return init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))


def tensor_parallel(model: Any, mesh: Any) -> None:
    """Shard every linear layer of the tiny LLaMA over `mesh`: rows of W (colwise) or columns of W (rowwise)."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {name: ColwiseParallel(output_layouts=Replicate()) for name in ("q_proj", "k_proj", "v_proj")}
    plan = {f"self_attn.{name}": style for name, style in plan.items()}
    plan |= {
        "self_attn.o_proj": RowwiseParallel(input_layouts=Replicate()),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)


def fully_sharded(kind: str, world: int, model: Any = None, mesh: Any = None, **options: Any) -> Any:
    """The tiny LLaMA under `fully_shard` (each layer and the root a unit) or `replicate`; `options` are theirs."""
    from torch.distributed.fsdp import fully_shard

    model, mesh = model or tiny_llama(), mesh or mesh_of(kind, world)
    if kind == "replicate":
        from torch.distributed._composable.replicate_with_fsdp import replicate as shard
    else:
        shard = fully_shard
    if kind == "fsdp2 tp":
        tensor_parallel(model, mesh["tp"])
        mesh = mesh["dp"]
    for layer in model.model.layers:
        shard(layer, mesh=mesh, **options)
    shard(model, mesh=mesh, **options)
    return model


def data_ranks(kind: str, rank: int, world: int) -> tuple[int, int]:
    """(index, count) of this process among those that get different data."""
    return (rank // 2, world // 2) if kind == "fsdp2 tp" else (rank, world)


def train_sharded(model: Any, optimizer: Any, kind: str, rank: int, world: int, steps: range) -> None:
    """Plain torch training of an FSDP2 model on its share of the global batches number `steps`."""
    place, parts = data_ranks(kind, rank, world)
    for batch in batches(steps.stop)[steps.start :]:
        mine = share(batch, place, parts)
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def fsdp2(rank: int, world: int, recipe: str, kind: str = "fsdp2", steps: int = STEPS, **options: Any) -> dict:
    """Weights after training under FSDP2 (or "hsdp", "fsdp2 tp", "replicate")."""
    model = fully_sharded(kind, world, **options)
    optimizer = build(recipe, model)
    train_sharded(model, optimizer, kind, rank, world, range(steps))
    return weights_of(model)
