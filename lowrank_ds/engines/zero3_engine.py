"""What takes the place of DeepSpeed's ZeRO-3 optimizer when updates happen in the backward (imports DeepSpeed).

Without an optimizer DeepSpeed partitions and gathers parameters (`DeepSpeedZeRoOffload`) but builds no fp32 copies and
no gradient buffers: just what layer-wise updates need. `FusedZero3` adds what an engine asks of an optimizer, so that
`engine(x)`, `engine.backward(loss)`, `engine.step()`, checkpoints and schedulers work as ever.
Private attributes used: `DeepSpeedEngine._configure_*`, `_do_optimizer_sanity_check`, `_support_torch_style_backward`,
`_backward_post_hook`, `_config`; `DeepSpeedZeRoOffload.partition_all_parameters`, `persistent_parameters`. Tested with
0.19.8; others outside `deepspeed.TESTED` are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import check_internal_apis_for_count_used_parameters
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from torch import Tensor

from lowrank_ds.engines import zero3
from lowrank_ds.engines.deepspeed import check_version

_STAGE = (
    "zero_optimization.stage is {stage}. Layer-wise updates need stage 3: in stages 1 and 2 DeepSpeed keeps a flat "
    "(fp32) copy of the weights and one of the gradients, and step() gathers the result at the end, so that an update "
    "inside the backward frees nothing. Set stage 3, or use FSDP2 (fully_shard), or leave layerwise out"
)


class FusedZero3(ZeROOptimizer):
    """The engine's optimizer: hands steps to ours, and refreshes the parameters that DeepSpeed keeps gathered.

    Args:
        engine: the DeepSpeed engine. optimizer: ours, on the engine's parameters.
        offload: what partitions and gathers the parameters.
    """

    def __init__(self, engine: Any, optimizer: Any, offload: DeepSpeedZeRoOffload) -> None:
        super().__init__()
        self.optimizer, self.parameter_offload = optimizer, offload
        self.dp_process_group = engine.seq_data_parallel_group
        self.fp16_groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        self.dynamic_loss_scale = self.custom_loss_scaler = self.overflow = False
        self.torch_autocast_gradscaler = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Ours, which schedulers change."""
        return self.optimizer.param_groups

    @property
    def layerwise(self) -> Any:
        """The handle that `lowrank_ds.layerwise` returns, for those whose ds_config called it."""
        return self.optimizer._in_backward

    @property
    def _global_grad_norm(self) -> Tensor | None:
        """What engine.get_global_grad_norm() answers after a step: the norm (0-d) if clipping took one."""
        return None if self.layerwise is None else self.layerwise.norm

    @property
    def state(self) -> MutableMapping[Tensor, Any]:
        """Ours."""
        return self.optimizer.state

    def _hosts(self) -> Iterator[Tensor]:
        return (p for group in self.fp16_groups for p in group)

    # -- the step -----------------------------------------------------------------------------------------------------
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Finish the updates, then drop gathered copies of old weights and gather those that stay gathered.

        Raises:
            RuntimeError: a closure is given.
        """
        if closure is not None:
            raise RuntimeError("DeepSpeed's engine.step() takes no closure.")
        self.optimizer.step()
        self.empty_partition_cache()
        self._gather_persistent()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free all gradients, and sums of micro-batches that no step has used."""
        self.optimizer.zero_grad()
        for host in self._hosts():
            zero3.drop_grad(host)

    def backward_epilogue(self, **_: Any) -> None:
        """Free the parameters of modules whose input needs no gradient (DeepSpeed's hook does not fire for them)."""
        self.parameter_offload.release_backward_leftovers()

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Nothing is left to reduce at the end of a backward."""

    def _gather_persistent(self) -> None:
        persistent = self.parameter_offload.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def empty_partition_cache(self) -> None:
        """Free every gathered parameter, those that stay gathered too."""
        self.parameter_offload.partition_all_parameters()

    def destroy(self) -> None:
        """Take our hooks and DeepSpeed's off the model."""
        if self.layerwise is not None:
            self.layerwise.remove()
        self.parameter_offload.destroy()
        for host in self._hosts():
            zero3.release(host)

    # -- checkpoints --------------------------------------------------------------------------------------------------
    def checkpoint_event_prologue(self) -> None:
        """Before saving or loading: every parameter is in pieces."""
        self.empty_partition_cache()

    def checkpoint_event_epilogue(self) -> None:
        """After saving or loading."""
        self._gather_persistent()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state and weights, as DeepSpeed's tools (zero_to_fp32) read them; weights in their own dtype."""
        return {
            "zero_stage": 3,
            "partition_count": dist.get_world_size(self.dp_process_group),
            "loss_scaler": None,
            "dynamic_loss_scale": False,
            "overflow": False,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "fp32_flat_groups": [host.ds_tensor.data for host in self._hosts()],
        }

    def load_state_dict(
        self, state_dict_list: list[Any], load_optimizer_states: bool = True, load_from_fp32_weights: bool = False,
        checkpoint_folder: str | None = None, load_serial: Tensor | None = None, param_shapes: Any = None,
    ) -> None:  # fmt: skip
        """Take the weights and the state of this rank out of a DeepSpeed checkpoint (the engine calls this).

        Raises:
            RuntimeError: a universal checkpoint, pipelined loading, or a checkpoint of another optimizer.
        """
        if checkpoint_folder or load_serial is not None:
            raise RuntimeError(
                "layer-wise ZeRO-3 loads plain DeepSpeed checkpoints only: leave checkpoint.load_universal and "
                "zero_optimization.pipeline_loading_checkpoint out."
            )
        saved = state_dict_list[dist.get_rank(self.dp_process_group)]
        pieces, hosts = saved["fp32_flat_groups"], list(self._hosts())
        if [piece.numel() for piece in pieces] != [host.ds_tensor.numel() for host in hosts]:
            raise RuntimeError(
                "the checkpoint was not saved by layer-wise ZeRO-3 with this model and these param groups. Convert "
                "its weights with DeepSpeed's zero_to_fp32 and load them into the model instead."
            )
        for host, piece in zip(hosts, pieces, strict=True):
            host.ds_tensor.data.copy_(piece)
        if load_optimizer_states:
            self.optimizer.load_state_dict(saved["optimizer_state_dict"])

    def _restore_from_bit16_weights(self) -> None:
        """The weights that the engine loaded into the model are the only ones."""


