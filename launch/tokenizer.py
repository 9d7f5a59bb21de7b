"""Tokenizers: any HF directory, or a SentencePiece BPE model, loaded so that ids are the ones the model was trained on.

transformers 5 has silent traps here (measured): `LlamaTokenizer(vocab_file=...)` yields a 3-token tokenizer, a unigram
model is converted as if it were BPE, and a directory without tokenizer_config.json loses the leading-space rule. So a
SentencePiece model is converted once, in a directory that says what it is, and the ids are compared with the original.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

SAMPLE = "It is a truth universally acknowledged, that a single man -- in possession of 1,000 pounds: naïve café.\nYes!"


def load_tokenizer(path: str):
    """HF fast tokenizer from a directory with tokenizer.json or tokenizer.model, from a .model file, or a Hub name."""
    from transformers import AutoTokenizer

    place = Path(path)
    if place.is_file():
        return from_sentencepiece(place)
    if place.is_dir() and not (place / "tokenizer.json").exists():
        if not (place / "tokenizer.model").exists():
            raise SystemExit(f"--tokenizer {path}: the directory has neither tokenizer.json nor tokenizer.model")
        return from_sentencepiece(place / "tokenizer.model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--tokenizer {path}: cannot be loaded: {error}") from None
    if place.is_dir():
        _check_against(tokenizer, _ids_of_tokenizer_json(place), f"{place}/tokenizer.json")
    return tokenizer


def from_sentencepiece(model_file: Path, save_to: Path | None = None):
    """Convert a SentencePiece BPE model to a HF tokenizer, check its ids, optionally save it as a directory."""
    from transformers import AutoTokenizer

    try:
        import google.protobuf  # noqa: F401  transformers reads the .model through it, and blames tiktoken if absent
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise SystemExit(f"reading {model_file} needs sentencepiece and protobuf: pip install {error.name}") from None
    pieces = SentencePieceProcessor(model_file=str(model_file))
    _refuse_unigram(model_file)
    with tempfile.TemporaryDirectory() as work:
        shutil.copy(model_file, Path(work) / "tokenizer.model")
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
        (Path(work) / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = AutoTokenizer.from_pretrained(work)
    _check_against(tokenizer, pieces.encode(SAMPLE), str(model_file))
    if save_to is not None:
        tokenizer.save_pretrained(save_to)
    return tokenizer


def fingerprint(tokenizer) -> str:
    """Short hash of everything that decides ids: part of the token cache's key."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def _refuse_unigram(model_file: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise SystemExit(f"{model_file} is not a BPE model: transformers would convert it silently wrong; train BPE")


def _ids_of_tokenizer_json(directory: Path) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json")).encode(SAMPLE, add_special_tokens=False).ids


def _check_against(tokenizer, expected: list[int], source: str) -> None:
    ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    if ids != expected:
        raise SystemExit(
            f"the tokenizer transformers built does not give the ids of {source} ({ids[:8]}... instead of "
            f"{expected[:8]}...); add a tokenizer_config.json with the right tokenizer_class"
        )
