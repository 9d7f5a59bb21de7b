"""`lowrank-ds bench`: its small forms run, and what it measures with can be trusted."""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lowrank_ds
from lowrank_ds import cli
from lowrank_ds.bench import budget, clock, contenders, facts, gemms, held, llama, micro, ranks, render, sharded
from lowrank_ds.bench import subjects as at_work
from tests.cluster import launch

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A HF config of a LLaMA of 2 layers."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def bench(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `lowrank-ds bench`."""
    status = cli.main(["bench", *arguments])
    return status, *capsys.readouterr()


def numbers(found: Any) -> list[float]:
    """Every number in a JSON document."""
    if isinstance(found, dict):
        return [n for value in found.values() for n in numbers(value)]
    if isinstance(found, list):
        return [n for value in found for n in numbers(value)]
    return [found] if isinstance(found, (int, float)) and not isinstance(found, bool) else []


# -- the measuring core ------------------------------------------------------------------------------------------------
def test_the_clock_counts_what_the_device_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA: events around the call, then a wait; the host's own time is not the figure."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Any) -> float:
            assert log[-1] == "wait", "read before the device was done"
            return 12.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (time.sleep(0.02), log.append("wait")))
    on_cuda = clock.Clock(torch.device("cuda"))
    found = on_cuda.time(lambda: log.append("call"))
    assert log == ["wait", "event", "call", "event", "wait"]
    assert found[on_cuda.main] == 12.5
    assert found["wall"] >= 20 > found["cpu"]


def test_cpu_time_is_not_stretched_by_waiting() -> None:
    """Sleeping costs wall time only."""
    found = clock.Clock(CPU).time(lambda: time.sleep(0.05))
    assert found["wall"] >= 50 > 25 > found["cpu"]


def test_contenders_take_turns() -> None:
    """Each once a round, in changing order; warm-up and preparation are not in the times."""
    log: list[tuple[str, int]] = []
    calls = {name: (lambda: None) for name in "abc"}

    def prepare(name: str, number: int) -> None:
        log.append((name, number))
        sum(range(200_000))

    found = clock.interleave(calls, clock.Clock(CPU), 5, warmup=2, prepare=prepare, few={"c": 2})
    assert [len(found[name]["cpu"]) for name in "abc"] == [5, 5, 2]
    assert [number for name, number in log if name == "a"] == [-2, -1, 0, 1, 2, 3, 4]
    assert len({tuple(name for name, number in log if number == n) for n in range(-2, 2)}) > 1
    assert max(found["a"]["cpu"]) < 1, "preparing was timed"


def test_statistics() -> None:
    """Quartiles and ratios of known numbers."""
    assert clock.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "min": 1.0, "q1": 2.0, "median": 3.0, "q3": 4.0, "mean": 3.0, "n": 5
    }  # fmt: skip
    assert clock.summary([7.0])["q3"] == 7.0
    assert clock.ratio([6.0, 4.0, 100.0], [2.0, 2.0, 1.0]) == {"median": 3.0, "min": 4.0}


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_floor_is_the_steps_own_products(shape: tuple[int, int]) -> None:
    """GaLore's step is two products of m x n by r; replaying them costs that arithmetic and touches nothing of ours."""
    subject = subject_of("GaLoreAdamW", shape, 8)
    products = micro._products(subject)
    assert [p.flops for p in products] == [2 * 24 * 40 * 8] * 2
    weight, state = subject.params["w"].detach().clone(), held.tensors(subject.optimizer)
    before = [t.clone() for t in state]
    run = gemms.replay(products)
    with gemms.Recorder() as again:
        run()
    assert [(p.left.shape, p.left.stride(), p.out.stride(), p.alpha) for p in again.products] == [
        (p.left.shape, p.left.stride(), p.out.stride(), p.alpha) for p in products
    ]
    assert torch.equal(weight, subject.params["w"]) and all(map(torch.equal, before, state))
    assert not micro._products(subject_of("ApolloMini", shape, 8)), "products with a vector are no floor"


def subject_of(name: str, shape: tuple[int, int], rank: int, dtype: torch.dtype = torch.float32) -> at_work.Subject:
    """A contender after its first step."""
    contender = next(c for c in contenders.ALL if c.name == name)
    params, grads = (make({"w": shape}, dtype, CPU) for make in (at_work.parameters, at_work.gradients))
    subject = at_work.Subject(contender, params, grads, ["w"], rank, contenders.NEVER)
    subject.first_step()
    return subject


