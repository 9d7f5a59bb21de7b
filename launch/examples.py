"""Tokenised instructions: which tokens count, packing, and the batches of each step."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from launch.data import BlockOrder, built_once, marks
from launch.losses import IGNORED, Batch
from launch.options import BatchPlan
from launch.records import TEMPLATES, Segments, read_records, segments_of
from launch.tokenizer import fingerprint

CACHE_FORMAT = 1
TOGETHER = 1000  # texts tokenised in one call
NO_END = ("messages",)  # records whose template writes its own end of text


@dataclass(frozen=True)
class Example:
    """One record; ids, labels: [length] int32, labels -100 where a token does not count (the first never does)."""

    ids: np.ndarray
    labels: np.ndarray

    @property
    def trained(self) -> int:
        """How many tokens count."""
        return int((self.labels != IGNORED).sum())


@dataclass
class Loaded:
    """Examples of some files, and how many records were cut or left out."""

    examples: list[Example]
    cut: int = 0
    dropped: int = 0

    def told(self, flag: str, limit: int) -> str:
        """One line for the user."""
        text = f"{flag}: {len(self.examples)} examples, {sum(len(e.ids) for e in self.examples):,} tokens"
        text += f", {self.cut} cut to --seq-len {limit}" if self.cut else ""
        return text + (f", {self.dropped} left out (no answer within --seq-len {limit})" if self.dropped else "")


def load_examples(files: list[Path], tokenizer, template: str, limit: int, train_on_inputs: bool) -> Loaded:
    """Read and tokenise; limit: most tokens of an example, the rest is cut.

    Raises:
        RecordError: a bad record, named; or no record is left.
    """
    render = tokenizer.apply_chat_template if tokenizer.chat_template else None
    loaded = Loaded([])

    def flush(group: list[tuple[Segments, bool]]) -> None:
        for example, cut in encode(group, tokenizer, limit, train_on_inputs):
            loaded.cut += cut
            if example.trained:
                loaded.examples.append(example)
            else:
                loaded.dropped += 1
        group.clear()

    group: list[tuple[Segments, bool]] = []
    for path in files:
        for where, record in read_records(path):
            ends = not any(key in record for key in NO_END)
            group.append((segments_of(where, record, template, render), ends))
            if len(group) == TOGETHER:
                flush(group)
    if group:
        flush(group)
    if not loaded.examples and not loaded.dropped:
        raise SystemExit(f"{', '.join(map(str, files))}: no records in there")
    if not loaded.examples:
        raise SystemExit(f"{', '.join(map(str, files))}: no example with an answer within --seq-len {limit}")
    return loaded


def cached_examples(
    files: list[Path], tokenizer, template: str, limit: int, train_on_inputs: bool, cache_dir: str
) -> Loaded:
    """`load_examples`, done by one process of those that see `cache_dir`; the others read what it wrote."""

    def write(out: BinaryIO) -> None:
        loaded = load_examples(files, tokenizer, template, limit, train_on_inputs)
        parts = {name: np.concatenate([getattr(e, name) for e in loaded.examples]) for name in ("ids", "labels")}
        sizes = np.array([len(e.ids) for e in loaded.examples])
        np.savez(out, **parts, sizes=sizes, counts=np.array([loaded.cut, loaded.dropped]))

    texts = [tokenizer.chat_template, TEMPLATES[template], fingerprint(tokenizer), *marks(tokenizer)]
    key = [CACHE_FORMAT, limit, train_on_inputs, *texts]
    with np.load(built_once(cache_dir, files, key, "examples", write)) as found:
        ends = np.cumsum(found["sizes"])[:-1]
        rows = zip(np.split(found["ids"], ends), np.split(found["labels"], ends), strict=True)
        return Loaded([Example(ids, labels) for ids, labels in rows], *found["counts"].tolist())


def encode(
    texts: list[tuple[Segments, bool]], tokenizer, limit: int, train_on_inputs: bool
) -> Iterator[tuple[Example, bool]]:
    """(example, whether it was cut) of each text; texts: (segments, whether an end-of-text mark follows).

    A token belongs to the segment its last character is in: where an answer's first letter and the space before it
    are one token, that token counts.
    """
    before, after = marks(tokenizer)
    whole = ["".join(text for text, _ in segments) for segments, _ in texts]
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    for (segments, ends), ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
        answers = np.array([answer or train_on_inputs for _, answer in segments])
        limits = np.cumsum([len(text) for text, _ in segments])
        last = np.array([end for _, end in offsets], dtype=np.int64).reshape(-1) - 1
        counts = answers[np.searchsorted(limits, np.maximum(last, 0), side="right").clip(max=len(segments) - 1)]
        front = [] if ids[:1] == before else before  # some chat templates write it
        end = after if ends and ids[-1:] != after and len(front) + len(ids) < limit else []
        ids = np.array([*front, *ids, *end], dtype=np.int32)
        counts = np.concatenate([np.zeros(len(front), bool), counts, np.full(len(end), answers[-1])])
        labels = np.where(counts, ids, IGNORED).astype(np.int32)
        labels[:1] = IGNORED
        yield Example(ids[:limit], labels[:limit]), len(ids) > limit


def pack(examples: list[Example], length: int, seed: int) -> list[list[int]]:
    """Numbers of the examples that share a row of `length` tokens: next fit in a random order, none is split."""
    rows: list[list[int]] = []
    room = 0
    for number in np.random.default_rng(seed).permutation(len(examples)).tolist():
        size = len(examples[number].ids)
        if size > room:
            rows.append([])
            room = length
        rows[-1].append(number)
        room -= size
    return rows


def collate(rows: list[list[Example]], pad: int, packed: bool) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels` [rows, longest], and what keeps examples apart.

    One example a row: `attention_mask`. packed: `position_ids`, which begin again with each example (and with the
    padding); transformers then lets no token see another example's, as long as no mask is given.
    """
    width = max(sum(len(e.ids) for e in row) for row in rows)
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    positions, mask = np.zeros((len(rows), width), dtype=np.int64), np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        at = 0
        for e in row:
            place = slice(at, at + len(e.ids))
            ids[i, place], labels[i, place], mask[i, place] = e.ids, e.labels, 1
            positions[i, place] = np.arange(len(e.ids))
            at += len(e.ids)
        positions[i, at:] = np.arange(width - at)
    apart = {"position_ids": positions} if packed else {"attention_mask": mask}
    return {k: torch.from_numpy(v) for k, v in {"input_ids": ids, "labels": labels, **apart}.items()}