# -- putting it there -------------------------------------------------------------------------------------------------
def attach(engine: Any, optimizer: Any, accumulation_steps: int) -> int:
    """See `zero3.attach`."""
    refuse(engine)
    if isinstance(engine.optimizer, FusedZero3) and engine.optimizer.layerwise is None:  # after handle.remove()
        engine.optimizer = engine.optimizer.parameter_offload
    if not isinstance(engine.optimizer, DeepSpeedZeRoOffload):
        raise RuntimeError(
            f"the engine already has an optimizer ({type(engine.optimizer).__name__}): its fp32 weights and gradient "
            "buffers are allocated. Call deepspeed.initialize without an optimizer (none in the ds_config either), "
            'then lowrank_ds.layerwise(engine, optimizer); or put "layerwise": true into the ds_config\'s '
            "optimizer.params."
        )
    steps = engine.gradient_accumulation_steps()
    if accumulation_steps not in (1, steps):
        raise RuntimeError(
            f"accumulation_steps={accumulation_steps}, but the ds_config's gradient_accumulation_steps is {steps}. "
            "Leave accumulation_steps out: the engine's is used."
        )
    _check_parameters(engine.module, optimizer)
    wire = engine._config.communication_data_type
    summed = engine.get_data_types()[1] if engine._config.grad_accum_dtype is not None else None
    for host in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
        zero3.prepare(host, wire, summed)
    started_here = engine.basic_optimizer is None  # not by deepspeed.initialize, which does the rest itself
    engine.basic_optimizer = optimizer
    engine.optimizer = FusedZero3(engine, optimizer, engine.optimizer)
    if started_here:
        _finish_engine(engine)
    return steps


def _finish_engine(engine: Any) -> None:
    """What deepspeed.initialize leaves out when it is given no optimizer."""
    engine._configure_checkpointing()
    if engine.lr_scheduler is None:
        engine._configure_lr_scheduler()
    if check_internal_apis_for_count_used_parameters():
        engine._support_torch_style_backward = True
        engine.optimizer.register_grad_acc_post_hook(engine._backward_post_hook)


def _check_parameters(module: torch.nn.Module, optimizer: Any) -> None:
    """The optimizer must have exactly the trainable parameters of the engine's model."""
    trained = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    given = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    foreign = len(given - set(trained))
    if foreign:
        raise RuntimeError(
            f"{type(optimizer).__name__} has {foreign} parameters that are not the engine's. Build it from "
            "engine.module: lowrank_ds.param_groups(engine.module, rank=...) or engine.module.named_parameters()."
        )
    left_out = [name for key, name in trained.items() if key not in given]
    if left_out:
        raise RuntimeError(
            f"{left_out[0]} needs a gradient but is in no param group ({len(left_out)} such parameters): its gradient "
            "would never be freed. Add it, or set requires_grad_(False) on it."
        )


