"""Which parameters are projected: names, patterns, shapes.

Names key everything that must not depend on sharding or order: selection, randomness, state. They come from
(name, tensor) pairs, a group's `param_names`, DeepSpeed's own record, or, for bare tensors, the position.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from lowrank_ds import engines

# Parameters whose rows are tokens: their gradients are sparse in rows, and the papers leave them to plain Adam.
DEFAULT_EXCLUDE = (
    r"(^|\.)embed\w*(\.|$)",
    r"(^|\.)\w*(embeddings?|_emb)(\.|$)",
    r"(^|\.)(wte|wpe|lm_head|shared)(\.|$)",
)
_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


def canonical(name: str) -> str:
    """The name without what DDP, torch.compile, FSDP and checkpoint wrappers insert."""
    previous = None
    while previous != name:
        previous, name = name, _WRAPPERS.sub(r"\1", name).lstrip(".").replace("..", ".")
    return name


def matrices(shape: Sequence[int], matricize: str) -> tuple[int, int, int]:
    """(count, m, n): a parameter's row-major entries as `count` matrices of m x n.

    2-D: one matrix. 3-D: a stack of matrices with a basis each (experts), or with matricize="flatten" one matrix
    (d0, d1*d2). 4-D and more (convolutions): one matrix (d0, rest), or with "stack" d0*d1*... matrices of the last two.
    """
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    stacked = matricize == "stack" or (matricize == "auto" and len(shape) == 3)
    if stacked:
        return math.prod(shape[:-2]), shape[-2], shape[-1]
    return 1, shape[0], math.prod(shape[1:])


def prepare_group(group: dict[str, Any], index: int) -> dict[str, Any]:
    """A copy of `group` with a list of tensors in "params" and their names in "param_names".

    Raises:
        TypeError: an element is neither a tensor nor a (name, tensor) pair.
        ValueError: names and tensors do not match, or a tensor is not real floating point.
    """
    params = group["params"]
    items = [params] if isinstance(params, Tensor) else list(params)
    names, tensors = list(group.get("param_names") or [None] * len(items)), []
    if len(names) != len(items):
        raise ValueError(f"param group {index}: {len(names)} param_names for {len(items)} params.")
    for i, item in enumerate(items):
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            names[i], item = item
        if not isinstance(item, Tensor):
            raise TypeError(
                f"param group {index}: expected tensors or (name, tensor) pairs, got {type(item).__name__}."
            )
        if not item.is_floating_point():
            raise ValueError(
                f"param group {index}: {names[i] or f'tensor {i}'} is {item.dtype}; only real floats train."
            )
        names[i] = canonical(names[i] or engines.name_of(item) or f"group{index}.param{i}")
        engines.check(names[i], item)
        tensors.append(item)
    return {**group, "params": tensors, "param_names": names}


def is_positional(name: str) -> bool:
    """Whether the name is only a position, because none was given."""
    return re.fullmatch(r"group\d+\.param\d+", name) is not None


def select(
    named: Sequence[tuple[str, Tensor]],
    target_modules: Sequence[str] | None,
    exclude: Sequence[str] | None,
    tokens: Iterable[str] = (),
    required: bool = True,
) -> list[str]:
    """Names of the parameters to project: at least 2-D, matched by a target, not excluded.

    Args:
        named: (name, tensor) of every parameter.
        target_modules: substrings or regular expressions, searched in the full name; None: every parameter with at
            least two dimensions but embeddings and lm_head (`DEFAULT_EXCLUDE`).
        exclude: patterns that win over targets.

    Raises:
        ValueError: a pattern matches no parameter, or nothing is left to project, or names are needed but unknown.
    """
    if any(is_positional(name) for name, _ in named):
        raise ValueError(
            "parameter names are unknown, so embeddings and lm_head cannot be told from the matrices to project. Pass "
            "model.named_parameters(), lowrank_ds.param_groups(model, rank=...), or groups that carry 'rank'."
        )
    for option, patterns in (("target_modules", target_modules), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(re.search(pattern, name) for name, _ in named):
                sample = ", ".join(name for name, _ in named[:8])
                raise ValueError(f"{option}: {pattern!r} matches no parameter. Names look like: {sample} ...")
    tokens = set(tokens)
    refused = tuple(exclude or ()) + (DEFAULT_EXCLUDE if target_modules is None else ())
    chosen = [
        name
        for name, p in named
        if len(engines.full_shape(p)) >= 2
        and (target_modules is None or any(re.search(t, name) for t in target_modules))
        and not any(re.search(x, name) for x in refused)
        and (target_modules is not None or name not in tokens)
    ]
    if not chosen and required:
        raise ValueError(
            f"nothing to project: of {len(named)} parameters none with two or more dimensions is matched by "
            f"target_modules={target_modules} and not excluded. Set rank=None to train without projection."
        )
    return chosen


def check_rank(name: str, shape: Sequence[int], rank: int, matricize: str) -> None:
    """Raise ValueError if the parameter cannot be projected to `rank`, naming it and the way out."""
    if len(shape) < 2:
        raise ValueError(
            f"{name} has shape {tuple(shape)} and is in a group with 'rank', but only parameters with two or more "
            "dimensions can be projected. Put it into a group without 'rank' (lowrank_ds.param_groups does). If it "
            "was 2-D, an engine flattened it first: see docs/engines.md."
        )
    _, m, n = matrices(shape, matricize)
    if rank > min(m, n):
        raise ValueError(
            f"rank {rank} is larger than min(m, n) = {min(m, n)} of {name}, a {m} x {n} matrix (shape {tuple(shape)}). "
            "Lower rank, or leave it out with exclude=[...] or target_modules=[...]."
        )


def param_groups(
    model: nn.Module,
    rank: int,
    target_modules: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Two groups for any optimizer of this package: matrices to project (with `rank`) and everything else.

    Args:
        model: any module, before or after wrapping; frozen parameters are left out.
        rank: subspace dimension r.
        target_modules: substrings or regular expressions of parameter names; default every weight with at least two
            dimensions except embeddings and the output head.
        exclude: patterns that are never projected.
        **options: put into the projected group (`update_proj_gap`, `scale`, ...).

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to project.
    """
    engines.record(model)
    named = [(canonical(n), p) for n, p in model.named_parameters() if p.requires_grad]
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tokens = {id(m.weight) for m in [*tables, head] if m is not None}
    chosen = set(select(named, target_modules, exclude, [n for n, p in named if id(p) in tokens]))
    return [_group(named, chosen, True) | {"rank": rank, **options}, _group(named, chosen, False)]


def divide_params(
    model: nn.Module,
    target_modules_list: Sequence[str] = ("attn", "mlp"),
    rank: int = 8,
    update_proj_gap: int = 200,
    alpha: float = 1.0,
    proj_type: str = "std",
) -> list[dict[str, Any]]:
    """fira.divide_params: the plain group first, then the weights of `nn.Linear` modules whose name has a target.

    Unlike the package it skips frozen parameters and raises ValueError when a target matches nothing.
    """
    engines.record(model)
    linear = {f"{canonical(n)}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    named = [(canonical(n), p) for n, p in model.named_parameters() if p.requires_grad]
    targets = [re.escape(t) for t in target_modules_list]
    chosen = set(select([(n, p) for n, p in named if n in linear], targets, None))
    options = {"rank": rank, "update_proj_gap": update_proj_gap, "alpha": alpha, "proj_type": proj_type}
    return [_group(named, chosen, False), _group(named, chosen, True) | options]


def _group(named: Iterable[tuple[str, Tensor]], chosen: set[str], inside: bool) -> dict[str, Any]:
    kept = [(n, p) for n, p in named if (n in chosen) == inside]
    return {"params": [p for _, p in kept], "param_names": [n for n, _ in kept]}
