#!/usr/bin/env python3
"""Unpack the corpus in launch/corpus, split it, train a tokenizer on it.

    python launch/prepare_corpus.py --output DIR

makes DIR/train.jsonl, DIR/valid.jsonl (one chapter a line; the last 5 % of every novel is held out) and
DIR/tokenizer (a HF tokenizer directory, SentencePiece BPE). Running it again does nothing; a run that is
interrupted leaves nothing half-made.
"""

import argparse
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.tokenizer import SAMPLE, from_sentencepiece

CORPUS = Path(__file__).with_name("corpus") / "austen.jsonl.xz"
CORPUS_SHA256 = "f6ce2c81dc761f966a661f0a1ae45ce39b007f57d33dd975e153cdc8267847ca"
HELD_OUT = 0.05
RECIPE = 1  # raise when the result of this script changes
CHAPTER = re.compile(r"^(?:chapter|volume)\s", re.IGNORECASE)


def read_works() -> list[dict]:
    """The vendored novels as {"title", "text"}, after checking the file's hash."""
    packed = CORPUS.read_bytes()
    if hashlib.sha256(packed).hexdigest() != CORPUS_SHA256:
        raise SystemExit(f"{CORPUS} is damaged (sha256 differs from launch/corpus/README.md); check it out again")
    return [json.loads(line) for line in lzma.decompress(packed).decode().splitlines()]


def paragraphs(text: str) -> list[str]:
    """Paragraphs with the printed line breaks removed."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def chapters(parts: list[str]) -> list[str]:
    """Group paragraphs into chapters; each is one document."""
    found: list[list[str]] = [[]]
    for part in parts:
        if CHAPTER.match(part) and found[-1]:
            found.append([])
        found[-1].append(part)
    return ["\n".join(chapter) for chapter in found]


def split(parts: list[str]) -> tuple[list[str], list[str]]:
    """Paragraphs before and after the point where the last 5 % of the characters begin."""
    allowed = sum(map(len, parts)) * (1 - HELD_OUT)
    cut = 0
    while allowed > 0:
        allowed -= len(parts[cut])
        cut += 1
    return parts[:cut], parts[cut:]


def train_tokenizer(documents: list[str], vocab_size: int, directory: Path) -> None:
    """SentencePiece BPE with byte fallback and LLaMA's special ids, saved as a HF tokenizer."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lines = (line for document in documents for line in document.split("\n"))
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", character_coverage=0.9995, split_digits=True,
        remove_extra_whitespaces=False, add_dummy_prefix=True, allow_whitespace_only_pieces=True,
        max_sentence_length=16384, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = from_sentencepiece(directory / "tokenizer.model", save_to=directory)
    if tokenizer.decode(tokenizer(SAMPLE)["input_ids"], skip_special_tokens=True) != SAMPLE:
        raise SystemExit("the new tokenizer does not give back the text it was given: report this, with pip list")


def write_documents(path: Path, documents: list[str]) -> None:
    """One {"text"} object a line."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))


def prepare(output: Path, vocab_size: int) -> None:
    """Make `output` unless it is already there and complete; it appears in one rename."""
    stamp = {"recipe": RECIPE, "corpus": CORPUS_SHA256, "vocab_size": vocab_size}
    stamp_file = output / "prepared.json"
    if stamp_file.exists() and json.loads(stamp_file.read_text()) == stamp:
        print(f"{output}: already prepared")
        return
    if output.exists() and any(output.iterdir()) and not stamp_file.exists():
        raise SystemExit(f"--output {output} holds something else; choose another directory or delete it")
    halves = [split(paragraphs(work["text"])) for work in read_works()]
    train, valid = ([text for half in halves for text in chapters(half[side])] for side in (0, 1))
    work = output.with_name(f"{output.name}.partial-{os.getpid()}")
    work.mkdir(parents=True)
    try:
        write_documents(work / "train.jsonl", train)
        write_documents(work / "valid.jsonl", valid)
        train_tokenizer(train, vocab_size, work / "tokenizer")
        (work / "prepared.json").write_text(json.dumps(stamp))
        if output.exists():
            shutil.rmtree(output)
        os.replace(work, output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sizes = [sum(map(len, documents)) / 1e6 for documents in (train, valid)]
    print(f"{output}: {sizes[0]:.2f} M characters to train on, {sizes[1]:.2f} M held out, {vocab_size} tokens")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Prepare the vendored corpus and its tokenizer.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    prepare(args.output, args.vocab_size)


if __name__ == "__main__":
    main()
