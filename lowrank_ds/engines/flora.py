"""flora-opt's `FloraAccelerator` on our Flora: micro-batches are summed in random subspaces, updates in the backward.

Imported when `lowrank_ds.FloraAccelerator` is first used: accelerate is needed for it alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lowrank_ds import engines
from lowrank_ds.algorithms import Flora
from lowrank_ds.backward import InBackward, layerwise


class FloraAccelerator(Accelerator):
    """accelerate's Accelerator with Flora's gradient accumulation (arXiv:2402.03293, Algorithm 1; package flora-opt).

    As there: `with accelerator.accumulate(model):` around the forward pass, `accelerator.backward(loss)`,
    `optimizer.step()` and `optimizer.zero_grad()`. A step of k micro-batches uses (G_1 + ... + G_k) A A^T with a
    seeded Gaussian A, new at each step: unbiased. On one process and under FSDP2 the parameters are updated inside the
    backward (`lowrank_ds.layerwise`), under DDP in `step()`. `save_state` holds a half-finished sum.

    Args:
        accumulation_compression_rank: r of A, for the matrices that Flora projects. None, or one micro-batch a step:
            gradients are summed whole.
        *args: accelerate's.
        **kwargs: accelerate's, such as gradient_accumulation_steps.

    Raises:
        ValueError: a rank that is no whole number >= 1, fp16, or an engine that sums gradients itself (DeepSpeed).
    """

    def __init__(self, accumulation_compression_rank: int | None = None, *args: Any, **kwargs: Any) -> None:
        rank = accumulation_compression_rank
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(
                f"FloraAccelerator: accumulation_compression_rank must be a whole number >= 1, got {rank!r}."
            )
        super().__init__(*args, **kwargs)
        self.accumulation_compression_rank = rank
        self._unarranged: list[Flora] = []
        self._handles: list[InBackward] = []
        self._in_step: list[tuple[Flora, nn.Module]] = []
        if self.scaler is not None:
            raise ValueError("FloraAccelerator: fp16's loss scaling must see all gradients at once; use bf16.")
        if self.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("FloraAccelerator: DeepSpeed sums whole gradients itself; use FSDP2 or DDP.")

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """accelerate's; the model and its Flora must be in one call.

        Raises:
            TypeError, ValueError: see `prepare_optimizer`; or no model, or several.
            RuntimeError: FSDP1.
        """
        prepared = super().prepare(*args, **kwargs)
        found = prepared if isinstance(prepared, (tuple, list)) else (prepared,)  # FSDP2: a list
        models = [x for x in found if isinstance(x, nn.Module)]
        if self._unarranged and len(models) != 1:
            raise ValueError(f"FloraAccelerator: prepare the optimizer with its model in one call; got {len(models)}.")
        while self._unarranged:
            self._arrange(self._unarranged.pop(), models[0])
        return prepared

    def prepare_optimizer(self, optimizer: Any, device_placement: bool | None = None) -> Any:
        """accelerate's, for a `lowrank_ds.Flora` whose accumulation_compression_rank is ours or not given.

        Raises:
            TypeError: another optimizer. ValueError: another rank.
        """
        if not getattr(optimizer, "_is_accelerate_prepared", False):
            self._take_rank(optimizer)
            self._unarranged.append(optimizer)
        return super().prepare_optimizer(optimizer, device_placement)

    def _take_rank(self, optimizer: Any) -> None:
        if not isinstance(optimizer, Flora):
            kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
            raise TypeError(
                f"FloraAccelerator: the optimizer must be lowrank_ds.Flora, got {kind}. (For "
                "others: lowrank_ds.layerwise with compress_accumulation=True, or accelerate's own Accelerator.)"
            )
        rank = self.accumulation_compression_rank if self.gradient_accumulation_steps > 1 else None
        for group in optimizer.param_groups:
            if group["accumulation_compression_rank"] not in (None, self.accumulation_compression_rank):
                raise ValueError(
                    f"FloraAccelerator: accumulation_compression_rank is {self.accumulation_compression_rank}, but the "
                    f"optimizer's is {group['accumulation_compression_rank']}. Give it to one of them."
                )
            group["accumulation_compression_rank"] = rank if group["rank"] is not None else None
        if rank is not None and all(group["rank"] is None for group in optimizer.param_groups):
            raise ValueError("FloraAccelerator: no param group has a rank, so nothing would be summed in a subspace.")

    def _arrange(self, optimizer: Flora, model: nn.Module) -> None:
        """Decide who updates: the backward, or `step()` where gradients are averaged after the hooks (DDP)."""
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self._in_step.append((optimizer, model))
            optimizer.init_state()
        else:
            self._handles.append(layerwise(model, optimizer, self.gradient_accumulation_steps))
            self._handles[-1].saves_whole_sums = True
        self.register_for_checkpointing(_WholeSums(optimizer))

    @contextlib.contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """accelerate's, except that gradients are reduced at every micro-batch: sums are kept sharded."""
        if self._unarranged:
            raise RuntimeError("FloraAccelerator: an optimizer was prepared without its model; use prepare(both).")
        with super().accumulate():
            for handle in self._handles:
                handle.expect(self.sync_gradients)
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """accelerate's; afterwards the micro-batch is in the sums."""
        super().backward(loss, **kwargs)
        for optimizer, model in self._in_step:
            if any(group["accumulation_compression_rank"] for group in optimizer.param_groups):
                optimizer.accumulate(model)

    def clip_grad_norm_(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: RuntimeError."""
        raise RuntimeError(
            "FloraAccelerator: gradients are gone or summed in a subspace, so there is no norm to clip. Flora limits "
            "its updates itself (clip_threshold, default 1.0)."
        )

    clip_grad_value_ = clip_grad_norm_


class _WholeSums:
    """For checkpoints: half-finished sums of the gradients that are summed whole, on the parameters themselves."""

    def __init__(self, optimizer: Flora) -> None:
        self.optimizer = optimizer

    def _hosts(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.optimizer.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    def state_dict(self) -> dict[str, Tensor]:
        """{parameter name: whole gradient (its shape)}; call it on every rank."""
        found = {name: host.grad.detach() for name, host in self._hosts() if host.grad is not None}
        return {name: (g.full_tensor() if engines.is_dtensor(g) else g).cpu() for name, g in found.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put the gradients back, each rank its part."""
        for name, host in self._hosts():
            grad = state.get(name)
            if grad is not None and engines.is_dtensor(host):
                from torch.distributed.tensor import distribute_tensor

                grad = grad.to(host.device, copy=True)
                grad = distribute_tensor(grad, host.device_mesh, host.placements, src_data_rank=None)
            host.grad = None if grad is None else grad.to(host.device)
