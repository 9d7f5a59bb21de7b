"""Optimizers and learning rates: by name, with parameter groups, for any engine."""

import math
from collections.abc import Callable

import torch
from torch import nn

import lowrank_ds  # makes the optimizers known by name to torch.optim and DeepSpeed
from launch.model import full_shape
from lowrank_ds.params import canonical

FALLS = {"cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)), "linear": lambda done: 1 - done}


def warmup_then(fall: str, steps: int, warmup: int, floor: float) -> Callable[[int], float]:
    """Factor on the learning rate at a 0-based step: linear up to 1, then down to `floor` as FALLS[fall] does."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (1 - floor) * FALLS[fall](done)

    return factor


def end_names(model: nn.Module) -> set[str]:
    """Names of embeddings, output head and 1-D weights; ask before an engine wraps the model and changes shapes."""
    ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    return {canonical(name) for name, p in model.named_parameters() if id(p) in ends or len(full_shape(p)) < 2}


def weight_groups(model: nn.Module, embed_lr: float | None, ends: set[str]) -> list[dict]:
    """Parameter groups: one, or two when the weights named by `ends` get their own learning rate."""
    trainable = [(canonical(name), p) for name, p in model.named_parameters() if p.requires_grad]
    if embed_lr is None:
        return [{"params": [p for _, p in trainable]}]
    inner, outer = ([p for name, p in trainable if (name in ends) == outside] for outside in (False, True))
    return [{"params": inner}, {"params": outer, "lr": embed_lr}]


def _named_groups(model: nn.Module, embed_lr: float | None, ends: set[str]) -> list[dict]:
    """`weight_groups` of (name, weight) pairs."""
    names = {p: canonical(name) for name, p in model.named_parameters()}
    groups = weight_groups(model, embed_lr, ends)
    return [{**group, "params": [(names[p], p) for p in group["params"]]} for group in groups]


def torch_optimizer(
    name: str, model: nn.Module, overrides: dict, embed_lr: float | None, ends: set[str]
) -> torch.optim.Optimizer:
    """Optimizer by class name: lowrank_ds's get their named, projected groups, torch's get plain ones.

    model: as the engine wrapped it, since FSDP replaces the parameters or changes their shapes.
    """
    if "lr" not in overrides:
        raise SystemExit(f"--optimizer {name} needs --lr")
    low_rank, options = getattr(lowrank_ds, name, None), dict(overrides)
    if low_rank is None:
        if not isinstance(getattr(torch.optim, name, None), type):
            raise SystemExit(f"--optimizer {name}: neither lowrank_ds nor torch.optim has it")
        return _construct(getattr(torch.optim, name), weight_groups(model, embed_lr, ends), options)
    if low_rank is lowrank_ds.LoRAFA:
        return _construct(low_rank, lowrank_ds.lorafa_groups(model), options)
    if low_rank.OPTIONS["rank"] is None:  # Lomo and AdaLomo train every weight whole, and say so if asked to project
        return _construct(low_rank, _named_groups(model, embed_lr, ends), options)
    selection = {key: options.pop(key) for key in ("rank", "target_modules") if key in options}
    groups = lowrank_ds.param_groups(model, **selection)
    for group in groups:
        if embed_lr is not None and "rank" not in group:
            group["lr"] = embed_lr
    return _construct(low_rank, groups, options)


def _construct(kind: type, groups: list[dict], options: dict) -> torch.optim.Optimizer:
    try:
        return kind(groups, **options)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--optimizer {kind.__name__} refuses --optimizer-args: {error}") from None
