"""launch/evidence.py: what its search asks for, what its tables say, and one run of it."""

import json
import math
import re
import time

import pytest

from launch import evidence, evidence_table
from launch.evidence_protocol import METHODS, Protocol, Run

EMBED = 0.04
BEST = {"adamw": 0.0025, "galore": 0.08, "apollo": 0.0025}  # where made-up perplexities are lowest; others at 0.01


def made_up(run: Run, seed_effect: float = 0.5) -> float:
    """A bowl around BEST, lowest at EMBED, with an effect of the seed that all methods share."""
    away = abs(math.log2(run.lr / BEST.get(run.method.split("-")[0], 0.01))) + abs(math.log2(run.embed_lr / EMBED))
    return 80 + away + seed_effect * run.seed


def search(protocol: Protocol, perplexity=made_up) -> dict[Run, float]:
    """All runs that the protocol asks for one after another, with made-up results."""
    found: dict[Run, float] = {}
    while wanted := protocol.wanted(found):
        found[wanted[0]] = perplexity(wanted[0])
    return found


def method(name: str):
    return next(method for method in METHODS if method.name == name)


def test_search_finds_the_best_of_a_growing_grid():
    protocol, found = Protocol(), search(Protocol())
    assert protocol.embed_lr(found) == EMBED, "AdamW's best learning rate of the embeddings"
    for name in ("adamw", "galore", "apollo", "fira"):
        assert protocol.chosen(method(name), found) == (name, BEST.get(name, 0.01), EMBED, 0)
    tried = sorted(run.lr for run in found if run.method == "galore" and run.seed == 0)
    assert tried == [0.005, 0.01, 0.02, 0.04, 0.08, 0.16], "grows while the best is at an end, and one beyond it"
    assert {run.embed_lr for run in found if run.method != "adamw"} == {EMBED}


def test_adamw_is_tuned_again_at_the_best_rate_of_the_embeddings():
    def tilted(run):  # the larger the one rate, the smaller the best other
        return 80 + abs(math.log2(run.lr * run.embed_lr / (0.00125 * 0.01))) + 2 * abs(math.log2(run.embed_lr / EMBED))

    found = search(Protocol(only=["fira"]), tilted)
    assert Protocol().chosen(method("adamw"), found) == ("adamw", 0.00125 / 4, EMBED, 0)
    assert Protocol().chosen(method("fira"), found).embed_lr == EMBED


def test_growth_has_an_end():
    falling = search(Protocol(only=["fira"]), lambda run: 100 - math.log2(run.lr))
    assert max(run.lr for run in falling if run.method == "fira") == 0.02 * 2**3


def test_every_reported_row_has_every_seed():
    protocol = Protocol(seeds=4)
    found = search(protocol)
    for each in protocol.methods():
        assert sorted(evidence_table.seeds_of(protocol, each, found)) == [0, 1, 2, 3], each.name
    assert protocol.chosen(method("galore-svd"), found).lr == BEST["galore"], "compared at the same learning rate"


def test_diverged_runs_are_never_chosen():
    found = search(Protocol(only=["fira"]), lambda run: math.inf if run.lr >= 0.01 else made_up(run))
    assert Protocol().chosen(method("fira"), found).lr < 0.01


def test_a_subset_brings_what_it_is_compared_with():
    assert [each.name for each in Protocol(only=["fira-svd"]).methods()] == ["adamw", "fira", "fira-svd"]
    with pytest.raises(SystemExit, match="--only adam.*the methods are adamw, galore"):
        Protocol(only=["adam"]).methods()


def test_results_of_another_protocol_are_refused(tmp_path):
    bench = evidence.Bench(tmp_path, Protocol(steps=20))
    bench.record(Run("adamw", 0.01, 0.01, 0), {"perplexity": 80.0, "wall_s": 1})
    assert evidence.Bench(tmp_path, Protocol(steps=20, seeds=5)).results == bench.results, "more seeds go on"
    with pytest.raises(SystemExit, match="other settings"):
        evidence.Bench(tmp_path, Protocol(steps=30))


def test_runs_go_on_where_they_stopped_and_side_by_side(tmp_path, monkeypatch):
    protocol, made = Protocol(only=["galore-svd"], seeds=2), []

    def train(self, run):
        made.append(run)
        if len(made) == 5:
            raise SystemExit("the machine is switched off")
        return {"perplexity": made_up(run), "wall_s": 1}

    monkeypatch.setattr(evidence.Bench, "train", train)
    with pytest.raises(SystemExit, match="switched off"):
        evidence.run_all(evidence.Bench(tmp_path, protocol), 1)
    evidence.run_all(evidence.Bench(tmp_path, protocol), 3)
    assert set(made) == set(search(protocol)) and len(made) == len(set(made)) + 1, "only the lost run is made again"


