"""One process and DDP: every tensor is a whole parameter (DDP has averaged the gradients before the step)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lowrank_ds.engines.placement import Placement


def locate(host: Tensor, name: str) -> list[Placement]:
    """The parameter `name` is `host` itself."""
    return [Placement(name, tuple(host.shape), (0, host.numel()), 0, None, 0)]


def on_gradient(host: Tensor, callback: Callable[[Tensor], None]) -> Any:
    """Call `callback(host)` when a backward has summed its gradient. FSDP2's DTensors: when that is averaged, too."""
    return host.register_post_accumulate_grad_hook(callback)
