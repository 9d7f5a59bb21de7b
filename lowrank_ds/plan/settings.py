"""What is planned for: model, recipe, engine, ranks, tokens; checked, with the flag's name in every message."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from lowrank_ds.algorithms import ALGORITHMS
from lowrank_ds.bench import llama
from lowrank_ds.optimizer import LowRankOptimizer

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ADAMW = "adamw"
# short names, as in ds_configs/; a class name does too
RECIPES = {
    "galore": "GaLoreAdamW", "galore_8bit": "GaLoreAdamW8bit", "q_galore": "QGaLore",
    "galore_adafactor": "GaLoreAdafactor", "fira": "FiraAdamW", "apollo": "ApolloAdamW", "apollo_mini": "ApolloMini",
    "flora": "Flora", "lomo": "Lomo", "adalomo": "AdaLomo",
}  # fmt: skip


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's own settings that cost memory, with its defaults (overlap_comm: as in ds_configs/).

    Numbers are of entries, not bytes. Names as in a ds_config's "zero_optimization".
    """

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = True
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000

    @classmethod
    def read(cls, config: Mapping[str, Any], where: str) -> Zero:
        """Out of a ds_config.

        A file without overlap_comm gets DeepSpeed's own: off under ZeRO-1 and 2 (under ZeRO-3 it costs no memory here).

        Raises:
            ValueError: it offloads, a setting is not a number, or there are no settings.
        """
        given = config.get("zero_optimization", {}) if isinstance(config, Mapping) else None
        if not isinstance(given, Mapping):
            raise ValueError(f'{where}: must be a JSON object whose "zero_optimization" is one')
        for name in ("offload_optimizer", "offload_param"):
            if (given.get(name) or {}).get("device") not in (None, "none"):
                raise ValueError(f"{where}: {name} moves state to the host, which plan does not know; leave it out")
        found = {}
        for one in dataclasses.fields(cls):
            default = False if one.name == "overlap_comm" else one.default
            value = given.get(one.name, given.get(one.name.removeprefix("stage3_")))
            value = default if value is None else value
            if isinstance(value, str) or not isinstance(value, (int, float)) or value < 0:
                raise ValueError(f'{where}: zero_optimization.{one.name} is {value!r}; plan needs a number, not "auto"')
            found[one.name] = bool(value) if isinstance(one.default, bool) else int(value)
        return cls(**found)