def test_every_step_gets_its_gradient() -> None:
    """flora-opt drops the gradient: unless it is handed over again, the steps that are timed do nothing."""
    subject = subject_of("flora-opt", (16, 24), 4)
    assert subject.params["w"].grad is None
    before = subject.params["w"].detach().clone()
    subject.step()
    assert torch.equal(before, subject.params["w"]), "flora-opt no longer drops gradients: say so in Subject.prepare"
    subject.prepare()
    subject.step()
    assert not torch.equal(before, subject.params["w"])


def test_a_contender_that_does_nothing_is_not_measured() -> None:
    """A first step that leaves the weights alone raises."""
    idle = contenders.Contender("idle", "torch", lambda matrices, *_: torch.optim.SGD([p for _, p in matrices], lr=0.0))
    params, grads = (make({"w": (4, 4)}, torch.float32, CPU) for make in (at_work.parameters, at_work.gradients))
    with pytest.raises(RuntimeError, match="idle: a step changed no weight"):
        at_work.Subject(idle, params, grads, ["w"], 2, 1).first_step()


# -- state -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [c.name for c in contenders.ALL if c.kind == "ours" and not c.dtypes])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_state_is_what_the_formula_says(name: str, shape: tuple[int, int]) -> None:
    """Held bytes equal the formula's, and a byte more is an error."""
    subject = subject_of(name, shape, 8)
    found, expected = held.count(subject.optimizer), held.formula(name, shape, 8, 4)
    assert found["held"] == found["logical"] == expected
    held.check(name, found["held"], expected)
    subject.optimizer.hidden = SimpleNamespace(cache=[torch.zeros(2)])
    with pytest.raises(RuntimeError, match=f"{name} holds {expected + 8} bytes"):
        held.check(name, held.count(subject.optimizer)["held"], expected)


def test_hidden_projectors_are_counted() -> None:
    """galore-torch keeps a view of all of U in an object that no count of `state` sees."""
    subject = subject_of("galore-torch", (24, 40), 8)
    moments, basis, whole = 4 * 2 * 40 * 8, 4 * 24 * 8, 4 * 24 * 24
    assert lowrank_ds.state_bytes(subject.optimizer) == moments
    found = held.count(subject.optimizer)
    assert (found["held"], found["logical"]) == (moments + whole, moments + basis)


def test_shapes_are_transformers(tiny: str) -> None:
    """The parameters of a config, by name, without building the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = llama.read_config(tiny, "")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config, tie_word_embeddings=False))
    assert llama.parameter_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(llama.projected(llama.parameter_shapes(config))) == 14


# -- the benchmarks ----------------------------------------------------------------------------------------------------
def test_micro(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """All contenders on one small matrix in both dtypes; what is printed can be made again from the JSON."""
    out = tmp_path / "micro.json"
    flags = ["--shapes", "48x32", "--ranks", "4", "--rounds", "2", "--refresh-rounds", "2", "--json", str(out)]
    status, printed, _ = bench(capsys, "micro", *flags)
    found = json.loads(out.read_text())
    assert status == 0 and all(map(math.isfinite, numbers(found)))
    about = found["facts"]
    assert {"date", "commit", "dirty", "cpu", "threads", "versions", "load_start", "load_end"} <= about.keys()
    assert about["versions"]["torch"] == torch.__version__ and about["command"].startswith("lowrank-ds bench micro")
    assert [cell["dtype"] for cell in found["results"]] == ["float32", "bfloat16"]
    for cell in found["results"]:
        rows = {row["name"]: row for row in cell["rows"]}
        assert rows.keys() == {c.name for c in contenders.choose(None, True, getattr(torch, cell["dtype"]))}
        assert rows["GaLoreAdamW"]["to_floor"]["median"] > 1 and rows["GaLoreAdamW"]["products"]["large"] == 2
        assert rows["fira"]["products"] is None and rows["FiraAdamW"]["times_faster"]["median"] > 0
        assert rows["Flora"]["state"]["held"] == rows["Flora"]["state"]["formula"]
        refreshes = {row["name"]: row for row in cell["refresh"]["rows"]}
        assert refreshes.keys() == {"svd warm", "randomized warm", "power warm", "galore-torch", "power cold"}
        assert all(0.9 < row["captured"] < 1.001 for row in refreshes.values())
    assert bench(capsys, "render", str(out))[1].strip() == printed.strip()


def test_model(capsys: pytest.CaptureFixture, tmp_path: Path, tiny: str) -> None:
    """Refreshes are spread over the steps between them; a package's too."""
    out = tmp_path / "model.json"
    flags = ["--model", tiny, "--rank", "4", "--rounds", "2", "--gap", "10", "--subspaces", "power", "--json", str(out)]
    status, printed, _ = bench(capsys, "model", *flags)
    found = json.loads(out.read_text())
    assert status == 0 and found["settings"]["matrices"] == 14 and all(map(math.isfinite, numbers(found)))
    rows = {row["name"]: row for row in found["rows"]}
    assert {"GaLoreAdamW", "FiraAdamW", "ApolloAdamW", "Flora", "galore-torch", "flora-opt"} < rows.keys()
    galore = rows["GaLoreAdamW"]
    steady = galore["times"]["cpu"]["median"]
    assert galore["method"] == "power" and galore["refresh_ms"]["warm"] > 0
    assert math.isclose(galore["amortised_ms"], steady + galore["refresh_ms"]["warm"] / 10)
    assert rows["torch AdamW fused"]["amortised_to_fused"] == 1
    assert "| GaLoreAdamW, power |" in printed
    assert all(0 < times["cpu"]["median"] < steady for times in found["floor"].values()) and len(found["floor"]) == 2


