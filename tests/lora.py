"""The tiny LLaMA with LoRA layers of mixed ranks, trained with LoRA-FA under any engine."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

import lowrank_ds
from tests import training
from tests.cluster import quiet_deepspeed, tiny_llama

LR, DECAY = 1e-2, 0.1
R, ALPHA = 6, 12
STEPS = training.STEPS


def lora_llama(**config: Any) -> nn.Module:
    """Ranks 6, 3 (up_proj) and 1 (v_proj), rsLoRA, the output head trained too; A and its seed the same everywhere."""
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    torch.manual_seed(3)
    settings = {
        "r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "use_rslora": True,
        "rank_pattern": {"up_proj": 3, "v_proj": 1}, "modules_to_save": ["lm_head"],
    }  # fmt: skip
    return get_peft_model(model, LoraConfig(**{**settings, **config}))


def optimizer_of(model: nn.Module, **options: Any) -> lowrank_ds.LoRAFA:
    """LoRA-FA with the settings all runs share."""
    return lowrank_ds.create_lorafa_optimizer(model, R, ALPHA, LR, DECAY, **options)


def one_process(steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights of one process on the whole batches."""
    model = lora_llama()
    training.train_wrapped(model, optimizer_of(model), 0, 1, steps)
    return training.weights_of(model)


def ddp(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Under DistributedDataParallel."""
    model = lora_llama()
    optimizer = optimizer_of(model)
    training.train_wrapped(nn.parallel.DistributedDataParallel(model), optimizer, rank, world)
    return training.weights_of(model)


def engine_of(stage: int, world: int, named: bool = True, **more: Any) -> Any:
    """A DeepSpeed engine; named: the ds_config names LoRAFA, else an instance is handed over."""
    gc.collect()  # an engine collected while the next one is built clears DeepSpeed's record of names
    deepspeed, model = quiet_deepspeed(), lora_llama()
    config = training.ds_config(None, stage, world, **more)
    if named:
        config["optimizer"] = {"type": "LoRAFA", "params": {"lr": LR, "weight_decay": DECAY}}
        return deepspeed.initialize(model=model, config=config)[0]
    return deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)[0]


def zero(rank: int, world: int, stage: int, named: bool = True, **more: Any) -> dict[str, torch.Tensor]:
    """Under ZeRO."""
    engine = engine_of(stage, world, named, **more)
    training.train_engine(engine, rank, world)
    weights = training.weights_of(engine.module)
    engine.destroy()
    return weights


def sharded(kind: str, world: int) -> nn.Module:
    """Under fully_shard (or "hsdp", ...): each decoder layer and the root a unit."""
    model = lora_llama()
    from torch.distributed.fsdp import fully_shard

    mesh = training.mesh_of(kind, world)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2(rank: int, world: int, kind: str = "fsdp2", **options: Any) -> dict[str, torch.Tensor]:
    """Under FSDP2 or HSDP."""
    model = sharded(kind, world)
    training.train_sharded(model, optimizer_of(model, **options), kind, rank, world, range(STEPS))
    return training.weights_of(model)


def fsdp1(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Under FSDP1: one unit for the first decoder layer, one for the rest."""
    from torch.distributed.fsdp.wrap import CustomPolicy

    model = lora_llama()
    first = model.base_model.model.model.layers[0]
    wrapped = training.fsdp1_model(model, auto_wrap_policy=CustomPolicy(lambda module: module is first))
    training.train_wrapped(wrapped, optimizer_of(wrapped), rank, world)
    return training.weights_of(wrapped)
