"""Train a causal language model with Trainer, in the manner of run_clm.py of transformers' examples.

It takes the examples' arguments and leaves the optimizer to them: tests start it unmodified.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class ModelArguments:
    """Which model to train."""

    config_name: str | None = field(default=None, metadata={"help": "A config to train from scratch."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "A checkpoint to start from."})


@dataclass
class DataArguments:
    """What to train it on."""

    train_file: str = field(metadata={"help": "A text file."})
    block_size: int = field(default=16, metadata={"help": "Tokens (here: bytes) of a sample."})


def build_model(arguments: ModelArguments) -> Any:
    """A model from a checkpoint, or from a config."""
    if arguments.model_name_or_path:
        return AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments.config_name))


def build_data(arguments: DataArguments, training: TrainingArguments) -> Dataset:
    """The file's bytes, in blocks."""

    def group(examples: dict[str, list]) -> dict[str, list]:
        text = list(chain.from_iterable((line + "\n").encode() for line in examples["text"]))
        size = arguments.block_size
        blocks = [text[i : i + size] for i in range(0, len(text) - size + 1, size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    with training.main_process_first(desc="grouping texts"):
        raw = load_dataset("text", data_files=arguments.train_file, split="train")
        return raw.map(group, batched=True, remove_columns=["text"])


def build_trainer(model: ModelArguments, data: DataArguments, training: TrainingArguments, **more: Any) -> Trainer:
    """Everything but the training."""
    set_seed(training.seed)
    dataset = build_data(data, training)
    return Trainer(
        model=build_model(model), args=training, train_dataset=dataset, data_collator=default_data_collator, **more
    )


def cpu_only() -> None:
    """What a script needs with DeepSpeed on a machine without GPU: no compiled shared-memory op, and gloo.

    (On GPUs accelerate initialises DeepSpeed's communication; with use_cpu it does not, and zero.Init counts one rank.)
    """
    if "--deepspeed" in sys.argv and not torch.cuda.is_available():
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")


def main() -> None:
    """Parse, train, save."""
    cpu_only()
    model, data, training = HfArgumentParser(
        (ModelArguments, DataArguments, TrainingArguments)
    ).parse_args_into_dataclasses()
    trainer = build_trainer(model, data, training)
    result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


if __name__ == "__main__":
    main()
