"""DeepSpeed's own checkpoints: resumed bit for bit, read without unpickling code, weights found by zero_to_fp32.py."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lowrank_ds
from lowrank_ds import cli
from lowrank_ds.checkpoint.agree import CheckpointError
from lowrank_ds.checkpoint.deepspeed_files import open_checkpoint
from lowrank_ds.checkpoint.runs import Run
from lowrank_ds.engines import deepspeed_checkpoint
from tests import training
from tests.cluster import batches, launch, quiet_deepspeed, tiny_llama

BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
TWICE = {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 3}
# name: (recipe, stage, ds_config, saved after so many steps). Bases are made in steps 1, 5, 9: a save after 4 is right
# before one, after 5 right after one.
CELLS: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "zero1": ("fira", 1, {}, 4),
    "zero2": ("flora", 2, {}, 5),
    "zero3": ("galore left", 3, {}, 3),
    "zero1 apollo": ("apollo", 1, {}, 5),
    "zero2 adafactor": ("galore adafactor", 2, {}, 4),
    "zero3 after": ("fira", 3, {}, 5),
    "zero2 offload": ("fira", 2, OFFLOAD, 4),
    "zero3 offload": ("galore", 3, OFFLOAD, 4),
    "zero2 accumulated": ("fira", 2, TWICE, 4),
    "zero1 bf16": ("fira", 1, BF16, 4),
    "zero2 bf16": ("galore", 2, BF16, 5),
    "zero3 bf16": ("fira", 3, BF16, 4),
    "bf16 optimizer": ("fira", 1, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}, 4),
}
AFTER = 3


def everything(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of the whole weights, and of this rank's fp32 partitions and state."""
    found = training.weights_of(engine.module)
    for i, (host, state) in enumerate(engine.basic_optimizer.state.items()):  # (ZeRO-3 empties its groups after a step)
        found[f"host {i}"] = host.detach().clone()
        found |= {f"host {i} {key}": value.clone() for key, value in state.items()}
    return found


def save_and_resume(rank: int, world: int, folder: str) -> dict[str, tuple[bool, int]]:
    """{cell: (whether a resumed run equals the one that went on, tensors compared)}; weights as saved are kept."""
    same = {}
    for name, (recipe, stage, config, at) in CELLS.items():
        engine = training.zero_engine(recipe, stage, world, **config)
        training.train_engine(engine, rank, world, at)
        engine.save_checkpoint(f"{folder}/{name}")
        if rank == 0:
            torch.save(training.weights_of(engine.module), f"{folder}/{name}/weights.pt")
        elif stage == 3:
            training.weights_of(engine.module)
        training.train_engine(engine, rank, world, AFTER)
        straight = everything(engine)
        if rank == 0:
            torch.save(
                {key: straight[key] for key in training.weights_of(tiny_llama())}, f"{folder}/{name}/straight.pt"
            )
        engine.destroy()
        engine = training.zero_engine(recipe, stage, world, tiny_llama(seed=1), **config)
        engine.load_checkpoint(f"{folder}/{name}")
        training.train_engine(engine, rank, world, AFTER)
        resumed = everything(engine)
        engine.destroy()
        alike = straight.keys() == resumed.keys()
        same[name] = alike and all(torch.equal(straight[n], resumed[n]) for n in straight), len(straight)
    model, optimizer = partly_frozen()
    engine = quiet_deepspeed().initialize(model=model, optimizer=optimizer, config=training.ds_config(None, 3, world))
    training.train_engine(engine[0], rank, world, 1)
    engine[0].save_checkpoint(f"{folder}/{FROZEN}")
    return same


FROZEN = "partly frozen"


def partly_frozen(seed: int = 0) -> tuple[Any, torch.optim.Optimizer]:
    """A model with frozen parameters, and an optimizer that was given all of them."""
    model = tiny_llama(seed)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    return model, lowrank_ds.GaLoreAdamW(model.named_parameters(), rank=8)


