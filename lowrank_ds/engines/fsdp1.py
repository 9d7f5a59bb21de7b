"""FSDP1 (`FullyShardedDataParallel`, `use_orig_params=True`): a parameter is a 1-D piece of its row-major entries.

The only file that touches FSDP1's private attributes. A unit's parameters are strung together, with padding between
them, and the string is cut into `world` equal parts; FSDP1 points each parameter's data at its part, which may begin
and end inside a row, or be empty. A parameter does not know its unit, so whoever sees the model records it (`record`,
called by `param_groups` and `divide_params`), weakly and without marking the parameter:

    unit._handle                       FlatParamHandle: `flat_param`, `process_group`, `uses_sharded_strategy`
    flat_param._params, _shapes        the original parameters (tied ones once) and their shapes
    flat_param._numels_with_padding    the lengths in the string; `_is_padding_mask` tells which of them are padding
    flat_param._sharded_size           the length of one part
    flat_param._shard_param_infos      this rank's own record, against which the computed cuts are checked

Run with torch 2.13, read in the sources of 2.6.0 and 2.14.1; versions outside `TESTED` are refused
(LOWRANK_DS_UNTESTED_TORCH=1 overrides), and so is a torch without these attributes. torch is patched in one place:
`FSDP.optim_state_dict` and its relatives, which would slice low-rank state as if it had the parameter's shape, refuse
our optimizers.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lowrank_ds.engines import tested
from lowrank_ds.engines.placement import Placement

TESTED = ((2, 6), (2, 15))  # from, below
_MODULE = "torch.distributed.fsdp.fully_sharded_data_parallel"
_HANDLE = ("flat_param", "process_group", "uses_sharded_strategy", "_use_orig_params")
_FLAT = ("_params", "_fqns", "_shapes", "_strides", "_numels_with_padding", "_is_padding_mask", "_sharded_size",
         "_shard_param_infos", "_param_extensions")  # fmt: skip
_GATHERERS = ("_optim_state_dict_impl", "_optim_state_dict_to_load_impl")  # every public one ends in one of these

_records: Any = WeakIdKeyDictionary()  # {parameter: (weak reference to its unit's handle, its place in the unit)}


# -- recording --------------------------------------------------------------------------------------------------------
def record(model: nn.Module) -> None:
    """Note which unit each FSDP1 parameter of `model` is in; does nothing (and imports nothing) without FSDP1.

    Raises:
        RuntimeError: `use_orig_params=False`, or a torch whose internals are not the tested ones.
    """
    module = sys.modules.get(_MODULE)
    units = module.FullyShardedDataParallel.fsdp_modules(model) if module is not None else []
    if not units:
        return
    check_version(torch.__version__)
    _guard(module.FullyShardedDataParallel)
    for handle in (_attribute(unit, "_handle") for unit in units):
        if handle is not None:  # None: all its parameters are in the units inside
            _record_unit(handle)


def _record_unit(handle: Any) -> None:
    for name in _HANDLE:
        _attribute(handle, name)
    for name in _FLAT:
        _attribute(handle.flat_param, name)
    if not handle._use_orig_params:
        check("this model", handle.flat_param)
    for place, param in enumerate(handle.flat_param._params):
        _records[param] = (weakref.ref(handle), place)


def check_version(version: str) -> None:
    """Raise RuntimeError for a torch whose private attributes were not tested."""
    tested.require(
        version, TESTED, "LOWRANK_DS_UNTESTED_TORCH",
        "torch {found} found; lowrank_ds reads FSDP1's internal layout, known for torch >= {low}, < {high}. Use "
        "FSDP2 (fully_shard) or one of these versions, or set LOWRANK_DS_UNTESTED_TORCH=1 and compare a few steps "
        "with one process first.",
    )  # fmt: skip


def _attribute(owner: Any, name: str) -> Any:
    """A private attribute that every tested torch has."""
    return tested.attribute(
        owner, name, f"torch {torch.__version__}: FSDP1 keeps other records than in the versions lowrank_ds was "
        "tested with ({missing}). Use FSDP2 (fully_shard), or torch 2.13.",
    )  # fmt: skip


# -- answering --------------------------------------------------------------------------------------------------------
def is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 has taken the parameter over."""
    return bool(getattr(param, "_fsdp_flattened", False))


def full_shape(param: Tensor) -> tuple[int, ...] | None:
    """The shape before FSDP1 flattened the parameter; None if there is no record of it."""
    handle, place = _recorded(param)
    return None if handle is None else tuple(handle.flat_param._shapes[place])


def _recorded(param: Tensor) -> tuple[Any, int]:
    """(the unit's handle, None if it is gone or was never recorded; the parameter's place in the unit)."""
    reference, place = _records.get(param, (lambda: None, -1))
    return reference(), place


def check(name: str, param: Tensor) -> None:
    """Raise RuntimeError for a parameter that FSDP1 has flattened and of which nothing more is known."""
    if getattr(param, "_is_flat_param", False):
        raise RuntimeError(
            f"{name}: FSDP1 has flattened {', '.join(getattr(param, '_fqns', ())[:3])}, ... into one tensor, which "
            "cannot be projected. Wrap with FullyShardedDataParallel(..., use_orig_params=True), or use FSDP2 "
            "(fully_shard)."
        )
    if is_flattened(param) and _recorded(param)[0] is None:
        raise RuntimeError(
            f"{name} is sharded by FSDP1, and its shape and place are only known to the model. Pass "
            "lowrank_ds.param_groups(model, rank=...), called after FullyShardedDataParallel(model, ...), to the "
            "optimizer instead of the parameters."
        )


