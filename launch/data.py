"""Local text: documents -> token cache -> fixed-length blocks in an order that no process count can change.

A cache is a flat file of token ids (uint16, or uint32 for vocabularies above 65536). Block i is tokens
[i*L, (i+1)*L). Training reads sample number k of the whole run as block `BlockOrder(k)`; which process reads it is
decided last, so one process and eight see the same batches, and a run can go on from any sample number.
"""

import fcntl
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from launch.options import BatchPlan
from launch.tokenizer import fingerprint

CACHE_FORMAT = 1
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
DOCUMENTS_PER_CALL = 64  # tokenised together: the Rust tokenizer works on them in parallel


def find_files(patterns: list[str], flag: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Files named by paths, directories or globs, sorted; an empty result is an error that names the flag."""
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        for match in matches:
            found.update(child for child in match.rglob("*") if child.is_file()) if match.is_dir() else found.add(match)
        if not matches:
            raise SystemExit(f"{flag} {pattern}: no such file or directory")
    files = sorted(path for path in found if path.name.endswith(suffixes))
    if not files:
        raise SystemExit(f"{flag} {' '.join(patterns)}: nothing ends in {', '.join(suffixes)}")
    return files


def read_documents(path: Path, text_key: str) -> Iterator[str]:
    """Texts of one file: a .txt is one document, jsonl and parquet have one in each row."""
    if path.name.endswith(".txt"):
        yield path.read_text(encoding="utf-8")
    elif path.name.endswith(".parquet"):
        yield from _read_parquet(path, text_key)
    else:
        opener = gzip.open if path.name.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(path, number, line, text_key)


def _text_of(path: Path, number: int, line: str, text_key: str) -> str:
    try:
        return json.loads(line)[text_key]
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path}:{number}: not one JSON object a line ({error})") from None
    except (KeyError, TypeError):
        raise SystemExit(f"{path}:{number}: has no field {text_key!r}; set --text-key") from None


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    from pyarrow import parquet

    table = parquet.ParquetFile(path)
    if text_key not in table.schema_arrow.names:
        raise SystemExit(f"{path}: columns are {table.schema_arrow.names}, not {text_key!r}; set --text-key")
    for batch in table.iter_batches(columns=[text_key]):
        yield from batch.column(0).to_pylist()


def tokenise(documents: Iterator[str], tokenizer) -> Iterator[list[int]]:
    """Ids of each document, between the tokenizer's beginning- and end-of-text marks where it has them."""
    before, after = marks(tokenizer)
    group: list[str] = []

    def flush() -> Iterator[list[int]]:
        if group:
            for ids in tokenizer(group, add_special_tokens=False)["input_ids"]:
                yield before + ids + after
        group.clear()

    for document in documents:
        group.append(document)
        if len(group) == DOCUMENTS_PER_CALL:
            yield from flush()
    yield from flush()


def marks(tokenizer) -> tuple[list[int], list[int]]:
    """Ids written before and after each text: none or one."""
    before = [] if tokenizer.bos_token_id in (None, tokenizer.eos_token_id) else [tokenizer.bos_token_id]
    return before, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def token_cache(files: list[Path], tokenizer, text_key: str, cache_dir: str) -> np.ndarray:
    """Memory-mapped ids of all documents of `files`, in file order; see `built_once`."""
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32

    def write(out: BinaryIO) -> None:
        documents = (document for path in files for document in read_documents(path, text_key))
        out.writelines(np.asarray(ids, dtype=dtype).tobytes() for ids in tokenise(documents, tokenizer))
        if not out.tell():
            raise SystemExit(f"{', '.join(map(str, files))}: no text in there")

    target = built_once(cache_dir, files, [CACHE_FORMAT, text_key, fingerprint(tokenizer)], "tokens", write)
    return np.memmap(target, dtype=dtype, mode="r")


def built_once(cache_dir: str, files: list[Path], key: list, suffix: str, write: Callable[[BinaryIO], None]) -> Path:
    """The cache of `files` under `key` (for JSON); built once, by whichever process of those that see it comes first.

    A file lock, not a barrier, makes the others wait: it cannot time out, and the kernel drops it if the builder dies.
    """
    directory = Path(cache_dir)
    directory.mkdir(parents=True, exist_ok=True)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    name = hashlib.sha256(json.dumps([stats, *key]).encode()).hexdigest()[:24]
    target = directory / f"{name}.{suffix}"
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")
            with open(partial, "wb") as out:
                write(out)
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial, target)  # a cache exists only when it is complete
    return target


