"""The parameters of a LLaMA by its config alone: no model is built."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from lowrank_ds.bench.facts import ROOT

Shapes = dict[str, tuple[int, ...]]


def read_config(path: str | None, default: str) -> dict[str, Any]:
    """The fields of a HF config.

    Args:
        path: a file; None: `default` of ds_configs/models.

    Raises:
        ValueError: no such file, or not the config of a LLaMA.
    """
    file = pathlib.Path(path or ROOT / "ds_configs" / "models" / f"{default}.json")
    if not file.exists():
        hint = "" if path else " (ds_configs/ comes with a checkout of the sources; else give --model FILE)"
        raise ValueError(f"--model {file}: no such file{hint}")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--model {file}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        raise ValueError(f'--model {file}: its "model_type" must be "llama"')
    return config


def parameter_shapes(config: dict[str, Any]) -> Shapes:
    """{name: shape} of every parameter, as transformers' LlamaForCausalLM names them."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    each = config.get("head_dim") or width // heads  # null in some configs: transformers then computes them
    keys, queries = (config.get("num_key_value_heads") or heads) * each, heads * each
    layer: Shapes = {
        "self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (width,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


def projected(shapes: Shapes) -> list[str]:
    """Names of what GaLore's recipes project: the matrices of attention and MLP."""
    return [name for name, shape in shapes.items() if len(shape) == 2 and ("self_attn" in name or "mlp" in name)]
