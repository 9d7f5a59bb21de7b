"""Options: the names, defaults and checks of everything a user can set, in Python, a ds_config or YAML alike."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Check = tuple[Callable[[Any], bool], str]


def _number(value: Any) -> bool:
    """A finite real number; a 0-d tensor counts, as torch's optimizers accept a tensor lr."""
    if isinstance(value, (bool, str)) or value is None:
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _pair(value: Any, low: float, high: float) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(_number(v) and low <= v < high for v in value)


def _integer(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _patterns(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not all(isinstance(p, str) and p for p in value):
        return False
    try:
        return all(re.compile(p) for p in value)
    except re.error:
        return False


def _choice(*values: str) -> Check:
    return (lambda v: v in values), "one of " + ", ".join(map(repr, values))


_BOOLEAN: Check = ((lambda v: isinstance(v, bool)), "true or false")
_NON_NEGATIVE: Check = ((lambda v: _number(v) and v >= 0), "a finite number >= 0")
_POSITIVE: Check = ((lambda v: _number(v) and v > 0), "a finite number > 0")
_STEPS: Check = ((lambda v: _integer(v, 1)), "a whole number of steps >= 1")
_NAMES: Check = (
    (lambda v: v is None or _patterns(v)),
    'a list of substrings or regular expressions of parameter names, such as ["attn", "mlp"]',
)
_NO_LOSS_SCALE: Check = (
    (lambda v: v is None),
    "null: scaling the loss belongs to the engine (DeepSpeed's fp16 section, torch.amp.GradScaler); bf16 needs none",
)

CHECKS: dict[str, Check] = {
    "lr": ((lambda v: v is None or (_number(v) and v >= 0)), "a finite number >= 0"),
    "weight_decay": _NON_NEGATIVE,
    "betas": ((lambda v: _pair(v, 0.0, 1.0)), "two numbers in [0, 1)"),
    "eps": (
        (lambda v: (_number(v) and v >= 0) or _pair(v, 0.0, math.inf)),
        "a finite number >= 0 (Adafactor and Flora: two of them)",
    ),
    "correct_bias": _BOOLEAN,
    "compile": _BOOLEAN,
    "rank": ((lambda v: v is None or _integer(v, 1)), "a whole number >= 1, or null to project nothing"),
    "update_proj_gap": _STEPS,
    "kappa": _STEPS,
    "scale": _POSITIVE,
    "alpha": _POSITIVE,
    "proj_type": _choice("std", "reverse_std", "right", "left", "full"),
    "subspace": (
        (lambda v: v in (None, "svd", "randomized", "power", "gaussian")),
        "one of 'svd', 'randomized', 'power', 'gaussian', or null for what fits",
    ),
    "on_refresh": _choice("keep", "rotate", "reset"),
    "residual": _choice("code", "paper"),
    "scaling": _choice("column", "matrix"),
    "scale_type": _choice("channel", "tensor"),
    "limiter": ((lambda v: v is None or (_number(v) and v > 1)), "a growth factor > 1, such as 1.01"),
    "scale_front": _BOOLEAN,
    "disable_nl": _BOOLEAN,
    "clip_threshold": _POSITIVE,
    "decay_rate": ((lambda v: _number(v) and v < 0), "a number < 0, such as -0.8"),
    "beta1": ((lambda v: v is None or (_number(v) and 0 <= v < 1)), "a number in [0, 1), or null for no momentum"),
    "scale_parameter": _BOOLEAN,
    "relative_step": ((lambda v: v is None or isinstance(v, bool)), "true or false"),
    "warmup_init": _BOOLEAN,
    "factorize_second_moment": _BOOLEAN,
    "quantization": _BOOLEAN,
    "moments": _choice("fp32", "8bit"),
    "projector_dtype": _choice("fp32", "8bit", "4bit"),
    "min_8bit_size": ((lambda v: _integer(v, 0)), "a whole number >= 0"),
    "lazy_refresh": _BOOLEAN,
    "lazy_threshold": ((lambda v: _number(v) and 0 < v <= 1), "a number in (0, 1]"),
    "clip_grad_norm": (
        (lambda v: v is None),
        "null: no update may start before the global norm is known. Use lowrank_ds.layerwise(model, optimizer, "
        'clip="two_pass", max_grad_norm=...), or without layerwise torch.nn.utils.clip_grad_norm_ or the engine\'s '
        "gradient_clipping",
    ),
    "clip_grad_value": (
        (lambda v: v is None),
        "null: call torch.nn.utils.clip_grad_value_ before step(), or clip by norm with lowrank_ds.layerwise(model, "
        'optimizer, clip="two_pass", max_grad_norm=...)',
    ),
    "loss_scale": _NO_LOSS_SCALE,
    "loss_scale_args": _NO_LOSS_SCALE,
    "target_modules": _NAMES,
    "exclude": _NAMES,
    "matricize": _choice("auto", "flatten", "stack"),
    "oversample": ((lambda v: _integer(v, 0)), "a whole number >= 0"),
    "cold_every": ((lambda v: _integer(v, 1)), "a whole number of refreshes >= 1"),
    "stagger": _BOOLEAN,
    "projector_storage": (
        (lambda v: v in (None, "sharded", "replicated", "seed")),
        "null (sharded, or seed for gaussian bases), 'sharded', 'replicated' or 'seed'",
    ),
    "seed": ((lambda v: _integer(v, 0)), "a whole number >= 0"),
    "stochastic_rounding": _BOOLEAN,
    "compress_accumulation": _BOOLEAN,
    "accumulation_compression_rank": (
        (lambda v: v is None or _integer(v, 1)),
        "a whole number >= 1, or null to sum micro-batches as whole gradients",
    ),
}

COMMON: dict[str, Any] = {
    "proj_type": "std",
    "on_refresh": "keep",
    "oversample": 16,
    "cold_every": 10,
    "stagger": False,
    "projector_storage": None,
    "target_modules": None,
    "exclude": None,
    "matricize": "auto",
    "seed": 0,
    "stochastic_rounding": True,
    "compress_accumulation": False,
    "moments": "fp32",
    "projector_dtype": "fp32",
    "min_8bit_size": 4096,
    "lazy_refresh": False,
    "lazy_threshold": 0.4,
}

# Keys other libraries put into param groups; harmless here.
TOLERATED = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "name",
             "previous_grad_norm"}  # fmt: skip


def check(options: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Check names and values of `options`.

    Args:
        options: what the user gave.
        known: the options of the optimizer, with defaults.
        where: how to name the place in a message, such as "FiraAdamW".

    Raises:
        ValueError: an unknown name (with the nearest known one) or a value out of range.
    """
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown option {name!r}{hint} Known options: {', '.join(known)}.")
        accept, meaning = CHECKS[name]
        if value == "auto" and not accept(value):
            raise ValueError(f'{where}: {name} is "auto", which only Hugging Face\'s Trainer fills in; give a value.')
        if not accept(value):
            raise ValueError(f"{where}: {name} must be {meaning}; got {value!r}.")


def settled(group: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What options that a group leaves open (None) come to mean in it. known: the optimizer's options, if not all."""
    if "subspace" in (group if known is None else known) and group.get("subspace") is None:
        return {"subspace": "svd" if group["proj_type"] == "full" else "power"}
    return {}


_USED_WITH = {  # options that only some choices read
    "oversample": (lambda group: group.get("subspace") in ("randomized", "power"), 'subspace="randomized" or "power"'),
    "cold_every": (lambda group: group.get("subspace") == "power", 'subspace="power"'),
    "lazy_threshold": (lambda group: group.get("lazy_refresh"), "lazy_refresh=True"),
}


def idle(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """A sentence for each option of a projected group that differs from its default and that nothing there reads."""
    return [
        f"{name}={group[name]!r} has no effect: only {what} uses it. Leave it out, or choose that."
        for name, (used, what) in _USED_WITH.items()
        if name in group and group[name] != defaults.get(name) and not used(group)
    ]
