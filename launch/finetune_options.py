"""Command line of finetune.py; engines, optimizers, schedule, output and checkpoints are those of pretrain.py."""

import argparse
import math

from launch.options import add_training_flags, check_training_flags, fill_warmup, new_parser, read_flags
from launch.records import TEMPLATES

METHODS = ("full", "lora", "lorafa")
FOR_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
LORA = {"lora_rank": 32, "lora_alpha": 64.0, "lora_dropout": 0.05, "lora_targets": ["all-linear"]}


def build_parser() -> argparse.ArgumentParser:
    """All flags of finetune.py."""
    parser = new_parser("Fine-tune a causal LM on instructions: all weights with any optimizer, or LoRA adapters.")
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, help="HF model directory with weights (*.safetensors)")
    add("--tokenizer", help="HF tokenizer directory (default: --model)")
    add("--train-data", nargs="+", required=True, help="instruction records: .json (a list), .jsonl (one a line), "
        "both also .gz, .parquet; files, directories or globs. A record has instruction/input/output "
        "(commonsense_170k.json, Alpaca), prompt/completion, or messages")  # fmt: skip
    add("--valid-data", nargs="+", help="held-out records, same formats")
    add("--valid-size", type=int, metavar="N", help="without --valid-data: hold out N records of --train-data, drawn "
        "by --seed (default: a fiftieth, at most 2000)")  # fmt: skip
    add("--template", choices=sorted(TEMPLATES), default="llm-adapters", help="prompt of instruction records (default: "
        "llm-adapters, what the published commonsense models were trained on)")  # fmt: skip
    add("--chat-template", metavar="FILE", help="Jinja file for messages (default: the tokenizer's own)")
    add("--train-on-inputs", action="store_true", help="prompts count too (default: answers only; the published "
        "commonsense runs trained on both)")  # fmt: skip
    add("--seq-len", type=int, default=256, help="most tokens of an example; longer ones are cut at the end, those "
        "whose answer is lost are left out, and both are counted (default 256)")  # fmt: skip
    add("--packing", action="store_true", help="several examples in a row of --seq-len tokens, which do not see each "
        "other; --batch-size then counts rows")  # fmt: skip
    add("--cache-dir", default=".cache/examples", help="where tokenised records are kept (default .cache/examples)")
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="full", help="full: every weight; lora: PEFT's LoRA with any optimizer; "
        "lorafa: LoRA whose A is frozen, by the optimizer LoRAFA (docs/lora_fa.md)")  # fmt: skip
    add("--lora-rank", type=int, help=f"default {LORA['lora_rank']}")
    add("--lora-alpha", type=float, help=f"default {LORA['lora_alpha']:g}: dW = alpha / rank B A")
    add("--lora-dropout", type=float, help=f"default {LORA['lora_dropout']}")
    add("--lora-targets", nargs="+", metavar="NAME", help="names of linear layers, such as q_proj v_proj (default "
        "all-linear: all but the output head)")  # fmt: skip
    add("--epochs", type=float, help="in place of --steps: times through --train-data, rounded up to whole steps")
    add("--keep", choices=["last", "best"], default="last", help="best: OUTPUT/best is the model of the lowest held-"
        "out perplexity so far (needs --eval-every); OUTPUT/model is always the last one")  # fmt: skip
    add_training_flags(parser)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed and checked flags; --steps and --warmup-steps may still be None with --epochs (`count_steps`)."""
    parser = build_parser()
    args = read_flags(parser, argv)
    if (args.steps is None) == (args.epochs is None):
        parser.error("give either --steps N or --epochs N")
    if args.epochs is not None and not 0 < args.epochs < float("inf"):
        parser.error("--epochs must be a number > 0")
    if args.valid_size is not None and (args.valid_data or args.valid_size < 1):
        parser.error("--valid-size is a number of records >= 1, and goes without --valid-data")
    if args.eval_tokens:
        parser.error("--eval-tokens is pretrain.py's; choose the held-out records with --valid-data or --valid-size")
    if args.keep == "best" and not args.eval_every:
        parser.error("--keep best needs --eval-every N: how often to look for a better model")
    _check_method(parser, args)
    check_training_flags(parser, args)
    args.tokenizer = args.tokenizer or args.model
    return args


def _check_method(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Say which flags go with which --method, and fill in LoRA's."""
    given = [name for name in FOR_LORA if getattr(args, name) is not None]
    if args.method == "full":
        if given:
            parser.error(f"--{given[0].replace('_', '-')} is for --method lora or lorafa")
        return
    for name, value in LORA.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lora_rank < 1 or args.lora_alpha <= 0 or not 0 <= args.lora_dropout < 1:
        parser.error("--lora-rank must be at least 1, --lora-alpha > 0, and --lora-dropout in [0, 1)")
    if args.embed_lr is not None:
        parser.error(f"--embed-lr: --method {args.method} trains adapters only; leave it out")
    if args.method != "lorafa":
        return
    if args.rank is not None:
        parser.error("--rank is a projection's; the rank of --method lorafa is --lora-rank")
    if not args.deepspeed_config:
        args.optimizer = args.optimizer or "LoRAFA"
        if args.optimizer != "LoRAFA":
            parser.error(f"--method lorafa is trained by LoRAFA, not {args.optimizer}; use --method lora for that")


def count_steps(args: argparse.Namespace, rows: int, batch: int) -> None:
    """Turn --epochs into --steps. rows: of --train-data (records, or packed rows); batch: rows a step."""
    if args.steps is None:
        args.steps = max(1, math.ceil(args.epochs * rows / batch))
    fill_warmup(args)