def cut_blocks(tokens: np.ndarray, length: int, flag: str, limit: int | None = None) -> np.ndarray:
    """View of a token array as [blocks, length]; the last, incomplete block is left out."""
    count = min(len(tokens), limit or len(tokens)) // length
    if not count:
        raise SystemExit(f"{flag}: {len(tokens)} tokens do not fill one sequence of --seq-len {length}")
    return tokens[: count * length].reshape(count, length)


class BlockOrder:
    """Sample number -> block number: each epoch is a new random permutation, computed from the seed, never stored.

    A Feistel network permutes [0, 4^k) and numbers outside [0, blocks) are sent through it again, so the cost does not
    grow with the corpus (a stored permutation of C4 would be 5 GB a process).
    """

    ROUNDS = 6

    def __init__(self, blocks: int, seed: int):
        self.blocks, self.seed = blocks, seed
        self.half = np.uint64(max(1, (max(blocks - 1, 1).bit_length() + 1) // 2))
        self.mask = np.uint64((1 << int(self.half)) - 1)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Block number of each sample number."""
        epoch, position = np.divmod(np.asarray(samples, dtype=np.uint64), np.uint64(self.blocks))
        key = _mix(epoch ^ _mix(np.full_like(epoch, self.seed)))
        block = self._permute(position, key)
        outside = block >= self.blocks
        while outside.any():
            block[outside] = self._permute(block[outside], key[outside])
            outside = block >= self.blocks
        return block.astype(np.int64)

    def _permute(self, value: np.ndarray, key: np.ndarray) -> np.ndarray:
        left, right = value >> self.half, value & self.mask
        for step in range(self.ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + np.uint64(step))) & self.mask)
        return (left << self.half) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a well-mixed 64-bit hash."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def fingerprint_blocks(blocks: np.ndarray) -> dict[str, int]:
    """What tells two texts apart, wherever the files lie: their length, and a sum over 64 places; blocks [count, L]."""
    some = np.unique(np.linspace(0, len(blocks) - 1, 64, dtype=np.int64))
    return {"tokens": blocks.size, "crc32": zlib.crc32(np.ascontiguousarray(blocks[some], dtype=np.int64).tobytes())}


class LocalBatches:
    """Training batches of one process, addressed by step number (so a resumed run needs nothing but its step)."""

    def __init__(self, blocks: np.ndarray, plan: BatchPlan, rank: int, seed: int):
        self.blocks, self.plan, self.rank = blocks, plan, rank
        self.order = BlockOrder(len(blocks), seed)

    def at(self, step: int) -> list[torch.Tensor]:
        """Micro-batches of int64 ids [micro, length] that this process contributes to `step` (0-based)."""
        plan = self.plan
        samples = np.arange(step * plan.total, (step + 1) * plan.total)
        mine = samples.reshape(plan.accumulation, plan.world, plan.micro)[:, self.rank]
        return [torch.from_numpy(self.blocks[self.order(row)].astype(np.int64)) for row in mine]

    def state(self) -> dict:
        """What a resumed run needs beside its step: nothing."""
        return {}

    def restore(self, state: dict | None) -> None:
        """Any number of processes may go on: batches are addressed by step."""

    def fingerprint(self) -> dict[str, int]:
        """See `fingerprint_blocks`."""
        return fingerprint_blocks(self.blocks)
