"""Damaged, foreign and failed checkpoints: a message on every rank, and everything as it was before."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_ds
from lowrank_ds.checkpoint import CheckpointError, format, places, save
from tests import neutral, training
from tests.cluster import launch


def flip(path: Path) -> None:
    """Change one bit in the last tensor of a file."""
    with open(path, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def cut(path: Path) -> None:
    """Take the end off a file."""
    os.truncate(path, path.stat().st_size - 100)


def edited(path: Path) -> None:
    """A manifest in which somebody changed a number."""
    path.write_text(path.read_text().replace('"world_size": ', '"world_size": 1'))


# what is done to which file, and what the message says
DAMAGE: tuple[tuple[Callable, str, str], ...] = (
    (flip, "rank-00001.safetensors", "rank-00001.safetensors is damaged: its SHA-256"),
    (cut, "rank-00000.safetensors", "rank-00000.safetensors is torn: it has"),
    (os.remove, "rank-00001.safetensors", "rank-00001.safetensors is missing"),
    (os.remove, "manifest.json", "it has no manifest.json"),
    (cut, "manifest.json", "manifest.json is torn or not ours"),
    (edited, "manifest.json", "manifest.json was changed after it was saved"),
)
# what is built, and what the message says
FOREIGN = (
    (("fira", {"rank": 6}), "rank is 8, but this optimizer was built with 6"),
    (("fira", {"seed": 5}), "seed is 0, but this optimizer was built with 5"),
    (("fira", {"exclude": ["down_proj", "embed", "lm_head"]}), "down_proj.weight is projected in the checkpoint only"),
    (("galore", {}), "it was saved with FiraAdamW, whose state means nothing to GaLoreAdamW"),
)


def refused(folder: str, run: neutral.Run, **more: bool) -> str:
    """The message of loading `folder`, which must leave weights and state alone."""
    weights, state = run.weights(), run.state()
    with pytest.raises(CheckpointError) as caught:
        lowrank_ds.load_checkpoint(folder, run.model, run.optimizer, **more)
    assert training.largest_difference(weights, run.weights()) == 0.0
    now = run.state()
    assert now.keys() == state.keys() and all(torch.equal(state[key], now[key]) for key in state)
    return str(caught.value)


def bad_loads(rank: int, world: int, folder: str) -> list[str]:
    """The messages, and what saving leaves behind when rank 1 cannot write."""
    run = neutral.start("fsdp2", "fira", rank, world)
    run.advance(range(2))
    good = f"{folder}/good"
    lowrank_ds.save_checkpoint(good, run.model, run.optimizer, extra="first")
    run.advance(range(2, 3))
    messages = []
    for i, (harm, name, _) in enumerate(DAMAGE):
        if rank == 0:
            shutil.copytree(good, f"{folder}/bad{i}")
            harm(Path(f"{folder}/bad{i}/{name}"))
        torch.distributed.barrier()
        messages.append(refused(f"{folder}/bad{i}", run))
    for (recipe, settings), _ in FOREIGN:
        other = neutral.start("fsdp2", recipe, rank, world, **settings)
        other.advance(range(1))
        messages.append(refused(good, other))
    return [*messages, *_bad_saves(rank, run, good)]


def _bad_saves(rank: int, run: neutral.Run, good: str) -> list[str]:
    """Saving over `good` while only rank 1 fails: in the middle of a file, or because of what it was given."""

    def disk_full(path: Path, blobs: list) -> tuple[int, str]:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    messages, write = [], format.write_file
    for broken, extra in ((disk_full, None), (write, rank), (write, {1, rank})):
        format.write_file = broken if rank == 1 else write
        with pytest.raises(CheckpointError) as caught:
            lowrank_ds.save_checkpoint(good, run.model, run.optimizer, extra=extra)
        messages.append(str(caught.value))
    format.write_file = write
    again = neutral.start("fsdp2", "fira", rank, 2)
    assert lowrank_ds.load_checkpoint(good, again.model, again.optimizer) == ("first", None)
    return messages


FAILED = (
    "failed on rank 1: OSError: [Errno 28] No space left on device",
    "extra differs between ranks",
    "extra is not JSON-able",
)


def test_every_rank_hears_and_nothing_changes() -> None:
    """Damaged and foreign checkpoints; a save that fails on one rank raises on both and leaves the old one."""
    expected = [message for _, _, message in DAMAGE] + [message for _, message in FOREIGN] + list(FAILED)
    with tempfile.TemporaryDirectory() as folder:
        for found in launch(2, bad_loads, folder):
            for said, message in zip(found, expected, strict=True):
                assert message in said and folder in said
        assert not [name for name in os.listdir(folder) if "partial" in name or "old" in name]


# -- one process: what needs no second rank ---------------------------------------------------------------------------
def small(width: int = 6, bias: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A layer, a frozen stack of matrices, a tied pair, batch norm with its buffers; after one step."""
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(5, width, bias=bias), nn.BatchNorm1d(width), nn.Linear(width, width))
    model.again = nn.Linear(width, width)
    model.again.weight = model[2].weight
    model.frozen = nn.Parameter(torch.randn(2, 3, 4), requires_grad=False)
    model.register_buffer("scratch", torch.randn(2), persistent=False)
    optimizer = lowrank_ds.FiraAdamW(lowrank_ds.param_groups(model, rank=2, target_modules=["weight"], exclude=["^1"]))
    model(torch.randn(4, 5))[:, 0].sum().backward()
    optimizer.step()
    return model, optimizer


