"""R on the wire: replicas average the projected gradient in place of the gradient, between refreshes.

Projection is linear: the mean over replicas of G_i Q is (the mean of the G_i) Q. A recipe that uses nothing but the
coordinates (GaLore: the residual is dropped) therefore loses nothing when r numbers a line travel instead of the line.
A step that makes a new basis needs the mean of the gradients themselves, and so does what is not projected: these are
averaged whole, as the engine does it.

Which matrices a backward sends as coordinates is decided from counters that are equal on all replicas, before it
starts: those for which no basis is due. (With `lazy_refresh` a due basis may be put off in the step; the gradient then
travelled whole once in vain, nothing else changes.)
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_ds import accumulate, collectives, engines
from lowrank_ds.backward import check_same_tensors
from lowrank_ds.collectives import Averaging, Task, run_all
from lowrank_ds.failures import RankError, some
from lowrank_ds.optimizer import LowRankOptimizer, Place
from lowrank_ds.recipe import Recipe
from lowrank_ds.residual import Drop, ScaleGradient, ScaleResidual
from lowrank_ds.slots import due

_WIRE = (None, torch.bfloat16, torch.float32)
_BUCKET = 1 << 27  # numbers (fp32) that projections keep alive at once


class Traffic(NamedTuple):
    """Bytes that this rank gave to all-reduces over replicas for one step (a ring of W ranks sends 2 (W-1)/W of it).

    Attributes:
        coordinates: of projected gradients.
        whole: of whole gradients.
        without: what whole gradients would have been.
    """

    coordinates: int
    whole: int
    without: int

    def plus(self, other: Traffic) -> Traffic:
        """Both together."""
        return Traffic(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


NOTHING = Traffic(0, 0, 0)


def reduce_in_subspace(
    model: nn.Module, optimizer: LowRankOptimizer, wire_dtype: torch.dtype | None = None
) -> InSubspace:
    """Average projected gradients over replicas as coordinates, r numbers a line, between refreshes (DDP, HSDP).

    Call it once, when the model is wrapped: DistributedDataParallel, `fully_shard` on a (replicas, shards) mesh, or
    `replicate()`. The training loop stays as it is, `no_sync()` and `set_requires_gradient_sync` included. State and
    checkpoints are the same with and without. Weights are the same to rounding.

    After a backward that averages, `p.grad` is None for each matrix that travelled as coordinates: nobody has the mean
    of its gradients. So there is no global norm to clip to: `step()` raises if gradients were changed after the
    backward (`clip_grad_norm_`, `GradScaler`).

    Args:
        model: the wrapped model.
        optimizer: of this package, on the model's parameters, with a recipe that drops the residual: GaLoreAdamW,
            GaLoreAdamW8bit, QGaLore, GaLoreAdafactor.
        wire_dtype: what coordinates and whole gradients travel and are summed as. Default None: coordinates as fp32,
            gradients as they are; exact. torch.bfloat16: half the bytes of fp32; not exact (8 bits of mantissa, each
            sum rounded). torch.float32: bf16 gradients are summed in fp32.

    Returns:
        A handle: `.traffic` and `.total` (`Traffic` of the last step and of all), `.remove()`.

    Raises:
        TypeError: not an optimizer of this package.
        ValueError: a recipe that needs whole gradients, nothing projected, `compress_accumulation`, or another dtype.
        RuntimeError: an engine that averages nothing over replicas (ZeRO, FSDP1, FSDP2 without replicas, one process)
            or cannot be asked (DDP with find_unused_parameters); `layerwise`; or an optimizer on other tensors.
    """
    _check_arguments(optimizer, wire_dtype)
    engines.check_replicas(model)
    check_same_tensors(model, optimizer, "reduce_in_subspace")
    handle = InSubspace(optimizer, wire_dtype)
    handle.take_over(model)
    optimizer._replicas = handle
    return handle


def _check_arguments(optimizer: Any, wire_dtype: Any) -> None:
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(
            f"reduce_in_subspace: optimizer must be one of lowrank_ds, such as GaLoreAdamW; got "
            f"{type(optimizer).__name__}."
        )
    if wire_dtype not in _WIRE:
        raise ValueError(
            f"reduce_in_subspace: wire_dtype must be None (exact), torch.bfloat16 or torch.float32; got {wire_dtype!r}."
        )
    name = type(optimizer).__name__
    if optimizer._replicas is not None:
        raise RuntimeError("reduce_in_subspace was called for this optimizer before; call .remove() on its handle.")
    if optimizer._in_backward is not None:
        raise RuntimeError(
            "reduce_in_subspace: layerwise() updates inside the backward, and coordinates are averaged when it ends. "
            "Choose one of the two."
        )
    recipes = [optimizer.recipe(group) for group in optimizer.param_groups]
    why = next((why for why in map(_needs_whole, recipes) if why), None)
    if why is not None:
        raise ValueError(
            f"reduce_in_subspace: {name}: {why}, so the mean of the coordinates is not enough. Leave the call out, or "
            "use a GaLore optimizer, which drops what is outside the subspace."
        )
    if optimizer._compresses():
        raise ValueError(
            "reduce_in_subspace sums micro-batches as coordinates by itself, wherever a backward averages them. Leave "
            "out compress_accumulation."
        )
    if all(recipe.subspace is None for recipe in recipes):
        raise ValueError(f"reduce_in_subspace: {name} projects nothing (rank is null), so there are no coordinates.")


def _needs_whole(recipe: Recipe) -> str | None:
    """Why a recipe needs the whole gradient; None if it does not, or projects nothing."""
    if recipe.subspace is None:
        return None
    if recipe.momentum is not None:
        return "its rule (Adafactor) works on the whole gradient, only its momentum is in the subspace"
    if isinstance(recipe.residual, ScaleResidual):
        return "its update has the part of the gradient outside the subspace (Fira's residual)"
    if isinstance(recipe.residual, ScaleGradient):
        return "its update is the whole gradient, scaled (APOLLO)"
    return None if isinstance(recipe.residual, Drop) else "its residual uses the whole gradient"


class InSubspace:
    """Averages the gradients of one optimizer's parameters over replicas; what `reduce_in_subspace` returns.

    traffic, total: what this rank gave to all-reduces over replicas, for the last step and for all.
    """

    def __init__(self, optimizer: LowRankOptimizer, wire_dtype: torch.dtype | None) -> None:
        self.optimizer, self.wire_dtype = optimizer, wire_dtype
        self.traffic, self.total = NOTHING, NOTHING
        self._indices: dict[Tensor, tuple[int, int]] = {}  # of its param group, and in it; loading replaces the groups
        self._engine: engines.Averaged | None = None
        self._forward: Any = None
        self._backward = -1  # the backward pass at whose end `_end` is called
        self._agreed: set[Tensor] = set()  # whose counters were compared over the replicas
        self.forget()

    def take_over(self, model: nn.Module) -> None:
        """Begin: the engine of `model` hands its gradients to us."""
        self._engine = engines.attach_averager(model, self)
        self.optimizer.init_state()  # all of it, outside the backward
        self.optimizer._step_supports_amp_scaling = True  # torch's GradScaler then tells step() that it is at work
        for number, group in enumerate(self.optimizer.param_groups):
            for index, host in enumerate(group["params"]):
                self._indices[host] = number, index
        before_forward = weakref.WeakMethod(self._before_forward)  # the model must not keep the optimizer alive
        self._forward = model.register_forward_pre_hook(lambda *_: (before_forward() or _nothing)())

    def remove(self) -> None:
        """Give the averaging back to the engine: whole gradients again (a DDP model cannot be taken over anew).

        Raises:
            RuntimeError: coordinates wait for `step()`; nobody else knows of them.
        """
        if self._coords or self._arriving:
            raise RuntimeError(
                "reduce_in_subspace: remove() between a backward pass and step() would lose the gradients that "
                "travelled as coordinates. Call it after step(), or optimizer.zero_grad() first."
            )
        self._engine.undo()
        self._forward.remove()
        del self.optimizer._step_supports_amp_scaling
        self.optimizer._replicas = None

    def forget(self) -> None:
        """Gradients were dropped: begin a new step."""
        self._coords: dict[Tensor, list[Tensor]] = {}  # of each matrix in a tensor: the sum over micro-batches
        self._arriving: list[tuple[Tensor, list[Tensor]]] = []  # of the last backward, some of it still on its way
        self._versions: dict[Tensor, tuple[int, int]] = {}  # of whole gradients, when they were averaged
        self._norms: dict[Tensor, Tensor] = {}  # of whole gradients that are DTensors, then; see `_norms_of`
        self._whole: set[Tensor] = set()  # what was averaged whole since the last step
        self._unused = False  # whether a backward has averaged gradients that no step has used
        self._outdated = False  # whether state was loaded over them
        self._spent = False  # whether the last step has used up coordinates, and gradients beside them are still there
        self._counted = NOTHING

    def state_loaded(self) -> None:
        """The counters, and the bases of what was averaged, may be others now."""
        self._agreed.clear()
        self._outdated = bool(self._coords or self._arriving)

    # -- in the backward, called by the engine ------------------------------------------------------------------------
    def announce(self) -> None:
        """See `engines.Averager`: have `_end` called when this backward, and what the engine does then, are over."""
        if engines.current_backward() == self._backward:
            return
        self._backward, self._unused = engines.current_backward(), True
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._end))  # in the second round: DDP has queued its own end by the first

    @torch.no_grad()
    def send(self, items: Sequence[tuple[Tensor, Tensor]], group: Any, flat: Tensor | None = None) -> Averaging:
        """See `engines.Averager`."""
        self._check_counters([host for host, _ in items], group, items[0][1].device)
        folds = [self._folds(host) for host, _ in items]
        folded = [item for item, on in zip(items, folds, strict=True) if on]
        whole = [item for item, on in zip(items, folds, strict=True) if not on]
        coords = self._project(folded)
        self._arriving += [(host, own) for (host, _), own in zip(folded, coords, strict=True)]
        self._whole.update(host for host, _ in whole)
        parts, grads = [part for own in coords for part in own], [grad for _, grad in whole]
        now = Traffic(self._bytes(parts), self._bytes(grads), sum(grad.nbytes for _, grad in items))
        self._counted = self._counted.plus(now)
        names = [self._name(host) for host, _ in items]
        return Averaging([flat] if flat is not None and not folded else [*parts, *grads], group, self.wire_dtype, names)

    def _bytes(self, tensors: list[Tensor]) -> int:
        return sum(t.numel() * (self.wire_dtype or t.dtype).itemsize for t in tensors)

    def _folds(self, host: Tensor) -> bool:
        """Whether the coming step needs no more of a gradient than its coordinates; the same on all replicas."""
        if host not in self._indices:
            return False  # of no param group, or of one that was added later
        group, _ = place = self._place(host)
        recipe, slots = self.optimizer.recipe(group), self.optimizer._bind(*place)
        return bool(slots) and all(slot.projected and not due(slot, recipe) for slot in slots)

    def _project(self, folded: Sequence[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
        """Coordinates (kept lines, r) of each matrix in each of some (parameter, gradient held here)."""
        tasks, counts = [], []
        for host, grad in folded:
            group, _ = place = self._place(host)
            recipe, slots = self.optimizer.recipe(group), self.optimizer._bind(*place)
            flat, weight = grad.detach().contiguous().view(-1), engines.local(host).detach()
            for slot in slots:
                part = slot.entries(flat)
                job = self.optimizer._job(slot, group, recipe, part, weight, False, advance=False)
                tasks.append(Task(job.layout, accumulate.project(job), job.size, slot.name))
            counts.append(len(slots))
        found = iter(run_all(tasks, folded[0][1].device, _BUCKET)) if tasks else iter(())
        return [[next(found) for _ in range(count)] for count in counts]

    def _check_counters(self, hosts: Sequence[Tensor], group: Any, device: torch.device) -> None:
        """Compare, once, what decides `_folds`: replicas that disagree would send different things to each other."""
        new = [host for host in hosts if host in self._indices and host not in self._agreed]
        if not new:
            return
        self._agreed.update(new)
        slots = [slot for host in new for slot in self.optimizer._bind(*self._place(host))]
        facts = [(slot.name, slot.step, slot.refreshes, slot.last_refresh, slot.doublings) for slot in slots]
        digest = hashlib.sha256(repr(facts).encode()).digest()
        if not collectives.agree(int.from_bytes(digest[:7], "little"), group, device):
            raise RankError(
                f"reduce_in_subspace: the replicas are not at the same step of {some(slot.name for slot in slots)}: "
                "they did not load the same checkpoint, or some left a step out. Nothing was averaged. End all ranks, "
                "mend that, and start again from the last checkpoint."
            )

    @torch.no_grad()
    def _end(self) -> None:
        """The backward is over: gradients that nobody averaged go, and what happens to the others will be noticed."""
        self._engine.flush()
        for host, _ in self._arriving:
            host.grad = None
        hosts = [host for host in self._whole if engines.has_grad(host)]
        self._versions |= {host: _version(host) for host in hosts}
        self._norms |= _norms_of(hosts)

    # -- around it ----------------------------------------------------------------------------------------------------
    def _before_forward(self) -> None:
        """A new micro-batch: gradients of the ones before may have been dropped behind the optimizer's back."""
        if self._unused and self._versions and not any(map(engines.has_grad, self._versions)):
            self.forget()
        if self._unused:
            self._check_unchanged()
        else:  # what the last step has used and is gone says nothing about gradients to come
            self._versions = {host: state for host, state in self._versions.items() if engines.has_grad(host)}
        self._sum()

    @torch.no_grad()
    def _sum(self) -> None:
        """Add the coordinates of the last backward, which is over, to those before it."""
        for host, parts in self._arriving:
            if host not in self._coords:
                self._coords[host] = parts
                continue
            for before, part in zip(self._coords[host], parts, strict=True):
                before.add_(part)
        self._arriving.clear()

    def before_step(self) -> None:
        """Hand the coordinates to the optimizer.

        Raises:
            RuntimeError: a gradient was not averaged, or changed since; or the basis of its coordinates is gone.
        """
        self._sum()
        self._refuse_scaler()
        if self._spent and not self._unused and any(map(engines.has_grad, self._versions)):
            raise RuntimeError(
                "reduce_in_subspace: step() came a second time after one backward pass, whose coordinates the first "
                "has used up: projected matrices would stand still while others move. Call optimizer.zero_grad(), "
                "forward and backward before each step()."
            )
        if self._outdated:
            raise RuntimeError(
                "reduce_in_subspace: state was loaded between a backward pass and step(), whose coordinates belong to "
                "the bases of before. Call optimizer.zero_grad() after loading, then forward, backward and step()."
            )
        hosts = [host for group in self.optimizer.param_groups for host in group["params"] if engines.has_grad(host)]
        left_out = [host for host in hosts if host not in self._versions]
        if left_out:
            raise RuntimeError(
                f"reduce_in_subspace: the gradient of {self._name(left_out[0])} (and {len(left_out) - 1} more) was not "
                "averaged over replicas: the last backward before step() was inside no_sync(), or the parameter was "
                "unfrozen or added after reduce_in_subspace(). Average in the last backward; after a change of "
                "parameters call handle.remove() and reduce_in_subspace() again."
            )
        self._check_unchanged()
        self._check_norms()
        for host, parts in self._coords.items():
            for slot, part in zip(self.optimizer._bind(*self._place(host)), parts, strict=True):
                slot.arrived = part
        self.traffic, self.total = self._counted, self.total.plus(self._counted)
        versions, spent = self._versions, bool(self._coords)
        self.forget()
        self._versions, self._spent = versions, spent  # a step may come again on the same gradients, if all are whole

    def _refuse_scaler(self) -> None:
        """GradScaler divides gradients without counting it as a change, and knows of no coordinates."""
        if not hasattr(self.optimizer, "found_inf"):
            return
        del self.optimizer.found_inf, self.optimizer.grad_scale  # it takes them back only after a step
        raise RuntimeError(
            "reduce_in_subspace: GradScaler scales the loss, and the projected matrices' gradients, which travelled as "
            "coordinates, stay scaled. Use bf16 in place of fp16, or leave out reduce_in_subspace."
        )

    @torch.no_grad()
    def _check_unchanged(self) -> None:
        changed = [h for h, version in self._versions.items() if engines.has_grad(h) and _version(h) != version]
        if changed:
            raise self._changed(changed)

    @torch.no_grad()
    def _check_norms(self) -> None:
        """`clip_grad_norm_` changes DTensors by operations that move no version counter: one look a step."""
        now = _norms_of([host for host in self._norms if engines.has_grad(host)])
        if not now:
            return
        before, after = torch.stack([self._norms[host] for host in now]), torch.stack([*now.values()])
        other = ((before != after) & ~(before.isnan() & after.isnan())).tolist()
        if any(other):
            raise self._changed([host for host, moved in zip(now, other, strict=True) if moved])

    def _changed(self, hosts: Sequence[Tensor]) -> RuntimeError:
        return RuntimeError(
            f"reduce_in_subspace: the gradient of {self._name(hosts[0])} (and {len(hosts) - 1} more) was "
            "changed after it was averaged: by clip_grad_norm_ or clip_grad_value_, a backward pass in no_sync() "
            "after it, or model.zero_grad(set_to_none=False). Projected matrices travel as coordinates and have no "
            "gradient that could be changed alike, and no norm. Leave the clipping out (Trainer: max_grad_norm=0), "
            "average every later micro-batch too, and drop gradients with optimizer.zero_grad(); or leave out "
            "reduce_in_subspace."
        )

    def _place(self, host: Tensor) -> Place:
        number, index = self._indices[host]
        return self.optimizer.param_groups[number], index

    def _name(self, host: Tensor) -> str:
        if host not in self._indices:
            return "a parameter that the optimizer does not train"
        group, index = self._place(host)
        return group["param_names"][index]


def _version(host: Tensor) -> tuple[int, int]:
    """Which tensor is held here of the gradient of `host`, and how often it was changed in place."""
    grad = engines.local_grad(host)
    return grad.data_ptr(), grad._version


def _norms_of(hosts: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """{parameter: norm (0-d) of its gradient's part held here}, of those that are DTensors."""
    held = {host: engines.local_grad(host) for host in hosts if engines.is_dtensor(host)}
    return dict(zip(held, torch._foreach_norm([*held.values()]), strict=True)) if held else {}


def _nothing() -> None:
    """The optimizer is gone."""