def test_what_runs_beside_a_failed_run_is_kept(tmp_path, monkeypatch):
    def train(self, run):
        if run.lr == 0.0025:
            raise SystemExit("no room on the disk")
        time.sleep(0.3 * (run.lr == 0.005))
        return {"perplexity": made_up(run), "wall_s": 1}

    monkeypatch.setattr(evidence.Bench, "train", train)
    with pytest.raises(SystemExit, match="no room"):
        evidence.run_all(evidence.Bench(tmp_path, Protocol(only=["adamw"])), 2)
    assert sorted(run.lr for run in evidence.Bench(tmp_path, Protocol()).results) == [0.00125, 0.005]


def test_tables(tmp_path, monkeypatch):
    """Means, spreads and paired differences of known numbers, between the markers and nowhere else."""
    protocol = Protocol(only=["adamw", "galore", "galore-svd"], seeds=3)
    factor = {"adamw": 1.0, "galore": 1.02, "galore-svd": 1.01}

    def record(run):
        return {
            "perplexity": factor[run.method] * made_up(run),
            "wall_s": 1800,
            "tokens": 614400,
            "parameters": 1852544,
            "state_bytes": 3 * 2**20,
            "device": "cpu",
            "versions": {"torch": "2"},
            "commit": "abc",
        }

    results = {run: record(run) for run in search(protocol)}
    page = tmp_path / "results.md"
    page.write_text(f"# Head\n{evidence_table.BEGIN}\nold\n{evidence_table.END}\ntail\n")
    evidence_table.write_tables(page, protocol, results)
    text = page.read_text()
    assert text.startswith("# Head\n") and text.endswith("\ntail\n") and "old" not in text
    assert f"{len(results)} runs of 300 steps" in text and f"{len(results) / 2:.1f} hours" in text
    assert "| AdamW (torch, fp32) | 0.0025 | 80.50 ± 0.50 | 3 |  | 3.00 MiB | 1.000 | 34.06 |" in text
    # GaLore's state: 2 r n of moments and m r of basis instead of 2 m n
    assert "| GaLore | 0.08 | 82.11 ± 0.51 | 3 | +2.0 % ± 0.0 | 3.00 MiB | 0.322 | 34.88 (+2.4 %) |" in text
    assert f"| GaLore | `power` | keep | 82.11 ± 0.51 | {math.log(1.02 / 1.01):+.4f} ± 0.0000 (3 pairs) |" in text
    assert "| GaLore | `svd` | keep | 81.3" in text
    assert re.search(r"\| GaLore \| 0.005: 85.\d\d, .*0.16: 82.62", text), "the whole grid is shown"
    kept = json.loads((tmp_path / "results" / "evidence.json").read_text())
    assert len(kept["runs"]) == len(results) and kept["protocol"]["steps"] == 300

    with pytest.raises(SystemExit, match="there is no run to write of"):
        evidence_table.write_tables(page, protocol, {})
    lost = {run: result | ({"perplexity": None} if run[0] == "galore" and run.seed == 2 else {})
            for run, result in results.items()}  # fmt: skip
    evidence_table.write_tables(page, protocol, lost)
    assert "| GaLore | 0.08 | inf | 3 | +inf % |" in page.read_text(), "a seed that diverged is told"

    first = {run: record for run, record in results.items() if run.seed == 0}
    assert "nan" not in evidence_table.render(protocol, first), "one seed has no spread"

    page.write_text("no markers")
    with pytest.raises(SystemExit, match="needs one line <!-- evidence: begin -->"):
        evidence_table.write_tables(page, protocol, results)
    assert page.read_text() == "no markers"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = evidence.Bench(tmp_path_factory.mktemp("evidence"), Protocol(steps=10, batch=4, seq_len=64))
    evidence.prepare(bench)
    return bench


def test_a_run(bench):
    """One real run: perplexity better than chance, state of AdamW."""
    result = bench.train(Run("adamw", 0.0025, 0.01, 0))
    assert 100 < result["perplexity"] < 4096 and result["tokens"] == 10 * 4 * 64
    assert result["state_bytes"] == pytest.approx(2 * 4 * result["parameters"], rel=1e-3)


def test_a_run_that_diverges_is_a_result(bench):
    assert bench.train(Run("adamw", 1e30, 1e30, 0))["perplexity"] is None


def test_a_run_that_fails_says_where_to_look(bench, monkeypatch):
    monkeypatch.setattr(Protocol, "flags", lambda self, run, corpus: ["--modle", "x"])
    with pytest.raises(SystemExit, match=r"--modle.* failed with exit code 2; see .*\.log"):
        bench.train(Run("adamw", 1.0, 1.0, 0))
