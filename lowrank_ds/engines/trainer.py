"""Layer-wise updates in Hugging Face's Trainer, by one option: `for_trainer(..., layerwise=True)`.

Trainer builds the optimizer before accelerate replaces the parameters (FSDP2), too early for `layerwise()`. But before
the forward pass of every micro-batch Trainer calls `optimizer.train()` where there is one (meant for schedule-free
optimizers; accelerate's wrapper hands it on): everything is in its final place by then, and accelerate says whether
this micro-batch is the last one of the step. Gradient accumulation, also of an epoch's incomplete last step, needs no
more. accelerate is imported when Trainer builds the optimizer.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from lowrank_ds import engines
from lowrank_ds.backward import InBackward, layerwise
from lowrank_ds.clipping import CLIPS, Previous
from lowrank_ds.groups import logger
from lowrank_ds.optimizer import LowRankOptimizer

_CLIPS = tuple(name for name, kind in CLIPS.items() if not kind.two_passes)


class LayerwiseOption:
    """What `for_trainer(layerwise=...)` asks for.

    Args:
        args: the TrainingArguments: max_grad_norm and gradient_accumulation_steps are theirs.
        wish: True, or {"clip": "previous" or "per_tensor"}.

    Raises:
        TypeError, ValueError: see `for_trainer`.
    """

    def __init__(self, args: Any, wish: bool | Mapping[str, Any]) -> None:
        self.args, self.clip = args, _clip_of(wish)
        self.norm: float | None = None
        if args is None:
            raise ValueError("for_trainer: layerwise needs args: max_grad_norm and the like decide what is possible.")
        self.check()

    def check(self) -> None:
        """Refuse what cannot be done with gradients that are gone before the step."""
        args, norm = self.args, self.args.max_grad_norm or self.norm
        if self.clip is None and norm:
            raise ValueError(
                f"for_trainer: layerwise=True frees each gradient in the backward, so Trainer would clip nothing to "
                f"max_grad_norm={norm} (1.0 unless set), without a word. Set TrainingArguments(max_grad_norm=0), or "
                'choose layerwise={"clip": "previous"} (by the global norm of the step before) or {"clip": '
                '"per_tensor"} (each gradient by its own norm): max_grad_norm is their limit.'
            )
        if self.clip is not None and not norm:
            raise ValueError(
                f'for_trainer: layerwise={{"clip": {self.clip!r}}} needs a limit: set TrainingArguments(max_grad_norm='
                "...). (It is 0 now; training with clip has set it to 0 if it was done with these args before.)"
            )
        for name, why in _REFUSED.items():
            if getattr(args, name, None):
                raise ValueError(f"for_trainer: layerwise does not go with {name}={getattr(args, name)!r}: {why}")

    def arrange(self, model: nn.Module, optimizer: LowRankOptimizer) -> None:
        """Called when Trainer builds the optimizer: everything that must be known before the first step."""
        from accelerate.state import GradientState

        self.check()
        _check_engine(model)
        if self.clip is not None and self.args.max_grad_norm:
            # Trainer reads it at every step, and would scale the gradients that wait for their update
            self.norm, self.args.max_grad_norm = self.args.max_grad_norm, 0.0
            logger.warning(
                "for_trainer: layerwise clips to max_grad_norm=%s itself; TrainingArguments.max_grad_norm is 0 now, "
                "also for whoever uses these arguments next.",
                self.norm,
            )
        if self.clip == "previous":
            for group in optimizer.param_groups:  # here already, so that a checkpoint finds where to put it
                group.setdefault(Previous.KEY, 0.0)
        # Without it FSDP2 keeps whole, unsharded gradients between micro-batches, on which no hook fires.
        GradientState().plugin_kwargs["sync_each_batch"] = True
        prepare = BeforeForward(self, model, optimizer)
        optimizer.train = prepare
        optimizer.register_step_pre_hook(prepare.check_called)


class BeforeForward:
    """`optimizer.train`: Trainer calls it before the forward pass of each micro-batch."""

    def __init__(self, option: LayerwiseOption, model: nn.Module, optimizer: LowRankOptimizer) -> None:
        self.option, self.model, self.optimizer = option, model, optimizer
        self.handle: InBackward | None = None

    def __call__(self) -> None:
        """Call `layerwise` at the first time; tell it which backward completes the gradients."""
        from accelerate.state import GradientState

        if self.handle is None:
            steps, clip, norm = self.option.args.gradient_accumulation_steps, self.option.clip, self.option.norm
            self.handle = layerwise(self.model, self.optimizer, steps, clip, norm)
        self.handle.expect(bool(GradientState().sync_gradients))

    def check_called(self, optimizer: LowRankOptimizer, *_: Any) -> None:
        """Before each `step()`: a loop that is not Trainer's must not lose the option.

        Loading a checkpoint makes a step on zeros first (torch.distributed.checkpoint): that one may pass.
        """
        if self.handle is not None:
            return
        hosts = [p for group in optimizer.param_groups for p in group["params"] if engines.has_grad(p)]
        if any(bool(engines.local_grad(p).any()) for p in hosts):
            raise RuntimeError(
                "for_trainer: layerwise was asked for, but optimizer.train() was not called before the forward pass, "
                "as transformers' Trainer.training_step does, so that nothing was updated in the backward. Is "
                "training_step overridden without super()? Call self.optimizer.train() at its beginning."
            )


_REFUSED = {
    "fp16": "its loss scaling must see all gradients before the first is used. Use bf16=True.",
    "auto_find_batch_size": "running out of memory in a backward leaves some weights updated and others not.",
    "deepspeed": (
        'a ds_config decides there. Under ZeRO-3 name the optimizer in it, with "layerwise": true among its params.'
    ),
}


def _clip_of(wish: Any) -> str | None:
    if wish is True:
        return None
    if not isinstance(wish, Mapping):
        raise TypeError(f'for_trainer: layerwise must be True, False or a dict ({{"clip": "previous"}}), got {wish!r}.')
    unknown = [key for key in wish if key != "clip"]
    if unknown:
        near = "; did you mean 'clip'?" if difflib.get_close_matches(str(unknown[0]), ["clip"], 1) else ""
        raise ValueError(
            f"for_trainer: layerwise has no option {unknown[0]!r}{near} It knows clip; the limit and the micro-batches "
            "are max_grad_norm and gradient_accumulation_steps of the TrainingArguments."
        )
    clip = wish.get("clip")
    if clip is not None and clip not in _CLIPS:
        hint = ": Trainer runs each forward and backward once" if clip in CLIPS else ""
        raise ValueError(f"for_trainer: layerwise's clip must be one of {_CLIPS} or None, got {clip!r}{hint}.")
    return clip


def _check_engine(model: nn.Module) -> None:
    """Refuse engines whose gradients are not complete in a parameter's own hook.

    Raises:
        RuntimeError: accelerate will wrap the model in DDP, or hand it to DeepSpeed.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    state = AcceleratorState()
    if state.distributed_type == DistributedType.DEEPSPEED:
        raise RuntimeError(f"for_trainer: layerwise does not go with DeepSpeed here: {_REFUSED['deepspeed']}")
    sharded = state.distributed_type == DistributedType.FSDP or any(engines.is_dtensor(p) for p in model.parameters())
    if state.num_processes > 1 and not sharded:
        raise RuntimeError(
            f"layerwise: {state.num_processes} processes without FSDP: Trainer wraps the model in "
            "DistributedDataParallel, which averages gradients after the hooks and keeps them all in its buckets. Use "
            'FSDP2: TrainingArguments(fsdp=True, fsdp_config={"version": 2, ...}).'
        )
