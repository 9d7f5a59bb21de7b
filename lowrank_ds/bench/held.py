"""Bytes of optimizer state: what is held, by storage and wherever it hides, beside what the formula says."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ds.subspace import CAPTURED

_LEAVES = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.layout, type,
           types.ModuleType, types.FunctionType, types.BuiltinFunctionType, nn.Module)  # fmt: skip


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor that the optimizer keeps alive but weights and gradients: in `state`, and in objects beside it.

    Some packages keep their projector as an attribute of a Python object, where no count of `state` sees it.
    """
    given = [p for group in optimizer.param_groups for p in group["params"]]
    given += [p.grad for p in given if p.grad is not None]
    skipped = {t.untyped_storage()._cdata for t in given}
    found = {id(t): t for t in _walk([dict(optimizer.state), vars(optimizer)], set())}
    return [t for t in found.values() if t.untyped_storage()._cdata not in skipped]


def _walk(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, _LEAVES) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        parts: Any = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    else:
        slots = (getattr(value, name, None) for name in getattr(type(value), "__slots__", ()) if isinstance(name, str))
        parts = [*getattr(value, "__dict__", {}).values(), *slots]
    for part in parts:
        yield from _walk(part, seen)


def count(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """{"held", "logical", "counters"}, bytes.

    held: whole storages, each once, of tensors with more than one entry: what the memory is short of. logical: the
    entries of these tensors; less than held where a view keeps a larger storage alive. counters: storages of 0-d
    tensors (steps, limiters' norms), which no formula counts.
    """
    found = tensors(optimizer)
    arrays, scalars = [t for t in found if t.numel() > 1], [t for t in found if t.numel() <= 1]
    entries = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t.nbytes for t in arrays}
    return {"held": _storages(arrays), "logical": sum(entries.values()), "counters": _storages(scalars)}


def _storages(found: list[Tensor]) -> int:
    return sum({s._cdata: s.nbytes() for t in found for s in [t.untyped_storage()]}.values())


def formula(name: str, shape: tuple[int, int], rank: int, itemsize: int) -> int | None:
    """Bytes of state of one m x n matrix; None for the packages, whose state is theirs to say.

    With d = min(m, n), the side that `proj_type="std"` compresses, and l = max(m, n), all in fp32: GaLore and Fira
    keep the basis d r, two moments l r and the three shares that block power looks at; APOLLO the moments only (its
    basis is drawn from a seed); Flora one momentum l r and the factored second moment m + n. torch's AdamW keeps two
    arrays of the weights' dtype.
    """
    lines, compressed = max(shape), min(shape)
    if name.startswith("torch AdamW"):
        return 2 * lines * compressed * itemsize
    family = name.split()[0]
    rank = min(rank, compressed)
    if family in ("GaLoreAdamW", "FiraAdamW"):
        return 4 * (rank * (compressed + 2 * lines) + CAPTURED)
    if family in ("ApolloAdamW", "ApolloMini"):
        return 4 * (1 if family == "ApolloMini" else rank) * 2 * lines
    return 4 * (rank * lines + sum(shape)) if family == "Flora" else None


def check(name: str, held: int, expected: int | None) -> None:
    """Raise RuntimeError if an optimizer of ours holds other bytes than the formula says."""
    if expected is not None and not name.startswith("torch") and held != expected:
        raise RuntimeError(
            f"{name} holds {held} bytes of state, the formula says {expected}: something beside the moments and the "
            "basis is kept alive (a view of something larger, a cache), or the formula (lowrank_ds/bench/held.py) is "
            "no longer true."
        )
