"""DistributedDataParallel: gradients on their way to be averaged, bucket by bucket (`lowrank_ds.reduce_in_subspace`).

A communication hook, public in torch, is given each bucket in the backward, as soon as its gradients are there; what it
leaves in the bucket DDP copies to the parameters when the backward ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_ds.collectives import Averaging
from lowrank_ds.engines.replicas import Averager


class Hook:
    """The communication hook on one model. It keeps nobody alive: Python's collector does not look into DDP."""

    def __init__(self, model: DistributedDataParallel, averager: Averager) -> None:
        if model.find_unused_parameters:
            raise RuntimeError(
                "reduce_in_subspace: the model is wrapped with find_unused_parameters=True, under which only DDP knows "
                "whether another rank has a gradient for a parameter. Leave it out, or (the same parameters unused in "
                "every step) wrap with static_graph=True instead."
            )
        if getattr(model, "mixed_precision", None) is not None:
            raise RuntimeError(
                "reduce_in_subspace: the model is wrapped with DDP's mixed_precision, which has its own communication "
                "hook. Use torch.autocast, or bf16 weights."
            )
        self._averager: Callable[[], Averager | None] = weakref.ref(averager)
        try:
            model.register_comm_hook(model.process_group, _hook_of(self))
        except RuntimeError as error:
            raise RuntimeError(
                "reduce_in_subspace: the model has a communication hook already, and DDP takes one in its life "
                f"(reduce_in_subspace is one too). Wrap it anew, and register no other hook. [{error}]"
            ) from error

    def average(self, items: list[tuple[Tensor, Tensor]], bucket: Tensor, group: Any) -> Averaging:
        """Start to average a bucket of (parameter, gradient): a flat `bucket` (numel,) and views of it."""
        averager = self._averager()
        if averager is None:  # its optimizer is gone: what DDP does without a hook
            return Averaging([bucket], group)
        averager.announce()
        return averager.send(items, group, bucket)

    def flush(self) -> None:
        """Nothing waits here: DDP waits for the buckets itself."""

    def undo(self) -> None:
        """From now on whole gradients are averaged."""
        self._averager = lambda: None


def _hook_of(hook: Hook) -> Callable[[Any, Any], Any]:
    """What `register_comm_hook` takes (it looks at a function's name and annotations)."""

    def reduce_in_subspace(group, bucket):
        items = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
        buffer = bucket.buffer()
        return hook.average(items, buffer, group).future(buffer)

    return reduce_in_subspace
