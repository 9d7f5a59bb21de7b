"""lowrank_ds: low-rank optimizers that give the same weights however the model is sharded.

Importing registers the algorithms with `torch.optim`, so that a ds_config can name them:
``"optimizer": {"type": "FiraAdamW", "params": {"lr": 0.01, "rank": 128}}``.
"""

from typing import Any as _Any

import torch as _torch

from lowrank_ds.algorithms import ALGORITHMS as _ALGORITHMS
from lowrank_ds.algorithms import (
    AdaLomo,
    ApolloAdamW,
    ApolloMini,
    FiraAdamW,
    Flora,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    Lomo,
    QGaLore,
)
from lowrank_ds.backward import layerwise
from lowrank_ds.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from lowrank_ds.diagnostics import Diagnostics
from lowrank_ds.engines.checkpointing import activation_checkpointing
from lowrank_ds.engines.huggingface import for_trainer
from lowrank_ds.failures import RankError
from lowrank_ds.int8_tensor import Int8Weight
from lowrank_ds.int8_weights import int8_weights
from lowrank_ds.lora_fa import LoRAFA, create_lorafa_optimizer, freeze_lora_a, lorafa_groups
from lowrank_ds.lora_layers import recompute_dropout
from lowrank_ds.memory import state_bytes, state_bytes_by_kind, weight_bytes
from lowrank_ds.params import divide_params, param_groups
from lowrank_ds.replicas import reduce_in_subspace
from lowrank_ds.version import __version__

__all__ = [
    "__version__",
    "AdaLomo",
    "ApolloAdamW",
    "ApolloMini",
    "CheckpointError",
    "Diagnostics",
    "FiraAdamW",
    "Flora",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "Int8Weight",
    "LoRAFA",
    "Lomo",
    "QGaLore",
    "RankError",
    "activation_checkpointing",
    "create_lorafa_optimizer",
    "divide_params",
    "for_trainer",
    "freeze_lora_a",
    "int8_weights",
    "layerwise",
    "load_checkpoint",
    "lorafa_groups",
    "param_groups",
    "recompute_dropout",
    "reduce_in_subspace",
    "save_checkpoint",
    "state_bytes",
    "state_bytes_by_kind",
    "weight_bytes",
]


def _register() -> None:
    """Put the algorithms where DeepSpeed resolves `optimizer.type` (it looks the name up on torch.optim)."""
    for cls in (*_ALGORITHMS, LoRAFA):
        existing = getattr(_torch.optim, cls.__name__, None)
        if existing is not None and existing.__module__ != cls.__module__:
            raise RuntimeError(
                f"torch.optim.{cls.__name__} already exists ({existing.__module__}): another package registered the "
                "same name. Import lowrank_ds first, or do not import the other one."
            )
        setattr(_torch.optim, cls.__name__, cls)


def __getattr__(name: str) -> _Any:
    """`FloraAccelerator` and `DiagnosticsCallback` are imported when used: accelerate, transformers."""
    if name == "FloraAccelerator":
        from lowrank_ds.engines.flora import FloraAccelerator

        return FloraAccelerator
    if name == "DiagnosticsCallback":
        from lowrank_ds.engines.observed import DiagnosticsCallback

        return DiagnosticsCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register()
