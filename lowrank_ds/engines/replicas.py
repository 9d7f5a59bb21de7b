"""Which engines average gradients over replicas, and who is asked to do it in their place."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from lowrank_ds.collectives import Averaging
from lowrank_ds.engines import deepspeed


class Averager(Protocol):
    """Who averages gradients in the place of an engine (`lowrank_ds.replicas.InSubspace`)."""

    def announce(self) -> None:
        """A backward pass has begun to hand out gradients."""

    def send(self, items: Sequence[tuple[Tensor, Tensor]], group: Any, flat: Tensor | None = None) -> Averaging:
        """Start to average these (parameter, gradient held here) over the ranks of `group`.

        Every rank of the group sends the same parameters in the same order. flat (numel,): all these gradients, where
        they are views of one tensor.
        """


class Averaged(Protocol):
    """An engine whose gradients an `Averager` averages."""

    def flush(self) -> None:
        """The backward is over: wait until all gradients are averaged."""

    def undo(self) -> None:
        """Give the work back to the engine."""


_ZERO = (
    "reduce_in_subspace: under DeepSpeed ZeRO no gradient is all-reduced over replicas: each rank is sent the sum of "
    "its own part only (reduce-scatter), inside DeepSpeed. Use DistributedDataParallel, or fully_shard with a "
    "(replicas, shards) mesh; under ZeRO leave the call out."
)
_FSDP1 = (
    "reduce_in_subspace: the model is wrapped in FSDP1, which hands out no gradient before it is reduced. Use "
    "torch.distributed.fsdp.fully_shard with a (replicas, shards) mesh."
)
_NO_REPLICAS = (
    "reduce_in_subspace: {name} has no replicas, so no gradient is all-reduced: its gradients are sent to the rank "
    "that holds the part (reduce-scatter). This is for DistributedDataParallel, replicate() and fully_shard with a two-"
    "dimensional mesh (replicas, shards); leave the call out here."
)
_PLAIN = (
    "reduce_in_subspace: {name} is a whole, plain tensor, and the model that was passed is not what averages its "
    "gradients. Pass the DDP-wrapped model itself (with one process there is nothing to send; leave the call out)."
)


def check(model: nn.Module) -> None:
    """Raise RuntimeError for an engine that averages nothing over replicas, or cannot be asked: see the messages."""
    if hasattr(model, "zero_optimization_stage") or any(map(deepspeed.is_partitioned, model.parameters())):
        raise RuntimeError(_ZERO)
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules()):
        raise RuntimeError(_FSDP1)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    module = sys.modules.get("torch.distributed.tensor")
    plain = next((name for name, p in trained if module is None or not isinstance(p, module.DTensor)), None)
    if plain is not None:
        raise RuntimeError(_PLAIN.format(name=plain))
    from lowrank_ds.engines import hsdp

    groups = hsdp.replicating_groups(model)
    alone = next((name for name, p in trained if p not in groups), None)
    if alone is not None:
        raise RuntimeError(_NO_REPLICAS.format(name=alone))


def attach(model: nn.Module, averager: Averager) -> Averaged:
    """Have `averager` average the gradients of a model (see `check`) in the place of its engine."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        from lowrank_ds.engines import ddp

        return ddp.Hook(model, averager)
    from lowrank_ds.engines import hsdp

    return hsdp.Buckets(model, averager)
