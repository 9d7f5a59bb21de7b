"""Streamed HF datasets (C4 and the like): tokenised and packed on the fly, one part of the stream per process.

Unlike local data, the order here depends on the number of processes: each reads its own shards.
"""

from collections.abc import Iterator

import numpy as np
import torch

from launch.data import tokenise
from launch.options import BatchPlan

DEFAULT_EVAL_TOKENS = 10_000_000  # what the GaLore, Fira and APOLLO papers evaluate on


def open_stream(path: str, name: str | None, split: str):
    """`datasets.load_dataset(..., streaming=True)`, with errors that say what to do instead."""
    try:
        import datasets
    except ImportError:
        raise SystemExit("--dataset needs the datasets package: pip install datasets (or use --train-data)") from None
    try:
        return datasets.load_dataset(path, name, split=split, streaming=True)
    except (ConnectionError, OSError) as error:
        raise SystemExit(
            f"--dataset {path}: cannot be reached ({str(error).splitlines()[0]}). Without internet give local files "
            "with --train-data and --valid-data; jsonl.gz and parquet shards of the same dataset work"
        ) from None
    except ValueError as error:
        raise SystemExit(f"--dataset {path} --dataset-name {name}: {error}") from None


def texts(stream, text_key: str) -> Iterator[str]:
    """The text field of each row."""
    for row in stream:
        if text_key not in row:
            raise SystemExit(f"--dataset rows have fields {sorted(row)}, not {text_key!r}; set --text-key")
        yield row[text_key]


def pack(documents: Iterator[list[int]], length: int) -> Iterator[np.ndarray]:
    """Concatenate documents and cut blocks of `length` tokens."""
    buffer: list[int] = []
    for ids in documents:
        buffer += ids
        whole = len(buffer) // length * length
        yield from np.asarray(buffer[:whole], dtype=np.int64).reshape(-1, length)
        buffer = buffer[whole:]


class StreamBatches:
    """Training batches of one process from its part of the stream; starts over when the stream ends."""

    def __init__(self, stream, tokenizer, text_key: str, length: int, plan: BatchPlan, rank: int):
        from datasets.distributed import split_dataset_by_node

        self.plan = plan
        self.part = split_dataset_by_node(stream, rank=rank, world_size=plan.world)
        self.blocks = self._forever(tokenizer, text_key, length)

    def _forever(self, tokenizer, text_key: str, length: int) -> Iterator[np.ndarray]:
        while True:
            some = False
            for block in pack(tokenise(texts(self.part, text_key), tokenizer), length):
                some = True
                yield block
            if not some:
                raise SystemExit(f"--dataset: this process's part does not fill one sequence of --seq-len {length}")

    def at(self, step: int) -> list[torch.Tensor]:
        """Next micro-batches [micro, length]; a stream can only be read in order, so `step` is not used."""
        return [self._next() for _ in range(self.plan.accumulation)]

    def _next(self) -> torch.Tensor:
        return torch.from_numpy(np.stack([next(self.blocks) for _ in range(self.plan.micro)]))


def held_out_blocks(stream, tokenizer, text_key: str, length: int, tokens: int | None) -> np.ndarray:
    """First `tokens` tokens of the validation split as [blocks, length]; every process reads the same ones."""
    blocks = []
    for block in pack(tokenise(texts(stream, text_key), tokenizer), length):
        blocks.append(block)
        if len(blocks) * length >= (tokens or DEFAULT_EVAL_TOKENS):
            break
    if not blocks:
        raise SystemExit(f"--valid-split does not fill one sequence of --seq-len {length}")
    return np.stack(blocks)
