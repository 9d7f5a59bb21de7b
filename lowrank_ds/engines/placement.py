"""What an engine answers: where a parameter lies inside a tensor of `param_groups`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Placement:
    """A parameter inside a tensor of `param_groups`.

    name, shape: the parameter's. cuts: row-major offsets that divide its entries among the ranks of `group`.
    rank: this process in `group` (None group: the parameter is whole). offset: where the entries held here start in
    the tensor's flattened entries. none_is_zero: the tensor is this parameter's entries alone, and a gradient of None
    counts as zeros (an engine that leaves it None on ranks without entries, which must still take part).
    """

    name: str
    shape: tuple[int, ...]
    cuts: tuple[int, ...]
    rank: int
    group: Any
    offset: int
    none_is_zero: bool = False
