"""Recomputing activations changes no weight, under any engine, whoever wraps the layers.

Each run counts how often the first layer's MLP ran: twice a step when its layer is recomputed, so that a run that
silently kept its activations fails.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ds
from tests import training
from tests.cluster import batches, launch, quiet_deepspeed, share, tiny_llama

STEPS, GAP = 3, 2  # bases at steps 0 and 2
RECIPE = "apollo"  # its bases are drawn by parameter name: a changed name is a changed result
TARGETS = [r"layers\.\d+\.self_attn", r"^model\.layers\.1\.mlp"]
SETTINGS = {"update_proj_gap": GAP, "target_modules": TARGETS}
SECTIONS = {
    "section": {},
    "section, contiguous": {
        "partition_activations": True,
        "cpu_checkpointing": True,
        "contiguous_memory_optimization": True,
        "number_checkpoints": 2,
    },
    "section, cpu": {"cpu_checkpointing": True},
}
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
CELLS = [
    *((engine, how) for engine in ENGINES for how in ("kept", "hugging face")),
    ("fsdp2", "wrapper"),
    *(("zero2", how) for how in ("section", "section, cpu")),
    *(("zero3", how) for how in ("section", "section, contiguous")),
]


def prepared(how: str) -> nn.Module:
    """The tiny LLaMA, recomputing in the given way."""
    model = tiny_llama().train()
    if how == "hugging face":
        model.activation_checkpointing_enable({"use_reentrant": False})  # once called gradient_checkpointing_enable
    elif how == "wrapper":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    elif how in SECTIONS:
        quiet_deepspeed()
        lowrank_ds.activation_checkpointing(model, {"activation_checkpointing": SECTIONS[how]})
    return model


def counted(model: nn.Module) -> list[int]:
    """One entry for every run of the first layer's MLP from now on."""
    calls: list[int] = []
    (mlp,) = (m for name, m in model.named_modules() if re.search(r"layers\.0\.(\w+\.)?mlp$", name))
    mlp.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    return calls


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Some matrices chosen by patterns of their names."""
    name, options = training.settings_of(RECIPE, **SETTINGS)
    return getattr(lowrank_ds, name)(model.named_parameters(), **options)


def projected(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of what is projected, in order."""
    return sorted(optimizer._projected)


def cell(rank: int, world: int, engine: str, how: str) -> tuple[dict[str, torch.Tensor], float, list[str]]:
    """(weights, runs of the first MLP a step, names projected) after STEPS steps."""
    model = prepared(how)
    calls = counted(model)
    if engine.startswith("zero"):
        ds = training.zero_engine(RECIPE, int(engine[-1]), world, model, settings=SETTINGS)
        training.train_engine(ds, rank, world, STEPS)
        weights, names = training.weights_of(ds.module), projected(ds.basic_optimizer)
        ds.destroy()
        return weights, len(calls) / STEPS, names
    if engine == "ddp" and world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    elif engine == "fsdp2":
        model = training.fully_sharded("fsdp2", world, model)
    optimizer = optimizer_of(model)
    for batch in batches(STEPS):
        mine = share(batch, rank, world)
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return training.weights_of(model), len(calls) / STEPS, projected(optimizer)


def all_cells(rank: int, world: int) -> dict[tuple[str, str], Any]:
    """{(engine, how): its results}."""
    return {(engine, how): cell(rank, world, engine, how) for engine, how in CELLS}


@functools.cache
def results() -> dict[tuple[str, str], Any]:
    """From two ranks."""
    return launch(2, all_cells)[0]


@pytest.mark.parametrize(("engine", "how"), [c for c in CELLS if c[1] != "kept"], ids=str)
def test_recomputing_changes_nothing(engine: str, how: str) -> None:
    """Bit for bit the weights of the same engine that keeps its activations; the same matrices projected."""
    kept, once, names = results()[engine, "kept"]
    weights, twice, same_names = results()[engine, how]
    assert (once, twice) == (1, 2)
    assert names == same_names and len(names) == 11  # 2 x 4 of attention, 3 of one MLP
    assert training.largest_difference(weights, kept) == 0.0


@pytest.mark.parametrize("how", ["hugging face", "wrapper"])
def test_recomputing_changes_nothing_on_one_process(how: str) -> None:
    """The same, and two ranks equal one."""
    torch.set_num_threads(1)
    kept, once, names = cell(0, 1, "one", "kept")
    weights, twice, same_names = cell(0, 1, "one", how)
    assert (once, twice, names) == (1, 2, same_names)
    assert training.largest_difference(weights, kept) == 0.0
    for engine in ENGINES:
        assert training.largest_difference(results()[engine, "kept"][0], kept) <= 1e-5, engine
    start = training.weights_of(tiny_llama())
    assert training.largest_difference(kept, start) > 5e-3


def test_the_wrapper_changes_names_and_ours_do_not() -> None:
    """What the comparison above rests on: torch's wrapper does insert itself into parameter names."""
    model = prepared("wrapper")
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    assert optimizer_of(model).param_groups[0]["param_names"] == [n for n, _ in tiny_llama().named_parameters()]


# --- what the section may be ------------------------------------------------------------------------------------------
def bad(section: Any) -> Callable[[], None]:
    """Apply a section to the tiny LLaMA."""
    return lambda: lowrank_ds.activation_checkpointing(tiny_llama(), {"activation_checkpointing": section})


ERRORS = [
    (lambda: lowrank_ds.activation_checkpointing(tiny_llama(), {"zero_optimization": {}}), "has no such section"),
    (bad(True), "has no such section"),
    (bad({"partitioned_activations": True}), "unknown key 'partitioned_activations'.*partition_activations, cpu_"),
    (bad({"profile": 1}), "profile must be true or false; got 1"),
    (bad({"number_checkpoints": True}), "number_checkpoints must be a whole number; got True"),
    (bad({"contiguous_memory_optimization": True}), "needs partition_activations: true and number_checkpoints"),
    (
        lambda: lowrank_ds.activation_checkpointing(nn.Linear(2, 2), {"activation_checkpointing": {}}),
        "Linear is not a Hugging Face model",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_a_wrong_section_is_named(call: Callable[[], None], message: str) -> None:
    """DeepSpeed would ignore most of these."""
    with pytest.raises(ValueError, match=f"activation_checkpointing: .*{message}"):
        call()


def test_ranks_must_be_known_first(tmp_path) -> None:
    """Also from a file."""
    path = tmp_path / "ds_config.json"
    path.write_text('{"activation_checkpointing": {}}')
    with pytest.raises(RuntimeError, match=r"call deepspeed.init_distributed\(\) first"):
        lowrank_ds.activation_checkpointing(tiny_llama(), path)
