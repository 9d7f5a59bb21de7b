"""Models: built from a HF config or directory, sharded from the start under ZeRO-3, saved as a HF directory."""

import json
import zlib
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn


def read_config(path: str):
    """HF config from a .json file or a model directory."""
    from transformers import AutoConfig

    place = Path(path)
    if place.is_dir():
        return AutoConfig.from_pretrained(path)
    try:
        fields = json.loads(place.read_text())
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except FileNotFoundError:
        raise SystemExit(f"--model {path}: no such file or directory") from None
    except (json.JSONDecodeError, KeyError) as error:
        raise SystemExit(f"--model {path}: not a HF model config: {error!r} (it needs a model_type)") from None


def build_model(path: str, tokenizer, *, seq_len: int, seed: int, dtype: torch.dtype, checkpointing: bool) -> nn.Module:
    """Causal LM: weights of a HF directory if it has any, else fresh ones that depend on `seed` alone.

    Under ZeRO-3 (a live HfDeepSpeedConfig) transformers shards each layer as it is made.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = read_config(path)
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(
            f"--tokenizer has {len(tokenizer)} tokens, more than the {config.vocab_size} of --model {path}"
        )
    context = getattr(config, "max_position_embeddings", seq_len)
    if seq_len > context:
        raise SystemExit(f"--seq-len {seq_len} exceeds max_position_embeddings {context} of --model {path}")
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = False
    logging.disable_progress_bar()  # of each process
    if Path(path).is_dir() and any(Path(path).glob("*.safetensors")):
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        draw_weights(model, seed)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def draw_weights(model: nn.Module, seed: int) -> None:
    """Initial weights by the model's own rule, from a seed for each module: ZeRO-3 and one process draw the same.

    (transformers draws them in another order under ZeRO-3, which would make engines incomparable.)
    """
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        with _gathered(own, modifier_rank=0), torch.no_grad():
            if own and own[0].numel():  # ZeRO-3 fills them in on all processes, and keeps the first one's
                torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                model._init_weights(module)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter; ZeRO-3 leaves an empty tensor in its place and keeps the shape beside it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def parameter_count(model: nn.Module) -> int:
    """Number of weights of the whole model."""
    return sum(full_shape(parameter).numel() for parameter in model.parameters())


def whole_weights(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """State dict on the CPU; under ZeRO-3 every process must call this, one parameter is gathered at a time.

    `keep`: whether this process wants the result (the others get an empty dict and only take part).
    """
    result = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with _gathered([parameter]):
            if keep:
                result[name] = parameter.detach().to("cpu", copy=True)
    return result


def _gathered(parameters: list[nn.Parameter], modifier_rank: int | None = None):
    """Context in which these parameters are whole on every process; changes by `modifier_rank` are kept."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def save_model(model: nn.Module, weights: dict[str, torch.Tensor], tokenizer, directory: Path) -> None:
    """HF model directory (weights, config, tokenizer), loadable by from_pretrained; call it on the main process."""
    model.config.use_cache = True
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)
    model.config.use_cache = False
