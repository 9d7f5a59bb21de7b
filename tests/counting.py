"""Count the collectives that our optimizer issues."""

from __future__ import annotations

import collections
from typing import Any

import torch

COUNTED = ("galore right", "galore left", "galore full", "fira", "apollo", "flora", "galore adafactor")
AT_MOST = {"flora": 5, "galore adafactor": 6}  # collectives of a step on rows and flat cuts, for any depth; others: 8
_KINDS = {
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
    "all_gather_single": "all_gather",
    "all_gather_into_tensor": "all_gather",
}


class Counting:
    """torch.distributed with its collectives counted: put it in place of `collectives.dist`."""

    def __init__(self, module: Any) -> None:
        self.module, self.calls, self.bytes = module, 0, 0
        self.kinds: collections.Counter[str] = collections.Counter()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.module, name)
        if name not in _KINDS:
            return attribute

        def counted(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            self.kinds[_KINDS[name]] += 1
            self.bytes += tensor.nbytes
            return attribute(tensor, *arguments, **keywords)

        return counted
