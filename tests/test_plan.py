"""`lowrank-ds plan`: bytes are those of real runs, errors name the flag, what is found fits."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from lowrank_ds import cli
from lowrank_ds.bench import llama
from lowrank_ds.plan import Planner, Settings, Zero, find, holding, models, ours, report
from tests import planning

ROOT = Path(__file__).parents[1]
TINY = planning.SMALL | {"num_hidden_layers": 1, "vocab_size": 64}
REAL = ["ddp", "zero2", "zero3, layer-wise", "fsdp2", "fsdp2, long, checkpointed"]


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict]]:
    """What both ranks of real runs tracked."""
    return planning.measured(REAL)


@pytest.mark.parametrize("name", REAL)
def test_weights_and_state_are_exact_and_the_total_within_three_percent(name: str, runs: dict) -> None:
    """Uneven cuts: every rank's state is what is planned for it, the largest is the one that is reported."""
    settings, tracked = planning.CELLS[name], runs[name]
    plan = Planner(settings).plan()
    states = [ours.Ours(settings, rank) for rank in range(2)]
    if name == "ddp":
        states[1] = states[0]
    assert [o.moments + o.projectors for o in states] == [found["state"] for found in tracked]
    assert sum(plan.state.values()) == tracked[plan.rank]["state"]
    assert plan.peak.at["weights"] == max(found["weights"] for found in tracked)
    assert plan.total == pytest.approx(max(found["total"] for found in tracked), rel=0.03)


def test_traffic_is_what_a_run_sends(runs: dict) -> None:
    """Our collectives, by kind, in number and bytes; and FSDP2's."""
    for name in ("zero2", "fsdp2"):
        plan = Planner(planning.CELLS[name]).plan()
        assert dict(plan.ours.calls) == runs[name][plan.rank]["calls"], name
        assert dict(plan.ours.sizes) == runs[name][plan.rank]["bytes"], name


def test_sizes_answers_as_torch_does() -> None:
    """Operations that are answered from memory leave temporaries and traffic as they are; a refresh too."""
    for recipe in ("fira", "flora"):
        one = ours.Ours(Settings(TINY, recipe, 16, gpus=2), 0)
        quick = [one.refresh() for _ in range(2)]  # the second is answered
        one._sizes = contextlib.nullcontext()
        assert quick == [one.refresh()] * 2


def test_what_a_rank_holds() -> None:
    """Pieces cover every parameter once, on any engine and number of ranks."""
    for engine, world in (("zero1", 3), ("zero3", 5), ("fsdp2", 4)):
        settings = Settings(TINY, engine=engine, gpus=world, rank=4)
        held = dict.fromkeys(settings.shapes, 0)
        for rank in range(world):
            for host in holding.hosts(settings, rank):
                for at in host.placements:
                    m, n = (1, at.shape[0]) if len(at.shape) == 1 else at.shape
                    held[at.name] += sum(layout.numel for _, _, layout in at.matrices(1, m, n))
        assert held == {name: torch.Size(shape).numel() for name, shape in settings.shapes.items()}


def test_state_without_making_it() -> None:
    """What chooses the largest rank agrees with what is then made."""
    for engine, recipe in (("zero2", "fira"), ("zero3", "galore_adafactor"), ("fsdp2", "q_galore")):
        settings = Settings(TINY, recipe, 16, engine=engine, gpus=3)
        built, _alive = ours.build(settings)
        for rank in range(3):
            made, counted = ours.Ours(settings, rank), ours.state_sizes(settings, holding.hosts(settings, rank), built)
            assert counted["projectors"] == made.projectors
            assert 0 <= made.moments - counted["moments"] <= 64 * len(settings.shapes)  # counters of what is elsewhere


def test_presets_are_the_checked_in_configs() -> None:
    """And projecting is decided as everywhere: by name."""
    for file in (ROOT / "ds_configs" / "models").glob("*.json"):
        theirs = json.loads(file.read_text())
        assert models.PRESETS[file.stem] == {k: theirs[k] for k in models.PRESETS[file.stem]}
    settings = Settings(models.read("llama_7b"))
    assert sorted(settings.matrices) == sorted(llama.projected(settings.shapes))