def saved_before_the_first_step(rank: int, world: int, folder: str) -> list[str]:
    """What the loader says to such folders of ZeRO-2 and ZeRO-3; DeepSpeed itself loads them."""
    said = []
    for stage in (2, 3):
        engine, place = training.zero_engine("fira", stage, world), f"{folder}/{stage}"
        engine.save_checkpoint(place)
        assert engine.load_checkpoint(place)[0] is not None
        with pytest.raises(CheckpointError) as caught:
            lowrank_ds.load_checkpoint(place, tiny_llama())
        said.append(str(caught.value))
        engine.destroy()
    return said


def test_saved_before_the_first_step(tmp_path: Path) -> None:
    """The message says so, and what to do."""
    for said in launch(1, saved_before_the_first_step, str(tmp_path))[0]:
        assert "was saved before the optimizer's first step" in said and "engine.load_checkpoint" in said


def test_frozen_parameters_in_the_groups(folder: str) -> None:
    """DeepSpeed leaves them out of its partitions, param_names has them."""
    model, optimizer = partly_frozen(seed=1)
    lowrank_ds.load_checkpoint(f"{folder}/{FROZEN}", model, optimizer)
    straight, other = partly_frozen()
    (batch,) = batches(1)
    straight(input_ids=batch, labels=batch).loss.backward()
    other.step()
    assert training.largest_difference(training.weights_of(model), training.weights_of(straight)) <= 2e-6


def engine_of(scaler: Any, schedule: str = "LambdaLR") -> Any:
    """What `counters` looks at of an engine (fp16 needs a GPU)."""
    optimizer = torch.optim.SGD([torch.zeros(1)])
    arguments = {"LambdaLR": [lambda step: 1.0], "CosineAnnealingLR": [9]}[schedule]
    return SimpleNamespace(
        global_steps=4, global_samples=8, skipped_steps=1, micro_steps=4, gradient_accumulation_steps=lambda: 1,
        optimizer=SimpleNamespace(loss_scaler=scaler),
        lr_scheduler=getattr(torch.optim.lr_scheduler, schedule)(optimizer, *arguments),
    )  # fmt: skip


def test_a_loss_scale_is_for_fp16_only(caplog: pytest.LogCaptureFixture) -> None:
    """A scale of 1 would drown small fp16 gradients, and nothing but fp16 has use for another."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    fp16, fp32 = engine_of(DynamicLossScaler(2.0**8, 2.0, 100, 1, 1, False, False)), engine_of(LossScaler(1.0))
    for one, other in ((fp16, fp32), (fp32, fp16)):
        caplog.clear()
        deepspeed_checkpoint.set_counters(one, deepspeed_checkpoint.counters(other))
        assert "has a dynamic loss scale (fp16); it is left as it is" in caplog.text
    assert fp16.optimizer.loss_scaler.cur_scale == 2.0**8 and fp32.optimizer.loss_scaler.cur_scale == 1.0
    again = engine_of(DynamicLossScaler(2.0**16, 2.0, 100, 1, 1, False, False))
    deepspeed_checkpoint.set_counters(again, deepspeed_checkpoint.counters(fp16))
    assert again.optimizer.loss_scaler.cur_scale == 2.0**8


def test_another_schedule_is_refused_in_time() -> None:
    """Its load_state_dict would raise KeyError, or not even that, when all weights are loaded already."""
    ours, theirs = engine_of(None), deepspeed_checkpoint.counters(engine_of(None, "CosineAnnealingLR"))
    with pytest.raises(RuntimeError, match="schedule was another one than LambdaLR: only one of them knows T_max"):
        deepspeed_checkpoint.check_counters(ours, theirs)
    deepspeed_checkpoint.check_counters(ours, deepspeed_checkpoint.counters(ours) | {"lr_scheduler": None})
    deepspeed_checkpoint.check_counters(ours, deepspeed_checkpoint.counters(ours))


@pytest.fixture(scope="module")
def folder() -> Iterator[str]:
    """Where two ranks saved every cell and resumed it bit for bit."""
    with tempfile.TemporaryDirectory() as path:
        for found in launch(2, save_and_resume, path):
            assert found.keys() == CELLS.keys()
            assert all(same and count > 80 for same, count in found.values()), found
        yield path


def test_zero_to_fp32_gives_the_saved_weights(folder: str) -> None:
    """DeepSpeed's own script, on what engine.save_checkpoint wrote (and engine.load_checkpoint resumed bit for bit)."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for name, (_, _, config, _) in CELLS.items():
        if "data_types" in config:
            continue  # zero_to_fp32.py itself refuses the files of BF16_Optimizer
        weights = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/{name}")
        saved = torch.load(f"{folder}/{name}/weights.pt", weights_only=True)
        for key, weight in saved.items():
            found = weights[key].bfloat16().float() if "bf16" in config else weights[key]
            assert torch.equal(found, weight), (name, key)