def watch_initialize(waiting: MutableMapping[Any, Callable[[Any], None]]) -> None:
    """Let deepspeed.initialize start the optimizers in `waiting` ({optimizer: start(engine)}) instead of wrapping them.

    Two methods of DeepSpeedEngine are wrapped, once; other optimizers pass through unchanged. DeepSpeed has no hook at
    this place: it looks a type up on torch.optim, and decides between its ZeRO-3 optimizer (fp32 copies, gradient
    buffers) and plain partitioning by whether the optimizer is None.
    """
    if hasattr(DeepSpeedEngine._configure_zero_optimizer, "_starts_layerwise"):
        return
    check, configure = DeepSpeedEngine._do_optimizer_sanity_check, DeepSpeedEngine._configure_zero_optimizer

    @functools.wraps(check)
    def checked(engine: Any, basic_optimizer: Any) -> Any:
        if basic_optimizer in waiting:
            refuse(engine)
        return check(engine, basic_optimizer)

    @functools.wraps(configure)
    def configured(engine: Any, optimizer: Any) -> Any:
        start = waiting.pop(optimizer, None) if optimizer is not None else None
        if start is None:
            return configure(engine, optimizer)
        engine.optimizer = configure(engine, None)
        start(engine)
        return engine.optimizer

    configured._starts_layerwise = True
    DeepSpeedEngine._do_optimizer_sanity_check, DeepSpeedEngine._configure_zero_optimizer = checked, configured


# -- what cannot be honoured ------------------------------------------------------------------------------------------
def refuse(engine: Any) -> None:
    """Raise RuntimeError for a ds_config that layer-wise updates would silently not follow, naming the setting."""
    check_version(deepspeed.__version__)
    for message in _objections(engine, engine._config.zero_config):
        raise RuntimeError(f"layer-wise updates under DeepSpeed: {message}.")


def _objections(engine: Any, zero: Any) -> Iterator[str]:
    stage = int(engine.zero_optimization_stage()) if engine.zero_optimization() else 0
    if stage != 3:
        yield _STAGE.format(stage=stage)
    if engine.gradient_clipping() > 0:
        yield (
            f"gradient_clipping is {engine.gradient_clipping()} (DeepSpeed's default is 1.0 since 0.19.8): the norm of "
            'all gradients is not known when the first one is used. Set "gradient_clipping": 0.0; to clip each '
            "matrix, see clip and max_grad_norm of lowrank_ds.layerwise()"
        )
    if engine.fp16_enabled() or (engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16):
        yield "fp16 needs loss scaling, which looks at all gradients before any is used. Use bf16"
    if not engine.managed_gradient_accumulation():
        yield "managed_gradient_accumulation is false: which micro-batch is the last is not known in the backward"
    if engine.has_moe_layers or engine.autotp_size() > 1 or engine.pipeline_parallelism:
        yield "expert, tensor and pipeline parallelism are not supported. Use FSDP2 (fully_shard), or leave it out"
    if any(getattr(m, "_z3_leaf", False) for m in engine.module.modules()):
        yield (
            "the model has ZeRO-3 leaf modules (experts that some ranks may not use): ranks would wait for each "
            "other's gradients. Use FSDP2 (fully_shard)"
        )
    yield from (f"{name} is not supported. Leave it out" for name, found in _features(engine, zero) if found)


def _features(engine: Any, zero: Any) -> list[tuple[str, Any]]:
    """(setting, whether it is on) of what was not tried."""
    return [
        ("zero_optimization.offload_param", zero.offload_param and zero.offload_param.device != "none"),
        ("zero_optimization.offload_optimizer", zero.offload_optimizer and zero.offload_optimizer.device != "none"),
        ("zero_optimization.zero_hpz_partition_size", zero.zero_hpz_partition_size > 1),
        ("zero_optimization.mics_shard_size", getattr(zero, "mics_shard_size", -1) > 0),  # gone in 0.19.8
        ("zero_optimization.zero_quantized_weights", zero.zero_quantized_weights),
        ("zero_optimization.zero_quantized_nontrainable_weights", zero.zero_quantized_nontrainable_weights),
        ("zero_optimization.zero_quantized_gradients", zero.zero_quantized_gradients),
        ("zero_optimization.zenflow", zero.zenflow),
        ("sequence parallelism", engine.sequence_parallel_size > 1),
        ("compile.deepcompile", engine.is_deepcompile_enabled()),
    ]