def test_all_of_a_model_comes_back(tmp_path: Path) -> None:
    """Frozen stacks, tied weights, buffers (not those a state dict leaves out); no pickle in the folder."""
    model, optimizer = small()
    lowrank_ds.save_checkpoint(tmp_path / "deep" / "a", model, optimizer)
    assert sorted(os.listdir(tmp_path / "deep" / "a")) == ["manifest.json", "rank-00000.safetensors"]
    other, theirs = small()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    assert lowrank_ds.load_checkpoint(tmp_path / "deep" / "a", other, theirs) == (None, None)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert not other.scratch.any() and other.again.weight is other[2].weight
    keys = json.loads((tmp_path / "deep" / "a" / "manifest.json").read_text())["checkpoint"]["tensors"]
    assert not any(name == "again.weight" for _, name, *_ in keys)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (small(7), r"0\.weight has shape \(6, 5\) in the checkpoint and \(7, 5\) here"),
        (small(6, bias=False), r"0\.bias is trained in the checkpoint only"),
    ],
    ids=["shape", "parameter"],
)
def test_another_model_is_refused_by_name(tmp_path: Path, other, message: str) -> None:
    """Also without the optimizer: then it is the weight that is missing."""
    model, optimizer = small()
    lowrank_ds.save_checkpoint(tmp_path / "a", model, optimizer)
    before = {k: v.clone() for k, v in other[0].state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        lowrank_ds.load_checkpoint(tmp_path / "a", *other)
    with pytest.raises(CheckpointError, match=message.replace("trained", "none of the model's").split(" is ")[0]):
        lowrank_ds.load_checkpoint(tmp_path / "a", other[0])
    assert all(torch.equal(v, before[k]) for k, v in other[0].state_dict().items())


def test_weights_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """optimizer_state=False: another algorithm starts anew, and says so; bf16 weights are converted, and say so."""
    model, optimizer = small()
    lowrank_ds.save_checkpoint(tmp_path / "a", model, optimizer)
    other, _ = small()
    theirs = lowrank_ds.GaLoreAdamW(lowrank_ds.param_groups(other, rank=3, target_modules=["0.weight"]))
    theirs.init_state()
    with caplog.at_level(logging.WARNING, "lowrank_ds"):
        lowrank_ds.load_checkpoint(tmp_path / "a", other.bfloat16(), theirs, optimizer_state=False)
    assert "weights only; GaLoreAdamW starts anew" in caplog.text
    assert "(such as 0.weight) are float32 in the checkpoint and bfloat16 here: converted" in caplog.text
    assert not theirs.state and torch.equal(other[0].weight, model[0].weight.bfloat16())
    lowrank_ds.save_checkpoint(tmp_path / "b", model)
    with pytest.raises(CheckpointError, match="it has weights only, no optimizer state for FiraAdamW"):
        lowrank_ds.load_checkpoint(tmp_path / "b", model, optimizer)


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    """A folder with other files is left alone; stale partial folders of the same path go; other optimizers."""
    model, optimizer = small()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="exists and is no checkpoint of lowrank_ds; it is not replaced"):
        lowrank_ds.save_checkpoint(tmp_path / "a", model, optimizer)
    (tmp_path / "b.partial-1234").mkdir()
    lowrank_ds.save_checkpoint(tmp_path / "b", model, optimizer)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    os.rename(tmp_path / "b", tmp_path / "b.old-1")  # killed between the two renames
    with pytest.raises(CheckpointError, match=r"b\.old-1 is complete: rename it"):
        lowrank_ds.load_checkpoint(tmp_path / "b", model, optimizer)
    with pytest.raises(CheckpointError, match="AdamW is no optimizer of lowrank_ds"):
        lowrank_ds.save_checkpoint(tmp_path / "c", model, torch.optim.AdamW(model.parameters()))


