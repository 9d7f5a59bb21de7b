"""DeepSpeed ZeRO-1/2/3: the optimizer is handed 1-D fp32 partitions that hold pieces of many parameters.

The only file that touches DeepSpeed's private attributes. They are read off the parameters the optimizer was built
with, so nothing in DeepSpeed is patched and DeepSpeed is never imported here:

    stage 1, 2   a parameter is a view of its group's flat buffer; that buffer is cut into `world` equal partitions.
                 Its storage offset is therefore its place (`_hp_mapping` is wrong under `round_robin_gradients`).
                 Process group: `_dp_group`.
    stage 3      each parameter is cut into `world` pieces of ceil(numel / world); `_z3_optimizer` knows the
                 sub-groups (`fp32_partitioned_groups_flat`, `fp16_groups`) and offsets (`grad_position`).

Tested with DeepSpeed 0.19.8; versions outside `TESTED` are refused (LOWRANK_DS_UNTESTED_DEEPSPEED=1 overrides).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lowrank_ds.engines import tested
from lowrank_ds.engines.placement import Placement

TESTED = ((0, 19), (0, 20))  # from, below


def full_shape(param: Tensor) -> tuple[int, ...]:
    """The unpartitioned shape: ZeRO-3 leaves `param.shape` == (0,)."""
    return tuple(getattr(param, "ds_shape", param.shape))


def is_partitioned(param: Tensor | None) -> bool:
    """Whether DeepSpeed has taken the parameter over (any stage)."""
    return param is not None and (hasattr(param, "ds_id") or hasattr(param, "_dp_group"))


def name_of(param: Tensor) -> str | None:
    """The name `deepspeed.initialize` recorded before it builds an optimizer from the ds_config; None if unknown."""
    debug = sys.modules.get("deepspeed.utils.debug")
    name = debug.debug_param2name(param) if debug is not None else "unknown"
    return None if name == "unknown" else name


def model() -> Any:
    """The model whose optimizer `deepspeed.initialize` is building (or built last); None if there is none.

    It recorded the names of all modules, the model itself first. (`WeakIdNameMap` knows its keys by id only, and keeps
    them in its finalizers.)
    """
    debug = sys.modules.get("deepspeed.utils.debug")
    known = getattr(debug, "module_names", {})
    if isinstance(known, dict):
        return next(iter(known), None)
    first = next(iter(known._finalizers.values()), None)
    entry = None if first is None else first.peek()
    return None if entry is None else entry[0]


def allow(cls: type) -> None:
    """Make ZeRO accept `cls` without `zero_allow_untested_optimizer` (called when an optimizer is built)."""
    utils = sys.modules.get("deepspeed.runtime.zero.utils")
    if utils is not None and cls not in utils.ZERO_SUPPORTED_OPTIMIZERS:
        utils.ZERO_SUPPORTED_OPTIMIZERS.append(cls)


def check_version(version: str) -> None:
    """Raise RuntimeError for a DeepSpeed whose private attributes were not tested."""
    tested.require(
        version, TESTED, "LOWRANK_DS_UNTESTED_DEEPSPEED",
        "DeepSpeed {found} found; lowrank_ds reads ZeRO's internal layout and was tested with >= {low}, < {high}. "
        "Install one of these (pip install 'deepspeed>={low},<{high}'), or set LOWRANK_DS_UNTESTED_DEEPSPEED=1 and "
        "compare a few steps with one process first.",
    )  # fmt: skip


def locate(host: Tensor, members: Sequence[tuple[str, Tensor | None]]) -> list[Placement]:
    """The pieces of parameters that the partition `host` holds.

    Args:
        members: (name, original parameter or None if it is gone) of the param group that `host` belongs to.

    Raises:
        RuntimeError: no ZeRO record explains `host`, or the DeepSpeed version is not tested.
    """
    if "deepspeed" in sys.modules:
        check_version(sys.modules["deepspeed"].__version__)
    trained = [(name, p) for name, p in members if p is not None and p.requires_grad and _numel(p)]
    if any(hasattr(p, "_z3_optimizer") for _, p in trained):
        return _stage3(host, trained)
    if any(hasattr(p, "_dp_group") for _, p in trained):
        return _stage12(host, trained)
    names = ", ".join(name for name, _ in members[:3]) or "none"
    raise RuntimeError(
        f"a tensor of shape {tuple(host.shape)} in param_groups is neither a parameter the optimizer was built with "
        f"nor a DeepSpeed ZeRO-1/2/3 partition (parameters of its group: {names}...). If an engine replaced the "
        "parameters, build the optimizer after the engine, or let the ds_config name it."
    )


def sharing_group(param: Tensor) -> Any:
    """The group of the ranks whose ZeRO partitions together hold the parameter `param`, each entry once."""
    return getattr(param, "_dp_group", None) or getattr(param, "ds_process_group", None)


def _numel(param: Tensor) -> int:
    return getattr(param, "ds_numel", param.numel())


def _clamped(cuts: list[int], start: int, numel: int) -> tuple[int, ...]:
    return (*(min(max(cut - start, 0), numel) for cut in cuts[:-1]), numel)


def _stage12(host: Tensor, members: list[tuple[str, Tensor]]) -> list[Placement]:
    group = next(p._dp_group for _, p in members if hasattr(p, "_dp_group"))
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    cuts = [i * host.numel() for i in range(world + 1)]
    storages = {p.untyped_storage().data_ptr() for _, p in members}
    if len(storages) != 1:
        raise RuntimeError(
            f"ZeRO-1/2: the parameters of one group lie in {len(storages)} buffers instead of one flat buffer "
            f"(first: {members[0][0]}). Were states offloaded, or parameters moved, after initialize()?"
        )
    base = min(p.storage_offset() for _, p in members)
    placements = []
    for name, p in sorted(members, key=lambda item: item[1].storage_offset()):
        start = p.storage_offset() - base
        mine = _clamped(cuts, start, p.numel())
        placements.append(Placement(name, tuple(p.shape), mine, rank, group, start + mine[rank] - cuts[rank]))
    return placements


def _stage3(host: Tensor, members: list[tuple[str, Tensor]]) -> list[Placement]:
    names = {id(p): name for name, p in members}
    zero: Any = next(p._z3_optimizer for _, p in members if hasattr(p, "_z3_optimizer"))
    if getattr(zero, "swap_optimizer", False):
        raise RuntimeError(
            "zero_optimization.offload_optimizer.device is nvme: DeepSpeed's swapper expects state of the partition's "
            "size, which low-rank state is not. Use device cpu."
        )
    index = next((i for i, flat in enumerate(zero.fp32_partitioned_groups_flat) if flat is host), None)
    if index is None:
        raise RuntimeError(
            f"ZeRO-3: a tensor of shape {tuple(host.shape)} in param_groups is not one of DeepSpeed's fp32 sub-groups "
            "(super-offload keeps other copies and is not supported). Is an optimizer of another engine being stepped?"
        )
    placements = []
    for p in zero.fp16_groups[index]:
        _, offset, size = zero.grad_position[zero.get_param_id(p)]
        group = p.ds_process_group
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        cuts = _clamped([i * size for i in range(world + 1)], 0, p.ds_numel)
        placements.append(Placement(names[id(p)], tuple(p.ds_shape), cuts, rank, group, offset))
    return placements
