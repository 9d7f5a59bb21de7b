"""DeepSpeed ZeRO-3, layer-wise: parameters are partitioned by DeepSpeed, their gradients reduced and used at once.

Here an optimizer works on the model's own parameters (under ordinary ZeRO-3 it is handed fp32 copies: `deepspeed.py`).
A rank's piece of a parameter is `ds_tensor`: ceil(numel / world) entries, of which the last ones may be padding.
Nothing here imports DeepSpeed; what takes the place of its optimizer is in `zero3_engine.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_ds import collectives
from lowrank_ds.engines.placement import Placement

_PIECE = "_lowrank_ds_piece"  # attribute of a parameter whose gradient arrives piece by piece


@dataclass
class Piece:
    """What this rank keeps of one parameter's gradient.

    wire: dtype in which gradients are summed over ranks. kept: dtype in which micro-batches are summed here.
    grad: this rank's entries (numel here,) of the averaged gradient; None: not there.
    """

    wire: torch.dtype
    kept: torch.dtype
    grad: Tensor | None = None


# -- what is where ----------------------------------------------------------------------------------------------------
def is_host(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter that ZeRO-3 has partitioned."""
    return getattr(tensor, "ds_tensor", None) is not None


def _held(host: Tensor) -> tuple[int, int]:
    """The row-major entries [from, to) of the parameter that this rank holds."""
    size, rank = host.ds_tensor.numel(), dist.get_rank(host.ds_process_group)
    return min(rank * size, host.ds_numel), min((rank + 1) * size, host.ds_numel)


def locate(host: Tensor, name: str) -> list[Placement]:
    """This rank's range of the parameter `name`.

    Raises:
        RuntimeError: the parameter is on NVMe.
    """
    if getattr(host, "nvme_swapper", None) is not None:
        raise RuntimeError(
            f"{name} is on NVMe (zero_optimization.offload_param.device), where its entries cannot be read. Use device "
            "cpu."
        )
    group, size, numel = host.ds_process_group, host.ds_tensor.numel(), host.ds_numel
    world = dist.get_world_size(group)
    cuts = (*(min(i * size, numel) for i in range(world)), numel)
    return [Placement(name, tuple(host.ds_shape), cuts, dist.get_rank(group), group, 0)]


def local(host: Tensor) -> Tensor:
    """This rank's entries (numel here,) of the weight, without the padding; shares memory with DeepSpeed's piece."""
    first, end = _held(host)
    return host.ds_tensor.data[: end - first]


def version(host: Tensor) -> int:
    """How often this rank's piece was changed in place."""
    return host.ds_tensor._version


# -- gradients --------------------------------------------------------------------------------------------------------
def prepare(host: Tensor, wire: torch.dtype | None, kept: torch.dtype | None) -> None:
    """Let the gradients of `host` arrive piece by piece. Dtypes: see `Piece`; None: the wire's, the parameter's."""
    setattr(host, _PIECE, Piece(wire or host.dtype, kept or wire or host.dtype))


def release(host: Tensor) -> None:
    """Undo `prepare`."""
    if hasattr(host, _PIECE):
        delattr(host, _PIECE)


def _piece(host: Tensor) -> Piece:
    piece = getattr(host, _PIECE, None)
    if piece is None:
        raise RuntimeError(
            f"a parameter of shape {tuple(host.ds_shape)} is partitioned by ZeRO-3 (or deepspeed.zero.Init), and its "
            "gradient does not reach this optimizer. Hand the optimizer to deepspeed.initialize (or name it in the "
            "ds_config), or, for layer-wise updates, call lowrank_ds.layerwise(engine, optimizer) with the engine that "
            "deepspeed.initialize returned without an optimizer."
        )
    return piece


def has_grad(host: Tensor) -> bool:
    """Whether this rank has its piece of the averaged gradient.

    Raises:
        RuntimeError: `host` trains, but nothing delivers its gradients (see `prepare`).
    """
    return (hasattr(host, _PIECE) or host.requires_grad) and _piece(host).grad is not None


def local_grad(host: Tensor) -> Tensor | None:
    """This rank's entries (numel here,) of the averaged gradient; None: not there."""
    return _piece(host).grad


def drop_grad(host: Tensor) -> None:
    """Free this rank's piece of the gradient."""
    if hasattr(host, _PIECE):
        _piece(host).grad = None


