"""One process and DDP: every tensor is a whole parameter (DDP has averaged the gradients before the step)."""

from __future__ import annotations

from torch import Tensor

from lowrank_ds.engines.placement import Placement


def locate(host: Tensor, name: str) -> list[Placement]:
    """The parameter `name` is `host` itself.

    Raises:
        RuntimeError: `host` is sharded in a way this release does not handle.
    """
    if hasattr(host, "placements"):
        raise RuntimeError(
            f"{name} is a DTensor (FSDP2 or tensor parallel). This release supports one process, DDP and DeepSpeed "
            "ZeRO-1/2/3; FSDP2 support comes with a later one. Refusing rather than training it un-projected."
        )
    return [Placement(name, tuple(host.shape), (0, host.numel()), 0, None, 0)]
