"""accelerate: it hands parameters through, but replaces one kind of optimizer without a word."""

from __future__ import annotations

import sys


def refuse_replacement(cls: type) -> None:
    """Called when an optimizer is built; accelerate is never imported here.

    Raises:
        RuntimeError: accelerate would put DeepSpeedCPUAdam in the place of this instance (its
            map_pytorch_optim_to_deepspeed, with offload_optimizer): nothing would be projected.
    """
    module = sys.modules.get("accelerate.state")
    if module is None or not module.AcceleratorState._shared_state:
        return
    plugin = getattr(module.AcceleratorState(), "deepspeed_plugin", None)
    config = plugin.deepspeed_config if plugin is not None else {}
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    replaced = offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True)
    if replaced and "optimizer" not in config:
        raise RuntimeError(
            f"{cls.__name__}: the ds_config has zero_optimization.offload_optimizer, and accelerate then replaces an "
            'optimizer built in Python by DeepSpeedCPUAdam without a word. Set "zero_force_ds_cpu_optimizer": false, '
            f'or let the ds_config name the optimizer ("optimizer": {{"type": "{cls.__name__}", ...}}).'
        )
