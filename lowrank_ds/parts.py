"""What declarations of algorithms are made of: default options, base classes, and each part of a `Recipe` from a group.

`algorithms.py` has the declarations; one of your own imports the same from here (docs/extend.md). A `group` is a param
group whose options are filled in and checked (`options.CHECKS`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lowrank_ds.optimizer import LowRankOptimizer
from lowrank_ds.options import COMMON, settled
from lowrank_ds.recipe import Accumulation, Storage
from lowrank_ds.rules import Adafactor, Adam
from lowrank_ds.subspace import Subspace

ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True,
          "compile": False}  # fmt: skip
BASIS = {"rank": 128, "update_proj_gap": 200, "subspace": None}
ADAFACTOR = {
    "lr": None, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None, "weight_decay": 0.0,
    "scale_parameter": True, "relative_step": None, "warmup_init": False,
}  # fmt: skip
WHOLE = {"rank": None} | {
    k: COMMON[k] for k in ("target_modules", "exclude", "matricize", "seed", "stochastic_rounding")
}


def subspace_of(group: Mapping[str, Any], every: str = "update_proj_gap", **fixed: Any) -> Subspace | None:
    """Which subspace the group's matrices are projected on; None for rank=None.

    Args:
        every: the option that holds the steps between refreshes.
        fixed: fields of `Subspace` that are the algorithm's own and no option.

    Raises:
        ValueError: options that exclude each other.
    """
    if group["rank"] is None:
        return None
    method = {"subspace": "gaussian", **group, **settled(group)}["subspace"]
    chosen = {"method": method, "every": group[every]}
    shared = {
        k: group[k] for k in ("rank", "proj_type", "on_refresh", "oversample", "cold_every", "stagger") if k in group
    }
    lazy = group["lazy_threshold"] if group.get("lazy_refresh") else None
    replicated = group.get("projector_storage") == "replicated"
    how = Subspace(**shared, **{**chosen, **fixed}, replicated=replicated, lazy=lazy)
    _check_projector_storage(how, group.get("projector_storage"))
    if how.on_refresh == "rotate" and (how.method == "gaussian" or how.proj_type == "full"):
        raise ValueError(
            'on_refresh="rotate" needs one orthonormal basis: use subspace="svd", "randomized" or "power" and a '
            'proj_type other than "full", or on_refresh="keep".'
        )
    if lazy is not None and (how.method == "gaussian" or how.proj_type == "full"):
        raise ValueError(
            'lazy_refresh compares one orthonormal basis with the one before it: use subspace="svd", "randomized" or '
            '"power" and a proj_type other than "full", or leave lazy_refresh out.'
        )
    if how.proj_type == "full" and how.method != "svd":
        raise ValueError('proj_type="full" projects both sides and needs subspace="svd". Leave subspace out.')
    return how


def _check_projector_storage(how: Subspace, storage: str | None) -> None:
    if storage is not None and (how.method == "gaussian") != (storage == "seed"):
        raise ValueError(
            f"projector_storage={storage!r} does not go with subspace={how.method!r}: gaussian bases are drawn again "
            'from their seed ("seed"), others are stored ("sharded" or "replicated"). Leave it out to get what fits.'
        )


def storage_of(group: Mapping[str, Any]) -> Storage:
    """How state is kept between steps.

    Raises:
        ValueError: projector_dtype for gaussian bases, which are not stored.
    """
    if group["projector_dtype"] != "fp32" and group["rank"] is not None and group["subspace"] == "gaussian":
        raise ValueError(
            f'projector_dtype={group["projector_dtype"]!r}: subspace="gaussian" stores no projector, it is drawn again '
            "from its seed. Leave projector_dtype out."
        )
    return Storage(group["moments"], group["projector_dtype"], group["min_8bit_size"])


def exact_sums(group: Mapping[str, Any]) -> Accumulation | None:
    """Micro-batches summed in the recipe's own subspace, for recipes that use nothing outside it."""
    if not group["compress_accumulation"]:
        return None
    return None if group["rank"] is None else Accumulation()


def refuse_compressed_accumulation(group: Mapping[str, Any], why: str) -> None:
    """Raise ValueError if compress_accumulation is set. why: what the algorithm needs whole gradients for."""
    if group["compress_accumulation"]:
        raise ValueError(
            f"compress_accumulation=True sums micro-batches in the subspace, and {why}. Leave it out: whole gradients "
            "are summed, sharded as the engine shards them."
        )


def require_orthonormal(how: Subspace | None, what: str) -> None:
    """Raise ValueError unless the basis, if there is one, is orthonormal and on one side. what: needs that."""
    if how is not None and (how.method == "gaussian" or how.proj_type == "full"):
        raise ValueError(
            f'{what} needs an orthonormal basis on one side: use subspace="svd", "randomized" or "power", and a '
            'proj_type other than "full".'
        )


def adam_of(group: Mapping[str, Any]) -> Adam:
    """Adam as the group's betas, eps, correct_bias and compile say; ValueError for an eps of two numbers."""
    if isinstance(group["eps"], (tuple, list)):
        raise ValueError(f"eps must be one number, got {group['eps']}.")
    return Adam(tuple(group["betas"]), group["eps"], group["correct_bias"], group["compile"])


def adafactor_of(group: Mapping[str, Any], **fixed: Any) -> Adafactor:
    """Adafactor as the group says; fixed: its fields that are no option. ValueError for an eps of one number."""
    if not isinstance(group["eps"], (tuple, list)):
        raise ValueError(f"eps must be two numbers (squared gradients, parameter scale), got {group['eps']}.")
    names = ("clip_threshold", "decay_rate", "beta1", "scale_parameter")
    return Adafactor(eps=tuple(group["eps"]), **({n: group[n] for n in names if n not in fixed} | fixed))


class AdamWBased(LowRankOptimizer):
    """Base of algorithms whose `lr` must be given."""

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        """Also of lr."""
        super().check_group(group)
        if group["lr"] is None:
            raise ValueError("lr is null; AdamW-based algorithms need a learning rate.")


class AdafactorBased(LowRankOptimizer):
    """Base of algorithms with Adafactor's `lr`, which may be None: then it is relative to the step number."""

    @staticmethod
    def _is_relative(group: Mapping[str, Any]) -> bool:
        return group["lr"] is None if group["relative_step"] is None else group["relative_step"]

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        """Also of lr."""
        super().check_group(group)
        relative = cls._is_relative(group)
        if relative and group["lr"] is not None:
            raise ValueError("lr and relative_step=True exclude each other.")
        if group["warmup_init"] and not relative:
            raise ValueError("warmup_init=True requires relative_step=True.")
        if not relative and group["lr"] is None:
            raise ValueError("lr is null and relative_step is false: give one of them.")

    @classmethod
    def learning_rate(cls, group: Mapping[str, Any], step: int) -> float:
        """lr, or Adafactor's relative step min(1e-2 or 1e-6 t, 1 / sqrt(t)) when lr is not given."""
        if not cls._is_relative(group):
            return float(group["lr"])
        return min(1e-6 * step if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(step))