def locate(host: Tensor, name: str) -> list[Placement]:
    """The parameter `name`, of which `host` is this rank's piece (NO_SHARD: the whole).

    Raises:
        RuntimeError: no record explains `host`, or its entries are not row-major ranges of one matrix.
    """
    check(name, host)
    handle, place = _recorded(host)
    flat = handle.flat_param
    if flat._params[place] is not host:
        raise RuntimeError(
            f"{name} is no longer the parameter that FSDP1 trains: it was replaced after the optimizer was built. "
            "Build the optimizer anew from lowrank_ds.param_groups(model, rank=...)."
        )
    shape = tuple(flat._shapes[place])
    if not handle.uses_sharded_strategy:
        return [Placement(name, shape, (0, host.numel()), 0, None, 0)]
    _check_order(name, flat, place)
    group = handle.process_group
    cuts, rank = cuts_of(flat, place, dist.get_world_size(group)), dist.get_rank(group)
    _check_cuts(name, flat._shard_param_infos[place], cuts, rank, host)
    return [Placement(name, shape, cuts, rank, group, 0, none_is_zero=True)]


def sharing_group(host: Tensor) -> Any:
    """The group of the ranks that hold the entries of the parameter of `host`, each once; None: all are here."""
    handle, _ = _recorded(host)
    return handle.process_group if handle.uses_sharded_strategy else None


def cuts_of(flat: Any, place: int, world: int) -> tuple[int, ...]:
    """world + 1 offsets that divide the entries of a unit's parameter number `place` among the ranks."""
    starts = list(itertools.accumulate(flat._numels_with_padding, initial=0))
    spans = [
        (start, numel)
        for start, numel, padding in zip(starts, flat._numels_with_padding, flat._is_padding_mask, strict=False)
        if not padding
    ]
    start, numel = spans[place]
    part = flat._sharded_size.numel()
    return (*(min(max(i * part - start, 0), numel) for i in range(world)), numel)


def _check_order(name: str, flat: Any, place: int) -> None:
    """FSDP1 strings entries together as they lie in memory: they must be the parameter's own, row by row."""
    if flat._param_extensions[place] is not None:
        raise RuntimeError(
            f"{name} was sharded by tensor parallelism before FSDP1 flattened it; the matrix cannot be found in its "
            "piece. Use FSDP2 (fully_shard)."
        )
    shape, strides = flat._shapes[place], flat._strides[place]
    row_major = torch.empty(shape, device="meta").stride()
    if any(size > 1 and ours != theirs for size, ours, theirs in zip(shape, row_major, strides, strict=True)):
        raise RuntimeError(
            f"{name} was not contiguous (strides {tuple(strides)}, channels_last or transposed) when FSDP1 flattened "
            "it, so a rank's piece is no range of rows. Make it contiguous before FullyShardedDataParallel(...)."
        )


def _check_cuts(name: str, info: Any, cuts: tuple[int, ...], rank: int, host: Tensor) -> None:
    """The cuts must agree with FSDP1's own record of this rank, and the tensor must be sharded now."""
    mine = (cuts[rank], cuts[rank + 1])
    theirs = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (mine[0], mine[0])
    if mine != theirs:
        raise RuntimeError(
            f"{name}: rank {rank} should hold entries {mine} but FSDP1 records {theirs}. torch {torch.__version__} "
            "cuts differently from the tested versions; use FSDP2 (fully_shard), or torch 2.13."
        )
    if host.numel() != mine[1] - mine[0]:
        raise RuntimeError(
            f"{name} has {host.numel()} entries now, its piece on this rank {mine[1] - mine[0]}. Call step() and "
            "init_state() outside FSDP.summon_full_params."
        )


# -- FSDP1's gathered optimizer state ---------------------------------------------------------------------------------
def _guard(fsdp: type) -> None:
    """Make FSDP1's functions that gather or scatter optimizer state refuse ours, on all ranks and with a reason."""
    for name in _GATHERERS:
        function = _attribute(fsdp, name)
        if not hasattr(function, "_refuses_low_rank"):
            setattr(fsdp, name, staticmethod(_guarded(function)))


def _guarded(function: Callable) -> Callable:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def guarded(*arguments: Any, **keywords: Any) -> Any:
        given = signature.bind(*arguments, **keywords).arguments
        groups = getattr(given.get("optim"), "param_groups", None)
        _refuse_ours((given.get("optim_state_dict") or {}).get("param_groups", ()) if groups is None else groups)
        return function(*arguments, **keywords)

    guarded._refuses_low_rank = True
    return guarded


def _refuse_ours(groups: Iterable[Mapping[str, Any]]) -> None:
    if any("matricize" in group for group in groups):  # an option only our optimizers have
        raise RuntimeError(
            "FSDP1's optim_state_dict, optim_state_dict_to_load and the like (torch.distributed.checkpoint's "
            "get/set_optimizer_state_dict call them) expect state of the parameter's shape, which low-rank state is "
            "not. Use lowrank_ds.save_checkpoint and load_checkpoint, for any engine and world size; or save "
            "optimizer.state_dict() on every rank to a file of its own, or use FSDP2 (fully_shard)."
        )