def ranks_of_all_engines(rank: int, world: int, settings: dict[str, Any]) -> dict[str, Any]:
    """`ranks.measure` under each engine, in processes that tests share."""
    from launch.processes import Processes

    processes = Processes(rank, world, rank, CPU)
    return {e: ranks.measure({**settings, "engine": e, "contenders": names}, processes) for e, names in CELLS.items()}


CELLS = {"zero2": ["AdamW", "Fira", "Flora"], "zero3": ["AdamW", "GaLore"],
         "fsdp2": ["AdamW", "AdamW fused", "Fira", "APOLLO", "Fira refreshing"]}  # fmt: skip


def test_sharded(tiny: str) -> None:
    """Times of every contender, at most 6 collectives a step, bytes within the budget, under each engine."""
    given = argparse.Namespace(
        model=tiny, world=2, batch=4, length=16, rank=4, block=1, rounds=2, refresh_rounds=1, threads=1, options={},
        device="cpu", gap=10,
    )  # fmt: skip
    settings = sharded._settings(given)
    found = launch(2, ranks_of_all_engines, settings)[0]
    for engine, names in CELLS.items():
        digest = sharded._digest(found[engine], settings, engine, given)
        rows = {row["name"]: row for row in digest["rows"]}
        assert list(rows) == [name for name in names if not name.endswith(ranks.REFRESHING)]
        assert all(map(math.isfinite, numbers(digest))) and len(digest["matrices"]) == 14
        assert rows["AdamW"]["traffic"]["calls"] == {} and rows["AdamW"]["to_adamw"]["wall"]["all"]["median"] == 1
        for row in (r for r in rows.values() if "budget_bytes" in r):
            assert 0 < sum(row["traffic"]["bytes"].values()) <= row["budget_bytes"], (engine, row["name"])
            assert sum(row["traffic"]["calls"].values()) <= budget.COLLECTIVES, (engine, row["name"])
    fira = sharded._digest(found["fsdp2"], settings, "fsdp2", given)["rows"][2]
    assert fira["refresh_traffic"]["bytes"] != fira["traffic"]["bytes"] and fira["refresh_ms"] >= 0
    steady, whole = (fira["to_adamw"]["wall"][kind]["median"] for kind in ("steady", "all"))
    assert whole <= steady


def test_sharded_starts_its_ranks(capsys: pytest.CaptureFixture, tmp_path: Path, tiny: str) -> None:
    """The command, with processes of its own; a rank's failure is told by its own words."""
    out = tmp_path / "sharded.json"
    flags = ["--engines", "fsdp2", "--model", tiny, "--rank", "4", "--batch", "4", "--length", "16", "--block", "1",
             "--rounds", "1", "--refresh-rounds", "0", "--only", "APOLLO", "--json", str(out)]  # fmt: skip
    status, printed, errors = bench(capsys, "sharded", *flags)
    assert status == 0, errors
    assert json.loads(out.read_text())["results"][0]["rows"][2]["name"] == "APOLLO"
    assert "### fsdp2, 2 ranks, tiny, 4 x 16 tokens a step, rank 4, fp32" in printed and "| APOLLO |" in printed
    with pytest.raises(RuntimeError, match=r"rank [01] ended with exit code 1:\n[\s\S]*KeyError: 'contenders'"):
        sharded.launch({"threads": 1, "dtype": "fp32"}, 2)


