"""HSDP (`fully_shard` on a two-dimensional mesh) and `replicate()`: gradients on their way to the mean over replicas.

FSDP2 scatters the sums of a unit's gradients over the shards and then all-reduces that over the replicas. None of its
public calls replaces the second part: `set_all_reduce_hook` runs after it, `set_requires_all_reduce(False)` keeps the
gradients from the parameters. So the all-reduce is left on, over a group of this rank alone, which moves nothing:

    module._get_fsdp_state()._fsdp_param_groups     the units' parameter groups (`FSDPParamGroup`)
    group.mesh_info.replicate_process_group         the replicas: FSDP2 asks for it in each backward, for nothing else
    group.fsdp_params[i].sharded_param              the parameters
    group.gradient_divide_factor                    None, or what the user has set

The gradients come to us by the parameters' own (public) hooks, which FSDP2 calls when it has set `p.grad`. No other
file touches these attributes. Read and run with torch 2.13; versions outside `TESTED` are refused
(LOWRANK_DS_UNTESTED_TORCH=1 overrides), and so is a torch without them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lowrank_ds.collectives import Averaging
from lowrank_ds.engines import dtensor, tested
from lowrank_ds.engines.replicas import Averager

TESTED = ((2, 13), (2, 14))  # from, below
BUCKET = 25 << 20  # bytes of gradients that are averaged together: DDP's default
_IN_FLIGHT = 2  # buckets on their way at once
_TAKEN = "_averaged_by_lowrank_ds"  # our mark on a mesh_info


def check_version(version: str) -> None:
    """Raise RuntimeError for a torch whose private attributes were not tested."""
    tested.require(
        version, TESTED, "LOWRANK_DS_UNTESTED_TORCH",
        "torch {found} found; reduce_in_subspace takes FSDP2's all-reduce over replicas out of its hands by private "
        "attributes, known for torch >= {low}, < {high}. Use one of these, or DistributedDataParallel, or leave the "
        "call out; or set LOWRANK_DS_UNTESTED_TORCH=1 and compare a few steps with a run without it first.",
    )  # fmt: skip


def _attribute(owner: Any, name: str) -> Any:
    """A private attribute that every tested torch has."""
    return tested.attribute(
        owner, name, f"torch {torch.__version__}: FSDP2 keeps other records than in the versions reduce_in_subspace "
        "was tested with ({missing}). Leave the call out, or use torch 2.13.",
    )  # fmt: skip


def _param_groups(model: nn.Module) -> Iterator[Any]:
    """FSDP2's parameter groups that have replicas."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in _attribute(_attribute(module, "_get_fsdp_state")(), "_fsdp_param_groups"):
                info = _attribute(group, "mesh_info")
                if hasattr(info, _TAKEN):
                    raise RuntimeError(
                        "reduce_in_subspace was called for this model before, maybe for another optimizer. Call "
                        ".remove() on what it returned first."
                    )
                replicas = getattr(info, "replicate_process_group", None)
                if replicas is not None and dist.get_world_size(replicas) > 1:
                    yield group


def replicating_groups(model: nn.Module) -> dict[Tensor, Any]:
    """{parameter: the group of its replicas}, of the parameters that have some.

    Raises:
        RuntimeError: a torch that was not tested, or a gradient divisor of the user's.
    """
    check_version(torch.__version__)
    found = {}
    for group in _param_groups(model):
        if _attribute(group, "gradient_divide_factor") is not None:
            raise RuntimeError(
                "reduce_in_subspace: set_gradient_divide_factor was called on the model; gradients over replicas would "
                "be divided twice. Leave it out: they are averaged."
            )
        for param in _attribute(group, "fsdp_params"):
            found[_attribute(param, "sharded_param")] = group.mesh_info.replicate_process_group
    return found


class Buckets:
    """Gradients of one model that wait until there are enough of them to be averaged together.

    Attributes:
        waiting, waiting_bytes: gradients that have come since the last were sent. sent: what is on its way.
    """

    def __init__(self, model: nn.Module, averager: Averager) -> None:
        self.groups, self._averager = replicating_groups(model), weakref.ref(averager)
        self.waiting: list[Tensor] = []
        self.waiting_bytes = 0
        self.sent: list[Averaging] = []
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        infos = {id(group.mesh_info): group.mesh_info for group in _param_groups(model)}.values()
        before = [(info, info.replicate_process_group) for info in infos]
        for info in infos:
            info.replicate_process_group = alone
            setattr(info, _TAKEN, True)
        arrived = weakref.WeakMethod(self._arrived)  # Python's collector does not see hooks
        handles = [
            host.register_post_accumulate_grad_hook(lambda host: (arrived() or _ignore)(host))
            for host in self.groups
            if host.requires_grad
        ]
        # also when nobody is left who would average: FSDP2 does it again then
        self._undo = weakref.finalize(self, _restore, before, handles)

    def _arrived(self, host: Tensor) -> None:
        """FSDP2 has set the gradient of `host`, averaged over its shards."""
        averager = self._averager()
        averager.announce()
        size = host.grad.nbytes
        full = self.waiting_bytes + size > BUCKET
        if self.waiting and (full or self.groups[host] is not self.groups[self.waiting[0]]):
            self._send()
        self.waiting.append(host)
        self.waiting_bytes += size

    def _send(self) -> None:
        hosts, self.waiting, self.waiting_bytes = self.waiting, [], 0
        items = [(host, _gradient(host)) for host in hosts]
        self.sent.append(self._averager().send(items, self.groups[hosts[0]]))
        while len(self.sent) > _IN_FLIGHT:  # what travels is a copy
            self.sent.pop(0).wait()

    def flush(self) -> None:
        """The backward is over: wait until all gradients are averaged."""
        if self.waiting:
            self._send()
        sent, self.sent = self.sent, []
        for averaging in sent:
            averaging.wait()

    def undo(self) -> None:
        """FSDP2 averages over replicas again."""
        self._undo()


@torch.no_grad()
def _gradient(host: Tensor) -> Tensor:
    """This rank's part of the gradient of `host`, laid out as the parameter (sequence parallelism sums it late)."""
    if host.grad.placements != host.placements:
        host.grad = host.grad.redistribute(host.device_mesh, host.placements)
    return dtensor.local(host.grad)


def _ignore(host: Tensor) -> None:
    """Nobody is there to average: `_restore` has seen to it that FSDP2 does."""


def _restore(before: list[tuple[Any, Any]], handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    for info, group in before:
        info.replicate_process_group = group
        delattr(info, _TAKEN)
