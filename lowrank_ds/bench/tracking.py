"""Memory of tensors, storage by storage: what is alive at the worst moment, and what it is."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_ds import engines

KINDS = ("weights", "gradients", "state", "other")  # other: activations and temporaries


class Peak(NamedTuple):
    """Bytes: the largest sum of all kinds; what it was made of; the largest of each kind, which may be at other times.

    at: {kind: bytes} when `total` was alive. own: {kind: largest bytes}.
    """

    total: int
    at: dict[str, int]
    own: dict[str, int]


class Tracker(TorchDispatchMode):
    """Records every storage that an operation returns while this is entered, until nothing refers to it any more.

    Its kind is told with `name`, at any time: the record is replayed afterwards, so that a gradient counts as one from
    the moment it was computed, not only from when it is in `.grad`. Works on fake tensors too. Storages that an
    engine frees and fills again (`resize_`) are followed. Not seen: workspace that a kernel allocates for itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[int, int, Any]] = {}  # storage: (number, bytes, weak reference)
        self._events: list[tuple[int, int]] = []  # (number, bytes more or less)
        self._kinds: dict[int, str] = {}
        self._numbers = itertools.count()

    # -- what is alive ------------------------------------------------------------------------------------------------
    def __enter__(self) -> Tracker:
        resize = self._resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int) -> Any:
            answer = resize(storage, size)
            self._see(storage)
            return answer

        torch.UntypedStorage.resize_ = followed
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record what it returned."""
        if any(issubclass(kind, _dtensor()) for kind in types):
            return NotImplemented  # it will come again as operations on the local tensors
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(engines.local(leaf).untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> int:
        """Record a storage, or its new size. Answers its number."""
        key, size = storage._cdata, storage.nbytes()
        number, before, reference = self._alive.get(key) or (next(self._numbers), 0, None)
        if size != before:
            self._events.append((number, size - before))
        reference = reference or weakref.ref(storage, lambda _, key=key: self._gone(key))
        self._alive[key] = number, size, reference
        return number

    def _gone(self, key: int) -> None:
        number, size, _ = self._alive.pop(key)
        self._events.append((number, -size))

    # -- what it is ---------------------------------------------------------------------------------------------------
    def name(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what these tensors' storages are."""
        for tensor in tensors:
            self._kinds[self._see(engines.local(tensor).untyped_storage())] = kind

    def follow_gradients(self, model: nn.Module) -> None:
        """Name each gradient when it arrives. Call it after sharding, before `layerwise` (hooks run in order)."""
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: self.name("gradients", [p.grad]))

    def name_model(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Name the weights and the optimizer's state."""
        self.name("weights", itertools.chain(model.parameters(), model.buffers()))
        leaves = torch.utils._pytree.tree_leaves(dict(optimizer.state))
        self.name("state", (leaf for leaf in leaves if isinstance(leaf, Tensor)))

    # -- the answer ---------------------------------------------------------------------------------------------------
    def now(self) -> int:
        """The number of events so far: a beginning for `peak`."""
        return len(self._events)

    def peak(self, since: int = 0) -> Peak:
        """The worst moment from event `since` on."""
        alive, own, total, at = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0), 0, {}
        for when, (number, size) in enumerate(self._events):
            kind = self._kinds.get(number, "other")
            alive[kind] += size
            if when < since - 1:  # the state just before `since` counts
                continue
            own = {k: max(own[k], alive[k]) for k in KINDS}
            if sum(alive.values()) > total:
                total, at = sum(alive.values()), dict(alive)
        return Peak(total, at, own)


def _dtensor() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor


def largest_two(model: nn.Module) -> int:
    """Bytes on this rank of the two largest parameters (by their whole size, as `layerwise` counts)."""
    held = sorted(model.parameters(), key=lambda p: -p.numel())
    return sum(engines.local(p).nbytes for p in held[:2])
