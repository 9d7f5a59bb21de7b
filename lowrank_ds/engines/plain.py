"""One process and DDP: every tensor is a whole parameter (DDP has averaged the gradients before the step)."""

from __future__ import annotations

from torch import Tensor

from lowrank_ds.engines.placement import Placement


def locate(host: Tensor, name: str) -> list[Placement]:
    """The parameter `name` is `host` itself.

    Raises:
        RuntimeError: `host` is sharded in a way this release does not handle.
    """
    if getattr(host, "_is_flat_param", False) or hasattr(host, "_fsdp_flattened"):
        raise RuntimeError(
            f"{name} is flattened by FSDP1. This release supports one process, DDP and DeepSpeed ZeRO-1/2/3: "
            "use one of these. Refusing rather than training it un-projected."
        )
    return [Placement(name, tuple(host.shape), (0, host.numel()), 0, None, 0)]
