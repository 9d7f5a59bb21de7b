"""Numbers in 8 or 4 bits: codes and the scales of their blocks. Pure functions of tensors; no rank, no parameter.

Moments are small floats: a code has 3 bits of mantissa and an exponent of 4 bits (with sign) or 5 (without), relative
to the largest magnitude of its block, which is kept in fp32. A linear code loses the small entries of exp_avg_sq
(divided by a root of zero, their momentum becomes the largest update of all), the dynamic code of bitsandbytes
(Dettmers et al., arXiv:2110.02861) gives them one bit; with this one every entry within 2^-31 of its block's largest
keeps 3 bits and none becomes zero. docs/low_bit.md has the measurement that chose it.

An average that moves by a thousandth a step stands still when it is rounded to the nearest of codes 9 % apart. So the
rounding is dithered: up or down by a threshold that runs evenly through [0, 1) from step to step, a function of the
entry's place and the step alone. Nothing is drawn at random: every sharding, and a resumed run, rounds alike.

Projectors are rounded once, so they get an affine code between the smallest and the largest entry of a block, to
nearest.

A block is at most 256 entries inside one row, so that codes and scales are cut with the rows they belong to. Legend:
x (l, w) is the columns first, first + 1, ... of rows that are `width` entries wide, with k = blocks(width)[0] blocks.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor
from torch.nn.functional import pad

LARGEST_BLOCK = 256
_DROPPED = 20  # bits of fp32's mantissa that a code does not have: 23 - 3
_ONE = 0x3F800000 >> _DROPPED  # 1.0, the largest magnitude of a block, has the largest code
_CODES = {True: 127, False: 255}  # of magnitudes other than zero, with and without a sign
# the steps in row, column and time of a sequence that fills [0, 1) evenly, in 2^-32 (Roberts 2018, dimension 3)
_ROW, _COLUMN, _TIME = 0xD1B54A33, 0xABC98389, 0x8CB92BA7


def blocks(width: int) -> tuple[int, int]:
    """(how many blocks a row of `width` entries has, entries of each but perhaps the last): as even as can be."""
    count = max(1, -(-width // LARGEST_BLOCK))
    return count, max(1, -(-width // count))


# --- moments ---------------------------------------------------------------------------------------------------------
def peaks(x: Tensor, width: int, first: int = 0) -> Tensor:
    """The largest magnitude in each block, (l, k); 0 for blocks that x (l, w) has nothing of."""
    (count, size), w = blocks(width), x.shape[1]
    if count == 1:
        return x.abs().amax(1, keepdim=True) if w else x.new_zeros(x.shape[0], 1)
    found = x.new_zeros(x.shape[0], count)
    start, stop = first // size, -(-(first + w) // size)
    if stop > start:
        padded = pad(x.abs(), (first - start * size, stop * size - first - w))
        found[:, start:stop] = padded.view(x.shape[0], stop - start, size).amax(2)
    return found


def encode(x: Tensor, scales: Tensor, signed: bool, noise: Tensor, width: int, first: int = 0) -> Tensor:
    """Codes (l, w) uint8 of x (l, w), whose blocks have the largest magnitudes `scales` (l, k).

    signed: whether x may be negative (the sign is the code's highest bit). noise: `dither`'s (l, w). Without sign, what
    is not zero does not become zero; with it, what is below the smallest code becomes zero or that, evenly.
    """
    divisor = _per_entry(torch.where(scales > 0, scales, 1.0), x.shape[1], width, first)
    y = x.abs().div_(divisor) if signed else x / divisor
    top = _CODES[signed]
    codes = (y.view(torch.int32) + noise).bitwise_right_shift_(_DROPPED).sub_(_ONE - top).clamp_(0, top)
    smallest = _value(1, signed)
    if not signed:
        return torch.maximum(codes.to(torch.uint8), y > 0)
    codes = torch.where(y < smallest, y > noise * (smallest / (1 << _DROPPED)), codes.to(torch.uint8))
    return torch.where((x < 0) & (codes > 0), codes + 128, codes)


def decode(codes: Tensor, scales: Tensor, signed: bool, width: int, first: int = 0) -> Tensor:
    """The fp32 values (l, w) of codes (l, w)."""
    values = _table(signed, codes.device).index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
    return values.mul_(_per_entry(scales, codes.shape[1], width, first))


@functools.cache
def _table(signed: bool, device: torch.device) -> Tensor:
    """The value of every code, (256,)."""
    values = [0.0, *(_value(code, signed) for code in range(1, _CODES[signed] + 1))]
    return torch.tensor(values + [-value for value in values] if signed else values, device=device)


def _value(code: int, signed: bool) -> float:
    """The magnitude of a code, in parts of its block's largest."""
    exponent, mantissa = divmod(code + _ONE - _CODES[signed], 8)
    return 2.0 ** (exponent - 127) * (1 + mantissa / 8)


def _per_entry(scales: Tensor, w: int, width: int, first: int) -> Tensor:
    """Of (l, k) numbers a block: one for each column, (l, w), or (l, 1) where there is one block."""
    count, size = blocks(width)
    return scales if count == 1 else scales.repeat_interleave(size, 1)[:, first : first + w]


def dither(key: tuple, step: int, rows: slice, columns: slice, device: torch.device) -> Tensor:
    """Thresholds (rows, columns) int32 in [0, 2^20): for `encode`, of these places of an array at this step.

    key: (run seed, parameter name, state name): arrays differ.
    """
    start = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little") + step * _TIME
    down = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int64) * _ROW + start
    across = torch.arange(columns.start, columns.stop, device=device, dtype=torch.int64) * _COLUMN
    total = _wrapped(down).unsqueeze(1) + _wrapped(across)  # int32 addition wraps, as it should
    return total.bitwise_right_shift_(32 - _DROPPED).bitwise_and_((1 << _DROPPED) - 1)