def test_more_tokens_more_memory() -> None:
    """The largest micro-batch fits, one more does not; checkpointing makes room for more."""
    settings = Settings(TINY | {"num_hidden_layers": 3}, rank=8, gpus=2, seq=64)
    planner = Planner(settings)
    memory = planner.plan(5).total
    assert planner.largest_micro_batch(memory) == 5
    assert planner.largest_micro_batch(memory - 1) == 4
    assert planner.largest_micro_batch(1) == 0
    assert Planner(dataclasses.replace(settings, checkpointing=True)).largest_micro_batch(memory) > 5


# -- the command ------------------------------------------------------------------------------------------------------
@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A folder with a model's config, with the nulls that older ones have."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"head_dim": None}))
    return str(tmp_path)


def test_text_and_json(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Categories add up; AdamW stands beside."""
    out = tmp_path / "plan.json"
    flags = ["--model", tiny, "--rank", "8", "--engine", "zero2", "--gpus", "2", "--seq", "64", "--moments", "8bit"]
    assert cli.main(["plan", *flags, "--json", str(out)]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    for words in ("master weights", "projectors", "largest micro-batch", "worst moment", "all-gather", "AdamW"):
        assert words in text
    for plan in (found["plan"], found["adamw"]):
        assert sum(plan["at_peak"].values()) == plan["total"]
        assert max(phase["total"] for phase in plan["phases"].values()) == plan["total"]
    assert found["plan"]["state"]["moments"] < found["adamw"]["state"]["moments"] / 2
    assert found["plan"]["traffic"]["engine"]["all-gather"]["calls"] == 1


def test_find_takes_what_is_cheapest(tiny: str, capsys: pytest.CaptureFixture) -> None:
    """Everything found fits; nothing is recomputed or coded that need not be; where nothing fits, the least is told."""
    settings = Settings(models.read(tiny), "adamw", gpus=2, seq=512)
    plenty, _ = find.find(settings, 1 << 40, lambda text: None)
    assert {one.plan.settings.engine for one in plenty} == {"ddp", "zero1", "zero2", "zero3", "fsdp2"}  # one node
    assert all(one.compute == 1 for one in plenty)
    assert [one.cost for one in plenty] == sorted(one.cost for one in plenty)
    ours_only = dataclasses.replace(settings, recipe="fira", rank=8, seq=8)
    (kept,), _ = find.find(ours_only, 1 << 40, lambda text: None, ["fsdp2"])
    scarce, smallest = find.find(ours_only, kept.plan.total - 1, lambda text: None, ["fsdp2"])
    assert scarce and all(smallest.total <= one.plan.total < kept.plan.total for one in scarce)
    assert all(one.compute > 1 or one.codes or one.plan.settings.layerwise for one in scarce)
    flags = ["--model", tiny, "--recipe", "adamw", "--gpu-memory", "0.001", "--reserve", "0", "--find"]
    assert cli.main(["plan", *flags]) == 1
    assert "nothing fits. The least is" in capsys.readouterr().out


def test_find_says_what_state_is_stored_as(tiny: str) -> None:
    """Codes that are a recipe's own or that were asked for count; --rank 0 and few key heads stay what they are."""
    config, flat = models.read(tiny), {"engines": ["fsdp2"], "progress": lambda text: None, "memory": 1 << 40}
    for recipe, options, codes, words in (
        ("fira", {}, 0, " fp32 "), ("galore_8bit", {}, 1, "8-bit moments "), ("adamw", {}, 0, " bf16 "),
        ("galore", {"projector_dtype": "4bit"}, 1, " 4-bit bases "), ("q_galore", {}, 2, "8-bit moments, 4-bit bases"),
    ):  # fmt: skip
        settings = Settings(config, recipe, None if recipe == "adamw" else 8, gpus=2, seq=8, options=options)
        rows, _ = find.find(settings, **flat)
        assert [one.codes for one in rows] == [codes], recipe
        assert words in report.found(rows, None, settings, 1), recipe
    (nothing,), _ = find.find(Settings(config, rank=0, gpus=2, seq=8), **flat)
    assert not nothing.plan.settings.projects
    few = config | {"num_key_value_heads": 1, "head_dim": 8}  # a sixteenth of the width is 8, too
    assert find.ranks_of(Settings(few, "apollo_mini", gpus=2)) == [2, 1]


def test_tied_embeddings_have_one_gradient() -> None:
    """It is one tensor, reduced once; two parts of it are there only until autograd has added them."""
    for engine in ("ddp", "zero2", "zero3", "fsdp2"):
        settings = Settings(TINY | {"tie_word_embeddings": True}, rank=8, engine=engine, gpus=2, seq=8)
        plan = Planner(settings).plan(refresh=False)
        sent = plan.engine.sizes["all-reduce"] + plan.engine.sizes["reduce-scatter"]
        whole = 2 * sum(map(math.prod, settings.shapes.values()))
        assert whole <= sent < 1.01 * whole, engine
        assert engine != "ddp" or plan.phases["step"].at["gradients"] == whole


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recipe", "muon"], ["--recipe 'muon'", "fira", "apollo", "adamw"]),
        (["--rank", "44"], ["--rank 44", "k_proj"]),
        (["--rank", "-1"], ["--rank"]),
        (["--engine", "hsdp", "--nodes", "3", "--shard", "5"], ["--shard 5", "24"]),
        (["--engine", "hsdp"], ["--engine hsdp", "--shard"]),
        (["--shard", "2"], ["--shard 2", "hsdp"]),
        (["--layerwise", "--engine", "zero2"], ["--layerwise", "zero2", "zero3"]),
        (["--layerwise", "--recipe", "adamw"], ["--layerwise"]),
        (["--gpus", "0"], ["--gpus"]),
        (["--micro-batch", "0"], ["--micro-batch"]),
        (["--model", "gpt5"], ["--model gpt5", "llama_7b"]),
        (["--option", "moment=8bit"], ["moment", "did you mean"]),
        (["--moments", "4bit"], ["moments must be"]),
        (["--gpu-memory", "2", "--reserve", "3"], ["--gpu-memory", "--reserve"]),
        (["--engine", "zero2", "--simulate"], ["--simulate", "fsdp2"]),
        (["--find", "--simulate"], ["--find", "--simulate"]),
        (["--recipe", "adamw", "--rank", "8"], ["--rank 8", "adamw"]),
        (["--recipe", "lomo", "--rank", "8"], ["--rank 8", "lomo"]),
    ],
)
def test_errors_name_the_flag(flags: list[str], words: list[str], tiny: str, capsys: pytest.CaptureFixture) -> None:
    """Nothing is planned; status 2."""
    model = [] if "--model" in flags else ["--model", tiny]
    rank = [] if "--rank" in flags else ["--rank", "8"]
    assert cli.main(["plan", *model, *rank, *flags]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert all(word in said.err for word in words), said.err


def test_a_ds_config_says_how_large_buckets_are(tmp_path: Path) -> None:
    """Its aliases too; what plan cannot know is refused by name."""
    zero = Zero.read({"zero_optimization": {"reduce_bucket_size": 10, "prefetch_bucket_size": 7}}, "x")
    assert (zero.reduce_bucket_size, zero.stage3_prefetch_bucket_size) == (10, 7)
    assert not zero.overlap_comm  # DeepSpeed's default, one bucket; without a file as in ds_configs/
    assert Zero().overlap_comm
    assert Zero.read({"zero_optimization": {"max_live_parameters": 5.0}}, "x").stage3_max_live_parameters == 5
    assert Zero.read({"zero_optimization": {"offload_param": None, "overlap_comm": None}}, "x") == Zero.read({}, "x")
    for given, word in (
        ({"offload_param": {"device": "cpu"}}, "offload_param"), ({"sub_group_size": "auto"}, "auto"), ([], "object"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            Zero.read({"zero_optimization": given}, "--ds-config x")
