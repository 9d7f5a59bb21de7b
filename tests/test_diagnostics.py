"""Diagnostics: right numbers, the same on all ranks and engines, and no effect on training."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_ds
from lowrank_ds import collectives, job
from tests import lora, training
from tests.cluster import batches, launch, share, tiny_llama
from tests.counting import Counting
from tests.deaths import trainer

STEPS = 6  # bases at steps 0 and 4
SHAPES = {"tall": (14, 9), "wide": (6, 17)}
RANK, GAP = 3, 2


# -- values -----------------------------------------------------------------------------------------------------------
def gradients(steps: int, scale: float = 1.0) -> list[dict[str, torch.Tensor]]:
    """Gradients with a few strong directions; each step's `scale` times the one before."""
    g = torch.Generator().manual_seed(5)
    strong = {n: [torch.randn(s[0], 4, generator=g), torch.randn(4, s[1], generator=g)] for n, s in SHAPES.items()}
    return [
        {n: (a @ b + 0.5 * torch.randn(SHAPES[n], generator=g)) * scale**t for n, (a, b) in strong.items()}
        for t in range(steps)
    ]


def driven(name: str, found: list[dict[str, torch.Tensor]], **settings: Any) -> tuple[Any, dict, list[dict]]:
    """(report, optimizer state, what each step added to the weights (fp64)) on two matrices with given gradients."""
    generator = torch.Generator().manual_seed(2)
    weights = {n: nn.Parameter(0.01 * torch.randn(shape, generator=generator)) for n, shape in SHAPES.items()}
    optimizer = getattr(lowrank_ds, name)(weights.items(), **{"lr": 1e-2, "rank": RANK, **settings})
    monitor, added = lowrank_ds.Diagnostics(optimizer), []
    for gradient in found:
        before = {n: w.detach().double() for n, w in weights.items()}
        for n, w in weights.items():
            w.grad = gradient[n].clone()
        optimizer.step()
        added.append({n: w.detach().double() - before[n] for n, w in weights.items()})
    return monitor.collect(), optimizer.state_dict()["state"], added


def basis_of(gradient: torch.Tensor) -> torch.Tensor:
    """The leading directions of the longer side's space that "std" projects on, fp64 (shorter side, RANK)."""
    u, _, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    return vh[:RANK].T if gradient.shape[0] >= gradient.shape[1] else u[:, :RANK]


@pytest.mark.parametrize("name", ["GaLoreAdamW", "FiraAdamW"])
def test_energy_and_overlap(name: str) -> None:
    """Against fp64 with an SVD of its own."""
    found = gradients(5)
    report, _, _ = driven(name, found, update_proj_gap=GAP)
    for n in SHAPES:
        projected = whole = 0.0
        overlaps, basis = [], None
        for t, gradient in enumerate(found):
            if t % GAP == 0:
                new = basis_of(gradient[n])
                if basis is not None:
                    overlaps.append((basis.T @ new).square().sum() / RANK)
                basis = new
            g = gradient[n].double()
            projected += ((g if g.shape[0] >= g.shape[1] else g.T) @ basis).square().sum()
            whole += g.square().sum()
        numbers = report.matrices[n]
        assert numbers["captured_energy"] == pytest.approx(float(projected / whole), rel=1e-5)
        assert numbers["overlap"] == pytest.approx(float(sum(overlaps) / len(overlaps)), rel=1e-4)
        assert 0.3 < numbers["captured_energy"] < 1 and 0 < numbers["overlap"] < 1
        assert (numbers["steps"], numbers["skipped_updates"], numbers["skipped_refreshes"]) == (5, 0, 0)
    means = [report.matrices[n]["captured_energy"] for n in SHAPES]
    assert report.summary["captured_energy_mean"] == pytest.approx(sum(means) / 2)
    assert report.summary["captured_energy_min"] == min(means)


UPDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "galore": ("GaLoreAdamW", {}),
    "galore full": ("GaLoreAdamW", {"proj_type": "full"}),
    "galore gaussian": ("GaLoreAdamW", {"subspace": "gaussian"}),
    "galore adafactor": ("GaLoreAdafactor", {"beta1": 0.9}),
    "fira": ("FiraAdamW", {}),
    "fira paper": ("FiraAdamW", {"residual": "paper", "proj_type": "reverse_std"}),
    "apollo": ("ApolloAdamW", {}),
    "apollo without limiter": ("ApolloAdamW", {"disable_nl": True, "proj_type": "right"}),
    "apollo mini left": ("ApolloMini", {"rank": 1, "proj_type": "left"}),
    "flora": ("Flora", {"update_proj_gap": None, "kappa": GAP}),
}


@pytest.mark.parametrize("case", list(UPDATES))
def test_update_rms_is_what_was_added_to_the_weights(case: str) -> None:
    """The root mean square over entries and steps, without decay."""
    name, settings = UPDATES[case]
    settings = {"update_proj_gap": GAP, **settings}
    settings = {k: v for k, v in settings.items() if v is not None}
    report, _, added = driven(name, gradients(5), **settings)
    for n in SHAPES:
        expected = math.sqrt(sum(float(a[n].square().mean()) for a in added) / len(added))
        assert report.matrices[n]["update_rms"] == pytest.approx(expected, rel=2e-4), n
    energies = [numbers["captured_energy"] for numbers in report.matrices.values()]
    random = settings.get("subspace") == "gaussian" or name in ("ApolloAdamW", "ApolloMini", "Flora")
    assert (energies == [None, None]) is random


@pytest.mark.parametrize("name", ["FiraAdamW", "ApolloAdamW"])
def test_limiter_hits(name: str) -> None:
    """A gradient that grows tenfold is cut at each step but the first; else: where the remembered norm grew by 1.01."""
    # (APOLLO's norms do so in an SVD's subspace; in a random one it depends on the draw)
    growing, *_ = driven(name, gradients(4, 10.0), update_proj_gap=100, subspace="svd")
    assert [numbers["limiter_hits"] for numbers in growing.matrices.values()] == [3, 3]
    assert growing.summary["limiter_hits"] == 6
    for scale in (0.1, 0.9):
        norms = [driven(name, gradients(t, scale), update_proj_gap=100)[1] for t in range(1, 7)]
        report, *_ = driven(name, gradients(6, scale), update_proj_gap=100)
        for i, n in enumerate(SHAPES):
            remembered = [float(state[i]["residual_norm"]) for state in norms]
            cut = [abs(new / old - 1.01) < 1e-5 for old, new in zip(remembered, remembered[1:], strict=False)]
            assert report.matrices[n]["limiter_hits"] == sum(cut)
            assert sum(cut) < 5 or scale == 0.9
    off, *_ = driven("FiraAdamW", gradients(2), update_proj_gap=100, limiter=None)
    assert off.matrices["tall"]["limiter_hits"] is None and "limiter_hits" not in off.summary


def test_skipped() -> None:
    """NaN at an ordinary step and at a refresh; energies and updates count the other steps."""
    found = gradients(6)
    for t in (1, 2):
        found[t]["tall"].fill_(math.nan)
    report, _, added = driven("GaLoreAdamW", found, update_proj_gap=GAP)
    tall, wide = report.matrices["tall"], report.matrices["wide"]
    assert (tall["steps"], tall["skipped_updates"], tall["skipped_refreshes"]) == (6, 2, 1)
    assert (wide["steps"], wide["skipped_updates"], wide["skipped_refreshes"]) == (6, 0, 0)
    assert report.summary["skipped_updates"] == 2 and report.summary["skipped_refreshes"] == 1
    expected = math.sqrt(sum(float(a["tall"].square().mean()) for a in added) / 4)
    assert tall["update_rms"] == pytest.approx(expected, rel=2e-4)
    assert 0 < tall["captured_energy"] < 1


