"""`Int8Weight`: a matrix kept as int8 codes and scales that autograd, FSDP2 and optimizers take for a float one.

`torch.nn.functional.linear` multiplies by the dequantised matrix and keeps only the codes for the backward. Everything
that reads the weight sees the dequantised matrix; what changes it in place is `copy_` and this package's optimizers.
Rows can be cut (FSDP2), columns cannot. Tested with torch 2.13.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lowrank_ds import int8_codes

_WAY_OUT = (
    "An int8 weight trains in one process, or under FSDP2 (fully_shard) or replicate(), which cut rows, with an "
    "optimizer of lowrank_ds. DDP, FSDP1, DeepSpeed ZeRO and tensor parallelism flatten it or cut its columns: leave "
    "int8_weights() out there. Multiply by it with torch.nn.functional.linear; as a plain tensor: weight.dequantize()."
)


class Int8Weight(Tensor):
    """A matrix (m, n) of int8 codes with an fp32 scale for each `block` columns of a row.

    Args:
        codes: (m, n) int8.
        scales: (m, ceil(n / block)) fp32.
        block: columns that share a scale.
        dtype: what the matrix looks like from outside: the dtype of its gradient.
        label: the name of the parameter, for messages.
        total: rows of the whole matrix, of which these are a rank's; default all.

    Attributes: all of these.
    """

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, block: int, dtype: torch.dtype, label: str, total: int | None = None
    ) -> Int8Weight:
        """See the class."""
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(
        self, codes: Tensor, scales: Tensor, block: int, dtype: torch.dtype, label: str, total: int | None = None
    ) -> None:
        self.codes, self.scales, self.block, self.label = codes, scales, block, label
        self.total = codes.shape[0] if total is None else total

    @classmethod
    def quantize(cls, weight: Tensor, block: int, label: str) -> Int8Weight:
        """`weight` (m, n) rounded to the nearest codes."""
        m, n = weight.shape
        codes = torch.empty(m, n, dtype=torch.int8, device=weight.device)
        scales = torch.zeros(m, int8_codes.blocks(n, block), dtype=torch.float32, device=weight.device)
        int8_codes.encode_(codes, scales, block, weight.detach())
        return cls(codes, scales, block, weight.dtype, label)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (m, n) as a plain tensor, in its own dtype or `dtype`."""
        return int8_codes.decode(self.codes, self.scales, self.block, dtype or self.dtype)

    def read_rows(self, rows: slice) -> Tensor:
        """Rows of the matrix, fp32 (rows, n), a copy."""
        return int8_codes.decode(self.codes[rows], self.scales[rows], self.block, torch.float32)

    def write_rows(self, rows: slice, values: Tensor, key: tuple | None, first: int, stride: int) -> None:
        """Replace rows by `values` (rows, n), rounded as `int8_codes.encode_` says."""
        int8_codes.encode_(self.codes[rows], self.scales[rows], self.block, values, key, first, stride)
        torch.autograd.graph.increment_version(self)  # as any in-place change: a backward that saved it must not go on

    @property
    def held_bytes(self) -> int:
        """Bytes of the codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def like(self, codes: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> Int8Weight:
        """Other codes and scales of the same parameter."""
        return Int8Weight(codes, scales, self.block, dtype or self.dtype, self.label, self.total)

    def _set_data(self, value: Tensor) -> None:
        """`weight.data = value`, which `Module.to` does; ZeRO would make it a piece of its buffer."""
        if not isinstance(value, Int8Weight):
            _refuse(self, f"its data cannot become a plain tensor of shape {tuple(value.shape)}")
        with torch._C.DisableTorchFunctionSubclass():
            Tensor.data.__set__(self, value)
        self.codes, self.scales, self.block, self.total = value.codes, value.scales, value.block, value.total

    def __deepcopy__(self, memo: dict) -> Int8Weight:
        copied = _rebuild(*copy.deepcopy(self._parts(), memo))
        copied.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, self._parts()

    def _parts(self) -> tuple:
        is_param = getattr(self, "_is_param", False)
        return self.codes, self.scales, self.block, self.dtype, self.label, self.total, self.requires_grad, is_param

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Int8Weight({self.label}, shape={tuple(self.shape)}, dtype={self.dtype}, block={self.block})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """`linear` with codes for a weight, and `weight.data = ...`; the rest goes its usual way."""
        if func is linear:
            return _linear(*args, **(kwargs or {}))
        if func == Tensor.data.__set__:  # a new object at each look
            return args[0]._set_data(args[1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """See `_OPERATORS`; what only reads gets the dequantised matrix.

        Raises:
            RuntimeError: an operator that flattens the matrix, cuts its columns or writes into it.
        """
        kwargs = kwargs or {}
        weights = _weights((args, kwargs))
        own = _OPERATORS.get(func)
        flat = any(w.dim() != 2 for w in weights)
        if own is not None and not (flat and func not in _ON_FLAT):
            return own(func, *args, **kwargs)
        if flat or func in _REFUSED or any(x.alias_info for x in (*func._schema.arguments, *func._schema.returns)):
            raise RuntimeError(f"{weights[0].label} is an int8 weight, which {func} cannot work on. {_WAY_OUT}")
        return func(*_dense(args), **_dense(kwargs))

    # -- FSDP2 --------------------------------------------------------------------------------------------------------
    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        """What this rank sends: codes and scales, with rows of zeros up to the largest rank's.

        A rank that holds all rows (`replicate()`, a mesh of one) sends nothing: FSDP2 copies the first tensor only, so
        there is only one. (FSDP2 would check the shapes that a function with its longer signature returns, and refuse
        scales on ranks with fewer rows.)
        """
        if self.shape[0] == self.total:
            return (torch.cat([x.view(-1).view(torch.uint8) for x in (self.scales, self.codes)]),), None
        rows = -(-self.total // mesh.size())
        return (_padded(self.codes, rows), _padded(self.scales, rows)), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Int8Weight, tuple[Tensor, ...]] | None:
        """The whole matrix from what all ranks sent; `out` has the same memory as the first time."""
        if out is not None:
            return None
        if len(outputs) == 1:
            scales, codes = outputs[0].split([self.scales.nbytes, self.codes.nbytes])
            outputs = codes.view(torch.int8).view(self.codes.shape), scales.view(torch.float32).view(self.scales.shape)
        codes, scales = (x[: self.total] for x in outputs)
        return self.like(codes, scales, param_dtype), ()


def _rebuild(
    codes: Tensor, scales: Tensor, block: int, dtype: torch.dtype, label: str, total: int, grad: bool, is_param: bool
) -> Int8Weight:
    """A copied or loaded weight, a Parameter again if it was one."""
    weight = Int8Weight(codes, scales, block, dtype, label, total)
    return nn.Parameter(weight, requires_grad=grad) if is_param else weight.requires_grad_(grad)


# torch.load(weights_only=True), wherever lowrank_ds is imported
torch.serialization.add_safe_globals([_rebuild])


def _padded(x: Tensor, rows: int) -> Tensor:
    """x with rows of zeros added up to `rows`."""
    return x if x.shape[0] == rows else torch.cat([x, x.new_zeros(rows - x.shape[0], x.shape[1])])


# -- the product ------------------------------------------------------------------------------------------------------
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., n) times the transpose of `weight`, in the dtype of x; under autocast in its dtype."""
    if not isinstance(weight, Int8Weight):
        raise RuntimeError(f"linear: int8 weights cannot be the input or the bias of a layer. {_WAY_OUT}")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    """x W^T + bias with W dequantised for the moment, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        """x (..., n), bias (m,) or None: (..., m)."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight (m, n) and bias from grad (..., m)."""
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            grad @ weight.dequantize(grad.dtype) if wants_x else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


