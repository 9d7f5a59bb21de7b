"""DeepSpeed's `activation_checkpointing` section, applied to Hugging Face models.

DeepSpeed 0.19 only parses the section: a model has to call `deepspeed.checkpointing.checkpoint` itself, and Hugging
Face's call torch's function, and only when asked. Whoever writes the section expects it to be applied.

Uses one private method of transformers, `PreTrainedModel._set_gradient_checkpointing` (tested with 5.23).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

logger = logging.getLogger("lowrank_ds")

_SECTION = "activation_checkpointing"
# The section's keys, the type of their values, and what deepspeed.checkpointing.configure calls them.
_KEYS: dict[str, tuple[type, str]] = {
    "partition_activations": (bool, "partition_activations"),
    "cpu_checkpointing": (bool, "checkpoint_in_cpu"),
    "contiguous_memory_optimization": (bool, "contiguous_checkpointing"),
    "number_checkpoints": (int, "num_checkpoints"),
    "synchronize_checkpoint_boundary": (bool, "synchronize"),
    "profile": (bool, "profile"),
}


def activation_checkpointing(model: nn.Module, config: Mapping[str, Any] | str | Path, mpu: Any = None) -> None:
    """Apply a ds_config's `activation_checkpointing` section to a Hugging Face model: every decoder layer keeps only
    its input and is recomputed in the backward, by `deepspeed.checkpointing.checkpoint`.

    Any section turns it on, also an empty one. Call it before or after `deepspeed.initialize` (then with
    `engine.module`), once `deepspeed.init_distributed()` has run; do not call `gradient_checkpointing_enable` as well.
    The settings are DeepSpeed's globals: one set a process. Under `layerwise` no weight may be shared by two
    such layers: its gradient would come in two parts (the second raises).

    Args:
        model: a transformers model that supports gradient checkpointing.
        config: the ds_config, or the path of its JSON file. Keys of the section, all optional:
            partition_activations, cpu_checkpointing, contiguous_memory_optimization, synchronize_checkpoint_boundary,
            profile (booleans, false) and number_checkpoints (an integer; needed by contiguous_memory_optimization).
        mpu: DeepSpeed's model-parallel unit, over whose ranks partition_activations divides; default None: there is
            nothing to divide over, and each rank keeps its activations whole.

    Raises:
        ValueError: no section, an unknown key, a value of the wrong type, contiguous_memory_optimization without what
            it needs, or a model that has no such layers.
        RuntimeError: `deepspeed.init_distributed()` has not run.
    """
    section = _checked(_read(config))
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"{_SECTION}: {type(model).__name__} is not a Hugging Face model that supports gradient checkpointing. "
            "Call deepspeed.checkpointing.configure, and deepspeed.checkpointing.checkpoint in the model's forward."
        )
    import deepspeed  # here, so that lowrank_ds does not need it

    if not deepspeed.comm.is_initialized():
        raise RuntimeError(f"{_SECTION}: call deepspeed.init_distributed() first; DeepSpeed's settings need the ranks.")
    if _already_there(section, deepspeed.accelerator.get_accelerator().device_name()):
        section["cpu_checkpointing"] = False
    deepspeed.checkpointing.configure(mpu, **{_KEYS[key][1]: value for key, value in section.items()})
    # Without the embeddings' gradients (frozen, or adapters) the first layer's input would cut the recomputed graph.
    model.enable_input_require_grads()
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=deepspeed.checkpointing.checkpoint)


def _read(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """The section of a ds_config."""
    whole = config if isinstance(config, Mapping) else json.loads(Path(config).read_text())
    section = whole.get(_SECTION)
    if not isinstance(section, Mapping):
        raise ValueError(f'{_SECTION}: the ds_config has no such section. Add "{_SECTION}": {{}} for the defaults.')
    return section


def _checked(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section, if DeepSpeed would take it (it ignores keys it does not know)."""
    for key, value in section.items():
        if key not in _KEYS:
            raise ValueError(f"{_SECTION}: unknown key {key!r}. Known keys: {', '.join(_KEYS)}.")
        kind = _KEYS[key][0]
        if type(value) is not kind and not (value is None and kind is int):
            raise ValueError(f"{_SECTION}: {key} must be {_name(kind)}; got {value!r}.")
    if section.get("contiguous_memory_optimization") and not (
        section.get("partition_activations") and section.get("number_checkpoints")
    ):
        raise ValueError(
            f"{_SECTION}: contiguous_memory_optimization needs partition_activations: true and number_checkpoints, the "
            "number of the model's layers."
        )
    return dict(section)


def _name(kind: type) -> str:
    return "true or false" if kind is bool else "a whole number"


def _already_there(section: Mapping[str, Any], device: str) -> bool:
    """Whether cpu_checkpointing has nothing to move. (DeepSpeed 0.19.8 would then empty the tensor it saved.)"""
    idle = bool(section.get("cpu_checkpointing")) and device == "cpu"
    if idle:
        logger.warning("%s: cpu_checkpointing has no effect: the activations are on the CPU already.", _SECTION)
    return idle
