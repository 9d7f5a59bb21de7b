"""Layer-wise updates: each parameter is updated inside the backward, when its gradient is complete, and that is freed.

The optimizer, its state and its state dict are the same as without; `step()` finishes what the backward left. A
gradient waits until the waiting ones would together be larger than the largest parameter, or the backward ends, so that
small ones share collectives: never more than the two largest gradients are alive. All ranks meet the same gradients in
the same order.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ds import engines
from lowrank_ds.clipping import CLIPS, Clip, make_clip
from lowrank_ds.groups import logger
from lowrank_ds.optimizer import LowRankOptimizer, Place
from lowrank_ds.recipe import Recipe


def layerwise(
    model: nn.Module,
    optimizer: LowRankOptimizer,
    accumulation_steps: int = 1,
    clip: str | None = None,
    max_grad_norm: float | None = None,
) -> InBackward:
    """Update every parameter inside the backward pass and free its gradient there (as LOMO does, arXiv:2306.09782).

    Call it once, when the model is in its final place: after `fully_shard`, `replicate()`, `deepspeed.initialize` or
    `accelerator.prepare`. `optimizer.step()` stays, once after the last backward of a step, and so do `zero_grad()`,
    learning rate schedules and state dicts.

    Args:
        model: the model, or the DeepSpeed engine (ZeRO-3).
        optimizer: of this package, on the model's parameters.
        accumulation_steps: backward passes before each `step()`. Gradients are summed in the subspace where the
            optimizer was built with `compress_accumulation`, else whole. Divide the loss by it, as always.
        clip: how gradients are clipped to `max_grad_norm`. "two_pass": by their exact global norm; pass `step` a
            closure that computes the loss and calls backward, it runs twice. "previous": by the global norm of the step
            before (none at the first). "per_tensor": each by its own norm.
        max_grad_norm: largest norm, > 0.

    Returns:
        A handle: `.norm` (the last global norm, 0-d or None), `.measuring()` (see there), `.remove()`.

    Raises:
        TypeError: not an optimizer of this package.
        ValueError: an argument out of range, or options that exclude each other.
        RuntimeError: a model under DDP, FSDP1 or ZeRO-1/2, or an optimizer on other tensors than the model's.
    """
    _check_arguments(optimizer, accumulation_steps, clip, max_grad_norm)
    if optimizer._replicas is not None:
        raise RuntimeError(
            "layerwise: reduce_in_subspace(model, optimizer) averages coordinates when the backward ends, and updates "
            "inside it would come before. Choose one of the two (call .remove() on the other's handle)."
        )
    if optimizer._in_backward is not None:
        raise RuntimeError("layerwise() was called for this optimizer before; call .remove() on its handle first.")
    accumulation_steps = engines.attach(model, optimizer, accumulation_steps)
    check_same_tensors(model, optimizer, "layerwise")
    optimizer.init_state()  # all of it, at the place it stays: a state dict is complete before the first step
    state = InBackward(optimizer, accumulation_steps, make_clip(clip, max_grad_norm, optimizer))
    optimizer._in_backward = state
    return state


def _check_arguments(optimizer: Any, accumulation_steps: Any, clip: Any, max_grad_norm: Any) -> None:
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(
            f"layerwise: optimizer must be one of lowrank_ds (for plain AdamW: GaLoreAdamW(..., rank=None)), got "
            f"{type(optimizer).__name__}."
        )
    if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int) or accumulation_steps < 1:
        raise ValueError(f"layerwise: accumulation_steps must be a whole number >= 1, got {accumulation_steps!r}.")
    if clip is not None and clip not in CLIPS:
        raise ValueError(f"layerwise: clip must be one of {', '.join(map(repr, CLIPS))} or None, got {clip!r}.")
    if clip is None and max_grad_norm:
        raise ValueError(
            f"layerwise: max_grad_norm={max_grad_norm} needs the norm of all gradients before any is used, and "
            'they are gone by then. Choose: clip="two_pass" (the exact global norm, forward and backward run twice), '
            '"previous" (the norm of the step before) or "per_tensor" (each gradient by its own norm).'
        )
    if clip is not None and not (isinstance(max_grad_norm, (int, float)) and 0 < max_grad_norm < float("inf")):
        raise ValueError(f"layerwise: clip={clip!r} needs max_grad_norm, a finite number > 0; got {max_grad_norm!r}.")
    if clip is not None and optimizer._compresses():
        raise ValueError(
            f"layerwise: clip={clip!r} needs norms of whole gradients, but the optimizer sums micro-batches in the "
            "subspace. Leave out clip, or compress_accumulation."
        )


def check_same_tensors(model: Any, optimizer: LowRankOptimizer, caller: str) -> None:
    """The optimizer's tensors must be the model's: those of before `fully_shard` never get a gradient."""
    known = {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=False):
            if id(p) not in known:
                raise RuntimeError(
                    f"{caller}: the optimizer's {name} is not a parameter of the model. Was the optimizer built "
                    "before fully_shard (or another wrapper) replaced the parameters? Build it afterwards."
                )


class InBackward:
    """The updates of one optimizer inside the backward; what `layerwise` returns."""

    def __init__(self, optimizer: LowRankOptimizer, micro_batches: int, clip: Clip | None) -> None:
        self.optimizer, self.micro_batches, self.clip = optimizer, micro_batches, clip
        self._indices: dict[Tensor, tuple[int, int]] = {}  # of its param group, and in it; loading replaces the groups
        self._handles: list[Any] = []
        self._ever = False  # whether any hook has fired
        self._measures = False
        self.saves_whole_sums = False  # whether somebody else puts half-finished sums of whole gradients in checkpoints
        self._backward = -1  # the backward pass at whose end `_flush` is called
        self._register()
        self.forget()
        self._largest = max((_size(host) for host in self._indices), default=0)
        self._say_what_accumulates()

    @property
    def norm(self) -> Tensor | None:
        """The global norm of the last gradients (0-d), under "two_pass" and "previous"."""
        return None if self.clip is None else self.clip.norm

    def remove(self) -> None:
        """Go back to updates in `step()` (not under ZeRO-3, where all that can follow is another `layerwise()`)."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.optimizer._in_backward = None

    def forget(self) -> None:
        """Begin a new step: nothing has fired, nothing waits."""
        self._expected = 0  # backward passes announced by `expect`
        self._fired: dict[Tensor, int] = {}
        self._waiting: dict[Tensor, bool] = {}  # tensor: whether to update it (else its gradient is only summed)
        self._waiting_size = 0
        if self.clip is not None:
            self.clip.restart()

    def expect(self, last: bool) -> None:
        """Say before a backward pass whether it is the last one before `step()`: where their number varies.

        `accumulation_steps` is set aside; call it before every backward then.
        """
        self._expected += 1
        self.micro_batches = self._expected if last else self._expected + 1

    def _register(self) -> None:
        arrived = weakref.WeakMethod(self._arrived)  # Python's collector does not see hooks: a cycle would never go

        def on_arrival(host: Tensor) -> None:
            callback = arrived()
            if callback is not None:  # else the optimizer is gone: an ordinary gradient
                callback(host)

        for number, group in enumerate(self.optimizer.param_groups):
            for index, host in enumerate(group["params"]):
                if host.requires_grad:
                    self._indices[host] = number, index
                    self._handles.append(engines.on_gradient(host, on_arrival))

    def _place(self, host: Tensor) -> Place:
        number, index = self._indices[host]
        return self.optimizer.param_groups[number], index

    def _recipe(self, host: Tensor) -> Recipe:
        return self.optimizer.recipe(self._place(host)[0])

    def _say_what_accumulates(self) -> None:
        whole = [host for host in self._indices if self._recipe(host).accumulation is None]
        if self.micro_batches > 1 and whole:
            size = sum(engines.local(host).nbytes for host in whole)
            logger.warning(
                "layerwise: %d micro-batches a step are summed as whole gradients for %d parameters: %.1f MiB stay "
                "alive on this rank between them (GaLore: compress_accumulation=True sums in the subspace).",
                self.micro_batches, len(whole), size / 2**20,
            )  # fmt: skip

    # -- in the backward --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _arrived(self, host: Tensor) -> None:
        """A gradient is complete (called by the engine's hook)."""
        self._ever = True
        fired = self._fired[host] = self._fired.get(host, 0) + 1
        if fired > self.micro_batches:
            raise RuntimeError(
                f"layerwise: the gradient of {self._name(host)} arrived {fired} times without step(), and "
                f"accumulation_steps is {self.micro_batches}: it is updated already. Call optimizer.step() after every "
                f"{self.micro_batches} backward passes, or raise accumulation_steps. (Reentrant activation "
                "checkpointing also does this to a weight used in two segments: use_reentrant=False.)"
            )
        if engines.before_reduction([] if self._is_reduced(host) else [host]):
            raise RuntimeError(engines.NOT_REDUCED.format(name=self._name(host)))
        if not engines.has_grad(host):
            raise RuntimeError(
                f"layerwise: the gradient of {self._name(host)} was taken away before its update, by a hook of its own "
                "or by layerwise() of another optimizer that has the same parameter. Leave one of them out."
            )
        if self._measures:
            if fired == self.micro_batches:
                self._measure(host)
            return
        if self.clip is not None and self.clip.two_passes and self.clip.factor is None:
            raise RuntimeError(
                'layerwise: clip="two_pass" must see all gradients once before the backward that updates: call '
                "optimizer.step(closure) with a closure that computes the loss and calls backward on it, or run a "
                "first forward and backward inside handle.measuring()."
            )
        if fired == self.micro_batches or self._recipe(host).accumulation is not None:
            self._wait(host, fired == self.micro_batches)

    def _is_reduced(self, host: Tensor) -> bool:
        return any(slot.layout.group is not None for slot in self.optimizer._bind(*self._place(host)))

    def _measure(self, host: Tensor) -> None:
        self.clip.measure(host)
        engines.drop_grad(host)

    def _wait(self, host: Tensor, update: bool) -> None:
        if (backward := engines.current_backward()) not in (-1, self._backward):
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._flush)
        if host not in self._waiting:
            if self._waiting and self._waiting_size + _size(host) > self._largest:
                self._flush()
            self._waiting_size += _size(host)
        self._waiting[host] = update
        if self._waiting_size >= self._largest:
            self._flush()

    @torch.no_grad()
    def _flush(self) -> None:
        """Update (or sum) what waits, and free its gradients."""
        waiting, self._waiting, self._waiting_size = self._waiting, {}, 0
        self.optimizer._fold(self._place(host) for host, update in waiting.items() if not update)
        self._update([host for host, update in waiting.items() if update])

    def _update(self, hosts: list[Tensor]) -> None:
        if not hosts:
            return
        if self.clip is not None and not self.clip.two_passes:
            for host in hosts:
                self.clip.measure(host)
        self.optimizer._update(map(self._place, hosts), None if self.clip is None else self.clip.scale)
        for host in hosts:
            engines.drop_grad(host)

    # -- around it --------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """For clip="two_pass": backward passes inside only measure the gradients; the next ones update.

        Run the same forward and backward passes as afterwards. Random numbers are put back where they were.
        """
        if self.clip is None or not self.clip.two_passes:
            raise RuntimeError('layerwise: measuring() is for clip="two_pass".')
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            self._measures = True
            try:
                yield
                for host in [host for host, fired in self._fired.items() if fired < self.micro_batches]:
                    self._measure(host)
                self.clip.conclude()
            finally:
                self._measures = False
                self.forget()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """`optimizer.step()`: finish the step that the backward passes did most of."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                if self.clip is not None and self.clip.two_passes:
                    with self.measuring():
                        closure()
                loss = closure()
        self._check_fired()
        if self._fired and max(self._fired.values()) < self.micro_batches:
            self.optimizer._warn_once("fewer", _FEWER.format(max(self._fired.values()), self.micro_batches))
        self._flush()
        self._update([host for host in self._indices if self._is_left(host)])
        if self.clip is not None:
            self.clip.conclude_step()
        self.optimizer._loads.clear()
        self.forget()
        self.optimizer._raise_errors()
        return loss

    def _is_left(self, host: Tensor) -> bool:
        """Whether a tensor got fewer gradients than `accumulation_steps`, and so was not updated in the backward."""
        fired = self._fired.get(host, 0)
        return fired < self.micro_batches and (fired > 0 or self.optimizer._sums(host))

    def before_saving(self) -> None:
        """Say what a state dict cannot have."""
        whole = not self.saves_whole_sums
        lost = [h for h, n in self._fired.items() if n == self.micro_batches or (whole and engines.has_grad(h))]
        if lost:
            logger.warning(
                "layerwise: state_dict() between a backward pass and step(): the gradients of %d parameters (such as "
                "%s) are not in it. Save after step().", len(lost), self._name(lost[0]),
            )  # fmt: skip

    def _check_fired(self) -> None:
        missed = [
            group["param_names"][index]
            for group, index in self.optimizer._places()
            if (host := group["params"][index]) not in self._fired and engines.has_grad(host)
        ]
        if missed:
            raise RuntimeError(
                f"layerwise: {missed[0]} (and {len(missed) - 1} more) has a gradient but its hook did not fire: the "
                "gradient was not made by a backward pass, or the parameters were replaced or added after layerwise(). "
                "Call handle.remove() and layerwise() again, after the last change of the model."
            )
        if not self._ever:
            raise RuntimeError(
                "layerwise: step() was called and no hook has fired yet: no parameter of the optimizer got a gradient. "
                "Was fully_shard (or another wrapper) applied after layerwise()? It replaces the parameters: call "
                "layerwise() afterwards."
            )
        if not self._fired and self.clip is not None and self.clip.measured:
            raise RuntimeError(
                'layerwise: clip="two_pass" has measured the gradients, but no backward pass came after measuring(): '
                "nothing was updated. Run the same forward and backward passes again before step()."
            )
        if not self._fired and not any(map(self.optimizer._sums, self._indices)):
            self.optimizer._warn_once("no gradient", "step() found no gradient on any parameter: nothing was updated.")

    def _name(self, host: Tensor) -> str:
        group, index = self._place(host)
        return group["param_names"][index]


_FEWER = (
    "layerwise: step() came after {} of accumulation_steps={} gradients, so that updates happen now and not in the "
    "backward. Right for an epoch's last, incomplete step; if it is every step, gradients are not reduced at each "
    "micro-batch and stay alive whole (FSDP2: set_requires_gradient_sync(True)), or accumulation_steps is too large."
)


def _size(host: Tensor) -> int:
    """Entries of the whole parameter: the same number on every rank."""
    size = 1
    for length in engines.full_shape(host):
        size *= length
    return size