def test_lora_fa() -> None:
    """The corrected matrices have update sizes and nothing of a subspace."""
    model = lora.lora_llama()
    optimizer = lora.optimizer_of(model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    monitor, batch = lowrank_ds.Diagnostics(optimizer), batches(1)[0]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    report = monitor.collect()
    assert len(report.matrices) >= 4
    for name, numbers in report.matrices.items():
        after = dict(model.named_parameters())[name].detach()
        change = float((after - before[name]).double().square().mean().sqrt())
        assert numbers["update_rms"] == pytest.approx(change, rel=1e-3)
        assert numbers["captured_energy"] is numbers["overlap"] is numbers["limiter_hits"] is None


# -- any engine -------------------------------------------------------------------------------------------------------
def reported(rank: int, world: int, engine: str, recipe: str) -> tuple[lowrank_ds.diagnostics.Report, int, int]:
    """(report after STEPS steps, collectives of collect(), steps of the report after it)."""
    if engine in ("fsdp2 tp", "fsdp1"):
        model = training.fsdp1_model() if engine == "fsdp1" else training.fully_sharded(engine, world)
        optimizer = (training.fsdp1_optimizer if engine == "fsdp1" else training.build)(recipe, model)
        monitor = lowrank_ds.Diagnostics(optimizer)
        training.train_sharded(model, optimizer, engine, rank, world, range(STEPS))
    else:
        _, optimizer, step = trainer(engine, world, recipe)
        monitor = lowrank_ds.Diagnostics(optimizer)
        for batch in batches(STEPS):
            step(share(batch, rank, world))
    counter = collectives.dist = Counting(torch.distributed)
    report = monitor.collect()
    collectives.dist = torch.distributed
    return report, counter.calls, monitor.collect().summary["steps"]


def all_reported(rank: int, world: int, cases: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """Several engines in one launch."""
    return {case: reported(rank, world, *case) for case in cases}


def one_process(recipe: str) -> dict[str, dict[str, Any]]:
    """The matrices of the report on one process."""
    model = tiny_llama()
    optimizer = training.build(recipe, model)
    monitor = lowrank_ds.Diagnostics(optimizer)
    for batch in batches(STEPS):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return monitor.collect().matrices


CASES = {
    2: [("zero2", "fira"), ("zero3", "galore full"), ("fsdp2", "fira"), ("fsdp2 layerwise", "galore power rotate"),
        ("ddp", "fira"), ("replicate", "galore"), ("fsdp1", "apollo"), ("fsdp2", "flora")],
    4: [("hsdp", "fira"), ("fsdp2 tp", "galore")],
}  # fmt: skip


@pytest.mark.parametrize("world", list(CASES))
def test_the_same_on_every_engine(world: int) -> None:
    """All ranks report the very same, which is one process's within rounding; collecting is one collective."""
    torch.set_num_threads(1)
    ranks = launch(world, all_reported, CASES[world])
    for case in CASES[world]:
        engine, recipe = case
        expected, reports = one_process(recipe), [found[case] for found in ranks]
        for report, calls, left in reports:
            assert report == reports[0][0], case
            assert calls == (0 if engine in ("ddp", "replicate") else 1), case
            assert left == 0
            assert report.matrices.keys() == expected.keys(), case
        for name, numbers in reports[0][0].matrices.items():
            for key, value in numbers.items():
                wanted = expected[name][key]
                assert value == (None if wanted is None else pytest.approx(wanted, rel=1e-3)), (case, name, key)


# -- no effect --------------------------------------------------------------------------------------------------------
class Reads(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(function)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("recipe", list(training.RECIPES)[:-2])
def test_no_effect(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the same weights and state; no more reads by the host; nothing kept when it is off."""
    monkeypatch.setattr(job, "_host_sees", lambda live: False)  # as on a GPU
    torch.set_num_threads(1)
    found = []
    for on in (False, True):
        model = tiny_llama()
        optimizer = training.build(recipe, model)
        monitor = lowrank_ds.Diagnostics(optimizer) if on else None
        reads = []
        for batch in batches(STEPS):
            model(input_ids=batch, labels=batch).loss.backward()
            with Reads() as mode:
                optimizer.step()
            reads.append(mode.count)
            optimizer.zero_grad()
        found.append((training.weights_of(model), optimizer.state_dict()["state"], reads))
        if on:
            monitor.remove()
        assert optimizer._observer is None
    (weights, state, reads), (watched_weights, watched_state, watched_reads) = found
    assert training.largest_difference(weights, watched_weights) == 0
    assert reads == watched_reads
    for index, tensors in state.items():
        assert tensors.keys() == watched_state[index].keys()
        assert all(torch.equal(value, watched_state[index][key]) for key, value in tensors.items())


# -- where it goes ----------------------------------------------------------------------------------------------------
class Writer:
    """A SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name] = value, step


def test_jsonl_and_tensorboard(tmp_path: Any) -> None:
    """One line an interval; the summary, and on request each matrix."""
    model, path, writer = tiny_llama(), tmp_path / "d.jsonl", Writer()
    optimizer = training.build("fira", model)
    monitor = lowrank_ds.Diagnostics(optimizer)
    for number, batch in enumerate(batches(4)):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        if number % 2:
            report = monitor.jsonl(path, number + 1)
    monitor.tensorboard(writer, 4, report, matrices=True)
    monitor.tensorboard(None, 4, report)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[1]["matrices"] == report.matrices and lines[1]["summary"] == report.summary
    assert lines[0]["summary"]["steps"] == 2
    assert writer.scalars["lowrank/captured_energy_min"] == (report.summary["captured_energy_min"], 4)
    assert "lowrank/model.layers.0.mlp.up_proj.weight/update_rms" in writer.scalars


def test_trainer_callback(tmp_path: Any) -> None:
    """The summary is in Trainer's log history, and with the callbacks after it."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    seen: list[dict] = []

    class After(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict, **_: Any) -> None:
            seen.append(dict(logs))

    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no",
        per_device_train_batch_size=4, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in batches(1)[0]]
    callback, writer = lowrank_ds.DiagnosticsCallback(tmp_path / "d.jsonl", None), Writer()
    callback.writer = writer
    run = Trainer(
        tiny_llama(), arguments, train_dataset=data, callbacks=[callback, After()],
        optimizer_cls_and_kwargs=lowrank_ds.for_trainer("FiraAdamW", arguments, rank=8),
    )  # fmt: skip
    run.train()
    history = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(history) == 2 and all(entry["lowrank/steps"] == 2 for entry in history)
    assert 0 < history[0]["lowrank/captured_energy_mean"] < 1
    assert seen[0]["lowrank/captured_energy_mean"] == history[0]["lowrank/captured_energy_mean"]
    assert len((tmp_path / "d.jsonl").read_text().splitlines()) == 2
    assert writer.scalars["lowrank/steps"] == (2, 4)
    assert callback.monitor is None


def test_what_cannot_be_watched() -> None:
    """By name."""
    model = nn.Linear(9, 14)
    with pytest.raises(TypeError, match="takes an optimizer of lowrank_ds, or an engine's wrapper of one; got SGD"):
        lowrank_ds.Diagnostics(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="AdaLomo projects no matrix"):
        lowrank_ds.Diagnostics(lowrank_ds.AdaLomo(model.named_parameters()))
    optimizer = lowrank_ds.GaLoreAdamW(model.named_parameters(), rank=2)
    monitor = lowrank_ds.Diagnostics(optimizer)
    with pytest.raises(RuntimeError, match="watched already"):
        lowrank_ds.Diagnostics(optimizer)
    assert monitor.collect().matrices == {} and monitor.collect().summary == {"steps": 0}
    monitor.remove()
    lowrank_ds.Diagnostics(optimizer)
