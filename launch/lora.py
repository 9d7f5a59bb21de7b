"""LoRA adapters: put on a model, merged into the weights an engine gathered, saved in PEFT's form and as a model."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lowrank_ds
from launch.model import save_model
from lowrank_ds.params import canonical

ADAPTER = "default"  # PEFT's name of the first adapter
_PREFIX = "base_model.model."  # of PEFT's names


def add_adapters(model: nn.Module, args, frozen_a: bool) -> nn.Module:
    """The model with LoRA layers, everything else frozen; frozen_a: lora_A too (LoRA-FA).

    Initial factors depend on --seed alone. Call it before any engine wraps the model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise SystemExit(f"--method {args.method} needs peft: pip install 'lowrank_ds[finetune]'") from None
    targets = args.lora_targets if len(args.lora_targets) > 1 else args.lora_targets[0]  # "all-linear" is no list
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets if targets == "all-linear" else args.lora_targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(args.seed)
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise SystemExit(f"--lora-targets {' '.join(args.lora_targets)}: {error}") from None
    others = [name for name, layer in lora_layers(model).items() if not isinstance(layer.base_layer, nn.Linear)]
    if others:
        raise SystemExit(
            f"--lora-targets: {others[0]} is no linear layer, and only those are merged here; leave it out"
        )
    if frozen_a:
        lowrank_ds.freeze_lora_a(model)
    return model


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of the layers that have an adapter."""
    return {name: layer for name, layer in model.named_modules() if ADAPTER in getattr(layer, "lora_B", {})}


def merged(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the base model with W + s B A in place of W, in W's dtype.

    model: as PEFT made it; FSDP1 wraps parts of it. weights: whole ones by PEFT's names, on the CPU, as an engine
    gathered them.
    """
    scalings = {canonical(name): layer.scaling[ADAPTER] for name, layer in lora_layers(model).items()}
    result = {}
    for name, value in weights.items():
        if ".lora_" in name:
            continue
        path, marker, kind = name.rpartition(".base_layer.")
        if marker and kind == "weight":
            a, b = (weights[f"{path}.lora_{factor}.{ADAPTER}.weight"].float() for factor in "AB")
            value = torch.addmm(value.float(), b, a, alpha=scalings[path]).to(value.dtype)
        result[name.replace(".base_layer.", ".").removeprefix(_PREFIX)] = value
    return result


def save_merged(model: nn.Module, weights: dict[str, Tensor], tokenizer, directory: Path) -> None:
    """An ordinary HF model, and in its folder `adapter` the same for PEFT; call it on the main process."""
    save_model(model.get_base_model(), merged(model, weights), tokenizer, directory)
    save_adapter(model, weights, directory / "adapter")


def save_adapter(model: nn.Module, weights: dict[str, Tensor], directory: Path) -> None:
    """PEFT's folder of an adapter; arguments as in `merged`.

    PEFT's own save_pretrained looks for modules by name and, under FSDP1's wrappers, writes a file without a tensor.
    """
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True  # as PEFT saves it
    config.save_pretrained(directory)
    factors = {name.replace(f".{ADAPTER}.", "."): value for name, value in weights.items() if ".lora_" in name}
    save_file(factors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
