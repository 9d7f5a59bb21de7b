"""Weights as int8 codes with one fp32 scale per block of a row: W = scale * code, codes in [-127, 127].

Pure arithmetic on tensors. Blocks lie inside rows: however the rows are divided among ranks, the scales go with them.
Legend: m rows, n columns, b = ceil(n / block) blocks in a row.

A scale is kept while the block's largest magnitude fits its 127 steps and fills three quarters of them. Renewing it at
every write would move the grid under all weights of a block whenever its largest one moves, and each of them would be
rounded anew, to a whole step, although its own update is a thousandth of one. Scales have 16 significant bits, so that
scale * code is exact in fp32: a write that changes nothing changes no code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank_ds import linalg

LEVELS = 127
HEADROOM = 1.0625  # a renewed scale leaves the largest weight this much room to grow
FILLED = 0.75  # of the 127 steps, by the largest weight of a block; with less the scale is renewed
_SMALLEST = 2.0**-100  # scale of a block of zeros
_CHUNK, _CHUNK_CPU = 1 << 22, 1 << 16  # entries encoded at a time: their noise takes 64-bit integers


def blocks(n: int, block: int) -> int:
    """Scales in a row of n columns."""
    return -(-n // block)


def decode(codes: Tensor, scales: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The weights (m, n) of codes (m, n) int8 and scales (m, b) fp32; products are rounded once, to `dtype`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for code, scale, to in _by_block(block, codes, scales, out):
        torch.mul(code, scale, out=to)
    return out


def encode_(
    codes: Tensor, scales: Tensor, block: int, values: Tensor, key: tuple | None = None, first: int = 0, stride: int = 0
) -> None:
    """Store values (m, n) fp32 into codes (m, n) and scales (m, b), in place; E[decoded] = values when `key` is given.

    Args:
        key: of the noise; None rounds to nearest.
        first, stride: entry (i, j) is at place first + i * stride + j of the whole matrix. The noise belongs to the
            place, so the result does not depend on sharding.

    A block with a NaN or an infinity becomes NaN.
    """
    size = _CHUNK_CPU if values.device.type == "cpu" else _CHUNK
    step = max(1, size // max(1, values.shape[1]))
    for start in range(0, values.shape[0], step):
        part, place = values[start : start + step].float(), first + start * stride
        noise = None if key is None else linalg.uniform(key, place, part.shape, stride, part.device)
        rows = slice(start, start + step)
        _encode(codes[rows], scales[rows], block, part, part if noise is None else noise, noise is not None)


def _encode(codes: Tensor, scales: Tensor, block: int, values: Tensor, noise: Tensor, stochastic: bool) -> None:
    """noise (m, n) uniform in [0, 1): a value is rounded up where it is below the distance to the lower code."""
    for code, scale, value, chance in _by_block(block, codes, scales, values, noise):
        scale.copy_(fitting(value.abs().amax(-1, keepdim=True), scale))
        steps = value / scale
        if stochastic:
            low = steps.floor()
            steps = low + (chance < steps - low)  # steps - low is exact: a value on the grid stays
        else:
            steps = steps.round()
        code.copy_(steps.clamp_(-LEVELS, LEVELS))


def fitting(peak: Tensor, scale: Tensor) -> Tensor:
    """The scale for blocks whose largest magnitudes are `peak`: `scale` where it will do (see the module), else new."""
    reach = LEVELS * scale
    keep = (peak <= reach) & (peak >= FILLED * reach)
    fresh = (peak * (HEADROOM / LEVELS)).clamp_min(_SMALLEST)
    rounded = (fresh.view(torch.int32) + 0xFF) & ~0xFF  # upwards to 16 bits; infinity and NaN stay what they are
    return torch.where(keep, scale, rounded.view(torch.float32))


def _by_block(block: int, codes: Tensor, scales: Tensor, *others: Tensor) -> Iterator[list[Tensor]]:
    """Views (m, blocks, width) of codes and others, (m, blocks, 1) of scales: whole blocks, then the last, shorter one.

    In the order codes, scales, others.
    """
    whole = codes.shape[1] // block
    end = whole * block
    if whole:
        first, *rest = (x[:, :end].unflatten(1, (whole, block)) for x in (codes, *others))
        yield [first, scales[:, :whole].unsqueeze(2), *rest]
    if end < codes.shape[1]:
        first, *rest = (x[:, end:].unsqueeze(1) for x in (codes, *others))
        yield [first, scales[:, whole:].unsqueeze(2), *rest]
