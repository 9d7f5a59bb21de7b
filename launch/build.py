"""From flags to an engine: batch sizes, and a model wrapped, with its optimizer, in whichever way --engine says."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import lowrank_ds
from launch.engines import DdpTrainer, DeepSpeedTrainer, Fsdp1Trainer, Fsdp2Trainer, TorchTrainer, hybrid_mesh
from launch.optimizers import torch_optimizer
from launch.options import BatchPlan, optimizer_overrides
from launch.processes import Processes, timeout_of

ModelOf = Callable[[torch.dtype], nn.Module]  # makes the model; under ZeRO-3 while its config lives


def plan_batches(args, config: dict | None, world: int) -> BatchPlan:
    """Batch sizes from the flags, else from the ds_config, which is brought in line with the result."""
    given = config or {}
    plan = BatchPlan.make(
        args.batch_size or (None if args.micro_batch else given.get("train_batch_size")),
        args.micro_batch or given.get("train_micro_batch_size_per_gpu"),
        given.get("gradient_accumulation_steps"),
        world,
    )
    if config is not None:
        config["train_batch_size"] = plan.total
        config["train_micro_batch_size_per_gpu"] = plan.micro
        config["gradient_accumulation_steps"] = plan.accumulation
    return plan


def build_deepspeed(args, config: dict, model_of: ModelOf, factor, processes: Processes) -> DeepSpeedTrainer:
    """Model and engine from a ds_config."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    if processes.device.type == "cpu":
        # The op would be compiled for minutes, and a killed compilation leaves a lock that hangs every later run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(**timeout_of(args.timeout))
    zero3 = HfDeepSpeedConfig(config)  # while it lives, transformers shards weights as it makes them (stage 3)
    dtype = torch.bfloat16 if zero3.is_zero3() and config.get("bf16", {}).get("enabled") else torch.float32
    model = model_of(dtype)
    if "activation_checkpointing" in config:  # DeepSpeed itself only parses it
        try:
            lowrank_ds.activation_checkpointing(model, config)
        except ValueError as error:
            raise SystemExit(f"--deepspeed_config {args.deepspeed_config}: {error}") from None
    return DeepSpeedTrainer(model, config, factor, args.embed_lr, processes)


def build_torch(args, model_of: ModelOf, factor, plan: BatchPlan, processes: Processes) -> TorchTrainer:
    """Model, engine and optimizer without DeepSpeed."""
    on_gpu = processes.device.type == "cuda"
    if (processes.world > 1 or args.engine != "ddp") and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", **timeout_of(args.timeout))
    bf16 = args.dtype == "bf16"
    model = model_of(torch.bfloat16 if bf16 and args.engine == "ddp" else torch.float32)

    def optimizer_of(wrapped: torch.nn.Module, ends: set[str]) -> torch.optim.Optimizer:
        return torch_optimizer(args.optimizer, wrapped, optimizer_overrides(args), args.embed_lr, ends)

    clip, layerwise = args.gradient_clipping or 0.0, None
    if args.layerwise:
        norm = clip if args.clip else None
        clip, layerwise = 0.0, {"accumulation_steps": plan.accumulation, "clip": args.clip, "max_grad_norm": norm}
    wire = torch.bfloat16 if args.wire_dtype == "bf16" else None
    in_subspace = {"wire_dtype": wire} if args.reduce_in_subspace else None
    parts = model, optimizer_of, factor, clip, processes, layerwise, in_subspace
    if args.engine == "ddp":
        return DdpTrainer(*parts)
    if args.engine == "fsdp1":
        return Fsdp1Trainer(*parts, bf16=bf16)
    if args.engine == "hsdp":
        mesh = hybrid_mesh(processes, args.hsdp_shard)
    else:
        mesh = init_device_mesh(processes.device.type, (processes.world,), mesh_dim_names=("shard",))
    return Fsdp2Trainer(*parts, mesh=mesh, bf16=bf16)


def engine_name(args, config: dict | None, world: int) -> str:
    """ "zero2", "fsdp2", ...; "plain" for one process without an engine."""
    if config:
        return f"zero{config.get('zero_optimization', {}).get('stage', 0)}"
    return "plain" if args.engine == "ddp" and world == 1 else args.engine