class InstructionBatches:
    """Training batches of one process, addressed by step number, as `launch.data.LocalBatches`."""

    def __init__(self, examples: list[Example], plan: BatchPlan, rank: int, seed: int, pad: int, length: int | None):
        """length: pack rows of this many tokens; None: one example a row."""
        self.examples, self.plan, self.rank, self.pad, self.packed = examples, plan, rank, pad, length is not None
        self.rows = pack(examples, length, seed) if length else [[number] for number in range(len(examples))]
        self.trained = np.array([sum(examples[n].trained for n in row) for row in self.rows])
        self.order = BlockOrder(len(self.rows), seed)

    def at(self, step: int) -> list[Batch]:
        """Micro-batches that this process contributes to `step` (0-based)."""
        plan = self.plan
        chosen = self.order(np.arange(step * plan.total, (step + 1) * plan.total))
        # Losses are averaged over micro-batches and processes; so every trained token of the step weighs the same.
        items = torch.tensor(self.trained[chosen].sum() / (plan.accumulation * plan.world), dtype=torch.float32)
        mine = chosen.reshape(plan.accumulation, plan.world, plan.micro)[:, self.rank]
        return [
            {**collate([[self.examples[n] for n in self.rows[k]] for k in row], self.pad, self.packed), "items": items}
            for row in mine
        ]

    def state(self) -> dict:
        """What a resumed run needs beside its step: nothing."""
        return {}

    def restore(self, state: dict | None) -> None:
        """Any number of processes may go on: batches are addressed by step."""


def fingerprint_examples(examples: list[Example]) -> dict[str, int]:
    """What tells two sets of examples apart, masks included."""
    check = 0
    for e in examples:
        check = zlib.crc32(e.labels.tobytes(), zlib.crc32(e.ids.tobytes(), check))
    return {"examples": len(examples), "crc32": check}
