"""Scaling factors against numpy, on any engine, without effect on training; their correlations against scipy."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import lowrank_ds
from launch.watching import watch
from lowrank_ds import cli, scaling
from lowrank_ds.report import similarity
from tests import pretraining, training
from tests.cluster import batches, launch, share, tiny_llama
from tests.deaths import trainer
from tests.test_diagnostics import SHAPES, gradients

RANK, STEPS, BETAS, EPS = 3, 5, (0.9, 0.999), 1e-6


# -- the factors ------------------------------------------------------------------------------------------------------
def adam_factors(found: list[np.ndarray]) -> np.ndarray:
    """Mean over steps of |M / (sqrt(V) + eps)| / |x| of each row (rows,), fp64; found: x (rows, columns) of each step.

    Steps that are not finite change nothing and do not count.
    """
    m, v, factors = 0.0, 0.0, []
    for x in (x for x in found if np.isfinite(x).all()):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * x, BETAS[1] * v + (1 - BETAS[1]) * x * x
        direction = m / (np.sqrt(v) + EPS)
        factors.append(np.linalg.norm(direction, axis=1) / np.linalg.norm(x, axis=1))
    return np.mean(factors, axis=0)


@pytest.mark.parametrize(
    ("name", "side"),
    [("FiraAdamW", "std"), ("FiraAdamW", "reverse_std"), ("GaLoreAdamW", "left"), ("ApolloMini", "right")],
)
def test_factors_are_numpys(name: str, side: str) -> None:
    """Low-rank factors in the subspace of numpy's own SVD, full-rank ones of the gradients; a step with NaN is none."""
    weights = {n: nn.Parameter(torch.zeros(shape)) for n, shape in SHAPES.items()}
    rank = 1 if name == "ApolloMini" else RANK
    settings = {"lr": 1e-2, "rank": rank, "subspace": "svd", "update_proj_gap": 100, "proj_type": side}
    optimizer = getattr(lowrank_ds, name)(weights.items(), **settings)
    monitor, given = lowrank_ds.Diagnostics(optimizer, compare_scaling=True), gradients(STEPS)
    given[2]["tall"][0, 0] = math.nan
    parts = []
    for step, gradient in enumerate(given, 1):
        for n, w in weights.items():
            w.grad = gradient[n].clone()
        optimizer.step()
        if step in (2, STEPS):  # moments go on from one interval to the next
            parts.append(monitor.scaling_factors())
    counts = {"tall": (2, STEPS - 3), "wide": (2, STEPS - 2)}
    found = {n: {k: np.average([p[n][k] for p in parts], 0, counts[n]) for k in ("low", "full")} for n in SHAPES}
    for n, (m, k) in SHAPES.items():
        right = {"std": m >= k, "reverse_std": m < k, "left": False, "right": True}[side]
        lines = [g[n].double().numpy() if right else g[n].double().numpy().T for g in given]
        basis = np.linalg.svd(lines[0])[2][:rank].T
        np.testing.assert_allclose(found[n]["low"], adam_factors([x @ basis for x in lines]), rtol=2e-4)
        np.testing.assert_allclose(found[n]["full"], adam_factors(lines), rtol=2e-5)
    assert monitor.scaling_factors() == {}


def test_adamw_s_own_factors() -> None:
    """torch's AdamW, read after each step, on matrices of both shapes; vectors and others' parameters left out."""
    weights = {n: nn.Parameter(torch.zeros(shape)) for n, shape in SHAPES.items()} | {
        "bias": nn.Parameter(torch.zeros(4))
    }
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, eps=EPS)
    monitor, given = scaling.AdamFactors(optimizer, weights.items()), gradients(STEPS)
    for gradient in given:
        for n, w in weights.items():
            w.grad = gradient.get(n, torch.ones(4)).clone()
        optimizer.step()
    found = monitor.scaling_factors()
    assert found.keys() == SHAPES.keys()
    for n, (m, k) in SHAPES.items():
        lines = [g[n].double().numpy() if m >= k else g[n].double().numpy().T for g in given]
        np.testing.assert_allclose(found[n]["full"], adam_factors(lines), rtol=2e-5)
    assert monitor.scaling_factors() == {}
    with pytest.raises(TypeError, match="SGD, which is not torch's Adam"):
        scaling.AdamFactors(torch.optim.SGD(weights.values(), lr=1.0), weights.items())