def on_gradient(host: Tensor, callback: Callable[[Tensor], None]) -> Any:
    """Call `callback(host)` in each backward, once the averaged gradient's piece is there and the whole one freed.

    All ranks must reach the same parameters in the same order, as for ZeRO-3 itself. Returns a handle with `remove()`.
    """
    _piece(host)

    @torch.no_grad()
    def arrived(param: Tensor) -> None:
        _take(param)
        callback(param)

    return _Hook(host.register_post_accumulate_grad_hook(arrived), host)


@dataclass
class _Hook:
    """What takes the gradients of `host`; without it they arrive nowhere, and `_piece` says so."""

    handle: Any
    host: Tensor

    def remove(self) -> None:
        """Take it off."""
        self.handle.remove()
        release(self.host)


def _take(host: Tensor) -> None:
    """Average the whole gradient over the ranks, keep this rank's entries (added to those there), free the rest."""
    piece, (first, end) = _piece(host), _held(host)
    whole, host.grad = host.grad.reshape(-1).to(piece.wire), None
    missing = host.ds_tensor.numel() * dist.get_world_size(host.ds_process_group) - whole.numel()
    if missing:
        whole = torch.cat([whole, whole.new_zeros(missing)])
    what = f"the gradient of a parameter of shape {tuple(host.ds_shape)}"
    mine = collectives.mean_scattered(whole, host.ds_process_group, what)[: end - first].to(piece.kept)
    piece.grad = mine if piece.grad is None else piece.grad.add_(mine)


# -- a ds_config that asks for it -------------------------------------------------------------------------------------
_Start = Callable[[Any], None]
_waiting: weakref.WeakKeyDictionary[Any, _Start] = weakref.WeakKeyDictionary()


def wants(options: Any) -> dict[str, Any] | None:
    """The arguments of `layerwise()` that an optimizer's option `layerwise` stands for; None: not wanted.

    Raises:
        ValueError: neither true, false nor a mapping.
    """
    if options is None or options is False:
        return None
    if options is True:
        return {}
    if isinstance(options, Mapping):
        return dict(options)
    raise ValueError(
        f'layerwise must be true, false, or arguments of lowrank_ds.layerwise() such as {{"clip": ..., '
        f'"max_grad_norm": 1.0}}; got {options!r}.'
    )


def expect(optimizer: Any, known: bool, start: _Start) -> None:
    """`optimizer` was built with layerwise=True: `start(engine)` when deepspeed.initialize hands it to an engine.

    Args:
        known: whether deepspeed.initialize is building it (it recorded the parameters' names).

    Raises:
        ValueError: it is not, so nothing would ever start.
    """
    name = type(optimizer).__name__
    if not known:
        raise ValueError(
            f"{name}: layerwise=True is for a ds_config, where deepspeed.initialize builds the optimizer. In Python, "
            f"leave it out and call lowrank_ds.layerwise(model, optimizer) after sharding the model (DeepSpeed ZeRO-3: "
            "lowrank_ds.layerwise(engine, optimizer))."
        )
    from lowrank_ds.engines import zero3_engine

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            f"{name} was built with layerwise=True, but deepspeed.initialize did not take it over. Name it in the "
            "ds_config, with zero_optimization.stage 3; in Python call lowrank_ds.layerwise(engine, optimizer)."
        )

    hook = optimizer.register_step_pre_hook(refuse)

    def begin(engine: Any) -> None:
        hook.remove()
        start(engine)

    _waiting[optimizer] = begin
    zero3_engine.watch_initialize(_waiting)


def attach(target: Any, optimizer: Any, accumulation_steps: int) -> int:
    """Make `optimizer` the optimizer of a DeepSpeed engine that updates in the backward; called once by `layerwise()`.

    Args:
        target: the engine that deepspeed.initialize returned, ZeRO stage 3, built without an optimizer.
        accumulation_steps: what the caller asked for; 1 means the engine's own gradient_accumulation_steps.

    Returns:
        How many micro-batches make a step.

    Raises:
        RuntimeError: a setting that layer-wise updates cannot honour, naming it and what to do.
    """
    if not hasattr(target, "zero_optimization_stage"):
        raise RuntimeError(
            "the model's parameters belong to a DeepSpeed engine: call lowrank_ds.layerwise(engine, optimizer) with "
            "what deepspeed.initialize returned, not with the model."
        )
    from lowrank_ds.engines import zero3_engine

    return zero3_engine.attach(target, optimizer, accumulation_steps)
