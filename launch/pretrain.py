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

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.data import LocalBatches, cut_blocks, find_files, fingerprint_blocks, token_cache
from launch.evaluation import perplexity
from launch.identity import describe_run
from launch.model import build_model, save_model
from launch.options import BatchPlan, parse
from launch.run import Work, execute, prepare
from launch.streaming import StreamBatches, held_out_blocks, open_stream
from launch.tokenizer import load_tokenizer


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


def model_of(args, tokenizer, dtype: torch.dtype) -> torch.nn.Module:
    """The model that --model describes."""
    checkpointing = args.activation_checkpointing
    return build_model(
        args.model, tokenizer, seq_len=args.seq_len, seed=args.seed, dtype=dtype, checkpointing=checkpointing
    )


def main() -> None:
    """Command line."""
    args = parse()
    job = prepare(args)
    processes, tokenizer = job.processes, load_tokenizer(args.tokenizer)
    batches, held_out = load_data(args, tokenizer, job.plan, processes.rank)
    names = ("--dataset", "--valid-split") if args.dataset else ("--train-data", "--valid-data")
    text = dict(zip(names, (batches.fingerprint(), fingerprint_blocks(held_out)), strict=True))
    work = Work(
        batches=batches,
        model_of=lambda dtype: model_of(args, tokenizer, dtype),
        evaluate=lambda t: perplexity(t.logits, held_out, processes.rank, processes.world, processes.device),
        save=lambda trainer, weights, directory: save_model(trainer.module, weights, tokenizer, directory),
        run=describe_run(args, job.config, job.plan, tokenizer, text),
        held_out_tokens=held_out.size,
        tokens_per_step=job.plan.total * args.seq_len,
        facts={},
    )
    execute(args, job, work)


if __name__ == "__main__":
    main()