# -- operators --------------------------------------------------------------------------------------------------------
aten = torch.ops.aten


def _weights(value: Any) -> list[Int8Weight]:
    if isinstance(value, Int8Weight):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [weight for part in parts for weight in _weights(part)]


def _dense(value: Any) -> Any:
    """The same arguments with dequantised weights."""
    if isinstance(value, Int8Weight):
        return value.dequantize()
    if isinstance(value, dict):
        return {k: _dense(v) for k, v in value.items()}
    return type(value)(map(_dense, value)) if isinstance(value, (list, tuple)) else value


def _refuse(weight: Int8Weight, what: str) -> None:
    raise RuntimeError(f"{weight.label} is an int8 weight of shape {tuple(weight.shape)}: {what}. {_WAY_OUT}")


def _same(func: Any, weight: Int8Weight, *args: Any, **kwargs: Any) -> Int8Weight:
    """The operator on codes and scales alike: detach, clone, and collectives that join rows."""
    return weight.like(func(weight.codes, *args, **kwargs), func(weight.scales, *args, **kwargs))


def _view(func: Any, weight: Int8Weight, size: Any) -> Tensor:
    if list(size) in ([-1], [weight.numel()]):  # FSDP2 keeps one such view; nothing else can be done with it
        return weight.like(weight.codes.view(-1), weight.scales)
    if list(size) not in ([*weight.shape], [-1, weight.shape[1]], [weight.shape[0], -1]):
        _refuse(weight, f"it cannot be seen as {list(size)}")
    return weight.like(weight.codes.detach(), weight.scales.detach())


