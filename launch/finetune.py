#!/usr/bin/env python3
"""Fine-tune a causal language model on instructions, under DeepSpeed, DDP or FSDP: all weights, LoRA, or LoRA-FA.

    python launch/finetune.py --model llama-7b --train-data commonsense_170k.json --optimizer FiraAdamW --lr 1e-4 \
        --rank 32 --epochs 3 --batch-size 16 --output runs/fira

    torchrun --nproc-per-node 8 launch/finetune.py --engine fsdp2 --method lorafa --lr 3e-4 ...
    deepspeed --num_gpus 8 launch/finetune.py --deepspeed_config ds_configs/zero2_fira.json ...

OUTPUT receives what pretrain.py writes; model/ (and best/, with --keep best) is an ordinary HF directory with adapters
merged (model/adapter has them in PEFT's form). Engines, optimizers, checkpoints and --resume: see launch/README.md.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.data import find_files
from launch.evaluation import exp_mean, row_losses
from launch.examples import Example, InstructionBatches, cached_examples, collate, fingerprint_examples
from launch.finetune_options import FOR_LORA, count_steps, parse
from launch.identity import describe_run
from launch.lora import add_adapters, save_merged
from launch.losses import leak
from launch.model import build_model, save_model
from launch.records import SUFFIXES
from launch.run import Job, Work, execute, prepare
from launch.tokenizer import load_tokenizer

LEAK = 0.05  # of the logits' standard deviation; nought but for rounding where examples are kept apart


def load_data(args, tokenizer, is_main: bool) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples."""

    def examples(patterns: list[str], flag: str) -> list[Example]:
        files = find_files(patterns, flag, SUFFIXES)
        how = args.template, args.seq_len, args.train_on_inputs
        loaded = cached_examples(files, tokenizer, *how, args.cache_dir)
        if is_main:
            print(loaded.told(flag, args.seq_len), flush=True)
        return loaded.examples

    train = examples(args.train_data, "--train-data")
    if args.valid_data:
        return train, examples(args.valid_data, "--valid-data")
    count = args.valid_size or min(2000, max(1, len(train) // 50))
    if count >= len(train):
        raise SystemExit(f"--valid-size {count}: --train-data has only {len(train)} examples; none is left to train on")
    held = set(np.random.default_rng(args.seed).permutation(len(train))[:count].tolist())
    return [e for i, e in enumerate(train) if i not in held], [e for i, e in enumerate(train) if i in held]


def held_out_perplexity(trainer, examples: list[Example], pad: int, processes) -> float:
    """exp of the mean loss of the tokens of `examples` that count; they are never packed."""

    def batch_of(rows: np.ndarray) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        batch = collate([[examples[row]] for row in rows], pad, packed=False)
        return batch, batch["labels"]

    losses = row_losses(trainer.logits, len(examples), batch_of, processes.rank, processes.world, processes.device)
    return exp_mean(losses, sum(e.trained for e in examples))


def model_of(args, tokenizer, dtype: torch.dtype) -> torch.nn.Module:
    """The model of --model, with adapters if --method says so."""
    model = build_model(
        args.model, tokenizer, seq_len=args.seq_len, seed=args.seed, dtype=dtype,
        checkpointing=args.activation_checkpointing,
    )  # fmt: skip
    return model if args.method == "full" else add_adapters(model, args, frozen_a=args.method == "lorafa")


def check_model(args, config: dict | None) -> None:
    """Refuse a model without weights, and a ds_config whose optimizer is not the method's."""
    if not any(Path(args.model).glob("*.safetensors")):
        raise SystemExit(
            f"--model {args.model}: no *.safetensors in there; fine-tuning starts from the weights of a HF model "
            "directory (to train from scratch use launch/pretrain.py)"
        )
    if config and args.method == "lorafa" and config["optimizer"]["type"] != "LoRAFA":
        raise SystemExit(
            f'--method lorafa needs "type": "LoRAFA" in the optimizer section of {args.deepspeed_config}, not '
            f"{config['optimizer']['type']!r}"
        )


def check_packing(args, trainer) -> None:
    """Refuse --packing of a model to which the examples of a row are one text."""
    found = leak(trainer.logits)
    if found > LEAK:
        raise SystemExit(
            f"--packing: {args.model} lets the examples of a row see each other (logits move by {found:.2g} of their "
            "spread): its attention does not look at where positions begin again; leave --packing out"
        )


def text_identity(args, train: list[Example], valid: list[Example]) -> dict:
    """What a resumed run must have in common with this one, beside what it shares with pretrain.py."""
    run = {"--train-data": fingerprint_examples(train), "--valid-data": fingerprint_examples(valid)}
    run |= {"--packing": args.packing, "--method": args.method, "--keep": args.keep}
    return run | ({} if args.method == "full" else {f"--{n.replace('_', '-')}": getattr(args, n) for n in FOR_LORA})


class Models:
    """The model as it was made, which engines wrap; what is saved needs it."""

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.made = args, tokenizer, None

    def make(self, dtype: torch.dtype) -> torch.nn.Module:
        """See `model_of`."""
        self.made = model_of(self.args, self.tokenizer, dtype)
        return self.made

    def save(self, trainer, weights: dict[str, torch.Tensor], directory: Path) -> None:
        """An ordinary HF directory, adapters merged."""
        if self.args.method == "full":
            save_model(trainer.module, weights, self.tokenizer, directory)
        else:
            save_merged(self.made, weights, self.tokenizer, directory)


def work_of(args, job: Job) -> Work:
    """Data, model and how it is judged, from the flags."""
    processes, tokenizer = job.processes, load_tokenizer(args.tokenizer)
    if args.chat_template:
        try:
            tokenizer.chat_template = Path(args.chat_template).read_text()
        except OSError as error:
            raise SystemExit(f"--chat-template {args.chat_template}: {error.strerror}") from None
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    train, valid = load_data(args, tokenizer, processes.is_main)
    length = args.seq_len if args.packing else None
    batches = InstructionBatches(train, job.plan, processes.rank, args.seed, pad, length)
    count_steps(args, len(batches.rows), job.plan.total)
    per_row = sum(len(e.ids) for e in train) / len(batches.rows)
    models = Models(args, tokenizer)
    return Work(
        batches=batches,
        model_of=models.make,
        evaluate=lambda trainer: held_out_perplexity(trainer, valid, pad, processes),
        save=models.save,
        run=describe_run(args, job.config, job.plan, tokenizer, text_identity(args, train, valid)),
        held_out_tokens=sum(e.trained for e in valid),
        tokens_per_step=job.plan.total * per_row,
        facts={
            "method": args.method,
            "tokens": round(args.steps * job.plan.total * per_row),
            "epochs": args.steps * job.plan.total / len(batches.rows),
            "examples": len(train),
        },
        keep_best=args.keep == "best",
        check=lambda trainer: check_packing(args, trainer) if args.packing else None,
    )


def main() -> None:
    """Command line."""
    args = parse()
    job = prepare(args)
    check_model(args, job.config)
    execute(args, job, work_of(args, job))


if __name__ == "__main__":
    main()
