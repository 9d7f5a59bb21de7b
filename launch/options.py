"""Command line of pretrain.py, and what finetune.py shares with it: flags, and checks that say which flag to change."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.flags_file import flags_of

ENGINES = ("ddp", "fsdp1", "fsdp2", "hsdp", "deepspeed")
CLIPS = ("two_pass", "previous", "per_tensor")
FLOORS = {"cosine": 0.1, "linear": 0.0}  # --schedule, and where it ends unless --min-lr-ratio says so
LEAST = {"steps": 1, "log_every": 1, "seq_len": 2, "hsdp_shard": 1, "eval_tokens": 1, "batch_size": 1, "micro_batch": 1}
SUMS = ("compress_accumulation", "accumulation_compression_rank")


@dataclass(frozen=True)
class BatchPlan:
    """How one optimizer step's sequences are dealt: `total` = `micro` x `accumulation` x `world`."""

    total: int
    micro: int
    accumulation: int
    world: int

    @classmethod
    def make(cls, total: int | None, micro: int | None, accumulation: int | None, world: int) -> "BatchPlan":
        """Complete the plan from what was given; `total` wins over `accumulation`."""
        micro = micro or (max(1, total // world) if total else 8)
        total = total or micro * (accumulation or 1) * world
        if total % (micro * world):
            raise SystemExit(
                f"--batch-size {total} is no multiple of --micro-batch {micro} x {world} processes; change one of them"
            )
        return cls(total, micro, total // (micro * world), world)


def build_parser() -> argparse.ArgumentParser:
    """All flags of pretrain.py."""
    parser = new_parser("Pre-train a causal LM with any torch.optim or lowrank_ds optimizer.")
    add = parser.add_argument_group("model and text").add_argument
    add("--model", required=True, help="HF config as a .json file (from scratch), or a HF model directory")
    add("--tokenizer", required=True, help="HF tokenizer directory, or a SentencePiece BPE .model file")
    add("--train-data", nargs="+", help="text: .txt, .jsonl[.gz], .json.gz, .parquet files, directories or globs")
    add("--valid-data", nargs="+", help="held-out text, same formats")
    add("--text-key", default="text", help="field or column that holds the text (jsonl, parquet, --dataset)")
    add("--dataset", help="stream this HF dataset instead of --train-data, e.g. allenai/c4")
    add("--dataset-name", help="its configuration, e.g. en")
    add("--train-split", default="train")
    add("--valid-split", default="validation")
    add("--seq-len", type=int, default=256, help="tokens per sequence (documents are packed)")
    add("--cache-dir", default=".cache/tokens", help="where tokenised local data is kept")

    add_training_flags(parser)
    return parser


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser with --config, which `read_flags` reads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file with these flags as keys; the command line wins")
    return parser


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Engine, optimizer, schedule, output and checkpoints: the same for all training programs."""
    _add_engine_flags(parser)
    add = parser.add_argument_group("schedule").add_argument
    add("--steps", type=int, help="optimizer steps")
    add("--batch-size", type=int, help="sequences per optimizer step, over all processes")
    add("--micro-batch", type=int, help="sequences per process and forward pass; the rest is gradient accumulation")
    add("--warmup-steps", type=int, help="linear warm-up (default: a tenth of --steps), then --schedule")
    add("--schedule", choices=sorted(FLOORS), default="cosine", help="how the learning rate falls after the warm-up "
        "(default cosine; published fine-tuning is linear)")  # fmt: skip
    add("--min-lr-ratio", type=float, help="the schedule ends at this fraction of the learning rate (default: 0.1 with "
        "cosine, 0 with linear)")  # fmt: skip
    add("--seed", type=int, default=0, help="of initial weights and data order")

    add = parser.add_argument_group("output").add_argument
    add("--output", required=True, help="new directory for metrics, summary, checkpoint and model")
    add("--log-every", type=int, default=10)
    add("--diagnostics-every", type=int, default=0, metavar="N", help="write captured energy, overlap of subspaces, "
        "limiter hits and update sizes of each matrix to OUTPUT/diagnostics.jsonl every N steps (default 0: "
        "never)")  # fmt: skip
    add("--scaling-every", type=int, default=0, metavar="N", help="compare scaling factors with full-rank Adam's, and "
        "write their means to OUTPUT/scaling.jsonl every N steps, for `lowrank-ds similarity` (default 0: never; it "
        "takes Adam's memory beside the run's own)")  # fmt: skip
    add("--eval-every", type=int, default=0, help="0: only at the end")
    add("--eval-tokens", type=int, help="use only this many held-out tokens (default: all; 10M with --dataset)")
    add = parser.add_argument_group("checkpoints to go on from").add_argument
    add("--save-every", type=int, default=0, metavar="N", help="write OUTPUT/checkpoints/step-... every N steps, "
        "at the last one, and on SIGTERM or SIGUSR1 (then exit with code 75); 0: never")  # fmt: skip
    add("--keep-last", type=int, default=2, metavar="K", help="checkpoints kept (default 2)")
    add("--resume", default="none", metavar="auto|PATH|none", help="auto: go on from the newest complete checkpoint in "
        "OUTPUT/checkpoints, or from the start if there is none; PATH: from this one")  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer and engine").add_argument
    add("--engine", choices=ENGINES, help="how the model is shared by processes (default: deepspeed with "
        "--deepspeed_config, else ddp; ddp with one process is plain torch)")  # fmt: skip
    add("--deepspeed_config", "--deepspeed-config", help="ds_config JSON; it names the optimizer")
    add("--hsdp-shard", type=int, metavar="N", help="hsdp: processes that share one copy of the model (default: those "
        "of one host, LOCAL_WORLD_SIZE)")  # fmt: skip
    add("--optimizer", help="without DeepSpeed: class name, e.g. FiraAdamW")
    add("--optimizer-args", type=json.loads, default={}, metavar="JSON", help="overrides, e.g. '{\"alpha\": 0.25}'")
    add("--lr", type=float, help="learning rate (default: the ds_config's)")
    add("--rank", type=int, help="rank of the subspaces (default: the ds_config's)")
    add("--embed-lr", type=float, help="learning rate of embeddings, lm_head and norms (default: the same as --lr)")
    add("--gradient-clipping", type=float, help="global norm, 0 = off (default: the ds_config's, else 0)")
    add(
        "--layerwise",
        action="store_true",
        help="update each weight inside the backward pass and free its gradient: "
        "ddp with one process, fsdp2, hsdp (--hsdp-shard 1 in place of DDP), DeepSpeed ZeRO-3",
    )
    add(
        "--clip",
        choices=CLIPS,
        help="with --layerwise: what --gradient-clipping is the limit of. two_pass: the exact "
        "global norm, each forward and backward runs twice; previous: the global norm of the step before; per_tensor: "
        "each gradient's own norm",
    )
    add(
        "--compress-accumulation",
        action="store_true",
        help="with --layerwise: sum micro-batches in the subspace "
        "(GaLore; Flora: accumulation_compression_rank in --optimizer-args)",
    )
    add(
        "--reduce-in-subspace",
        action="store_true",
        help="ddp, hsdp: replicas exchange projected gradients between refreshes, in place of whole ones (GaLore; the "
        "same weights to rounding; docs/replicas.md)",
    )
    add("--wire-dtype", choices=["bf16"], help="with --reduce-in-subspace: what is exchanged travels as bf16 (half the "
        "bytes, not exact)")  # fmt: skip
    add("--dtype", choices=["fp32", "bf16"], help="default: the ds_config's; without one bf16 on GPUs, fp32 on CPUs. "
        "bf16 is fp32 master weights computed in bf16 under fsdp1, fsdp2, hsdp and DeepSpeed; under ddp the weights "
        "themselves are bf16")  # fmt: skip
    add("--timeout", type=float, metavar="SECONDS", help="how long a process waits for the others in any exchange "
        "before it ends with an error that names it (default: torch's and DeepSpeed's own, 30 minutes; 10 for torch on "
        "GPUs; at the start at least 5 minutes). That a process ended is noticed at once on CPUs")  # fmt: skip
    add("--activation-checkpointing", action="store_true", help="recompute each layer in the backward "
        "pass (a ds_config's activation_checkpointing section does so, too, by DeepSpeed's function)")  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed and checked flags."""
    parser = build_parser()
    args = read_flags(parser, argv)
    if args.steps is None:
        parser.error("the following arguments are required: --steps")
    check_training_flags(parser, args)
    if bool(args.train_data) == bool(args.dataset):
        parser.error("give either --train-data FILES or --dataset NAME")
    if args.train_data and not args.valid_data:
        parser.error("--train-data needs --valid-data: held-out text in the same formats")
    fill_warmup(args)
    return args


def read_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Flags of the command line (default: this process's), over those of the YAML file that --config names."""
    argv = sys.argv[1:] if argv is None else argv
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--config")
    config = early.parse_known_args(argv)[0].config
    return parser.parse_args([*(flags_of(parser, Path(config)) if config else []), *argv])


def check_training_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check what `add_training_flags` added, and --seq-len."""
    check_engine(parser, args)
    check_layerwise(parser, args)
    check_reduction(parser, args)
    if not isinstance(args.optimizer_args, dict):
        parser.error("--optimizer-args must be a JSON object such as '{\"alpha\": 0.25}'")
    for name, least in LEAST.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    args.min_lr_ratio = FLOORS[args.schedule] if args.min_lr_ratio is None else args.min_lr_ratio
    if not 0 <= args.min_lr_ratio <= 1:
        parser.error("--min-lr-ratio must be in [0, 1]")
    for name in ("diagnostics", "scaling"):
        if getattr(args, f"{name}_every") < 0:
            parser.error(f"--{name}-every must be a number of steps, or 0 for never")
    if args.timeout is not None and not 0 < args.timeout < float("inf"):
        parser.error("--timeout must be a number of seconds > 0")
    if args.save_every < 0 or args.keep_last < 1:
        parser.error("--save-every must be at least 0 (never) and --keep-last at least 1")
    if args.resume == "none" and any((Path(args.output) / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        parser.error(
            f"--output {args.output} already holds a run; choose another directory or delete it (or go on with it: "
            "--resume auto)"
        )


def fill_warmup(args: argparse.Namespace) -> None:
    """Unless --warmup-steps was given, a tenth of --steps."""
    if args.warmup_steps is None:
        args.warmup_steps = max(1, args.steps // 10)


def check_engine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in --engine, or say which flags contradict each other."""
    if args.engine == "deepspeed" and not args.deepspeed_config:
        parser.error("--engine deepspeed needs --deepspeed_config FILE (the file names the optimizer)")
    if args.engine not in (None, "deepspeed") and args.deepspeed_config:
        parser.error(f"--engine {args.engine} and --deepspeed_config contradict each other; leave one of them out")
    if bool(args.deepspeed_config) == bool(args.optimizer):
        parser.error("give either --deepspeed_config FILE (the file names the optimizer) or --optimizer NAME")
    args.engine = args.engine or ("deepspeed" if args.deepspeed_config else "ddp")
    if args.hsdp_shard is not None and args.engine != "hsdp":
        parser.error(f"--hsdp-shard is for --engine hsdp, not {args.engine}")


def check_layerwise(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Say which flags go only with --layerwise, and which not with it."""
    if isinstance(args.optimizer_args, dict):
        if args.compress_accumulation:
            args.optimizer_args["compress_accumulation"] = True
        sums = next((k for k in SUMS if args.optimizer_args.get(k)), None)
        if sums and not args.layerwise:
            parser.error(f"{sums} (micro-batches are summed in the subspace) needs --layerwise")
    if args.clip and not args.layerwise:
        parser.error(f"--clip {args.clip} is for --layerwise; --gradient-clipping alone clips by the global norm")
    if not args.layerwise:
        return
    if args.engine == "fsdp1":
        parser.error("--layerwise: FSDP1 fires no hook with the reduced gradient; use --engine fsdp2")
    if args.engine == "deepspeed" and (args.clip or args.gradient_clipping):
        parser.error("--layerwise: DeepSpeed clips before gradients are gone; leave out --clip and --gradient-clipping")
    if args.clip and not args.gradient_clipping:
        parser.error(f"--clip {args.clip} needs --gradient-clipping, the largest norm")
    if args.gradient_clipping and not args.clip:
        parser.error(
            f"--gradient-clipping {args.gradient_clipping} with --layerwise needs --clip, one of {', '.join(CLIPS)}: "
            "there is no moment at which all gradients are there (see --help)"
        )


def check_reduction(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Say which flags go only with --reduce-in-subspace, and which not with it."""
    if args.wire_dtype and not args.reduce_in_subspace:
        parser.error(f"--wire-dtype {args.wire_dtype} is for --reduce-in-subspace")
    if not args.reduce_in_subspace:
        return
    if args.engine not in ("ddp", "hsdp"):
        parser.error(
            f"--reduce-in-subspace: --engine {args.engine} has no replicas that all-reduce gradients; use ddp or hsdp"
        )
    if args.layerwise:
        parser.error("--reduce-in-subspace and --layerwise exclude each other; leave one of them out")
    if args.gradient_clipping:
        parser.error(
            f"--gradient-clipping {args.gradient_clipping} needs the norm of whole gradients, and with "
            "--reduce-in-subspace no process has it; leave one of them out"
        )


def optimizer_overrides(args: argparse.Namespace) -> dict:
    """Optimizer parameters given on the command line; --lr and --rank win over --optimizer-args."""
    given = {"lr": args.lr, "rank": args.rank}
    return {**args.optimizer_args, **{key: value for key, value in given.items() if value is not None}}


def load_ds_config(args: argparse.Namespace) -> dict:
    """The ds_config with this command line's overrides applied; batch sizes are filled in later."""
    path = Path(args.deepspeed_config)
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise SystemExit(f"--deepspeed_config {path}: no such file") from None
    except json.JSONDecodeError as error:
        raise SystemExit(f"--deepspeed_config {path}: not valid JSON ({error})") from None
    if "type" not in config.get("optimizer", {}):
        raise SystemExit(f'{path}: needs an "optimizer" section with a "type", e.g. FiraAdamW')
    config["optimizer"].setdefault("params", {}).update(optimizer_overrides(args))
    params = config["optimizer"]["params"]
    if args.layerwise and not params.get("layerwise"):  # the file may give clip and max_grad_norm
        params["layerwise"] = True  # lowrank_ds arranges it inside deepspeed.initialize
    args.layerwise = bool(params.get("layerwise"))
    if args.gradient_clipping is not None:
        config["gradient_clipping"] = args.gradient_clipping
    # DeepSpeed's own default is 1.0 since 0.19: say what is meant.
    config.setdefault("gradient_clipping", 0.0)
    if args.dtype:
        config.pop("fp16", None)
        config["bf16"] = {**config.get("bf16", {}), "enabled": args.dtype == "bf16"}
    return config
