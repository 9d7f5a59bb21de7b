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
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_LINE = 1 << 15  # columns of a line
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's constants
_BLOCK = 0xD1342543DE82EF95  # tells the lines of a row apart
_ROUND = 0x846CA68B  # the second multiplier of Wellons' lowbias32
_tables: dict[torch.device, Tensor] = {}


class Noise:
    """The words of rectangles that lie one below the other, drawn some rows at a time.

    Args:
        streams: (key, rows) of each rectangle: a key is anything with a stable `repr`, rows are places in its whole
            matrix. columns: of all of them.
    """

    def __init__(
        self, streams: Sequence[tuple[tuple, slice]], columns: slice, device: torch.device | None = None
    ) -> None:
        counts = [rows.stop - rows.start for _, rows in streams]
        # a row's number times golden ratio plus seed, where rows are counted through all rectangles
        starts = [
            _seed(key) + (rows.start - before) * _GOLDEN
            for (key, rows), before in zip(streams, itertools.accumulate(counts, initial=0), strict=False)
        ]
        table, numbers = _columns(device), torch.arange(sum(counts), device=device, dtype=torch.int64)
        numbers.mul_(_signed(_GOLDEN, 64))
        for part, start in zip(numbers.split(counts), starts, strict=True):
            part.add_(_signed(start, 64))
        self._lines = []
        for block in range(columns.start // _LINE, max(columns.start, columns.stop - 1) // _LINE + 1):
            first, last = max(columns.start - block * _LINE, 0), min(columns.stop - block * _LINE, _LINE)
            pair = _mixed(numbers + _signed(block * _BLOCK, 64)).view(torch.int32).view(-1, 2)  # (h, 2)
            self._lines.append((table[first:last], pair[:, :1], pair[:, 1:] | 1))

    def words(self, rows: slice) -> Tensor:
        """int32 (h, w) of some of the rows, counted from the first of the first rectangle."""
        parts = [_round(column + add[rows], multiply[rows]) for column, add, multiply in self._lines]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _seed(key: tuple) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


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
