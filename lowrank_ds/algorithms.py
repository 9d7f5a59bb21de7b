"""The algorithms: each is a declaration over the axes of a `Recipe`, in its paper's dialect.

Notation: W, G m x n; B the basis, R the projected gradient, N the rule's direction for R, eta the learning rate.
All accept `rank`, `target_modules`, `exclude` and the other options of `options.COMMON`; defaults are the packages'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lowrank_ds.optimizer import LowRankOptimizer
from lowrank_ds.options import COMMON
from lowrank_ds.parts import (
    ADAFACTOR,
    ADAMW,
    BASIS,
    WHOLE,
    AdafactorBased,
    AdamWBased,
    adafactor_of,
    adam_of,
    exact_sums,
    refuse_compressed_accumulation,
    require_orthonormal,
    storage_of,
    subspace_of,
)
from lowrank_ds.recipe import Accumulation, Momentum, Recipe, Storage
from lowrank_ds.residual import Drop, ScaleGradient, ScaleResidual
from lowrank_ds.rules import SGD


class GaLoreAdamW(AdamWBased):
    """GaLore (arXiv:2403.03507, Algorithm 2; package galore-torch): Adam on P^T G, the residual dropped.

    W <- (1 - eta wd) W - eta scale N B^T.

    Options: lr, betas, eps (added to the uncorrected sqrt(v)), weight_decay, rank, update_proj_gap (T), scale,
    proj_type ("std" compresses the shorter side; "reverse_std", "right", "left"; "full" both), subspace (left out:
    "power", with proj_type="full" "svd"; the package: "svd"), on_refresh.
    """

    OPTIONS = {**ADAMW, **BASIS, "scale": 0.25, **COMMON}

    @classmethod
    def recipe(cls, group: Mapping[str, Any]) -> Recipe:
        """Adam in the subspace, residual dropped."""
        return Recipe(
            adam_of(group), subspace_of(group), Drop(group["scale"]), accumulation=exact_sums(group),
            storage=storage_of(group),
        )  # fmt: skip


class GaLoreAdamW8bit(GaLoreAdamW):
    """GaLore with 8-bit moments (galore-torch's GaLoreAdamW8bit): of the coordinates and of plain parameters.

    `GaLoreAdamW(moments="8bit")`, and its options. The package takes bitsandbytes' codes, in blocks that cross rows;
    ours stay inside rows and are other codes (docs/low_bit.md), so its checkpoints do not fit.
    """

    OPTIONS = {**GaLoreAdamW.OPTIONS, "moments": "8bit"}


class QGaLore(GaLoreAdamW8bit):
    """Q-GaLore (arXiv:2407.08296): 8-bit moments, a 4-bit projector, and refreshes as rare as the subspace allows.

    `GaLoreAdamW(moments="8bit", projector_dtype="4bit", lazy_refresh=True)`, and its options. After each refresh the
    new basis is compared with the old one; when the mean stability of five refreshes reaches lazy_threshold, the
    matrix' interval doubles. The paper compares the first singular vectors' cosine (threshold 0.4), whose sign is
    arbitrary; we compare whole subspaces, less what random ones have in common (`subspace.stability`). The package
    stores its 4-bit codes one to a byte, we two.
    """

    OPTIONS = {**GaLoreAdamW8bit.OPTIONS, "projector_dtype": "4bit", "lazy_refresh": True}


class GaLoreAdafactor(AdafactorBased):
    """GaLore with Adafactor on the coordinates (galore-torch's GaLoreAdafactor).

    Options as GaLoreAdamW's and Adafactor's; lr=None means Adafactor's relative step. With `beta1` the momentum is
    of the update before the learning rate, max(eps, RMS(W)) included (the package: lr too; equal while lr is constant).
    """

    OPTIONS = {**ADAFACTOR, **BASIS, "scale": 0.25, **COMMON}

    @classmethod
    def recipe(cls, group: Mapping[str, Any]) -> Recipe:
        """Adafactor in the subspace, residual dropped."""
        if group["rank"] is not None and group["on_refresh"] == "rotate" and not group["beta1"]:
            raise ValueError('on_refresh="rotate" moves the momentum, and beta1 is null: there is none. Set beta1.')
        return Recipe(
            adafactor_of(group), subspace_of(group), Drop(group["scale"]), accumulation=exact_sums(group),
            storage=storage_of(group),
        )  # fmt: skip


class FiraAdamW(AdamWBased):
    """Fira (arXiv:2410.01623, Algorithm 1; package fira): GaLore plus the norm-scaled, growth-limited residual.

    residual="code" (the package): U = alpha N B^T + S, S = limit(phi o (G - alpha R B^T));
    residual="paper":              U = alpha (N B^T + S), S = limit(phi o (G - R B^T)).

    Options: as GaLoreAdamW with alpha in place of scale; scaling ("column" or "matrix"), limiter (growth, 1.01).
    """

    OPTIONS = {**ADAMW, **BASIS, "alpha": 0.25, "residual": "code", "scaling": "column", "limiter": 1.01, **COMMON}

    @classmethod
    def recipe(cls, group: Mapping[str, Any]) -> Recipe:
        """Adam in the subspace, residual scaled."""
        how = subspace_of(group)
        require_orthonormal(how, "Fira's residual")
        refuse_compressed_accumulation(group, "Fira's residual is the rest of the gradient")
        limiter = math.inf if group["limiter"] is None else group["limiter"]
        residual = ScaleResidual(group["alpha"], group["residual"], group["scaling"], limiter)
        return Recipe(adam_of(group), how, residual, storage=storage_of(group))


class ApolloAdamW(AdamWBased):
    """APOLLO (arXiv:2412.05270, Algorithm 1; package apollo-torch): the gradient scaled channel by channel.

    W <- (1 - eta wd) W - eta sqrt(scale) s o G with s = |N| / |R|, R = G B, B seeded Gaussian (never stored).

    Options: as GaLoreAdamW; scale enters as its square root (apollo-torch's convention, unlike GaLore's scale);
    scale_type "channel" or "tensor"; scale_front; disable_nl switches the growth limiter off.
    """

    OPTIONS = {
        **ADAMW, **BASIS, "subspace": "gaussian", "scale": 1.0, "scale_type": "channel", "scale_front": False,
        "disable_nl": False, **COMMON,
    }  # fmt: skip
    ALIASES = {"proj": lambda v: ("subspace", {"random": "gaussian"}.get(v, v))}

    @classmethod
    def recipe(cls, group: Mapping[str, Any]) -> Recipe:
        """Adam in a random subspace, only its scaling used."""
        if group["rank"] is not None and group["proj_type"] == "full":
            raise ValueError('APOLLO scales one side: proj_type="full" has no meaning here.')
        refuse_compressed_accumulation(group, "APOLLO scales the whole gradient")
        growth = None if group["disable_nl"] else 1.01
        scaled = ScaleGradient(group["scale"], group["scale_type"] == "channel", growth, group["scale_front"])
        return Recipe(adam_of(group), subspace_of(group), scaled, storage=storage_of(group))


class ApolloMini(ApolloAdamW):
    """APOLLO-Mini: rank 1, one scaling factor per matrix, scale 128 (arXiv:2412.05270, section 4.2)."""

    OPTIONS = {**ApolloAdamW.OPTIONS, "rank": 1, "scale": 128.0, "scale_type": "tensor"}


class Flora(AdafactorBased):
    """Flora (arXiv:2402.03293; package flora-opt): Adafactor whose momentum is kept in a random subspace.

    u = Adafactor(G); U = (1 - b1) u + b1 M B^T; M <- b1 M + (1 - b1) u B; every kappa steps M <- M (B_old^T B_new).

    Options are flora-opt's, in its order. beta1 defaults to 0.9 (the package's default None keeps no momentum, hence
    compresses nothing; asking for it together with a rank raises). Matrices of any aspect ratio are compressed (the
    package leaves those with max/min > 4 alone without saying so). quantization=True keeps the momentum (and the second
    moment, where it is not factored) in 8 bits, as the package does with bitsandbytes; matrices with fewer than
    min_8bit_size entries stay fp32.
    """

    OPTIONS = {
        "lr": None, "rank": 128, "kappa": 1000, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8,
        "beta1": 0.9, "weight_decay": 0.0, "scale_parameter": True, "relative_step": None, "warmup_init": False,
        "factorize_second_moment": True, "seed": 0, "quantization": False,
        **{k: COMMON[k] for k in ("proj_type", "target_modules", "exclude", "matricize", "stochastic_rounding")},
        "accumulation_compression_rank": None, "min_8bit_size": COMMON["min_8bit_size"],
    }  # fmt: skip

    @classmethod
    def recipe(cls, group: Mapping[str, Any]) -> Recipe:
        """Adafactor on everything, momentum compressed where projected."""
        if group["rank"] is not None and not group["beta1"]:
            raise ValueError(
                f"beta1={group['beta1']} keeps no momentum, so rank={group['rank']} would compress nothing. Set beta1 "
                "(0.9 in the paper), or rank=None for plain Adafactor."
            )
        if group["rank"] is not None and group["proj_type"] == "full":
            raise ValueError('Flora compresses one side: proj_type="full" has no meaning here.')
        rule = adafactor_of(group, momentum_first=True, factored=group["factorize_second_moment"])
        how = subspace_of({**group, "on_refresh": "keep"}, "kappa", method="gaussian")
        sketch = None if how is None else group["accumulation_compression_rank"]
        sums = None if sketch is None else Accumulation(sketch)
        momentum = None if how is None else Momentum(group["beta1"])
        storage = Storage("8bit" if group["quantization"] else "fp32", smallest=group["min_8bit_size"])
        return Recipe(rule, how, momentum=momentum, accumulation=sums, storage=storage)


class _Unprojected(LowRankOptimizer):
    """LOMO's family: every parameter is trained whole. What is saved is the state, and the gradient (`layerwise`)."""

    INSTEAD = ""

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        for name in ("rank", "target_modules", "exclude"):
            if group[name] is not None:
                raise ValueError(
                    f"{name}={group[name]!r}: {cls.__name__} projects nothing. Leave it out, or use {cls.INSTEAD}."
                )
        if group["lr"] is None:
            raise ValueError(f"lr is null; {cls.__name__} needs a learning rate.")


class Lomo(_Unprojected):
    """LOMO (arXiv:2306.09782; package lomo-optim): gradient descent without state. W <- (1 - eta wd) W - eta G.

    `step()` is an ordinary step; `layerwise(model, optimizer)` runs it inside the backward, which is LOMO's point.

    Options, in lomo-optim's order: lr, weight_decay (decoupled, before the update); matricize, seed,
    stochastic_rounding as everywhere. The package's clip_grad_norm, clip_grad_value and loss_scale_args are refused:
    clipping and loss scaling belong to the loop or the engine. `rank` raises ValueError.
    """

    OPTIONS = {
        "lr": 1e-3, "clip_grad_norm": None, "clip_grad_value": None, "weight_decay": 0.0, "loss_scale_args": None,
        **WHOLE,
    }  # fmt: skip
    INSTEAD = "GaLoreAdamW or GaLoreAdafactor, which project"

    @classmethod
    def recipe(cls, group: Mapping[str, Any]) -> Recipe:
        """The gradient itself, on everything."""
        return Recipe(SGD())


class AdaLomo(_Unprojected):
    """AdaLomo (arXiv:2310.10195, Algorithm 1; package lomo-optim): Adafactor without momentum and relative step.

    U = G / sqrt(v), v factored for matrices, beta2_t = 1 - t^decay_rate; U <- U / max(1, RMS(U) / clip_threshold);
    s = max(eps[1], RMS(W)); W <- (1 - eta s wd) W - eta s U. Both RMS are of one parameter ("grouped").

    Options, in lomo-optim's order: lr, eps (added to squared gradients, smallest RMS(W)), clip_threshold, decay_rate,
    weight_decay; the rest as `Lomo`'s, loss_scale refused too. t counts a parameter's own updates, from its first
    gradient that is not zero (the package: calls of fused_backward). `rank` raises ValueError.
    """

    OPTIONS = {
        "lr": 1e-3, "loss_scale": None, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8,
        "clip_grad_norm": None, "clip_grad_value": None, "weight_decay": 0.0, **WHOLE,
    }  # fmt: skip
    INSTEAD = "GaLoreAdafactor, which is Adafactor in a subspace"

    @classmethod
    def recipe(cls, group: Mapping[str, Any]) -> Recipe:
        """Adafactor on everything, no momentum."""
        return Recipe(adafactor_of(group, beta1=None, scale_parameter=True))


ALGORITHMS = (
    GaLoreAdamW,
    GaLoreAdafactor,
    FiraAdamW,
    ApolloAdamW,
    ApolloMini,
    Flora,
    Lomo,
    AdaLomo,
    GaLoreAdamW8bit,
    QGaLore,
)