@dataclass(frozen=True)
class Settings:
    """One configuration.

    Attributes:
        config: the model's HF config.
        recipe: a name of RECIPES, a class name, or "adamw" (torch's AdamW, fused).
        rank: of the subspaces; None: the recipe's default; 0: nothing is projected (our AdamW, which layer-wise updates
            can use).
        engine: one of ENGINES.
        nodes: how many.
        gpus: of a node.
        seq: tokens of a sequence.
        micro_batch: sequences of a rank.
        layerwise: updates inside the backward.
        checkpointing: activation checkpointing.
        dtype: "bf16" or "fp32", of weights, gradients and activations.
        shard: ranks that share one copy of the model under "hsdp" (0: those of a node).
        options: the recipe's other options.
        zero: DeepSpeed's settings.

    Raises:
        ValueError: a value out of range, or an engine that cannot do what is asked.
    """

    config: Mapping[str, Any]
    recipe: str = "fira"
    rank: int | None = None
    engine: str = "fsdp2"
    nodes: int = 1
    gpus: int = 8
    seq: int = 2048
    micro_batch: int = 1
    layerwise: bool = False
    checkpointing: bool = False
    dtype: str = "bf16"
    shard: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    zero: Zero = Zero()

    def __post_init__(self) -> None:
        for flag in ("nodes", "gpus", "seq", "micro_batch"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(self, flag)}")
        if self.engine not in ENGINES:
            raise ValueError(f"--engine {self.engine!r}: must be one of {', '.join(ENGINES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r}: must be one of {', '.join(DTYPES)}")
        _ = self.algorithm
        self._check_shards()
        self._check_layerwise()
        self._check_rank()

    def _check_shards(self) -> None:
        if self.engine != "hsdp":
            if self.shard:
                raise ValueError(f"--shard {self.shard}: only --engine hsdp has groups of ranks that shard")
            return
        if self.shard < 0 or self.world % self.shards:
            raise ValueError(
                f"--shard {self.shards} does not divide the {self.world} ranks of --nodes {self.nodes} --gpus "
                f"{self.gpus}: every copy of the model needs as many ranks"
            )
        if self.shards == self.world:
            raise ValueError(
                f"--engine hsdp: one group of {self.shards} ranks shards everything, nothing is replicated. Give "
                "--shard a smaller number, or --engine fsdp2"
            )

    def _check_layerwise(self) -> None:
        alone = self.engine == "ddp" and self.world == 1
        if self.layerwise and not alone and self.engine in ("ddp", "zero1", "zero2"):
            raise ValueError(
                f"--layerwise: {self.engine} keeps all gradients until the step, so that nothing would be saved, and "
                "layerwise() refuses it. Use --engine fsdp2, hsdp or zero3"
            )
        if self.layerwise and self.recipe == ADAMW:
            raise ValueError("--layerwise is for our optimizers: torch's AdamW has no updates inside the backward")

    def _check_rank(self) -> None:
        if not self.projects:
            return
        rank = self.subspace_rank
        if rank < 0:
            raise ValueError(f"--rank must be at least 1, or 0 to project nothing, got {rank}")
        smallest, name = min((min(shape), name) for name, shape in self.shapes.items() if name in self.matrices)
        if rank >= smallest:
            raise ValueError(
                f"--rank {rank} is not smaller than {smallest}, the smaller side of {name} {self.shapes[name]}: there "
                "is nothing to compress"
            )

    # -- what follows from it ---------------------------------------------------------------------------------------
    @property
    def world(self) -> int:
        """All ranks."""
        return self.nodes * self.gpus

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the model."""
        return (self.shard or self.gpus) if self.engine == "hsdp" else self.world

    @property
    def itemsize(self) -> int:
        """Bytes of a weight, a gradient, an activation."""
        return DTYPES[self.dtype].itemsize

    @property
    def handed(self) -> torch.dtype:
        """The dtype of the tensors that the optimizer is handed: DeepSpeed gives fp32 copies."""
        masters = self.engine.startswith("zero") and not self.layerwise
        return torch.float32 if masters else DTYPES[self.dtype]

    @cached_property
    def shapes(self) -> llama.Shapes:
        """{name: shape} of all parameters."""
        return llama.parameter_shapes(dict(self.config))

    @property
    def algorithm(self) -> type[LowRankOptimizer] | None:
        """The optimizer's class; None for torch's AdamW."""
        classes = {cls.__name__: cls for cls in ALGORITHMS}
        if self.recipe == ADAMW:
            return None
        name = RECIPES.get(self.recipe, self.recipe)
        if name not in classes:
            raise ValueError(f"--recipe {self.recipe!r}: there are {', '.join([*RECIPES, ADAMW])}")
        return classes[name]

    @property
    def subspace_rank(self) -> int | None:
        """r; None where nothing is projected (LOMO's family, AdamW, rank 0)."""
        if self.algorithm is None or self.algorithm.OPTIONS["rank"] is None or self.rank == 0:
            return None
        return self.algorithm.OPTIONS["rank"] if self.rank is None else self.rank

    @property
    def projects(self) -> bool:
        """Whether the recipe projects anything."""
        return self.subspace_rank is not None

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the optimizer's constructor."""
        rank = {} if self.algorithm.OPTIONS["rank"] is None else {"rank": self.subspace_rank}
        return {**self.options, **rank}

    @property
    def stored(self) -> tuple[str, ...]:
        """What moments are stored as and, where any are stored, projectors: "fp32", "bf16", "8bit", "4bit"."""
        if self.algorithm is None:
            return (next(name for name, dtype in DTYPES.items() if dtype == self.handed),)
        known = {**self.algorithm.OPTIONS, **self.options}
        moments = "8bit" if known.get("quantization") else known.get("moments", "fp32")
        return (moments, known.get("projector_dtype", "fp32")) if self.projects else (moments,)

    @cached_property
    def matrices(self) -> frozenset[str]:
        """Names of what is projected: chosen as `param_groups` and the optimizers choose."""
        from lowrank_ds import params

        named = [(name, torch.empty(shape, device="meta")) for name, shape in self.shapes.items()]
        given = {**self.algorithm.OPTIONS, **self.options}
        return frozenset(params.select(named, given["target_modules"], given["exclude"]))