def _as_strided(func: Any, weight: Int8Weight, size: Any, stride: Any, offset: int | None = None) -> Int8Weight:
    n = weight.shape[1]
    if len(size) != 2 or size[1] != n or list(stride) != [n, 1] or offset or size[0] > weight.shape[0]:
        _refuse(weight, f"it cannot be seen with sizes {list(size)} and strides {list(stride)}")
    return weight.like(weight.codes[: size[0]], weight.scales[: size[0]])


def _slice(
    func: Any, weight: Int8Weight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Int8Weight:
    n = weight.shape[1]
    if dim % 2 and ((start or 0) > 0 or (end is not None and end < n) or step != 1):
        _refuse(weight, "its columns share scales and cannot be cut")
    if dim % 2:
        return weight.like(weight.codes.detach(), weight.scales.detach())
    return weight.like(*(func(x, 0, start, end, step) for x in (weight.codes, weight.scales)))


def _split(func: Any, weight: Int8Weight, size: int, dim: int = 0) -> list[Int8Weight]:
    if dim % 2:
        _refuse(weight, "its columns share scales and cannot be cut (fully_shard without shard_placement_fn cuts rows)")
    return [weight.like(*pair) for pair in zip(weight.codes.split(size), weight.scales.split(size), strict=True)]


def _new(func: Any, weight: Int8Weight, size: Any, **kwargs: Any) -> Tensor:
    """Zeros (or uninitialised) of the same kind if they have the same columns, else a plain tensor."""
    kwargs = {"dtype": weight.dtype, "device": weight.device} | {k: v for k, v in kwargs.items() if v is not None}
    if len(size) != 2 or size[1] != weight.shape[1] or kwargs["dtype"] != weight.dtype:
        return torch.zeros(size, **kwargs)
    scales = torch.zeros(size[0], weight.scales.shape[1], dtype=torch.float32, device=kwargs["device"])
    return weight.like(torch.zeros(size, dtype=torch.int8, device=kwargs["device"]), scales)


def _empty_like(func: Any, weight: Int8Weight, **kwargs: Any) -> Tensor:
    return _new(func, weight, weight.shape, **{k: kwargs.get(k) for k in ("dtype", "device")})


def _to_copy(func: Any, weight: Int8Weight, **kwargs: Any) -> Int8Weight:
    """Another device, or another dtype to look like: codes and scales keep theirs."""
    dtype = kwargs.pop("dtype", None)
    if dtype is not None and not dtype.is_floating_point:
        return func(weight.dequantize(), dtype=dtype, **kwargs)
    return weight.like(func(weight.codes, **kwargs), func(weight.scales, **kwargs), dtype)


def _copy(func: Any, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Codes as they are; other numbers are rounded to the nearest codes of new scales."""
    if not isinstance(to, Int8Weight):
        return func(to, source.dequantize(), non_blocking)
    if source.shape != to.shape:
        _refuse(to, f"numbers of shape {tuple(source.shape)} cannot be copied into it")
    if isinstance(source, Int8Weight) and source.block == to.block:
        to.codes.copy_(source.codes, non_blocking)
        to.scales.copy_(source.scales, non_blocking)
        return to
    values = source.dequantize() if isinstance(source, Int8Weight) else source
    to.scales.zero_()
    int8_codes.encode_(to.codes, to.scales, to.block, values.to(to.device))
    return to


def _pad(func: Any, weight: Int8Weight, pad: Any, value: float = 0) -> Int8Weight:
    if any(pad[:2]) or (len(pad) > 2 and pad[2]) or value:
        _refuse(weight, f"it cannot be padded by {list(pad)}")
    rows = weight.shape[0] + (pad[3] if len(pad) > 2 else 0)
    return weight.like(_padded(weight.codes, rows), _padded(weight.scales, rows))


_OPERATORS: dict[Any, Callable] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.view.default: _view,
    aten.as_strided.default: _as_strided,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.new_zeros.default: _new,
    aten.new_empty.default: _new,
    aten.empty_like.default: _empty_like,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.constant_pad_nd.default: _pad,
    aten._pin_memory.default: _same,
}
_REFUSED = {aten.cat.default, aten.stack.default}
_ON_FLAT = {aten.detach.default}
