"""Engine-neutral checkpoints of what a LLaMA does not have: experts, LoRA, sums of micro-batches; geometry; tools."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_ds
from lowrank_ds import cli
from lowrank_ds.checkpoint import CheckpointError, records
from lowrank_ds.checkpoint.runs import Run, Taken, overlaps
from tests import lora, neutral, training
from tests import test_mixed_model as mixed
from tests.cluster import batches, launch, quiet_deepspeed, share
from tests.test_neutral import LIMIT


# -- geometry ---------------------------------------------------------------------------------------------------------
def entries(run: Run) -> torch.Tensor:
    """The numbers of its entries, in the order a piece holds them."""
    start = run.start + torch.arange(run.count).unsqueeze(1) * run.stride
    return (start + torch.arange(run.length)).reshape(-1)


def some_run(draw: random.Random, shape: tuple[int, int]) -> Run:
    """An interval of a matrix' entries, or a rectangle."""
    m, n = shape
    if draw.random() < 0.5:
        start = draw.randrange(m * n)
        return Run.interval(start, draw.randrange(start, m * n) + 1)
    (top, left), rows, cols = (draw.randrange(m), draw.randrange(n)), draw.randrange(1, m + 1), draw.randrange(1, n + 1)
    rows, cols = min(rows, m - top), min(cols, n - left)
    first = top * n + left
    return Run(first, rows, cols, n) if rows > 1 else Run.interval(first, first + cols)


def test_pieces_meet_where_they_should() -> None:
    """Any two pieces of a tensor, also of matrices of different width: what is copied is what both have, once."""
    draw = random.Random(0)
    for _ in range(600):
        shapes = [(6, 10), draw.choice([(6, 10), (12, 5), (4, 15)])]
        source, target = (some_run(draw, shape) for shape in shapes)
        values, out = entries(source), torch.full((target.size + 1,), -1)[1:]  # a view that begins elsewhere
        for shared in overlaps(source, target):
            assert (out.clone() == -1).any()
            first, last = shared.window
            shared.copy(values[first:last], out)
        wanted = entries(target)
        assert torch.equal(out, torch.where(torch.isin(wanted, values), wanted, -1)), (source, target)
        assert sum(o.rows * o.cols for o in overlaps(source, target)) == torch.isin(wanted, values).sum()


def test_what_is_claimed_twice_is_written_once() -> None:
    """Lines kept by two ranks and replicas of tiles: each entry belongs to the first who asks."""
    draw = random.Random(1)
    for _ in range(50):
        taken, found = Taken(), []
        for _ in range(5):
            start = draw.randrange(40)
            found += taken.claim(Run.interval(start, draw.randrange(start, 40) + 1))
        numbers = torch.cat([entries(run) for run in found])
        assert numbers.unique().numel() == numbers.numel() == taken.size
    tile = Run(1, 2, 2, 5)
    assert taken.claim(tile) == [tile] and taken.claim(tile) == []


# -- experts, LoRA, sums of micro-batches -----------------------------------------------------------------------------
def mixed_run(kind: str, world: int, initial: int = 0) -> tuple[Any, Any]:
    """(model or engine, optimizer) of the model with stacked experts; kind: "zero3", "zero1" or an FSDP2 placement."""
    torch.manual_seed(initial)
    model = mixed.Mixed()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(initial)
    if kind.startswith("zero"):
        optimizer = mixed.optimizer_of("fira stagger randomized", model)
        config = training.ds_config(None, int(kind[4]), world)
        return quiet_deepspeed().initialize(model=model, optimizer=optimizer, config=config)[0], None
    if kind != "one":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=training.mesh_of("fsdp2", world), **mixed.FSDP2[kind])
    return model, mixed.optimizer_of("fira stagger randomized", model)


