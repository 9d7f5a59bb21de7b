"""Low-bit state: its bytes for a LLaMA-60M, and what it does to the loss of a small LLaMA on real text.

    python -m tests.benchmarks.low_bit [--steps 500] [--model llama_60m] [--rank 128]

Bytes: `init_state()` on the model's dimensions, counted by `state_bytes`. Loss: a byte-level LLaMA (2 layers, 64 wide,
0.13M parameters, rank 16, randomized refreshes every 25 steps) on the novels in launch/corpus, the same batches for all
(two fp32 rows also on others: what chance does); held-out loss after the last step.
One thread, fp32 weights. AdamW is ours without projection (GaLoreAdamW, rank=None): the same update as torch's, and the
only 8-bit AdamW that runs here and shards (bitsandbytes keeps blocks that cross rows).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import pathlib
import time
from typing import Any

import torch

import lowrank_ds
from tests.benchmarks.memory import MODELS
from tests.benchmarks.step_time import header

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


def build(row: str, model: torch.nn.Module, rank: int, gap: int) -> Any:
    """The row's optimizer on a model."""
    name, settings = ROWS[row]
    cls = getattr(lowrank_ds, name)
    settings = {"lr": 1e-2, "rank": rank, **settings}
    if cls.OPTIONS.get("subspace") == "svd" and settings["rank"]:
        settings["subspace"] = "randomized"  # exact SVDs would take longer than the rest
    interval = "kappa" if "kappa" in cls.OPTIONS else "update_proj_gap"
    return cls(model.named_parameters(), **{interval: gap}, **settings)


def llama(**sizes: Any) -> torch.nn.Module:
    """A LLaMA with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{"use_cache": False, "tie_word_embeddings": False, **sizes}))


def bytes_of(row: str, name: str, rank: int) -> tuple[int, int]:
    """(bytes of all state, parameters) of a model of ds_configs/models."""
    model = llama(**json.loads((MODELS / f"{name}.json").read_text()))
    optimizer = build(row, model, rank, 200)
    optimizer.init_state()
    return lowrank_ds.state_bytes(optimizer), sum(p.numel() for p in model.parameters())


def text() -> torch.Tensor:
    """The corpus as bytes, 1-D."""
    with lzma.open(CORPUS, "rt") as lines:
        joined = "\n".join(json.loads(line)["text"] for line in lines)
    return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8).long()


def train(row: str, tokens: torch.Tensor, steps: int, order: int) -> tuple[float, float, int]:
    """(held-out loss, ms of the optimizer's step, refreshes of all matrices) after `steps`.

    order: seed of the batches.
    """
    model = llama(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    optimizer, generator = build(row, model, 16, 25), torch.Generator().manual_seed(order)
    peak, spent, held_out = optimizer.param_groups[0]["lr"], 0.0, len(tokens) // 20
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        batch = windows(tokens[held_out:], 8, generator)
        model(input_ids=batch, labels=batch).loss.backward()
        began = time.perf_counter()
        optimizer.step()
        spent += time.perf_counter() - began
        optimizer.zero_grad()
    fixed = torch.Generator().manual_seed(7)
    with torch.no_grad():
        batches = [windows(tokens[:held_out], 32, fixed) for _ in range(8)]
        losses = [model(input_ids=batch, labels=batch).loss.item() for batch in batches]
    refreshes = sum(int(state["refreshes"]) for state in optimizer.state.values() if "refreshes" in state)
    return sum(losses) / len(losses), 1e3 * spent / steps, refreshes


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
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(header(torch.device("cpu")), flush=True)
    tokens, base = text(), None
    print(f"\n| state | {given.model}, MiB | of AdamW | loss after {given.steps} | against fp32 | other batches |"
          " step, ms | refreshes |\n|---|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    exact = math.nan
    for row in given.rows:
        size, _ = bytes_of(row, given.model, given.rank)
        base = base or size
        loss, ms, refreshes = train(row, tokens, given.steps, 1)
        fp32 = "," not in row and "Q-" not in row
        exact = loss if fp32 else exact
        other = f"{train(row, tokens, given.steps, 2)[0]:.4f}" if row in ("AdamW", "GaLore") else ""
        print(f"| {row} | {size / 2**20:.1f} | {size / base:.3f} | {loss:.4f} | {100 * (loss / exact - 1):+.2f} % | "
              f"{other} | {ms:.1f} | {refreshes or ''} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
