"""Who is measured: torch's AdamW, our optimizers and the published packages, each built from names and a rank."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lowrank_ds

NEVER = 10**9  # steps between refreshes: the first step's basis stays
BASE = "torch AdamW fused"
LR = 1e-3  # of every contender
Named = Sequence[tuple[str, nn.Parameter]]
Build = Callable[[Named, Named, int, int], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """One optimizer.

    Args:
        name: as in the tables.
        kind: "torch", "ours" or "package".
        build: from (name, parameter) pairs to project and not to, rank and steps between refreshes.
        distribution: what to install for it.
        rival: the package that does the same, for one of ours.
        dtypes: the weights' dtypes it is measured for; empty: all.
    """

    name: str
    kind: str
    build: Build
    distribution: str | None = None
    rival: str | None = None
    dtypes: tuple[torch.dtype, ...] = ()


def _torch(**options: Any) -> Build:
    def build(matrices: Named, plain: Named, rank: int, gap: int) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for _, p in (*matrices, *plain)], lr=LR, weight_decay=0.0, **options)

    return build


def _ours(cls: type, gap_name: str = "update_proj_gap", fixed_rank: int | None = None, **options: Any) -> Build:
    def build(matrices: Named, plain: Named, rank: int, gap: int) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": list(matrices), "rank": fixed_rank or rank}]
        groups += [{"params": list(plain)}] if plain else []
        return cls(groups, lr=LR, **{gap_name: gap}, **options)

    return build


def _package(module: str, name: str, fixed_rank: int | None = None, **options: Any) -> Build:
    """A class of the AdamW family: options are keys of the projected group."""

    def build(matrices: Named, plain: Named, rank: int, gap: int) -> torch.optim.Optimizer:
        cls = getattr(importlib.import_module(module), name)
        given = {"rank": fixed_rank or rank, "update_proj_gap": gap, "proj_type": "std", **options}
        groups: list[dict[str, Any]] = [{"params": [p for _, p in matrices], **given}]
        groups += [{"params": [p for _, p in plain]}] if plain else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # "this AdamW is deprecated"
            return cls(groups, lr=LR)

    return build


def _flora_opt(matrices: Named, plain: Named, rank: int, gap: int) -> torch.optim.Optimizer:
    cls = importlib.import_module("flora_opt").Flora
    groups: list[dict[str, Any]] = [{"params": [p for _, p in matrices], "rank": rank}]
    groups += [{"params": [p for _, p in plain], "rank": None}] if plain else []
    return cls(groups, lr=LR, kappa=gap, beta1=0.9)


_GALORE, _APOLLO = {"scale": 0.25}, {"proj": "random", "scale_type": "channel", "scale": 1.0}
_MINI = {"proj": "random", "scale_type": "tensor", "scale": 128.0}
_NEAREST = {"stochastic_rounding": False}
_BF16 = (torch.bfloat16,)

ALL = (
    Contender(BASE, "torch", _torch(fused=True)),
    Contender("torch AdamW foreach", "torch", _torch(foreach=True)),
    Contender("GaLoreAdamW", "ours", _ours(lowrank_ds.GaLoreAdamW), rival="galore-torch"),
    Contender("FiraAdamW", "ours", _ours(lowrank_ds.FiraAdamW), rival="fira"),
    Contender("ApolloAdamW", "ours", _ours(lowrank_ds.ApolloAdamW), rival="apollo-torch"),
    Contender("ApolloMini", "ours", _ours(lowrank_ds.ApolloMini, fixed_rank=1), rival="apollo-torch mini"),
    Contender("Flora", "ours", _ours(lowrank_ds.Flora, "kappa"), rival="flora-opt"),
    Contender("GaLoreAdamW nearest", "ours", _ours(lowrank_ds.GaLoreAdamW, **_NEAREST), None, "galore-torch", _BF16),
    Contender("FiraAdamW nearest", "ours", _ours(lowrank_ds.FiraAdamW, **_NEAREST), None, "fira", _BF16),
    Contender("ApolloAdamW nearest", "ours", _ours(lowrank_ds.ApolloAdamW, **_NEAREST), None, "apollo-torch", _BF16),
    Contender("Flora nearest", "ours", _ours(lowrank_ds.Flora, "kappa", **_NEAREST), None, "flora-opt", _BF16),
    Contender("galore-torch", "package", _package("galore_torch", "GaLoreAdamW", **_GALORE), "galore-torch"),
    Contender("fira", "package", _package("fira", "FiraAdamW", alpha=0.25), "fira"),
    Contender("apollo-torch", "package", _package("apollo_torch", "APOLLOAdamW", **_APOLLO), "apollo-torch"),
    Contender("apollo-torch mini", "package", _package("apollo_torch", "APOLLOAdamW", 1, **_MINI), "apollo-torch"),
    Contender("flora-opt", "package", _flora_opt, "flora-opt"),
)


def with_subspace(method: str, cls: type = lowrank_ds.GaLoreAdamW) -> Contender:
    """An optimizer of ours with one method of making bases, for the time of its refresh."""
    return Contender(f"{cls.__name__} {method}", "ours", _ours(cls, subspace=method))


def choose(only: Iterable[str] | None, packages: bool, dtype: torch.dtype | None = None) -> list[Contender]:
    """The contenders of a run.

    Args:
        only: their names (fused AdamW joins them, ratios need it); None: all.
        packages: whether the published packages take part.
        dtype: the weights'.

    Raises:
        ValueError: a name that is none of them.
    """
    names = None if only is None else [BASE, *only]
    for name in names or ():
        if all(name != c.name for c in ALL):
            raise ValueError(f"--only {name!r} is no contender; there are: {', '.join(c.name for c in ALL)}")
    wanted = [c for c in ALL if names is None or c.name in names]
    return [c for c in wanted if (packages or c.kind != "package") and (not c.dtypes or dtype in c.dtypes)]


def installed(contender: Contender) -> str | None:
    """None if the contender can run here, else why not, naming what to install."""
    if contender.distribution is None:
        return None
    module = contender.distribution.replace("-", "_")
    try:
        importlib.import_module(module)
    except ImportError as error:
        return (
            f"{contender.name}: not measured, `import {module}` fails ({error}); pip install {contender.distribution}"
        )
    return None


def split(contenders: Iterable[Contender]) -> tuple[list[Contender], list[str]]:
    """(those that can run here, for each of the others a sentence that names what is missing)."""
    present, missing = [], []
    for contender in contenders:
        why = installed(contender)
        if why is None:
            present.append(contender)
        else:
            missing.append(why)
    return present, missing
