#!/usr/bin/env python3
"""Pre-train a causal language model with a low-rank (or any) optimizer, under DeepSpeed, DDP or FSDP.

    deepspeed --num_gpus 2 launch/pretrain.py --deepspeed_config ds_configs/zero2_fira.json \
        --model ds_configs/models/llama_60m.json --tokenizer DIR \
        --train-data 'c4/train.*.json.gz' --valid-data 'c4/valid.*.json.gz' \
        --steps 10000 --batch-size 512 --micro-batch 64 --output runs/fira_60m

    torchrun --nproc-per-node 2 launch/pretrain.py --engine fsdp2 --optimizer FiraAdamW --lr 0.01 --rank 128 ...

OUTPUT receives metrics.jsonl, summary.json, checkpoint/ (of the engine's kind) and model/ (a HF directory); with
--save-every N also checkpoints/, from which --resume auto goes on exactly (docs/resume.md).
"""

import importlib.metadata
import json
import platform
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lowrank_ds
from launch.data import LocalBatches, cut_blocks, find_files, fingerprint_blocks, token_cache
from launch.engines import DdpTrainer, DeepSpeedTrainer, Fsdp1Trainer, Fsdp2Trainer, TorchTrainer, hybrid_mesh
from launch.evaluation import perplexity
from launch.identity import describe_run
from launch.model import build_model, save_model
from launch.optimizers import torch_optimizer, warmup_cosine
from launch.options import BatchPlan, load_ds_config, optimizer_overrides, parse
from launch.processes import Processes, find_processes, limit_waits, timeout_of
from launch.progress import Progress
from launch.resume import check_run, restore
from launch.saving import PREEMPTED, PREEMPTED_FILE, Position, Preemption, Saver, check_loss
from launch.streaming import StreamBatches, held_out_blocks, open_stream
from launch.tokenizer import load_tokenizer
from launch.watching import watch
from lowrank_ds import failures
from lowrank_ds.checkpoint.rotation import replace_text


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


def load_data(args, tokenizer, plan: BatchPlan, rank: int) -> tuple[LocalBatches | StreamBatches, np.ndarray]:
    """Training batches and held-out blocks."""
    if args.dataset:
        train, valid = (open_stream(args.dataset, args.dataset_name, s) for s in (args.train_split, args.valid_split))
        name = {
            "dataset": args.dataset,
            "name": args.dataset_name,
            "split": args.train_split,
            "text_key": args.text_key,
        }
        batches = StreamBatches(train, tokenizer, args.text_key, args.seq_len, plan, rank, name)
        return batches, held_out_blocks(valid, tokenizer, args.text_key, args.seq_len, args.eval_tokens)

    def blocks(patterns: list[str], flag: str, limit: int | None) -> np.ndarray:
        tokens = token_cache(find_files(patterns, flag), tokenizer, args.text_key, args.cache_dir)
        return cut_blocks(tokens, args.seq_len, flag, limit)

    train = blocks(args.train_data, "--train-data", None)
    return LocalBatches(train, plan, rank, args.seed), blocks(args.valid_data, "--valid-data", args.eval_tokens)