def test_gpu_on_a_cpu(capsys: pytest.CaptureFixture, tmp_path: Path, tiny: str) -> None:
    """Its small form runs here: layer shapes, and whole training steps in processes of their own."""
    out = tmp_path / "gpu.json"
    flags = ["--device", "cpu", "--small", "--shapes", "32x48", "--rounds", "1", "--refresh-rounds", "1", "--steps",
             "1", "--length", "8", "--model", tiny, "--cells", "Q-GaLore, int8 weights", "--only", "FiraAdamW",
             "--json", str(out)]  # fmt: skip
    status, printed, errors = bench(capsys, "gpu", *flags)
    assert status == 0, errors
    found = json.loads(out.read_text())
    assert found["measured"] and found["layers"][0]["dtype"] == "bfloat16" and found["layers"][0]["rank"] == 8
    assert [cell["matmul_precision"] for cell in found["layers"]] == ["highest", "high"]
    assert found["settings"]["matmul_precision"] == "high" and torch.get_float32_matmul_precision() == "highest"
    assert [row["name"] for row in found["training"]] == ["Q-GaLore, int8 weights"]
    assert found["training"][0]["tokens_per_s"] > 0 and found["training"][0]["peak_bytes"] is None
    assert "not measured" in printed  # peak memory, on a CPU


def test_gpu_without_one(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says "not measured"; asked for CUDA it refuses."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, printed, _ = bench(capsys, "gpu")
    assert status == 0 and "Not measured: there is no CUDA device" in printed
    status, _, errors = bench(capsys, "gpu", "--device", "cuda")
    assert status == 2 and "--device cuda: there is no CUDA device here" in errors


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are measured."""
    monkeypatch.setitem(__import__("sys").modules, "fira", None)
    flags = ["--shapes", "16x24", "--ranks", "2", "--rounds", "1", "--refresh-rounds", "0", "--dtypes", "float32"]
    status, printed, _ = bench(capsys, "micro", *flags, "--only", "FiraAdamW", "fira", "galore-torch")
    assert status == 0 and re.search(r"- fira: not measured, `import fira` fails \(.*\); pip install fira", printed)
    assert "| FiraAdamW |" in printed and "| galore-torch |" in printed and "| fira |" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("micro --shapes 12", "--shapes '12': must be rows x columns"),
        ("micro --shapes 12x16 --ranks 13", "--ranks 13 does not fit --shapes 12x16: 1 to 12"),
        ("micro --only Fira", "--only 'Fira' is no contender; there are: torch AdamW fused, "),
        ("micro --rounds 0", "--rounds must be at least 1"),
        ("micro --device tpu", "--device 'tpu': must be cpu, cuda"),
        ("model --model nowhere.json", "--model nowhere.json: no such file"),
        ("model --gap 0", "--gap and --refresh-rounds must be at least 1"),
        ("sharded --batch 5", "--batch 5 is no multiple of --world 2"),
        ("sharded --only GaLoreAdamW", "--only 'GaLoreAdamW' is no contender; there are: Fira, "),
        ("gpu --device cpu", "--device cpu is only for a trial of this benchmark: add --small"),
        ("gpu --cells SGD", "--cells 'SGD' is no way to train; there are: AdamW fused"),
        ("render", "give either JSON files, or --into PAGE"),
        ("render nowhere.json", "nowhere.json: no such file"),
        ("render ds_configs/zero2_fira.json", "not the result of a benchmark"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    """Each is refused before anything is measured, naming the flag and what to give."""
    monkeypatch.chdir(ROOT)
    status, _, errors = bench(capsys, *arguments.split())
    assert status == 2 and message in errors


def test_the_page_is_made_from_the_files() -> None:
    """docs/benchmarks.md has the tables of docs/benchmarks/*.json, and every file is in it."""
    page = ROOT / "docs" / "benchmarks.md"
    assert render.fill(page) == page.read_text(), "run: lowrank-ds bench render --into docs/benchmarks.md"
    shown = {match["file"] for match in render._BLOCK.finditer(page.read_text())}
    assert shown == {f"benchmarks/{path.name}" for path in (ROOT / "docs" / "benchmarks").glob("*.json")}


def test_a_changed_checkout_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure of code that no commit has says so."""
    about = facts.finish(facts.collect(CPU, 1, ["bench", "a b"])) | {"commit": "abc", "dirty": True}
    assert "commit abc with changes" in facts.line(about) and "`bench 'a b'`" in facts.line(about)
    monkeypatch.setattr(facts, "ROOT", Path("/nowhere"))
    assert facts.commit() == ("unknown", None)


def test_the_best_layout_does_the_same_arithmetic() -> None:
    """Two products of m x n by r, whichever layout is the quickest."""
    _, run = gemms.best_layout((24, 40), 8, torch.bfloat16, CPU, clock.Clock(CPU))
    with gemms.Recorder() as recorder:
        run()
    assert [p.flops for p in recorder.products] == [2 * 24 * 40 * 8] * 2
