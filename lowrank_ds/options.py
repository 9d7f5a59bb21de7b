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

# What each option does, one sentence or two: docs/reference/options.md is made of it (docs/generate.py).
MEANINGS: dict[str, str] = {
    "lr": "Learning rate of everything. null (Adafactor, Flora): Adafactor's relative step.",
    "weight_decay": "Decoupled decay per step, times the learning rate; before the update (LoRAFA: after it, as peft).",
    "betas": "Decay of Adam's two moments.",
    "eps": "Added to the uncorrected sqrt of the second moment (Adam), as in the packages. Adafactor, AdaLomo: added "
    "to squared gradients, and smallest RMS of a weight.",
    "correct_bias": "Adam's bias correction, of the step size.",
    "compile": "Adam's moments in one kernel made by torch.compile.",
    "rank": "Dimension r of the subspaces, of matrices that are projected; larger than min(m, n) raises, naming the "
    "matrix. null, or a group without it: nothing is projected, the plain rule on the whole parameter.",
    "update_proj_gap": "Steps between bases (T).",
    "kappa": "Steps between bases; flora-opt's name for update_proj_gap.",
    "scale": "Factor of the update of projected matrices: linear in GaLore, its square root in APOLLO.",
    "alpha": "Factor of the update of projected matrices, linear; fira's name for scale.",
    "proj_type": "Which side is compressed: std the shorter, reverse_std the longer, right the columns, left the rows, "
    "full both (GaLore).",
    "subspace": "Where a basis comes from: svd exact, randomized a range finder, power warm-started block power, "
    "gaussian seeded and never stored. null: power, with proj_type full svd.",
    "on_refresh": "The moments at a new basis: keep (as published), rotate (exp_avg expressed in the new one), reset.",
    "residual": "What is made of the gradient outside the subspace: code as the package, paper as Algorithm 1.",
    "scaling": "Fira's factor of the residual: one a line (column), or one a matrix.",
    "limiter": "Largest growth of the residual's norm from one step to the next; null: none.",
    "scale_type": "APOLLO's factor of the gradient: one a channel, or one a tensor.",
    "scale_front": "Apply sqrt(scale) before the growth limiter.",
    "disable_nl": "Leave APOLLO's growth limiter (1.01) out.",
    "clip_threshold": "Adafactor: an update with a larger root mean square is scaled down to it.",
    "decay_rate": "Adafactor: the second moment's decay at step t is 1 - t^decay_rate.",
    "beta1": "Decay of Adafactor's momentum; null: none. Flora keeps it in the subspace.",
    "scale_parameter": "Adafactor: the step is times max(eps[1], RMS of the weight).",
    "relative_step": "Adafactor's own step size min(1e-2, 1 / sqrt(t)). null: if lr is not given.",
    "warmup_init": "With relative_step: at most 1e-6 t.",
    "factorize_second_moment": "Keep a row's and a column's mean of a matrix' squared gradients in place of all.",
    "quantization": "Keep the momentum in 8 bits; flora-opt's name for moments.",
    "moments": "How exp_avg and exp_avg_sq are stored, those of parameters that are not projected too.",
    "projector_dtype": "How a basis is stored.",
    "min_8bit_size": "Matrices with fewer entries, all ranks' together, stay fp32.",
    "lazy_refresh": "Double a matrix' refresh interval each time its subspace has hardly moved.",
    "lazy_threshold": "What hardly means: mean stability of five refreshes, 1 for an unchanged subspace.",
    "clip_grad_norm": "lomo-optim's; refused.",
    "clip_grad_value": "lomo-optim's; refused.",
    "loss_scale": "lomo-optim's; refused.",
    "loss_scale_args": "lomo-optim's; refused.",
    "target_modules": "Parameters to project: substrings or regular expressions of their names. null: each with two or "
    "more dimensions, except embeddings and the output head.",
    "exclude": "Parameters that are not projected; wins over target_modules.",
    "matricize": "How a parameter of 3 or 4 dimensions becomes matrices: stack (a basis each), flatten (out x rest). "
    "auto: 3 stack, 4 flatten.",
    "oversample": "Random columns beside the r that a basis is chosen from (subspace randomized, power).",
    "cold_every": "Every so many refreshes start from random columns alone (subspace power).",
    "stagger": "Spread the refreshes of different matrices over the interval.",
    "projector_storage": "Where a basis lives: sharded over the ranks, replicated on each, seed (drawn again). null: "
    "what fits the subspace.",
    "seed": "Of random bases, sketches and rounding, which belong to (seed, parameter name, refresh or step).",
    "stochastic_rounding": "Round updates of bf16 weights without an fp32 copy up or down at random, right on average.",
    "compress_accumulation": "Sum micro-batches as coordinates (recipes that drop the residual).",
    "accumulation_compression_rank": "Sum micro-batches in a random sketch of this rank.",
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
        ValueError: an unknown name (with the nearest known one), one without a check, or a value out of range.
    """
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown option {name!r}{hint} Known options: {', '.join(known)}.")
        if name not in CHECKS:
            raise ValueError(
                f"{where}: option {name!r} is in its OPTIONS, and lowrank_ds.options.CHECKS has no check of it. "
                "Add one (docs/extend.md)."
            )
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
