"""What the backward keeps of a forward pass: MiB of saved tensors, parameters excluded, each storage counted once.

    python -m tests.benchmarks.saved_activations

A LLaMA of 4 layers, width 512, on 4 x 256 tokens: full fine-tuning, LoRA on all linear layers (r 16), peft's LoRA-FA
(lora_A frozen) and ours (`lowrank_ds.recompute_dropout` too), without and with dropout 0.05, and the time of
a forward and backward pass.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

import torch

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_of(kind: str, dropout: float, layers: int = 4, hidden: int = 512) -> torch.nn.Module:
    """kind: "full", "lora", "fa" (peft's LoRA-FA) or "ours"."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import lowrank_ds

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": hidden * 43 // 16, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=8, use_cache=False, **sizes))
    if kind == "full":
        return model
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, lora_dropout=dropout, target_modules=LINEAR))
    if kind != "lora":
        lowrank_ds.freeze_lora_a(model)
    if kind == "ours":
        lowrank_ds.recompute_dropout(model)
    return model


def saved_mib(kind: str, dropout: float, **sizes: int) -> float:
    """MiB of the distinct storages that autograd saved, without those of parameters and buffers."""
    model, found = model_of(kind, dropout, **sizes), {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=_tokens(), labels=_tokens()).loss
    size = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    loss.backward()
    return size / 2**20


def seconds(kind: str, dropout: float, repeats: int = 5) -> float:
    """Median CPU time of a forward and backward pass (one thread; not disturbed by other processes' share)."""
    model, times = model_of(kind, dropout), []
    for _ in range(repeats + 1):
        start = time.thread_time()
        model(input_ids=_tokens(), labels=_tokens()).loss.backward()
        times.append(time.thread_time() - start)
    return statistics.median(times[1:])


def _tokens() -> torch.Tensor:
    return torch.randint(0, 256, (4, 256), generator=torch.Generator().manual_seed(0))


def main() -> None:
    """Print the table."""
    import peft
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, {commit=}")
    print(f"command: python -m {__spec__.name}, {torch.get_num_threads()} thread(s), Python {sys.version.split()[0]}")
    print(f"{'':6s}{'dropout':>9s}{'saved MiB':>11s}{'CPU s':>11s}")
    for kind, dropout in [("full", 0.0), *((k, p) for p in (0.0, 0.05) for k in ("lora", "fa", "ours"))]:
        print(f"{kind:6s}{dropout:9.2f}{saved_mib(kind, dropout):11.1f}{seconds(kind, dropout):11.3f}", flush=True)


if __name__ == "__main__":
    main()
