"""Seeded bits: 32 of them for every place of a matrix, a pure function of a key, a row and a column.

Device, world size, sharding and the order of calls do not matter: a rank draws what belongs to its entries and no more.

    line     (row, 2^15 columns): two 32-bit numbers (a, b), a odd, out of splitmix64 (Steele, Lea & Flood 2014)
    column   a 32-bit number c, the same for all lines; computed once
    word     two rounds of multiply-and-shift of a (b + c) in 32-bit lanes, where CPUs and GPUs multiply natively

Lines and columns are mixed thoroughly, but there are few of them; of what is done for each of the many words, 7 cheap
passes are left. (The same rounds on b + column * constant fail every test of neighbours.) Legend: h rows, w columns.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_LINE = 1 << 15  # columns of a line
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's constants
_BLOCK = 0xD1342543DE82EF95  # tells the lines of a row apart
_ROUND = 0x846CA68B  # the second multiplier of Wellons' lowbias32
_tables: dict[torch.device, Tensor] = {}


class Noise:
    """The words of a rectangle, drawn some rows at a time.

    Args:
        key: of the stream, anything with a stable `repr`. rows, columns: the rectangle, as places in the whole matrix.
    """

    def __init__(self, key: tuple, rows: slice, columns: slice, device: torch.device | None = None) -> None:
        seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
        table = _columns(device)
        self._lines = []
        for block in range(columns.start // _LINE, max(columns.start, columns.stop - 1) // _LINE + 1):
            first, last = max(columns.start - block * _LINE, 0), min(columns.stop - block * _LINE, _LINE)
            number = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int64)
            pair = _mixed(number.mul_(_signed(_GOLDEN, 64)).add_(_signed(seed + block * _BLOCK, 64)))
            pair = pair.view(torch.int32).view(-1, 2)  # (h, 2)
            self._lines.append((table[first:last], pair[:, :1], pair[:, 1:] | 1))

    def words(self, rows: slice) -> Tensor:
        """int32 (h, w) of some of the rows, counted from the first of the rectangle."""
        parts = [_round(column + add[rows], multiply[rows]) for column, add, multiply in self._lines]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _round(x: Tensor, multiply: Tensor) -> Tensor:
    """The words of x (h, w) int32, in its place; multiply (h, 1). Adding what is shifted needs no mask for the sign."""
    shifted = torch.bitwise_right_shift(x.mul_(multiply), 15)
    x.add_(shifted).mul_(_signed(_ROUND, 32))
    return x.add_(torch.bitwise_right_shift(x, 16, out=shifted))


def _columns(device: torch.device | None) -> Tensor:
    """The numbers c (_LINE,) int32 of all columns."""
    probe = torch.empty(0, device=device)
    if type(probe) is Tensor and probe.device in _tables:
        return _tables[probe.device]
    numbers = torch.arange(1, _LINE + 1, device=device, dtype=torch.int64).mul_(_signed(_GOLDEN, 64))
    table = _mixed(numbers).view(torch.int32)[::2].contiguous()
    if type(table) is Tensor:  # what a planner's fake tensors compute is of no use to anyone else
        _tables[probe.device] = table
    return table


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser of x int64, in place. Multiplication wraps."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(_signed(factor, 64))
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def _signed(value: int, bits: int) -> int:
    """The number whose two's complement has the low `bits` bits of `value`."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value