def _wrapped(x: Tensor) -> Tensor:
    """int64 modulo 2^32, as int32."""
    return (((x + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)).to(torch.int32)


# --- projectors ------------------------------------------------------------------------------------------------------
def code_width(width: int, bits: int) -> int:
    """Bytes of a row's codes: with 4 bits two to a byte."""
    return width if bits == 8 else -(-width // 2)


def encode_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes (l, code_width) uint8, (smallest value, step) of each block (l, 2 k) fp32) of x (l, w), to nearest.

    bits: 8 or 4.
    """
    (count, size), (rows, w) = blocks(x.shape[1]), x.shape
    padded = x if w == count * size else torch.cat([x, x[:, -1:].expand(rows, count * size - w)], 1)
    lines = padded.reshape(rows, count, size)
    low, high = lines.amin(2), lines.amax(2)
    step = (high - low) / ((1 << bits) - 1)
    scaled = (lines - low.unsqueeze(2)) / torch.where(step > 0, step, 1.0).unsqueeze(2)
    codes = scaled.round().clamp_(0, (1 << bits) - 1).to(torch.uint8).flatten(1)[:, :w]
    ranges = torch.stack([low, step], 2).reshape(rows, 2 * count)
    return (codes if bits == 8 else _packed(codes)).contiguous(), ranges


def decode_range(codes: Tensor, ranges: Tensor, width: int, bits: int) -> Tensor:
    """The fp32 values (l, width) of codes (l, code_width) with ranges (l, 2 k)."""
    count, _ = blocks(width)
    pairs = ranges.view(-1, count, 2)
    low, step = (_per_entry(pairs[..., i], width, width, 0) for i in (0, 1))
    whole = codes if bits == 8 else torch.stack([codes & 15, codes >> 4], 2).flatten(1)[:, :width]
    return whole.to(torch.float32) * step + low


def _packed(codes: Tensor) -> Tensor:
    """Two 4-bit codes to a byte, the first of them in the lower half; (l, w) to (l, ceil(w / 2))."""
    even = pad(codes, (0, codes.shape[1] % 2))
    return even[:, 0::2] | (even[:, 1::2] << 4)
