"""Streamed HF datasets (C4 and the like): tokenised and packed on the fly, one part of the stream per process.

Unlike local data, the order here depends on the number of processes: each reads its own shards.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from launch.data import DOCUMENTS_PER_CALL, tokenise
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
    """Training batches of one process from its part of the stream; starts over when the stream ends.

    The place in the stream is known after every group of documents; a resumed run starts there and drops the blocks
    it had already `taken` (a group is tokenised in one call, so there is no place inside one).
    """

    def __init__(self, stream, tokenizer, text_key: str, length: int, plan: BatchPlan, rank: int, name: dict):
        """name: what the stream is called, for `fingerprint`."""
        from datasets.distributed import split_dataset_by_node

        self.tokenizer, self.text_key, self.length, self.plan = tokenizer, text_key, length, plan
        self.part = split_dataset_by_node(stream, rank=rank, world_size=plan.world)
        self.name = name
        self.place: dict = {"stream": {}, "buffer": []}  # {}: its beginning; buffer: tokens that filled no block yet
        self.taken = 0
        self.blocks = self._forever()

    def _forever(self) -> Iterator[np.ndarray]:
        resumed = bool(self.place["stream"])
        while True:
            some, buffer, documents = resumed, list(self.place["buffer"]), texts(self.part, self.text_key)
            while group := list(itertools.islice(documents, DOCUMENTS_PER_CALL)):
                for ids in tokenise(iter(group), self.tokenizer):
                    buffer += ids
                whole = len(buffer) // self.length * self.length
                some = some or whole > 0
                yield from np.asarray(buffer[:whole], dtype=np.int64).reshape(-1, self.length)
                buffer = buffer[whole:]
                self.place, self.taken = {"stream": self.part.state_dict(), "buffer": list(buffer)}, 0
            if not some:
                raise SystemExit(
                    f"--dataset: this process's part does not fill one sequence of --seq-len {self.length}"
                )
            self.part.load_state_dict({})  # or the next epoch, too, would begin where this run was resumed
            self.place, self.taken, resumed = {"stream": {}, "buffer": []}, 0, False

    def at(self, step: int) -> list[torch.Tensor]:
        """Next micro-batches [micro, length]; a stream can only be read in order, so `step` is not used."""
        return [self._next() for _ in range(self.plan.accumulation)]

    def _next(self) -> torch.Tensor:
        blocks = []
        for _ in range(self.plan.micro):
            blocks.append(next(self.blocks))
            self.taken += 1
        return torch.from_numpy(np.stack(blocks))

    def fingerprint(self) -> dict:
        """What tells two streams apart: their names, for their text is not read in advance."""
        return self.name

    def state(self) -> dict:
        """This process's place in its part of the stream, as JSON takes it."""
        return {**self.place, "taken": self.taken}

    def restore(self, state: dict | None) -> None:
        """Go on from `state`; None: the checkpoint is of another number of processes."""
        if state is None:
            raise SystemExit(
                "--resume: with --dataset each process reads its own part of the stream, so a run goes on only with "
                "the number of processes that saved it; start as many (--train-data goes on with any number)"
            )
        self.place = {"stream": state["stream"], "buffer": state["buffer"]}
        self.part.load_state_dict(state["stream"])
        self.blocks = self._forever()
        for _ in range(state["taken"]):
            next(self.blocks)
        self.taken = state["taken"]


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