def factors_of(rank: int, world: int, cases: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """{(engine, recipe): factors after STEPS steps}."""
    found = {}
    for engine, recipe in cases:
        if engine == "fsdp1":
            model = training.fsdp1_model()
            optimizer = training.fsdp1_optimizer(recipe, model)
        else:
            _, optimizer, step = trainer(engine, world, recipe)
        monitor = lowrank_ds.Diagnostics(optimizer, compare_scaling=True)
        if engine == "fsdp1":
            training.train_sharded(model, optimizer, engine, rank, world, range(STEPS))
        else:
            for batch in batches(STEPS):
                step(share(batch, rank, world))
        found[engine, recipe] = monitor.scaling_factors()
    return found


def one_process(recipe: str, compare: bool = True) -> tuple[dict, dict]:
    """(factors, weights) on one process."""
    model = tiny_llama()
    optimizer = training.build(recipe, model)
    monitor = lowrank_ds.Diagnostics(optimizer, compare_scaling=True) if compare else None
    for batch in batches(STEPS):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return monitor.scaling_factors() if compare else {}, training.weights_of(model)


def test_the_same_on_every_engine() -> None:
    """Cut rows (FSDP1), rows (FSDP2), whole matrices (DDP): one process's factors, which all ranks know."""
    torch.set_num_threads(1)
    cases = [("fsdp1", "fira"), ("fsdp2", "fira"), ("fsdp2", "apollo"), ("ddp", "fira")]
    ranks = launch(2, factors_of, cases)
    for case in cases:
        expected, _ = one_process(case[1])
        first, second = (found[case] for found in ranks)
        assert first.keys() == expected.keys() and len(first) == 14
        for name, both in expected.items():
            for which, values in both.items():
                assert torch.equal(first[name][which], second[name][which]), (case, name)
                np.testing.assert_allclose(first[name][which], values, rtol=1e-3, err_msg=f"{case} {name} {which}")


def test_no_effect_and_refusals() -> None:
    """Weights are the same bit for bit; what has no scaling factors is refused by name."""
    torch.set_num_threads(1)
    assert training.largest_difference(one_process("fira")[1], one_process("fira", compare=False)[1]) == 0
    for recipe in ("flora", "galore full", "galore adafactor"):
        with pytest.raises(ValueError, match="any proj_type but"):
            lowrank_ds.Diagnostics(training.build(recipe, tiny_llama()), compare_scaling=True)
    with pytest.raises(RuntimeError, match="compare_scaling=True"):
        lowrank_ds.Diagnostics(training.build("fira", tiny_llama())).scaling_factors()


def test_a_resumed_run_records_none(tmp_path: Path) -> None:
    """The full-rank moments are in no checkpoint; AdamW's own are. The flag is named in messages."""
    model = tiny_llama()
    args = SimpleNamespace(output=str(tmp_path), scaling_every=2, diagnostics_every=0)
    ours = SimpleNamespace(optimizer=training.build("fira", model), module=model)
    with pytest.raises(SystemExit, match="--scaling-every 2: .* goes on from step 3. Leave --scaling-every out"):
        watch(args, ours, 3)
    theirs = SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters()), module=model)
    assert [every for every, _ in watch(args, theirs, 3)] == [2]
    with pytest.raises(SystemExit, match="--scaling-every 2: .* SGD"):
        watch(args, SimpleNamespace(optimizer=torch.optim.SGD(model.parameters(), 1.0), module=model), 0)


