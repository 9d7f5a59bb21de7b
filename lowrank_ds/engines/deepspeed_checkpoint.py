"""DeepSpeed and engine-neutral checkpoints: find all partitions, refresh what is made of them, carry the counters.

Private attributes and methods used (DeepSpeed 0.19.8; others outside `deepspeed.TESTED` are refused):

    engine          `optimizer`, `basic_optimizer`, `lr_scheduler`, `global_steps`, `global_samples`, `micro_steps`,
                    `skipped_steps`
    stage 1, 2      `update_lp_params` (also BF16_Optimizer's)
    stage 3         `fp32_partitioned_groups_flat`, `sub_group_to_group_id`, `checkpoint_event_prologue`,
                    `checkpoint_event_epilogue`, `_reassign_or_swap_out_partitioned_parameters`
    no ZeRO, bf16   `fp32_groups`, `fp16_groups` of FP16_UnfusedOptimizer
    fp16            `loss_scaler`; without ZeRO `loss_scale_config`
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowrank_ds.engines import deepspeed, zero3

logger = logging.getLogger("lowrank_ds")

_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def is_engine(model: Any) -> bool:
    """Whether `model` is what deepspeed.initialize returns."""
    return hasattr(model, "zero_optimization_stage") and hasattr(model, "basic_optimizer")


def optimizer_of(engine: Any) -> Any:
    """The optimizer inside the engine (None: it has none)."""
    return engine.basic_optimizer


def check(engine: Any) -> None:
    """Raise RuntimeError for a DeepSpeed that was not tested, or between micro-batches."""
    deepspeed.check_version(sys.modules["deepspeed"].__version__)
    steps = engine.gradient_accumulation_steps()
    if engine.micro_steps % steps:
        raise RuntimeError(
            f"the engine is at micro-batch {engine.micro_steps % steps} of {steps} of a step, and the gradients that "
            "DeepSpeed has summed so far are not in a checkpoint. Save and load after an engine.step() that updated "
            "the weights (engine.is_gradient_accumulation_boundary() before it)."
        )


@contextlib.contextmanager
def all_hosts(optimizer: Any) -> Iterator[None]:
    """ZeRO-3 leaves the param groups empty between steps: put all fp32 partitions there, as its state_dict does."""
    zero = next((p._z3_optimizer for p in _originals(optimizer) if hasattr(p, "_z3_optimizer")), None)
    groups = optimizer.param_groups
    if zero is None or any(group["params"] for group in groups):
        yield
        return
    for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
        groups[zero.sub_group_to_group_id[index]]["params"].append(flat)
    try:
        yield
    finally:
        for group in groups:
            group["params"] = []


def _originals(optimizer: Any) -> Iterator[Tensor]:
    return (p for reference in optimizer._originals.values() if (p := reference()) is not None)


def is_handled(param: Tensor) -> bool:
    """Whether the weights of a trained parameter are an optimizer's partitions, so that it cannot be read by itself."""
    if not deepspeed.is_partitioned(param) or not param.requires_grad:
        return False
    return hasattr(param, "_z3_optimizer") or not zero3.is_host(param)


# -- loading ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def being_loaded(engine: Any) -> Iterator[None]:
    """While partitions are written; afterwards the model's own parameters are made of them again."""
    zero = engine.optimizer
    if hasattr(zero, "checkpoint_event_prologue"):
        zero.checkpoint_event_prologue()  # ZeRO-3: gathered copies would be old weights
    yield
    with torch.no_grad():
        _refresh(zero)
    if hasattr(zero, "checkpoint_event_epilogue"):
        zero.checkpoint_event_epilogue()


def _refresh(zero: Any) -> None:
    """The model's own (bf16) parameters from the fp32 partitions."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        for index in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()
    elif hasattr(zero, "fp32_groups") and hasattr(zero, "fp16_groups"):
        for low, high in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
            for param, master in zip(low, high, strict=True):
                param.data.copy_(master.data)


# -- counters ---------------------------------------------------------------------------------------------------------
def counters(engine: Any) -> dict[str, Any]:
    """The engine's counters, learning-rate schedule and loss scale, JSON-able if the schedule's state is."""
    scheduler = engine.lr_scheduler
    scaler = _scaler(engine.optimizer)
    return {name: getattr(engine, name) for name in _COUNTERS} | {
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
        "loss_scale": {n: getattr(scaler, n) for n in SCALE if hasattr(scaler, n)} if _is_dynamic(scaler) else {},
    }


def check_counters(engine: Any, saved: dict[str, Any] | None) -> None:
    """Raise RuntimeError for the state of another kind of learning-rate schedule, which would fail half-way."""
    if saved is None or saved["lr_scheduler"] is None or engine.lr_scheduler is None:
        return
    ours, theirs = set(engine.lr_scheduler.state_dict()), set(saved["lr_scheduler"])
    if not (ours <= theirs or theirs <= ours):  # torch's own gain a key now and then
        raise RuntimeError(
            f"its learning-rate schedule was another one than {type(engine.lr_scheduler).__name__}: only one of them "
            f"knows {', '.join(sorted(ours ^ theirs)[:4])}. Build the engine with the scheduler it was saved with, or "
            "without one."
        )


def set_counters(engine: Any, saved: dict[str, Any] | None) -> None:
    """Put them back; `micro_steps` is counted anew where another world size accumulates another number of times."""
    if saved is None:
        logger.warning("the checkpoint is not of a DeepSpeed engine: global_steps, lr_scheduler and loss scale stay.")
        return
    for name in _COUNTERS:
        setattr(engine, name, saved[name])
    steps = engine.gradient_accumulation_steps()
    engine.micro_steps = saved["micro_steps"] // saved["gradient_accumulation_steps"] * steps
    if (engine.lr_scheduler is None) != (saved["lr_scheduler"] is None):
        who = (
            "the checkpoint, but not the engine," if engine.lr_scheduler is None else "the engine, not the checkpoint,"
        )
        logger.warning("%s has a learning-rate schedule; it is left as it is.", who)
    elif engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    scaler = _scaler(engine.optimizer)
    if _is_dynamic(scaler) != bool(saved["loss_scale"]):
        who = "the engine, not the checkpoint," if _is_dynamic(scaler) else "the checkpoint, but not the engine,"
        logger.warning("%s has a dynamic loss scale (fp16); it is left as it is.", who)
        return
    for name, value in saved["loss_scale"].items():
        setattr(scaler, name, value)


def _scaler(zero: Any) -> Any:
    return getattr(zero, "loss_scaler", None) or getattr(zero, "loss_scale_config", None) or zero


def _is_dynamic(scaler: Any) -> bool:
    """Whether the loss scale changes by itself; others are what the ds_config says (1 without fp16)."""
    return bool(getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)))
