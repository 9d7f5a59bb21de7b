"""LoRA layers: which lora_A belongs to which lora_B, and the dropout in front of them. peft is never imported.

A layer is recognised by what peft's layers have in common: the dicts `lora_A`, `lora_B` and `scaling` by adapter name.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from lowrank_ds import engines
from lowrank_ds.params import canonical

_EMBEDDING = (
    "a LoRA embedding: its lora_embedding_A starts at zero, and with that factor frozen nothing would be trained. "
    "Leave embeddings out of LoraConfig's target_modules (modules_to_save trains them whole)"
)


@dataclass(frozen=True)
class Adapter:
    """One adapter of one layer, dW = scaling B A.

    path: the layer's name. name: the adapter's. owner: the layer, weakly. refusal: why LoRA-FA cannot train it.
    """

    path: str
    name: str
    owner: weakref.ref[nn.Module]
    refusal: str | None = None

    @property
    def layer(self) -> nn.Module:
        """The layer; RuntimeError when it (or its model) is gone."""
        layer = self.owner()
        if layer is None or self.name not in layer.lora_A:
            raise RuntimeError(f"{self.path}: the adapter {self.name!r} that LoRAFA trains is gone from the model.")
        return layer

    @property
    def a_name(self) -> str:
        """The name of the frozen factor."""
        return f"{self.path}.lora_A.{self.name}.weight"

    @property
    def a(self) -> Tensor:
        """The frozen factor, (r, in) or (r, in, kernel ...) as an engine keeps it now."""
        return self.layer.lora_A[self.name].weight

    @property
    def scaling(self) -> float:
        """s of dW = s B A: alpha / r, or alpha / sqrt(r) with rsLoRA, times what set_scale gave."""
        return float(self.layer.scaling[self.name])


_records: Any = WeakIdKeyDictionary()  # {lora_B weight (or a factor that is refused): Adapter}


def known(param: Tensor) -> Adapter | None:
    """The adapter whose B is `param`, if a model with it was recorded."""
    return _records.get(param)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    needed = ("lora_A", "lora_B", "scaling", "base_layer")
    return ((canonical(path), m) for path, m in model.named_modules() if all(hasattr(m, name) for name in needed))


def record(model: nn.Module) -> list[Adapter]:
    """Note (weakly) which adapters the LoRA layers of `model` have; answers those that LoRA-FA can train."""
    found = []
    for path, layer in _layers(model):
        for name, factor in layer.lora_B.items():
            adapter = Adapter(path, name, weakref.ref(layer), _refusal(layer, name))
            _records[factor.weight] = adapter
            if adapter.refusal is None:
                found.append(adapter)
        for factors in (getattr(layer, "lora_embedding_A", {}), getattr(layer, "lora_embedding_B", {})):
            for name, factor in factors.items():
                _records[factor] = Adapter(path, name, weakref.ref(layer), _EMBEDDING)
    return found


def _refusal(layer: nn.Module, name: str) -> str | None:
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None and "Dora" in type(variant).__name__ or getattr(layer, "use_dora", {}).get(name):
        return (
            "a DoRA layer: its weight is m (W + s B A) / |W + s B A|, whose rows are rescaled at every step, so "
            "(A A^T)^-1 / s^2 is not the correction of its gradient. Set use_dora=False, or train it with plain LoRA"
        )
    if variant is not None:
        return f"a {type(variant).__name__} layer, whose weight is not W + s B A. Use plain LoRA layers"
    if hasattr(layer, "parameter_name"):
        return "LoRA on a bare parameter (target_parameters), whose factors are stacked. Use target_modules"
    a, b = (engines.full_shape(factors[name].weight) for factors in (layer.lora_A, layer.lora_B))
    if a[0] != b[1]:
        return (
            f"a layer with lora_A {a} and lora_B {b}, which do not multiply (grouped or tensor-parallel). Leave it out"
        )
    if not layer.scaling[name]:
        return "a layer with scaling 0: its adapter has no gradient. Set lora_alpha > 0"
    return None


# -- dropout ----------------------------------------------------------------------------------------------------------
class _SeededDropout(torch.autograd.Function):
    """Dropout that keeps a seed for the backward instead of a mask of the input's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        """x (any shape) with entries zeroed with probability p and the others divided by 1 - p."""
        ctx.p, ctx.seed = p, seed
        return _dropped(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The same map on the gradient (it is linear and diagonal)."""
        return _dropped(grad, ctx.p, ctx.seed), None, None


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    generator = torch.Generator(device=x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
    return torch.where(kept, x / (1 - p), 0.0)


class RecomputedDropout(nn.Dropout):
    """nn.Dropout that draws its mask again in the backward, so that it saves nothing.

    One seed per call comes from torch's CPU generator (activation checkpointing restores it). The masks are not those
    nn.Dropout would draw from the same seed.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape; the identity in eval mode or with p = 0."""
        if not self.training or self.p == 0.0:
            return x
        if self.p == 1.0:
            return x * 0.0
        return _SeededDropout.apply(x, self.p, int(torch.randint(1 << 62, ()).item()))


def recompute_dropout(model: nn.Module) -> int:
    """Make LoRA's dropout save a seed instead of its mask; answers how many layers' dropouts were replaced.

    With lora_A frozen the mask is all that LoRA's path saves of the size of its input (what lora_B's gradient needs,
    dropout(x) A^T, has r columns). Call it once after `get_peft_model`; merging, saving, disabling adapters and
    `lora_A` as such are untouched, and it works with any base layer (quantized, convolution). It costs a second draw
    of the mask in the backward.

    Raises:
        ValueError: the model has no LoRA layers.
    """
    layers = [layer for _, layer in _layers(model)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers: call peft.get_peft_model first.")
    swapped = 0
    for layer in layers:
        for name, dropout in layer.lora_dropout.items():
            if type(dropout) is nn.Dropout:
                layer.lora_dropout[name] = RecomputedDropout(dropout.p).train(dropout.training)
                swapped += 1
    return swapped
