"""Param groups of a checkpoint against the optimizer's own, which may be divided otherwise (another engine's way)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lowrank_ds.checkpoint.agree import CheckpointError
from lowrank_ds.checkpoint.format import Manifest
from lowrank_ds.optimizer import LowRankOptimizer
from lowrank_ds.slots import state_names

_WEIGHTS_ONLY = "To take the weights alone and let the optimizer start anew, pass optimizer_state=False."

# Options without meaning for parameters that are not projected: groups of those may differ in them.
_PROJECTION = {
    "rank", "update_proj_gap", "kappa", "scale", "alpha", "proj_type", "subspace", "on_refresh", "residual", "scaling",
    "scale_type", "limiter", "scale_front", "disable_nl", "matricize", "oversample", "cold_every", "stagger",
    "projector_dtype", "projector_storage", "lazy_refresh", "lazy_threshold", "compress_accumulation",
    "accumulation_compression_rank",
}  # fmt: skip
_SELECTION = {"params", "param_names", "target_modules", "exclude", "name"}  # how groups came to be, not what they do


def checked_groups(saved: Manifest, optimizer: LowRankOptimizer) -> list[dict[str, Any]]:
    """The optimizer's param groups (without "params") with the saved hyper-parameters.

    Raises:
        CheckpointError: another algorithm, other parameters, or options that give the state another meaning.
    """
    ours = type(optimizer).__name__
    if saved.algorithm is None:
        raise CheckpointError(f"it has weights only, no optimizer state for {ours}. {_WEIGHTS_ONLY}")
    if saved.algorithm != ours:
        raise CheckpointError(
            f"it was saved with {saved.algorithm}, whose state means nothing to {ours}. {_WEIGHTS_ONLY}"
        )
    theirs = {name: group for group in saved.groups for name in group["param_names"]}
    names = {name for group in optimizer.param_groups for name in trained_names(optimizer, group)}
    _same_names(set(theirs), names, "trained", ours)
    _same_names(set(saved.projected), names & optimizer._projected, "projected", ours)
    return [_merged(i, group, theirs, optimizer) for i, group in enumerate(optimizer.param_groups)]


def trained_names(optimizer: LowRankOptimizer, group: Mapping[str, Any]) -> list[str]:
    """Names of a group's parameters that are not frozen."""
    names, tensors = group["param_names"], group["params"]
    if len(tensors) != len(names):  # ZeRO-1/2/3: partitions
        tensors = [optimizer._originals[name]() for name in names]
    return [name for name, p in zip(names, tensors, strict=True) if p is None or p.requires_grad]


def _same_names(theirs: Iterable[str], ours: Iterable[str], what: str, algorithm: str) -> None:
    for one, other, where in ((theirs, ours, "the checkpoint"), (ours, theirs, f"this {algorithm}")):
        only = sorted(set(one) - set(other))
        if only:
            raise CheckpointError(
                f"{only[0]} is {what} in {where} only (and {len(only) - 1} more). Build the optimizer with the same "
                f"named parameters and options. {_WEIGHTS_ONLY}"
            )


def _merged(
    index: int, group: Mapping[str, Any], saved: Mapping[str, Mapping[str, Any]], optimizer: LowRankOptimizer
) -> dict[str, Any]:
    """One group of ours with the options its parameters were saved with."""
    names = trained_names(optimizer, group)
    projected = [name for name in names if name in optimizer._projected]
    if not names:
        return {k: v for k, v in group.items() if k != "params"}
    found: dict[str, Any] = {}
    for option in sorted({key for name in names for key in saved[name]} - _SELECTION):
        asked = (projected or names[:1]) if option in _PROJECTION else names
        values = {repr(saved[name].get(option)): name for name in asked}
        if len(values) > 1:
            one, other = list(values.items())[:2]
            raise CheckpointError(
                f"{option} was saved as {one[0]} for {one[1]} and {other[0]} for {other[1]}, which are in one param "
                "group now. Build the optimizer with the param groups it was saved with."
            )
        if option in _PROJECTION and not projected:
            continue
        found[option] = _like(group.get(option), saved[asked[0]].get(option))
    try:
        new = optimizer._loaded_group(index, group, found)
    except ValueError as error:
        raise CheckpointError(f"{(projected or names)[0]}: {error} {_WEIGHTS_ONLY}") from error
    _check_meaning((projected or names)[0], group, new, optimizer)
    return new


def _like(ours: Any, saved: Any) -> Any:
    """JSON knows no tuples."""
    return tuple(saved) if isinstance(ours, tuple) and isinstance(saved, list) else saved


def _check_meaning(name: str, ours: Mapping[str, Any], new: Mapping[str, Any], optimizer: LowRankOptimizer) -> None:
    """Options that say what state there is must be the same: the state was already made by ours."""
    if state_names(optimizer.recipe(ours)) == state_names(optimizer.recipe(new)):
        return
    other = sorted(k for k in new if k in ours and k not in _SELECTION and new[k] != ours[k])
    raise CheckpointError(
        f"{name}: it was saved with {', '.join(f'{k}={new[k]!r}' for k in other)}, this optimizer was built with "
        f"{', '.join(f'{k}={ours[k]!r}' for k in other)}: other state. Build it as it was saved. {_WEIGHTS_ONLY}"
    )


def take(optimizer: LowRankOptimizer, groups: list[dict[str, Any]]) -> None:
    """Put checked groups in place; each keeps its tensors."""
    for group, new in zip(optimizer.param_groups, groups, strict=True):
        group.update(new)