# -- the analysis -----------------------------------------------------------------------------------------------------
LINES = {
    "layers.0.q_proj.weight": 7,
    "layers.0.up_proj.weight": 9,
    "layers.1.q_proj.weight": 7,
    "layers.1.up_proj.weight": 9,
}


def recorded(folder: Path, sides: tuple[str, ...], seed: int, steps: tuple[int, ...] = (10, 20, 25)) -> list[dict]:
    """A run's scaling.jsonl with random factors, and what is in it."""
    random = np.random.default_rng(seed)
    records = [
        {"step": s, "matrices": {n: {k: random.lognormal(i, 0.8, w).tolist() for k in sides}
                                 for i, (n, w) in enumerate(LINES.items())}}
        for s in steps
    ]  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "scaling.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return records


def by_hand(low: list[dict], full: list[dict], lines: list[int] | None = None) -> dict[str, tuple[float, float]]:
    """{level: (Spearman, Kendall)}: intervals of 10, 10, 5 steps; Spearman from ranks, Kendall from pairs."""
    means = [
        {
            n: np.average([r["matrices"][n][k] for r in records], axis=0, weights=[10, 10, 5])[lines or slice(None)]
            for n in LINES
        }
        for records, k in ((low, "low"), (full, "full"))
    ]
    found = {}
    for level, pick in (("matrix", lambda v: [v.mean()]), ("line", list)):
        a, b = (np.concatenate([pick(v) for v in side.values()]) for side in means)
        signs = np.sign(np.subtract.outer(a, a)) * np.sign(np.subtract.outer(b, b))
        ranked = np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1]
        found[level] = ranked, signs.sum() / (len(a) * (len(a) - 1))
    return found


@pytest.mark.parametrize("paired", [False, True])
def test_correlations_are_those_by_hand(tmp_path: Path, paired: bool, capsys: pytest.CaptureFixture) -> None:
    """One run, or two: numbers, and everything that is written."""
    low = recorded(tmp_path / "low", ("low", "full"), 0)
    full = recorded(tmp_path / "full", ("full",), 1) if paired else low
    out = tmp_path / "out"
    runs = [str(tmp_path / name) for name in (["low", "full"] if paired else ["low"])]
    assert cli.main(["similarity", *runs, "--output", str(out)]) == 0
    found, expected = json.loads((out / "similarity.json").read_text()), by_hand(low, full)
    for level, count in (("matrix", 4), ("line", sum(LINES.values()))):
        assert (found[level]["spearman"], found[level]["kendall"]) == pytest.approx(expected[level])
        assert found[level]["count"] == count
    assert (
        f"{expected['line'][0]:.4f}" in (printed := capsys.readouterr().out)
        and f"{expected['matrix'][1]:.4f}" in printed
    )
    rows = list(csv.DictReader((out / "lines.csv").open()))
    assert len(rows) == sum(LINES.values()) and rows[7]["matrix"] == "layers.0.up_proj.weight"
    of_first = [row for row in csv.DictReader((out / "matrices.csv").open())][0]
    inside = stats.spearmanr(*([float(r[k]) for r in rows[:7]] for k in ("low", "full"))).statistic
    assert float(of_first["spearman"]) == pytest.approx(inside)
    assert float(of_first["low"]) == pytest.approx(np.mean([float(r["low"]) for r in rows[:7]]))
    assert [point["step"] for point in found["course"]] == [10, 20, 25]
    page = (out / "similarity.html").read_text()
    assert page.count("<svg") == 2 and "q_proj" in (out / "matrices.csv").read_text()
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("similarity.png", "lines.png"))


