"""Tiny data in LLM-Adapters' formats that a tiny model can learn: the right option is the one that shines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

MODEL = {
    "vocab_size": 330, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 1, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = {  # {task: (question, how its options are introduced)}
    "boolq": ("Please answer the following question with true or false, question: is it {}?", ()),
    "piqa": ("Please choose the correct solution to the question: {}.", ("Solution1: a", "Solution2: b")),
    "social_i_qa": ("Please choose the correct answer to the question: {}.",
                    ("Answer1: a", "Answer2: b", "Answer3: c")),
    "hellaswag": ("Please choose the correct ending to complete the given sentence: {}.",
                  ("Ending1: a", "Ending2: b", "Ending3: c", "Ending4: d")),
    "winogrande": ("Please choose the correct answer to fill in the blank to complete the given sentence: {}.",
                   ("Option1: a", "Option2: b")),
    **{task: ("Please choose the correct answer to the question: {}.",
              ("Answer1: a", "Answer2: b", "Answer3: c", "Answer4: d"))
       for task in ("ARC-Easy", "ARC-Challenge", "openbookqa")},
}  # fmt: skip
HINTS = ("sun", "moon", "rain", "snow")  # the n-th means the n-th option


def record(task: str, right: int) -> dict[str, str]:
    """One record; right: number of the right option, from 0."""
    question, options = ASKED[task]
    names = [option.split(":")[0].lower() for option in options] or ["true", "false"]
    format_ = f"Answer format: {'/'.join(names)}"
    instruction = "\n\n".join(
        [question.format(" ".join([HINTS[right]] * 8)), *([" ".join(options)] if options else []), format_]
    )
    return {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {names[right]}",
        "answer": names[right],
    }


def options_of(task: str) -> int:
    """How many options its records have."""
    return len(ASKED[task][1]) or 2


def prepare(folder: Path) -> Path:
    """`tokenizer`, `model` (a HF directory), `train.json` as commonsense_170k.json, `dataset/TASK/test.json`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from launch.prepare_corpus import train_tokenizer
    from launch.records import prompt_of
    from launch.tokenizer import load_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    everything = [record(task, right) for task in ASKED for right in range(options_of(task))]
    texts = [prompt_of("", r, "llm-adapters") + r["output"] for r in everything]
    train_tokenizer(texts, 330, folder / "tokenizer")
    (folder / "train.json").write_text(
        json.dumps([everything[i] for i in random.permutation(4 * len(everything)) % len(everything)])
    )
    for task in ASKED:
        (folder / "dataset" / task).mkdir(parents=True)
        rows = [record(task, int(right)) for right in random.integers(0, options_of(task), 5)]
        (folder / "dataset" / task / "test.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    model.save_pretrained(folder / "model")
    load_tokenizer(str(folder / "tokenizer")).save_pretrained(folder / "model")
    (folder / "chat.jinja").write_text(CHAT)
    return folder


def flags(data: Path, output: Path, *more: Any) -> list[str]:
    """finetune.py's arguments for a short run."""
    given = [
        "--model", data / "model", "--train-data", data / "train.json", "--cache-dir", data / "cache", "--seq-len", 256,
        "--batch-size", 12, "--micro-batch", 3, "--dtype", "fp32", "--log-every", 1, "--steps", 4, "--lr", 0.01,
        "--output", output,
    ]  # fmt: skip
    return [str(part) for part in [*given, *more]]
