"""The tiny LLaMA under every engine behind one interface, for tests of engine-neutral checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import lowrank_ds
from tests import training
from tests.cluster import batches, share, tiny_llama

GAP = 3  # bases are renewed in steps 0, 3, 6, ...


class Run(NamedTuple):
    """A model in training. model: what checkpoints are given (ZeRO: the engine). optimizer: None for ZeRO."""

    model: Any
    optimizer: Any
    advance: Callable[[range], None]

    def weights(self) -> dict[str, torch.Tensor]:
        """{name: whole weight}; under ZeRO the ones the model computes with."""
        return training.weights_of(self.model.module if self.optimizer is None else self.model)

    def state(self) -> dict[tuple[int, str], torch.Tensor]:
        """{(number of the tensor, key): a copy of this rank's part}."""
        optimizer = self.model.basic_optimizer if self.optimizer is None else self.optimizer
        own = enumerate(optimizer.state.values())
        return {(i, k): getattr(v, "to_local", lambda v=v: v)().clone() for i, s in own for k, v in s.items()}


def start(
    kind: str, recipe: str, rank: int, world: int, /, initial: int = 0, bf16: bool = False, **settings: Any
) -> Run:
    """An untrained model under an engine: "one", "ddp", "zero1" ... "zero3" (with words that `_zero` looks for),
    "fsdp1", "fsdp2", "hsdp", "fsdp2 tp". initial: seed of the weights. settings: the recipe's."""
    known = training.settings_of(recipe)[1]
    settings = {name: GAP for name in ("update_proj_gap", "kappa") if name in known} | settings
    model = tiny_llama(initial)
    if kind.startswith("zero"):
        return _zero(kind, recipe, rank, world, model, bf16, settings)
    model = model.bfloat16() if bf16 else model
    place, parts = (0, 1) if kind == "one" else training.data_ranks(kind, rank, world)
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp1":
        model = training.fsdp1_model(model)
    elif kind != "one":
        model = training.fully_sharded(kind, world, model)
    optimizer = (training.fsdp1_optimizer if kind == "fsdp1" else training.build)(recipe, model, **settings)

    def advance(steps: range) -> None:
        for batch in batches(steps.stop)[steps.start :]:
            mine = share(batch, place, parts)
            model(input_ids=mine, labels=mine).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return Run(model, optimizer, advance)


def _zero(kind: str, recipe: str, rank: int, world: int, model: Any, bf16: bool, settings: dict) -> Run:
    more: dict[str, Any] = {"bf16": {"enabled": True}} if bf16 else {}
    if "grad fp32" in kind:  # DeepSpeed's BF16_Optimizer
        more["data_types"] = {"grad_accum_dtype": "fp32"}
    if "sub-groups" in kind:
        more["zero"] = {"sub_group_size": 3000}
    if "layerwise" in kind:
        settings = {**settings, "layerwise": True}
    if "scheduled" in kind:
        warmup = {"warmup_num_steps": 6, "warmup_max_lr": 1e-3, "warmup_type": "linear"}
        more["scheduler"] = {"type": "WarmupLR", "params": warmup}
    engine = training.zero_engine(recipe, int(kind[4]), world, model, settings=settings, **more)

    def advance(steps: range) -> None:
        for batch in batches(steps.stop)[steps.start :]:
            mine = share(batch, rank, world)
            engine.backward(engine(input_ids=mine, labels=mine).loss)
            engine.step()

    return Run(engine, None, advance)


def resume(folder: str, kind: str, recipe: str, rank: int, world: int, **more: Any) -> tuple[Run, Any]:
    """(a run with other initial weights that has loaded `folder`, what loading answered)."""
    run = start(kind, recipe, rank, world, initial=3, **more)
    return run, lowrank_ds.load_checkpoint(folder, run.model, run.optimizer)