def test_sample_and_from_step(tmp_path: Path) -> None:
    """The same lines of every matrix; records before a step left out; a resumed run's later records count."""
    low = recorded(tmp_path / "low", ("low", "full"), 0)
    found = similarity.analyse(tmp_path / "low", sample=5)
    assert all(len(values) == 5 for values in found.low.values())
    whole = similarity.analyse(tmp_path / "low").low
    lines = [
        int(np.flatnonzero(whole["layers.1.up_proj.weight"] == v)[0]) for v in found.low["layers.1.up_proj.weight"]
    ]
    assert lines == sorted(set(lines))
    for level, expected in by_hand(low, low, lines).items():
        assert (found.levels[level]["spearman"], found.levels[level]["kendall"]) == pytest.approx(expected)
    late = similarity.analyse(tmp_path / "low", from_step=25)
    assert np.allclose(late.low["layers.0.q_proj.weight"], low[2]["matrices"]["layers.0.q_proj.weight"]["low"])
    with (tmp_path / "low" / "scaling.jsonl").open("a") as file:  # went back to step 20, and was cut off while writing
        file.write(json.dumps({**low[0], "step": 20}) + "\n" + '{"step": 30, "matr')
    resumed = similarity.analyse(tmp_path / "low")
    assert [point["step"] for point in resumed.course] == [10, 20]
    assert np.allclose(resumed.low["layers.0.q_proj.weight"], low[0]["matrices"]["layers.0.q_proj.weight"]["low"])
    assert any("torn" in note for note in resumed.notes) and any("20" in note for note in resumed.notes)


def test_messages(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing or contradicts itself is named, with what to do; exit code 2."""
    recorded(tmp_path / "low", ("low", "full"), 0)
    recorded(tmp_path / "full", ("full",), 1)
    for arguments, message in (
        ([tmp_path / "nothing"], "has no scaling.jsonl; train it with launch/pretrain.py --scaling-every N"),
        ([tmp_path / "full"], "it is a full-rank run; give a low-rank one first"),
        ([tmp_path / "low", "--from-step", 26], "ends before --from-step 26"),
        ([tmp_path / "low", "--sample", 8], "the smallest matrix has 7 lines"),
    ):
        assert cli.main(["similarity", *map(str, arguments), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert cli.main(["similarity", str(tmp_path / "low"), "--output", str(tmp_path / "out")]) == 2
    assert "scipy's, which is not installed: pip install 'lowrank_ds[report]'" in capsys.readouterr().err


# -- from training to the table ---------------------------------------------------------------------------------------
def test_one_command_each(tmp_path: Path) -> None:
    """A low-rank and a full-rank run of pretrain.py, both kinds of analysis, and a report of the two."""
    data = pretraining.prepare(tmp_path / "data")
    every = ["--scaling-every", 2, "--diagnostics-every", 5, "--steps", 6, "--save-every", 0]
    full = ["--optimizer", "AdamW", "--optimizer-args", "{}", "--scaling-every", 2, "--steps", 6, "--save-every", 0]
    for name, more in (("low", every), ("full", full)):
        flags = pretraining.flags(data, tmp_path / name, "ddp", *more)
        if name == "full":
            at = flags.index("--rank")
            del flags[at : at + 2]
        codes, printed = pretraining.run(1, flags, tmp_path / f"{name}.log")
        assert codes == [0], printed[-3000:]
    records = [json.loads(line) for line in (tmp_path / "low" / "scaling.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6] and len(records[0]["matrices"]) == 7
    for runs in (["low"], ["low", "full"]):
        found = similarity.analyse(*(tmp_path / name for name in runs))
        assert found.levels["matrix"]["count"] == 7 and 0 < found.levels["line"]["spearman"] <= 1
    summary = json.loads((tmp_path / "low" / "summary.json").read_text())
    kinds = [summary[f"state_{kind}_bytes_per_rank"][0] for kind in ("moments", "projectors", "other")]
    assert sum(kinds) == summary["optimizer_state_bytes_per_rank"][0] and min(kinds) > 0
    page = tmp_path / "report.html"
    assert cli.main(["report", str(tmp_path / "low"), str(tmp_path / "full"), "--output", str(page)]) == 0
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"loss", "perplexity", "memory", "subspaces"}
