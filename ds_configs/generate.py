#!/usr/bin/env python3
"""Writes every JSON file of this directory from the tables below.

Usage:

    python ds_configs/generate.py            write them
    python ds_configs/generate.py --check    fail if a file differs from what would be written
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent

# Published settings for LLaMA on C4, 60M model; sources: the scripts of the GaLore, Fira and APOLLO repositories
# (rank 128 / 256 / 256 / 512 for 60M / 130M / 350M / 1B, warm-up 10 %, cosine to 10 %, no weight decay, no clipping).
# Fira uses alpha 0.0625 from 1B on, and lr 0.005, update_proj_gap 500 at 7B. APOLLO uses scale 0.5 at 1B.
# Flora publishes no LLaMA pre-training: rank and lr as the others, the rest are its package's defaults.
OPTIMIZERS = {
    "fira": ("FiraAdamW", {"lr": 0.01, "rank": 128, "update_proj_gap": 200, "alpha": 0.25, "weight_decay": 0.0}),
    "galore": ("GaLoreAdamW", {"lr": 0.01, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "weight_decay": 0.0}),
    "apollo": ("ApolloAdamW", {"lr": 0.01, "rank": 128, "update_proj_gap": 200, "scale": 1.0, "weight_decay": 0.0}),
    "flora": ("Flora", {"lr": 0.01, "rank": 128, "kappa": 1000, "beta1": 0.9, "relative_step": False,
                        "scale_parameter": False, "weight_decay": 0.0}),
}  # fmt: skip
# torch_adam: torch's own AdamW. Without it DeepSpeed compiles a C++/CUDA kernel on first use.
ADAMW = ("AdamW", {"torch_adam": True, "lr": 0.002, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0})

ZERO = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    "zero3": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True,
              "stage3_gather_16bit_weights_on_model_save": True},
    "zero3_layerwise": {"stage": 3, "overlap_comm": True, "stage3_gather_16bit_weights_on_model_save": True},
    "zero3_offload": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True,
                      "stage3_gather_16bit_weights_on_model_save": True,
                      "offload_optimizer": {"device": "cpu", "pin_memory": True},
                      "offload_param": {"device": "cpu", "pin_memory": True}},
}  # fmt: skip

# name -> hidden, intermediate, layers, heads, vocabulary, context; 60m to 7b as in the GaLore repository.
MODELS = {
    "tiny": (128, 352, 4, 4, 4096, 1024),
    "9m": (128, 352, 4, 4, 32000, 1024),
    "60m": (512, 1376, 8, 8, 32000, 1024),
    "130m": (768, 2048, 12, 12, 32000, 1024),
    "350m": (1024, 2736, 24, 16, 32000, 1024),
    "1b": (2048, 5461, 24, 32, 32000, 1024),
    "7b": (4096, 11008, 32, 32, 32000, 2048),
}


def ds_config(stage: str, optimizer: tuple[str, dict]) -> dict:
    """A ds_config that plain DeepSpeed accepts as it is: no "auto"."""
    kind, params = optimizer
    if stage == "zero3_layerwise":
        params = {**params, "layerwise": True}
    return {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": kind, "params": params},
        # DeepSpeed clips at 1.0 unless told otherwise; the published runs do not clip.
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "zero_optimization": ZERO[stage],
        "steps_per_print": 1000000,
        "wall_clock_breakdown": False,
    }


def model_config(name: str) -> dict:
    """A Hugging Face LlamaConfig."""
    hidden, intermediate, layers, heads, vocabulary, context = MODELS[name]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def expected_files() -> dict[Path, str]:
    """Path -> content of every generated file."""
    contents = {
        HERE / f"{stage}_{name}.json": ds_config(stage, optimizer)
        for stage in ZERO
        for name, optimizer in OPTIMIZERS.items()
    }
    contents[HERE / "zero2_adamw.json"] = ds_config("zero2", ADAMW)
    contents.update({HERE / "models" / f"llama_{name}.json": model_config(name) for name in MODELS})
    return {path: json.dumps(content, indent=2) + "\n" for path, content in contents.items()}


def stale_files() -> list[str]:
    """Names of files that are missing, differ, or are not generated from the tables."""
    expected = expected_files()
    present = [*HERE.glob("*.json"), *(HERE / "models").glob("*.json")]
    wrong = [path for path, text in expected.items() if not path.exists() or path.read_text() != text]
    return sorted(str(path.relative_to(HERE)) for path in {*wrong, *(set(present) - set(expected))})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Generate the ds_configs and model configs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    if parser.parse_args().check:
        stale = stale_files()
        sys.exit(f"out of date, run python ds_configs/generate.py: {', '.join(stale)}" if stale else 0)
    (HERE / "models").mkdir(exist_ok=True)
    for path, text in expected_files().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