def build_deepspeed(args, config: dict, tokenizer, factor, processes: Processes) -> DeepSpeedTrainer:
    """Model and engine from a ds_config."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    if processes.device.type == "cpu":
        # The op would be compiled for minutes, and a killed compilation leaves a lock that hangs every later run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(**timeout_of(args.timeout))
    zero3 = HfDeepSpeedConfig(config)  # while it lives, transformers shards weights as it makes them (stage 3)
    dtype = torch.bfloat16 if zero3.is_zero3() and config.get("bf16", {}).get("enabled") else torch.float32
    model = _model(args, tokenizer, dtype)
    if "activation_checkpointing" in config:  # DeepSpeed itself only parses it
        try:
            lowrank_ds.activation_checkpointing(model, config)
        except ValueError as error:
            raise SystemExit(f"--deepspeed_config {args.deepspeed_config}: {error}") from None
    return DeepSpeedTrainer(model, config, factor, args.embed_lr, processes)


def build_torch(args, tokenizer, factor, plan: BatchPlan, processes: Processes) -> TorchTrainer:
    """Model, engine and optimizer without DeepSpeed."""
    on_gpu = processes.device.type == "cuda"
    if (processes.world > 1 or args.engine != "ddp") and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", **timeout_of(args.timeout))
    bf16 = args.dtype == "bf16"
    model = _model(args, tokenizer, torch.bfloat16 if bf16 and args.engine == "ddp" else torch.float32)

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


def _model(args, tokenizer, dtype: torch.dtype) -> torch.nn.Module:
    checkpointing = args.activation_checkpointing
    return build_model(
        args.model, tokenizer, seq_len=args.seq_len, seed=args.seed, dtype=dtype, checkpointing=checkpointing
    )


def engine_name(args, config: dict | None, world: int) -> str:
    """ "zero2", "fsdp2", ...; "plain" for one process without an engine."""
    if config:
        return f"zero{config.get('zero_optimization', {}).get('stage', 0)}"
    return "plain" if args.engine == "ddp" and world == 1 else args.engine


def train(args, trainer, batches, evaluate, progress: Progress, processes: Processes, saver: Saver, at: Position):
    """The training loop, from where `at` is; in the end it is at the last step."""
    preemption, first = Preemption(processes) if saver.every else None, at.step
    watchers = watch(args, trainer, first)
    while at.step < args.steps:
        lr = trainer.lr()
        at.loss, at.since = at.loss + trainer.train_step(batches.at(at.step)), at.since + 1
        at.step += 1
        if at.step == first + 1:  # some groups are made in the first step
            limit_waits(args.timeout)
        for every, write in watchers:
            if at.step % every == 0 or at.step == args.steps:
                write(at.step)
        if at.step % args.log_every == 0 or at.step == args.steps:
            trainer.watch.settle()
            mean = processes.mean(at.loss / at.since)
            progress.training(at.step, mean, lr)
            check_loss(mean, at.step)
            at.loss, at.since = torch.zeros_like(at.loss), 0
        if at.step == args.steps or (args.eval_every and at.step % args.eval_every == 0):
            trainer.watch.settle()
            at.perplexity = progress.evaluation(at.step, evaluate)
        signalled = preemption.asked() if preemption else 0
        saved = saver.save(at) if signalled or saver.due(at.step) else False
        if signalled and at.step < args.steps:
            stop_early(args, signalled, at.step, saver, saved, processes)


def stop_early(args, signal_number: int, step: int, saver: Saver, saved: bool, processes: Processes) -> None:
    """End the job as a scheduler asked, with an exit code that says whether it can go on from here."""
    if not saved:
        raise SystemExit(f"{saver.failure}. The job ends, as signal {signal_number} asked")
    if processes.is_main:
        replace_text(Path(args.output) / PREEMPTED_FILE, f"{step}\n")  # launchers such as torchrun hide exit codes
        print(f"signal {signal_number}: saved after step {step}; go on with --resume auto", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(PREEMPTED)


def summarise(args, config: dict | None, trainer, plan: BatchPlan, processes: Processes) -> dict:
    """Facts of the run beside its perplexity; every process must call it."""
    params = trainer.optimizer.defaults
    on_gpu = processes.device.type == "cuda"
    replicas = getattr(trainer, "replicas", None)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "optimizer": type(trainer.optimizer).__name__,
        "optimizer_params": config["optimizer"]["params"] if config else optimizer_overrides(args),
        "lr": params["lr"],
        "embed_lr": params["lr"] if args.embed_lr is None else args.embed_lr,
        "engine": engine_name(args, config, processes.world),
        "layerwise": args.layerwise,
        "bytes_averaged_over_replicas": None if replicas is None else replicas.total._asdict(),
        "model": args.model,
        "parameters": trainer.parameters,
        "steps": args.steps,
        "tokens": args.steps * plan.total * args.seq_len,
        "batch_size": plan.total,
        "seq_len": args.seq_len,
        "optimizer_state_bytes_per_rank": processes.gather(trainer.state_bytes()),
        **state_kinds(trainer, processes),
        "peak_memory_bytes_per_rank": processes.gather(peak),
        **trainer.watch.report(),
        "world_size": processes.world,
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu ({platform.machine()})",
        "versions": versions(),
    }


def state_kinds(trainer, processes: Processes) -> dict[str, list[int]]:
    """{"state_moments_bytes_per_rank": ..., "state_projectors...", "state_other..."}: the state by what it is for."""
    own = lowrank_ds.state_bytes_by_kind(trainer.optimizer)
    return {f"state_{kind}_bytes_per_rank": processes.gather(own[kind]) for kind in own}


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("lowrank_ds", "torch", "deepspeed", "transformers", "numpy")
    found = {name: _version(name) for name in names}
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a checkout, or a package this run did not need


def announce(args, config: dict | None, run: dict, trainer, plan: BatchPlan, processes: Processes) -> None:
    """Write arguments.json and say what is trained."""
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / PREEMPTED_FILE).unlink(missing_ok=True)
    facts = {**vars(args), "ds_config": config, "run": run}
    replace_text(output / "arguments.json", json.dumps(facts, indent=2) + "\n")
    print(
        f"{type(trainer.optimizer).__name__}, {trainer.parameters:,} parameters, "
        f"{processes.world} x {processes.device.type}, {plan.total} x {args.seq_len} tokens a step",
        flush=True,
    )
    if hasattr(trainer.optimizer, "summary"):  # ours says what it projects and what not
        print(trainer.optimizer.summary(), flush=True)


def finish(args, config: dict | None, trainer, plan: BatchPlan, tokenizer, processes: Processes, found: dict) -> None:
    """Write what a finished run leaves; summary.json comes last, and says that it is finished. found: its results."""
    output = Path(args.output)
    if processes.is_main:
        shutil.rmtree(output / "checkpoint", ignore_errors=True)  # half of one, if the job was killed right here
    processes.barrier()
    trainer.save(output / "checkpoint", {"step": args.steps, "samples": args.steps * plan.total, "seed": args.seed})
    weights = trainer.weights()
    if processes.is_main:
        save_model(trainer.module, weights, tokenizer, output / "model")
    summary = summarise(args, config, trainer, plan, processes) | found
    if processes.is_main:
        replace_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(f"saved {output}/checkpoint, {output}/model and {output}/summary.json", flush=True)


def main() -> None:
    """Command line."""
    args = parse()
    processes = find_processes()
    output = Path(args.output)
    args.dtype = args.dtype or (
        None if args.deepspeed_config else "bf16" if processes.device.type == "cuda" else "fp32"
    )
    config = load_ds_config(args) if args.deepspeed_config else None
    plan = plan_batches(args, config, processes.world)
    tokenizer = load_tokenizer(args.tokenizer)
    batches, held_out = load_data(args, tokenizer, plan, processes.rank)
    run = describe_run(args, config, plan, tokenizer, batches.fingerprint(), fingerprint_blocks(held_out))
    check_run(args, run)
    if args.resume == "auto" and (output / "summary.json").exists():
        if processes.is_main:
            print(f"{output}: this run is finished; nothing to do")
        return
    factor = warmup_cosine(args.steps, args.warmup_steps, args.min_lr_ratio)
    if config:
        trainer = build_deepspeed(args, config, tokenizer, factor, processes)
    else:
        trainer = build_torch(args, tokenizer, factor, plan, processes)

    def evaluate() -> float:
        return perplexity(trainer.logits, held_out, processes.rank, processes.world, processes.device)

    progress = Progress(output, args.steps, plan.total * args.seq_len, processes.is_main)
    processes.meet(args.timeout)
    at = restore(args, trainer, batches, progress, processes)
    if processes.is_main:
        announce(args, config, run, trainer, plan, processes)
    saver = Saver(args, run, trainer, batches, progress, processes)
    with failures.watch("training"):
        train(args, trainer, batches, evaluate, progress, processes, saver, at)
    found = {
        "perplexity": at.perplexity,
        "held_out_tokens": held_out.size,
        "tokens_per_s": progress.tokens_per_second(),
    }
    finish(args, config, trainer, plan, tokenizer, processes, found)
    if dist.is_initialized():
        dist.destroy_process_group()
    if saver.failure:
        raise SystemExit(f"{saver.failure}. The run is finished, but its last checkpoint is missing")


if __name__ == "__main__":
    main()
