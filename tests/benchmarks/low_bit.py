"""Low-bit state: its bytes for a LLaMA-60M, and what it does to the loss of a small model.

    python -m tests.benchmarks.low_bit [--steps 500] [--model llama_60m] [--rank 128] [--text]

Bytes: `init_state()` on the model's dimensions (fake memory), counted by `state_bytes`. Loss: the model and the noisy
rule of tests/test_bf16_weights.py (a LLaMA block without attention, rank 8, randomized refreshes every 25 steps, no
matrix too small for codes), the same batches for all; mean of the last 50 losses. --text: instead a byte-level LLaMA (2
layers, 64 wide, 0.13M parameters, rank 16) on the novels in launch/corpus, held-out loss after the last step; some
minutes a row. One thread, fp32 weights. AdamW is ours without projection (GaLoreAdamW, rank=None): the same update as
torch's, and the only 8-bit AdamW here that shards (bitsandbytes' blocks cross rows).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import torch

import lowrank_ds
from lowrank_ds.bench.facts import header
from tests.benchmarks.memory import MODELS
from tests.test_bf16_weights import Model, sequences

CORPUS = pathlib.Path(__file__).parents[2] / "launch" / "corpus" / "austen.jsonl.xz"
EIGHT = {"moments": "8bit"}
FOUR = {**EIGHT, "projector_dtype": "4bit"}
PLAIN = {"rank": None, "lr": 3e-3}
# name: (class, settings); rank and update_proj_gap are filled in where the class has them
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("GaLoreAdamW", PLAIN),
    "AdamW, 8-bit moments": ("GaLoreAdamW", {**PLAIN, **EIGHT}),
    "GaLore": ("GaLoreAdamW", {}),
    "GaLore, 8-bit moments": ("GaLoreAdamW8bit", {}),
    "GaLore, 8-bit moments, 8-bit projector": ("GaLoreAdamW8bit", {"projector_dtype": "8bit"}),
    "GaLore, 8-bit moments, 4-bit projector": ("GaLoreAdamW", FOUR),
    "Q-GaLore (the same, lazy refresh)": ("QGaLore", {}),
    "Fira": ("FiraAdamW", {}),
    "Fira, 8-bit moments": ("FiraAdamW", EIGHT),
    "Fira, 8-bit moments, 4-bit projector": ("FiraAdamW", FOUR),
    "APOLLO": ("ApolloAdamW", {}),
    "APOLLO, 8-bit moments": ("ApolloAdamW", EIGHT),
    "Flora": ("Flora", {"lr": 1e-2, "relative_step": False}),
    "Flora, 8-bit momentum": ("Flora", {"lr": 1e-2, "relative_step": False, "quantization": True}),
}


def build(row: str, model: torch.nn.Module, rank: int, gap: int, **more: Any) -> Any:
    """The row's optimizer on a model."""
    name, settings = ROWS[row]
    cls = getattr(lowrank_ds, name)
    settings = {"lr": 1e-2, "rank": rank, **settings, **more}
    if settings["rank"] is None:
        settings.pop("exclude", None)
    interval = "kappa" if "kappa" in cls.OPTIONS else "update_proj_gap"
    return cls(model.named_parameters(), **{interval: gap}, **settings)


def llama(**sizes: Any) -> torch.nn.Module:
    """A LLaMA with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{"use_cache": False, "tie_word_embeddings": False, **sizes}))


def bytes_of(row: str, name: str, rank: int) -> int:
    """Bytes of all state of a model of ds_configs/models."""
    with torch.device("meta"):  # sizes are all that counts
        model = llama(**json.loads((MODELS / f"{name}.json").read_text()))
    optimizer = build(row, model, rank, 200)
    optimizer.init_state()
    return lowrank_ds.state_bytes(optimizer)


def text() -> torch.Tensor:
    """The corpus as bytes, 1-D."""
    with lzma.open(CORPUS, "rt") as lines:
        joined = "\n".join(json.loads(line)["text"] for line in lines)
    return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8).long()


def step_all(row: str, model: torch.nn.Module, rank: int, batches: Iterable[torch.Tensor], steps: int, **more: Any):
    """Train on `batches`. Answers (losses, ms of the optimizer's step, refreshes of all matrices)."""
    optimizer, losses, spent = build(row, model, rank, 25, **more), [], 0.0
    peak = optimizer.param_groups[0]["lr"]
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        loss = model(batch) if isinstance(model, Model) else model(input_ids=batch, labels=batch).loss
        loss.backward()
        began = time.process_time()
        optimizer.step()
        spent += time.process_time() - began
        optimizer.zero_grad()
        losses.append(loss.item())
    refreshes = sum(int(state["refreshes"]) for state in optimizer.state.values() if "refreshes" in state)
    return losses, 1e3 * spent / steps, refreshes


def train_rule(row: str, steps: int) -> tuple[float, float, int]:
    """(mean of the last losses, ms of the optimizer's step, refreshes) on the noisy rule."""
    losses, ms, refreshes = step_all(
        row, Model(), 8, sequences(steps), steps, min_8bit_size=0, exclude=["embed", "head"]
    )
    return sum(losses[-50:]) / 50, ms, refreshes


def train_text(row: str, steps: int) -> tuple[float, float, int]:
    """(held-out loss, ms of the optimizer's step, refreshes) on the corpus."""
    model = llama(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    tokens, generator, fixed = text(), torch.Generator().manual_seed(1), torch.Generator().manual_seed(7)
    held_out = len(tokens) // 20
    batches = (windows(tokens[held_out:], 8, generator) for _ in range(steps))
    _, ms, refreshes = step_all(row, model, 16, batches, steps)
    with torch.no_grad():
        pieces = [windows(tokens[:held_out], 32, fixed) for _ in range(8)]
        losses = [model(input_ids=piece, labels=piece).loss.item() for piece in pieces]
    return sum(losses) / len(losses), ms, refreshes


def windows(tokens: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` pieces of 64 bytes from random places."""
    starts = torch.randint(0, len(tokens) - 64, (count,), generator=generator)
    return torch.stack([tokens[start : start + 64] for start in starts])


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(header(torch.device("cpu")), flush=True)
    print(
        f"\n| state | {given.model}, MiB | of AdamW | loss after {given.steps} | against fp32 | step, ms | refreshes |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    base, exact = None, math.nan
    for row in given.rows:
        size = bytes_of(row, given.model, given.rank)
        base = base or size
        loss, ms, refreshes = (train_text if given.text else train_rule)(row, given.steps)
        exact = loss if "," not in row and "Q-" not in row else exact
        print(f"| {row} | {size / 2**20:.1f} | {size / base:.3f} | {loss:.4f} | {100 * (loss / exact - 1):+.2f} % | "
              f"{ms:.1f} | {refreshes or ''} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