def saved(name: str) -> tuple[str, dict[str, Any]]:
    """(recipe, ds_config) of a cell."""
    recipe, _, config, _ = CELLS[name]
    return recipe, config


# {saved by: loaded by}; the global batches are the same for any number of ranks.
MOVES = {
    "zero1": "zero2", "zero2": "zero2", "zero3": "zero3", "zero1 apollo": "fsdp2", "zero2 adafactor": "zero3",
    "zero3 after": "fsdp2", "zero3 offload": "zero1", "bf16 optimizer": "zero2", "zero3 bf16": "zero3",
}  # fmt: skip


def loaded_elsewhere(rank: int, world: int, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """{cell: weights after training on from it under another engine, at another world size}."""
    found = {}
    for name, engine in MOVES.items():
        recipe, config = saved(name)
        if engine == "fsdp2":
            model = training.fully_sharded(engine, world, tiny_llama(seed=1))
            optimizer = training.build(recipe, model)
            lowrank_ds.load_checkpoint(f"{folder}/{name}", model, optimizer)
            training.train_sharded(model, optimizer, engine, rank, world, range(AFTER))
            found[name] = training.weights_of(model)
        else:
            more = BF16 if "bf16" in config else {}
            zero = training.zero_engine(recipe, int(engine[-1]), world, tiny_llama(seed=1), **more)
            lowrank_ds.load_checkpoint(f"{folder}/{name}", zero)
            if more:
                lowrank_ds.save_checkpoint(f"{folder}/{name}/again", zero)
            training.train_engine(zero, rank, world, AFTER)
            found[name] = training.weights_of(zero.module)
            assert zero.global_steps == CELLS[name][3] + AFTER
            zero.destroy()
    return found


def assert_same_entries(one: str, other: str) -> None:
    """Two checkpoints hold the same weights (fp32 masters) and state, bit for bit."""
    with open_checkpoint(one) as a, open_checkpoint(other) as b:
        assert a.manifest.entries.keys() == b.manifest.entries.keys() and len(a.manifest.entries) > 100
        for key, entry in a.manifest.entries.items():
            whole = Run.interval(0, entry.numel)
            assert torch.equal(a.read(key, whole), b.read(key, whole)), key


def test_loads_at_any_world_size_and_in_any_engine(folder: str) -> None:
    """lowrank_ds.load_checkpoint reads DeepSpeed's folders: 2 ranks -> 3 under ZeRO-1/2/3 or FSDP2, and one process."""
    torch.set_num_threads(1)
    for name, weights in launch(3, loaded_elsewhere, folder)[0].items():
        if "bf16" in CELLS[name][2]:  # other micro-batches round otherwise: compare what was loaded
            assert_same_entries(f"{folder}/{name}", f"{folder}/{name}/again")
            continue
        straight = torch.load(f"{folder}/{name}/straight.pt", weights_only=True)
        assert training.largest_difference(weights, straight) <= 2e-6, name
    for name in MOVES:
        recipe, config = saved(name)
        if config:
            continue
        model = tiny_llama(seed=1)
        optimizer = training.build(recipe, model)
        lowrank_ds.load_checkpoint(f"{folder}/{name}", model, optimizer)
        for batch in batches(AFTER):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        straight = torch.load(f"{folder}/{name}/straight.pt", weights_only=True)
        assert training.largest_difference(training.weights_of(model), straight) <= 2e-6, name


def copied(folder: str, tmp_path: Path, name: str = "zero2") -> Path:
    """A copy of one cell's folder, to be spoiled."""
    return Path(shutil.copytree(f"{folder}/{name}", tmp_path / name))


def torn(where: Path) -> None:
    """The second rank's optimizer file cut short."""
    (file,) = where.glob("*/*pp_rank_1*optim_states.pt")
    file.write_bytes(file.read_bytes()[:-2000])


def flipped(where: Path) -> None:
    """One byte of the first rank's numbers changed."""
    (file,) = where.glob("*/*pp_rank_0*optim_states.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def missing(where: Path) -> None:
    """No file of the second rank."""
    (file,) = where.glob("*/*pp_rank_1*optim_states.pt")
    file.unlink()


def with_code(where: Path) -> None:
    """An object in client_state whose class would be imported and run."""
    (file,) = where.glob("*/mp_rank_00_model_states.pt")
    model = torch.load(file, weights_only=True)
    torch.save(model | {"mine": subprocess.CompletedProcess("echo", 0)}, file)


def of_another(where: Path) -> None:
    """State of an optimizer that says nothing of where it lies."""
    for file in where.glob("*/*optim_states.pt"):
        saved = torch.load(file, weights_only=False)
        del saved["optimizer_state_dict"]["base_optimizer_state"]["lowrank_ds"]
        torch.save(saved, file)


SPOILED = {
    torn: "torn", flipped: "damaged", missing: "2 ranks saved, 1 files", with_code: "holds code",
    of_another: "another optimizer",
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda f: f.__name__)
def test_spoiled_folders_are_refused(folder: str, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """Named, before anything is changed."""
    where = copied(folder, tmp_path)
    spoil(where)
    model = tiny_llama(seed=1)
    optimizer = training.build("flora", model)
    before = training.weights_of(model)
    with pytest.raises(CheckpointError, match=SPOILED[spoil]):
        lowrank_ds.load_checkpoint(where, model, optimizer)
    assert training.largest_difference(before, training.weights_of(model)) == 0.0


@pytest.mark.parametrize("command", [["consolidate"], ["reshard", "--files", "3"]], ids=lambda c: c[0])
def test_converted_offline(folder: str, tmp_path: Path, command: list[str]) -> None:
    """lowrank-ds consolidate and reshard: the same entries in files of ours."""
    assert cli.main([command[0], f"{folder}/zero3", str(tmp_path / "out"), *command[1:]]) == 0
    assert_same_entries(f"{folder}/zero3", str(tmp_path / "out"))


def test_inspected(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """lowrank-ds inspect says what there is, and that a byte was changed."""
    assert cli.main(["inspect", f"{folder}/zero2"]) == 0
    assert "Flora, saved by 2 ranks" in (said := capsys.readouterr().out) and "steps taken: 5" in said
    where = copied(folder, tmp_path)
    flipped(where)
    assert cli.main(["inspect", str(where)]) == 1 and "DAMAGED" in capsys.readouterr().out


def test_files_hold_no_code(folder: str) -> None:
    """What DeepSpeed pickles beside tensors: classes of its own, none of ours."""
    found = set()
    for file in Path(folder).glob("*/*/*.pt"):
        found |= set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    found.discard("builtins.getattr")  # of an enum's member: Python 3.11.0 to 3.11.3 write them so
    assert found and all(name.startswith("deepspeed.") for name in found), found
