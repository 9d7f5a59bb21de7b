"""One training run: the loop, its files, how it ends and goes on; pretrain.py and finetune.py say what is trained."""

import importlib.metadata
import json
import platform
import resource
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import lowrank_ds
from launch.build import ModelOf, build_deepspeed, build_torch, engine_name, plan_batches
from launch.engines import Trainer
from launch.optimizers import warmup_then
from launch.options import BatchPlan, load_ds_config, optimizer_overrides
from launch.processes import Processes, find_processes, limit_waits
from launch.progress import Progress
from launch.resume import check_run, restore
from launch.saving import PREEMPTED, PREEMPTED_FILE, Position, Preemption, Saver, check_loss
from launch.watching import watch
from lowrank_ds import failures
from lowrank_ds.checkpoint.rotation import replace_text


@dataclass
class Job:
    """Who trains: this process, the ds_config if there is one, and how a batch is dealt."""

    processes: Processes
    config: dict | None
    plan: BatchPlan


@dataclass
class Work:
    """What is trained.

    batches: `at(step)`, `state()` and `restore(state)`, as `launch.data.LocalBatches`. evaluate: held-out perplexity.
    save: writes a HF directory from the trainer and its whole weights; called on the main process. run: what a resumed
    run must have in common with this one (`launch.identity`). facts: more for summary.json. keep_best: write
    OUTPUT/best whenever the held-out perplexity has improved.
    """

    batches: object
    model_of: ModelOf
    evaluate: Callable[[Trainer], float]
    save: Callable[[Trainer, dict[str, torch.Tensor], Path], None]
    run: dict
    held_out_tokens: int
    tokens_per_step: float  # on average
    facts: dict
    keep_best: bool = False
    check: Callable[[Trainer], None] = lambda trainer: None


def prepare(args) -> Job:
    """The processes, the ds_config and the batch sizes that the flags and the launcher mean; fills in --dtype."""
    processes = find_processes()
    args.dtype = args.dtype or (
        None if args.deepspeed_config else "bf16" if processes.device.type == "cuda" else "fp32"
    )
    config = load_ds_config(args) if args.deepspeed_config else None
    return Job(processes, config, plan_batches(args, config, processes.world))


def execute(args, job: Job, work: Work) -> None:
    """Train, from the beginning or from where --resume means, and write what a finished run leaves."""
    processes, config, plan, output = job.processes, job.config, job.plan, Path(args.output)
    check_run(args, work.run)
    if args.resume == "auto" and (output / "summary.json").exists():
        if processes.is_main:
            print(f"{output}: this run is finished; nothing to do")
        return
    factor = warmup_then(args.schedule, args.steps, args.warmup_steps, args.min_lr_ratio)
    if args.resume == "auto" and not args.save_every and processes.is_main:
        print("WARNING: --resume auto without --save-every N: this run saves nothing to go on from", flush=True)
    if config:
        trainer = build_deepspeed(args, config, work.model_of, factor, processes)
    else:
        trainer = build_torch(args, work.model_of, factor, plan, processes)
    progress = Progress(output, args.steps, work.tokens_per_step, processes.is_main)
    processes.meet(args.timeout)
    work.check(trainer)
    at = restore(args, trainer, work.batches, progress, processes)
    if processes.is_main:
        announce(args, config, work, trainer, plan, processes)
    saver = Saver(args, work.run, trainer, work.batches, progress, processes)
    with failures.watch("training"):
        train(args, trainer, work, progress, processes, saver, at)
    found = {
        "perplexity": at.perplexity,
        "held_out_tokens": work.held_out_tokens,
        "tokens_per_s": progress.tokens_per_second(),
        **({"best_perplexity": at.best} if work.keep_best else {}),
        **work.facts,
    }
    finish(args, config, trainer, plan, work, processes, found)
    if dist.is_initialized():
        dist.destroy_process_group()
    if saver.failure:
        raise SystemExit(f"{saver.failure}. The run is finished, but its last checkpoint is missing")


def train(args, trainer, work: Work, progress: Progress, processes: Processes, saver: Saver, at: Position) -> None:
    """The training loop, from where `at` is; in the end it is at the last step."""
    preemption, first = Preemption(processes) if saver.every else None, at.step
    watchers = watch(args, trainer, first)
    while at.step < args.steps:
        lr = trainer.lr()
        at.loss, at.since = at.loss + trainer.train_step(work.batches.at(at.step)), at.since + 1
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
            at.perplexity = progress.evaluation(at.step, lambda: work.evaluate(trainer))
            if work.keep_best and at.perplexity < at.best:
                at.best = at.perplexity
                write_model(trainer, work, Path(args.output) / "best", processes, progress)
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


def write_model(trainer, work: Work, directory: Path, processes: Processes, progress: Progress | None = None) -> None:
    """A HF directory of the weights as they are now; every process must call it. progress: whose clock then stands."""
    with progress.aside() if progress else nullcontext():
        weights = trainer.weights()
        if processes.is_main:
            work.save(trainer, weights, directory)
        processes.barrier()


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


def announce(args, config: dict | None, work: Work, trainer, plan: BatchPlan, processes: Processes) -> None:
    """Write arguments.json and say what is trained."""
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / PREEMPTED_FILE).unlink(missing_ok=True)
    facts = {**vars(args), "ds_config": config, "run": work.run}
    replace_text(output / "arguments.json", json.dumps(facts, indent=2) + "\n")
    size = args.seq_len if work.tokens_per_step == plan.total * args.seq_len else f"up to {args.seq_len}"
    print(
        f"{type(trainer.optimizer).__name__}, {trainer.parameters:,} parameters, "
        f"{processes.world} x {processes.device.type}, {plan.total} x {size} tokens a step",
        flush=True,
    )
    if hasattr(trainer.optimizer, "summary"):  # ours says what it projects and what not
        print(trainer.optimizer.summary(), flush=True)


def finish(args, config: dict | None, trainer, plan: BatchPlan, work: Work, processes: Processes, found: dict) -> None:
    """Write what a finished run leaves; summary.json comes last, and says that it is finished. found: its results."""
    output = Path(args.output)
    if processes.is_main:
        shutil.rmtree(output / "checkpoint", ignore_errors=True)  # half of one, if the job was killed right here
    processes.barrier()
    trainer.save(output / "checkpoint", {"step": args.steps, "samples": args.steps * plan.total, "seed": args.seed})
    write_model(trainer, work, output / "model", processes)
    summary = summarise(args, config, trainer, plan, processes) | found
    if processes.is_main:
        replace_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(f"saved {output}/checkpoint, {output}/model and {output}/summary.json", flush=True)
