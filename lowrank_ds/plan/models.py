"""Models that can be planned for: the LLaMA family by its config alone. No weights, no transformers."""

from __future__ import annotations

import pathlib
from typing import Any

from lowrank_ds.bench import llama

_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")

# Dimensions of ds_configs/models (which a wheel does not carry), and of LLaMA 2's 13B and 70B.
_SIZES = {
    "llama_tiny": (128, 352, 4, 4, 4),
    "llama_9m": (128, 352, 4, 4, 4),
    "llama_60m": (512, 1376, 8, 8, 8),
    "llama_130m": (768, 2048, 12, 12, 12),
    "llama_350m": (1024, 2736, 24, 16, 16),
    "llama_1b": (2048, 5461, 24, 32, 32),
    "llama_7b": (4096, 11008, 32, 32, 32),
    "llama_13b": (5120, 13824, 40, 40, 40),
    "llama_70b": (8192, 28672, 80, 64, 8),
}
PRESETS: dict[str, dict[str, Any]] = {
    name: {"model_type": "llama", "vocab_size": 4096 if name == "llama_tiny" else 32000}
    | dict(zip(_FIELDS, sizes, strict=True))
    for name, sizes in _SIZES.items()
}
_NEEDED = ("vocab_size", *_FIELDS[:4])


def read(model: str) -> dict[str, Any]:
    """The fields of a model's HF config.

    Args:
        model: a name of `PRESETS`, a config.json, or a folder with one.

    Raises:
        ValueError: there is no such model, or it is not one whose activations the formulas know.
    """
    if model in PRESETS:
        return dict(PRESETS[model])
    path = pathlib.Path(model)
    if not path.exists():
        raise ValueError(f"--model {model}: no such file or folder, and none of {', '.join(PRESETS)}")
    config = llama.read_config(str(path / "config.json" if path.is_dir() else path), "")
    missing = [field for field in _NEEDED if not isinstance(config.get(field), int)]
    if missing:
        raise ValueError(f"--model {model}: the config has no {', '.join(missing)}")
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            raise ValueError(f"--model {model}: {field} is true, which the formulas do not know; --simulate neither")
    return config