def test_a_failed_rename_brings_the_old_checkpoint_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing takes two renames: should the second fail, the first is undone."""
    model, optimizer = small()
    lowrank_ds.save_checkpoint(tmp_path / "a", model, optimizer, extra="old")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if ".partial-" in source.name:
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Input/output error"):
        patch.setattr(save.os, "rename", failing)
        lowrank_ds.save_checkpoint(tmp_path / "a", model, optimizer, extra="new")
    assert os.listdir(tmp_path) == ["a"] and lowrank_ds.load_checkpoint(tmp_path / "a", model, optimizer)[0] == "old"


def test_what_a_checkpoint_cannot_say_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights updated in part; gradients of a backward pass under `layerwise`; keys that JSON takes for the same."""
    model, optimizer = small()
    with pytest.raises(CheckpointError, match="keys that are the same to JSON"):
        lowrank_ds.save_checkpoint(tmp_path / "a", model, optimizer, extra={1: "a", "1": "b"})
    optimizer._broken = RuntimeError("rank 1 has ended")
    with pytest.raises(CheckpointError, match=r"a step of FiraAdamW failed midway \(rank 1 has ended\)"):
        lowrank_ds.save_checkpoint(tmp_path / "a", model, optimizer)
    assert not os.listdir(tmp_path)
    optimizer._broken = None
    lowrank_ds.layerwise(model, optimizer)
    lowrank_ds.save_checkpoint(tmp_path / "a", model, optimizer, extra={"inf": float("inf"), "nan": [float("nan")]})
    model(torch.randn(4, 5)).sum().backward()
    with caplog.at_level(logging.WARNING, "lowrank_ds"):
        lowrank_ds.save_checkpoint(tmp_path / "b", model, optimizer)
    assert "between a backward pass and step()" in caplog.text
    extra, _ = lowrank_ds.load_checkpoint(tmp_path / "a", model, optimizer)
    assert extra["inf"] == float("inf")
    for _ in range(2):  # what had arrived before loading is forgotten
        model(torch.randn(4, 5)).sum().backward()
        optimizer.load_state_dict(optimizer.state_dict())


def test_pieces_that_leave_a_gap_are_refused() -> None:
    """Every entry of every tensor is claimed by somebody, or nothing is written."""
    key, run = format.Key("weights", "w"), places.Run.interval
    with pytest.raises(CheckpointError, match="w: the ranks hold 5 of its 6 entries"):
        save._deal([[(key, (2, 3), "float32", run(0, 3))], [(key, (2, 3), "float32", run(4, 6))]], ["", ""])
    entries, own = save._deal([[(key, (6,), "float32", run(0, 4))], [(key, (6,), "float32", run(2, 6))]], ["", ""])
    assert [piece.run for piece in entries[key].pieces] == [run(0, 4), run(4, 6)] and own == [(0, run(0, 4), "w@0")]
