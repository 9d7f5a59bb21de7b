"""The tiny LLaMA under every engine behind one interface, for tests of engine-neutral checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import lowrank_ds
from tests import training
from tests.cluster import batches, share, tiny_llama


class Run(NamedTuple):
    """A model in training. model: what checkpoints are given (a DeepSpeed engine for ZeRO); optimizer: None for ZeRO."""

    model: Any
    optimizer: Any
    advance: Callable[[range], None]

    def weights(self) -> dict[str, torch.Tensor]:
        """{name: whole weight}; under ZeRO the ones the model computes with."""
        return training.weights_of(self.model.module if self.optimizer is None else self.model)

    def snapshot(self) -> tuple[dict, dict]:
        """(whole weights, this rank's state by (number of the tensor, key)): copies."""
        optimizer = self.model.basic_optimizer if self.optimizer is None else self.optimizer
        own = enumerate(optimizer.state.values())
        state = {(i, k): getattr(v, "to_local", lambda v=v: v)().clone() for i, s in own for k, v in s.items()}
        return self.weights(), state


def start(kind: str, recipe: str, rank: int, world: int, seed: int = 0, bf16: bool = False, **settings: Any) -> Run:
    """An untrained model under an engine: "one", "ddp", "zero1" ... "zero3", "zero3 layerwise", "fsdp1", "fsdp2",
    "hsdp", "fsdp2 tp". settings: the recipe's."""
    model = tiny_llama(seed)
    if kind.startswith("zero"):
        return _zero(kind, recipe, rank, world, model, bf16, settings)
    model = model.bfloat16() if bf16 else model
    place, parts = training.data_ranks(kind, rank, world)
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp1":
        model = training.fsdp1_model(model)
    elif kind != "one":
        model = training.fully_sharded(kind, world, model)
    build = training.fsdp1_optimizer if kind == "fsdp1" else training.build
    optimizer = build(recipe, model, **settings)
    if kind == "one":
        place, parts = 0, 1

    def advance(steps: range) -> None:
        for batch in batches(steps.stop)[steps.start :]:
            mine = share(batch, place, parts)
            model(input_ids=mine, labels=mine).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return Run(model, optimizer, advance)


def _zero(kind: str, recipe: str, rank: int, world: int, model: Any, bf16: bool, settings: dict) -> Run:
    more: dict[str, Any] = {"bf16": {"enabled": True}} if bf16 else {}
    if "layerwise" in kind:
        settings = {**settings, "layerwise": True}
    more["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-2}}
    more = more if "scheduled" in kind else {k: v for k, v in more.items() if k != "scheduler"}
    engine = training.zero_engine(recipe, int(kind[4]), world, model, settings=settings, **more)

    def advance(steps: range) -> None:
        for batch in batches(steps.stop)[steps.start :]:
            mine = share(batch, rank, world)
            engine.backward(engine(input_ids=mine, labels=mine).loss)
            engine.step()

    return Run(engine, None, advance)


def resume(folder: str, kind: str, recipe: str, rank: int, world: int, **more: Any) -> tuple[Run, Any]:
    """(a run with other initial weights that has loaded `folder`, what loading answered)."""
    run = start(kind, recipe, rank, world, seed=3, **more)
    return run, lowrank_ds.load_checkpoint(folder, run.model, run.optimizer)