def mixed_steps(model: Any, optimizer: Any, rank: int, world: int, steps: slice) -> dict[str, torch.Tensor]:
    """Weights after some of the global batches."""
    for batch in mixed.data()[steps]:
        if optimizer is None:
            model.backward(model(batch.chunk(world)[rank]))
            model.step()
            continue
        optimizer.zero_grad()
        model(batch.chunk(world)[rank]).backward()
        optimizer.step()
    return training.weights_of(model.module if optimizer is None else model)


MIXED = ("zero3", "fsdp2 expert columns", "zero1", "fsdp2 expert rows", "fsdp2")


def three_ranks(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Experts from engine to engine (two steps each), LoRA-FA under ZeRO-3, a save between micro-batches."""
    for i, kind in enumerate(MIXED):
        model, optimizer = mixed_run(kind, world, initial=i)
        if i:
            lowrank_ds.load_checkpoint(f"{folder}/mixed", model, optimizer)
        weights = mixed_steps(model, optimizer, rank, world, slice(i, i + 1 if i + 1 < len(MIXED) else None))
        lowrank_ds.save_checkpoint(f"{folder}/mixed", model, optimizer)
    engine = lora.engine_of(3, world)
    training.train_engine(engine, rank, world, 3)
    lowrank_ds.save_checkpoint(f"{folder}/lora", engine)
    found = {"mixed": weights, "lora": training.weights_of(engine.module)}
    engine = training.zero_engine("galore", 2, world, gradient_accumulation_steps=2, train_micro_batch_size_per_gpu=2)
    mine = share(batches(1)[0], rank, world)[:2]
    engine.backward(engine(input_ids=mine, labels=mine).loss)
    engine.step()
    with pytest.raises(CheckpointError, match="the engine is at micro-batch 1 of 2 of a step"):
        lowrank_ds.save_checkpoint(f"{folder}/between", engine)
    return found | {"sums": between(rank, world, folder)}


def between(rank: int, world: int, folder: str) -> float:
    """Largest difference after a save in the middle of a step that sums micro-batches in the subspace (FSDP2)."""
    kind, runs = ("one", []) if world == 1 else ("fsdp2", [])
    for resumed in (False, True):
        run = neutral.start(kind, "galore", rank, world, initial=resumed, compress_accumulation=True)
        for step, batch in enumerate(batches(6)):
            for number, mine in enumerate(share(batch, rank, world).chunk(2)):
                if (step, number) == (4, 1):
                    act = lowrank_ds.load_checkpoint if resumed else lowrank_ds.save_checkpoint
                    act(f"{folder}/sums", run.model, run.optimizer)
                if not resumed or (step, number) >= (4, 1):
                    run.model(input_ids=mine, labels=mine).loss.backward()
                    run.optimizer.accumulate()
            if not resumed or step >= 4:
                run.optimizer.step()
                run.optimizer.zero_grad()
        runs.append(run.weights())
    plain = neutral.start(kind, "galore", rank, world)
    with pytest.raises(CheckpointError, match="q_proj.weight was saved between the micro-batches of a step"):
        lowrank_ds.load_checkpoint(f"{folder}/sums", plain.model, plain.optimizer)
    return training.largest_difference(*runs)


def test_experts_lora_and_sums() -> None:
    """Three ranks: stacks cut in every way, frozen weights under ZeRO-3, sums bit for bit; then one process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = launch(3, three_ranks, folder)[2]
        assert found["sums"] == between(0, 1, folder) == 0.0
        straight = mixed.one_process("fira stagger randomized")
        assert training.largest_difference(straight, found["mixed"]) <= LIMIT
        model, optimizer = mixed_run("one", 1, initial=7)
        lowrank_ds.load_checkpoint(f"{folder}/mixed", model, optimizer)
        assert training.largest_difference(training.weights_of(model), found["mixed"]) == 0.0
        model = lora.lora_llama()
        optimizer = lora.optimizer_of(model)
        lowrank_ds.load_checkpoint(f"{folder}/lora", model, optimizer)
        assert training.largest_difference(training.weights_of(model), found["lora"]) == 0.0
        for batch in batches(5)[3:]:
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert training.largest_difference(training.weights_of(model), lora.one_process(5)) <= LIMIT


# -- the command line -------------------------------------------------------------------------------------------------
def test_consolidate_reshard_inspect(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Joined and divided checkpoints load alike; weights are a plain safetensors state dict; damage is told."""
    run = neutral.start("one", "galore adafactor", 0, 1)
    run.advance(range(4))
    source, local = str(tmp_path / "a"), {"rng": torch.arange(5)}
    lowrank_ds.save_checkpoint(source, run.model, run.optimizer, extra={"epoch": 1}, local=local)
    assert cli.main(["reshard", source, f"{source}3", "--files", "3"]) == 0
    assert cli.main(["consolidate", f"{source}3", f"{source}1"]) == 0
    capsys.readouterr()
    for where in ("", "1", "3"):
        again, (extra, mine) = neutral.resume(source + where, "one", "galore adafactor", 0, 1)
        assert extra == {"epoch": 1} and torch.equal(mine["rng"], local["rng"])
        assert training.largest_difference(run.weights(), again.weights()) == 0.0
        ours, theirs = run.state(), again.state()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    weights = load_file(f"{source}1/model.safetensors")
    assert weights.keys() == run.model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in run.model.state_dict().items())
    assert len(list((tmp_path / "a3").glob("*.safetensors"))) == 3
    assert cli.main(["inspect", f"{source}3"]) == 0
    said = capsys.readouterr().out
    assert (
        "GaLoreAdafactor, saved by 1 ranks, 3 files" in said and "steps taken: 4" in said and "checksums agree" in said
    )
    assert cli.main(["reshard", source, f"{source}1", "--files", "2"]) == 1 and "exists" in capsys.readouterr().err
    with open(f"{source}3/rank-00002.safetensors", "ab") as file:
        file.write(b"x")
    assert cli.main(["inspect", f"{source}3"]) == 1 and "DAMAGED" in capsys.readouterr().out
    assert cli.main(["consolidate", f"{source}3", f"{source}0"]) == 1 and not (tmp_path / "a0").exists()


def test_groups_may_be_divided_otherwise(tmp_path: Path) -> None:
    """Options that only mean something to projected matrices are given to their group, or to all."""
    options = {"projector_dtype": "4bit", "lazy_refresh": True, "lazy_threshold": 0.3, "compress_accumulation": True}
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    named = lambda: list(model.named_parameters())
    builds = [
        lambda: lowrank_ds.GaLoreAdamW(named(), rank=8, target_modules=["0.weight"], **options),
        lambda: lowrank_ds.GaLoreAdamW(lowrank_ds.param_groups(model, 8, ["0.weight"], **options)),
    ]
    for i, (saved, loaded) in enumerate((builds, builds[::-1])):
        one, other = saved(), loaded()
        model(torch.randn(4, 64)).sum().backward()
        one.step()
        lowrank_ds.save_checkpoint(tmp_path / str(i), model, one)
        lowrank_ds.load_checkpoint(tmp_path / str(i), model, other)
        for key, value in one.state[model[0].weight].items():
            assert torch.equal(other.state[model[0].weight][key], value), key


def test_records_say_where_state_lies() -> None:
    """For every tensor of a state dict: each matrix, its weight's entries and those of its state. JSON-able."""
    run = neutral.start("one", "fira", 0, 1)
    assert records(run.optimizer) == [[] for _ in run.optimizer.param_groups[0]["params"]]
    run.advance(range(1))
    found = json.loads(json.dumps(records(run.optimizer)))
    saved = run.optimizer.state_dict()["state"]
    for index, own in enumerate(found):
        (matrix,) = own
        assert matrix["state"].keys() == saved[index].keys() and matrix["prefix"] == ""
        for key, (shape, run_of) in matrix["state"].items():
            assert list(saved[index][key].shape) == shape and Run(*run_of).size == saved[index][key].numel()
        assert matrix["weight"] == [0, list(Run.interval(0, Run(*matrix["weight"][1]).size))]
