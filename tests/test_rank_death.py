"""A rank that dies, stops or fails alone: the others stop with an error that says so, or go on together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import lowrank_ds
from lowrank_ds import agreement, failures
from tests import lora, training
from tests.cluster import batches, launch, share
from tests.deaths import LAST, outcomes, train_until, trainer

BOUND = 20  # seconds in which every rank must have noticed a dead one (measured: 0.1-1)
TIMEOUT = 4  # seconds that a group waits for a rank that stopped
OURS = ("zero2", "zero3", "fsdp2", "fsdp2 layerwise")  # engines under which the step has exchanges of its own


@pytest.fixture(scope="module")
def fates() -> dict[tuple[str, str], Any]:
    """{(engine, fate): (outcomes, time of the fate)}; two jobs at a time."""
    jobs = [(engine, "killed") for engine in (*OURS, "ddp")] + [
        ("fsdp2", "stopped"),
        ("zero2", "stopped"),
        ("zero2", "fails"),
    ]
    found = {}
    for pair in (jobs[i : i + 2] for i in range(0, len(jobs), 2)):
        running = {
            job: outcomes(3 if job[0] == "fsdp2" else 2, train_until, *job, 1, TIMEOUT, doomed=job[1] != "fails")
            for job in pair
        }
        found |= {job: collect() for job, collect in running.items()}
    return found


@pytest.mark.parametrize("engine", [*OURS, "ddp"])
def test_a_killed_rank_ends_the_others(fates: dict, engine: str, capsys: pytest.CaptureFixture) -> None:
    """SIGKILL in the middle of a step: every other rank raises RankError, soon, and says what to look for."""
    found, since = fates[engine, "killed"]
    with capsys.disabled():
        print(f"\n{engine}: noticed after " + ", ".join(f"{o.at - since:.2f} s" for o in found.values()))
    for rank, outcome in found.items():
        assert outcome.kind == "RankError", (rank, outcome)
        assert outcome.at - since < BOUND, (rank, outcome)
        assert "one of them has ended: killed, out of memory, or an error of its own" in outcome.message
        assert "first error in each rank's own output" in outcome.message
        assert "Connection" in outcome.message  # what gloo said
        if engine in OURS:
            assert f"on rank {rank}" in outcome.message
            assert "over ranks 0, 1" in outcome.message
            assert "proj.weight" in outcome.message or "model." in outcome.message, outcome.message
        else:
            assert outcome.message.startswith("training: a collective of the engine failed")


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_a_stopped_rank_ends_the_others_at_the_timeout(fates: dict, engine: str) -> None:
    """A rank that lives but does not move: the group's timeout, which `limit_waits` sets in DeepSpeed's groups too."""
    found, since = fates[engine, "stopped"]
    for rank, outcome in found.items():
        assert outcome.kind == "RankError", (rank, outcome)
        assert outcome.at - since < TIMEOUT + BOUND, (rank, outcome)
    first = min(found.values(), key=lambda outcome: outcome.at)
    assert first.at - since > TIMEOUT - 1
    assert "hangs or is stopped" in first.message
    assert "--timeout SECONDS" in first.message


def test_a_rank_that_raises_alone_ends_the_others_when_it_ends(fates: dict) -> None:
    """ZeRO-2: DeepSpeed gathers weights after our step, where the others wait for a rank that left with an error."""
    found, since = fates["zero2", "fails"]
    assert found[LAST].kind == "ValueError" and "learning rate is nan" in found[LAST].message
    assert found[0].kind == "RankError" and found[0].at - since < BOUND, found[0]


# -- errors that one rank sees alone ----------------------------------------------------------------------------------
def one_rank_without_rate(rank: int, world: int, engine: str, at: int) -> tuple[list[str], dict, dict]:
    """(errors by step, weights, skipped) when the last rank's learning rate is NaN in step `at`."""
    _, optimizer, step = run = trainer(engine, world, update_proj_gap=3)
    errors = []
    for number, batch in enumerate(batches(6)):
        for group in optimizer.param_groups:
            group["lr"] = math.nan if (rank, number) == (LAST, at) else 1e-2
        try:
            step(share(batch, rank, world))
            errors.append("")
        except (RuntimeError, ValueError) as error:
            errors.append(f"{type(error).__name__}: {error}")
            optimizer.zero_grad()
    return errors, training.weights_of(run[0]), optimizer.skipped()


def alone(rank: int, world: int) -> dict[str, Any]:
    """The cases of one rank's own error, one after another."""
    found = {engine: one_rank_without_rate(rank, world, engine, 1) for engine in ("fsdp2", "fsdp2 layerwise")}
    found["refresh"] = one_rank_without_rate(rank, world, "fsdp2", 3)
    found["parted"] = {case: one_group_without_rate(rank, world, **how) for case, how in PARTED.items()}
    found["watched"] = watched_by_one(rank, world)
    found["facts"] = disagreeing(rank, world)
    found["zero a"] = {engine: zero_lora_a(rank, world, engine) for engine in ("fsdp2", "zero2")}
    found["broken"] = broken_midway(rank, world)
    return found


# Three matrices are projected, so that exact SVDs are not dealt evenly.
PARTED: dict[str, dict[str, Any]] = {
    "at a refresh": {"spoiled": 1, "update_proj_gap": 1},
    "sums": {"spoiled": 0, "update_proj_gap": 4, "proj_type": "left", "compress_accumulation": True},
}


def one_group_without_rate(rank: int, world: int, spoiled: int, **settings: Any) -> tuple[list[str], dict, set[str]]:
    """(errors by step, weights, names of skipped) when the last rank has no learning rate for one group in step 1."""
    model = training.fully_sharded("fsdp2", world)
    parts: list[dict[str, torch.nn.Parameter]] = [{}, {}]
    for name, p in model.named_parameters():
        parts["layers.0.mlp" not in name][name] = p
    groups = [
        {"params": [*part.values()], "param_names": [*part], "rank": r}
        for part, r in zip(parts, (8, None), strict=True)
    ]
    optimizer, errors = lowrank_ds.GaLoreAdamW(groups, lr=1e-3, **settings), []
    for number, batch in enumerate(batches(4)):
        mine = share(batch, rank, world)
        model(input_ids=mine, labels=mine).loss.backward()
        if "compress_accumulation" in settings:
            optimizer.accumulate()
        optimizer.param_groups[spoiled]["lr"] = math.nan if (rank, number) == (LAST, 1) else 1e-3
        try:
            optimizer.step()
            errors.append("")
        except ValueError as error:
            errors.append(str(error))
        optimizer.param_groups[spoiled]["lr"] = 1e-3
        optimizer.zero_grad()
    return errors, training.weights_of(model), set(optimizer.skipped())


def watched_by_one(rank: int, world: int) -> str:
    """The error when only the first rank builds Diagnostics, which exchange bases at a refresh."""
    _, optimizer, step = trainer("fsdp2", world)
    if rank == 0:
        lowrank_ds.Diagnostics(optimizer)
    try:
        step(share(batches(1)[0], rank, world))
    except lowrank_ds.RankError as error:
        return str(error)
    return ""


def disagreeing(rank: int, world: int) -> dict[str, str]:
    """{fact: error at the refresh} of ranks that differ in it; the exchanges after it still fit."""
    found = {}
    for fact, spoil in {
        "learning rate": lambda group, _: group.update(lr=1e-2 * (1 + rank * 1e-4)),
        "weight decay": lambda group, _: group.update(weight_decay=0.1 * rank),
        "number of skipped updates": lambda _, slot: slot.state["skipped"].add_(rank),
    }.items():
        for kind in ("fsdp2", "replicate"):
            _, optimizer, step = trainer(kind, world, update_proj_gap=2)
            for number, batch in enumerate(batches(3)):
                if number == 1:
                    slots = [slot for slots in optimizer._slots.values() for slot in slots if slot.projected]
                    for group in optimizer.param_groups:
                        spoil(group, slots[-1])
                try:
                    step(share(batch, rank, world))
                except lowrank_ds.RankError as error:
                    found[fact, kind] = number, str(error)
                    break
    return found


def zero_lora_a(rank: int, world: int, engine: str) -> str:
    """The error of each rank when a lora_A is zero."""
    if engine == "zero2":
        model = lora.engine_of(2, world)
        weights = model.module
    else:
        weights = lora.sharded("fsdp2", world)
    for name, p in weights.named_parameters():
        if "layers.0.self_attn.q_proj.lora_A" in name:
            p.data.zero_()
    try:
        if engine == "zero2":
            lora_step(model, rank, world)
        else:
            training.train_sharded(weights, lora.optimizer_of(weights), "fsdp2", rank, world, range(1))
    except ValueError as error:
        return str(error)
    return ""


def lora_step(engine: Any, rank: int, world: int) -> None:
    """One step of a DeepSpeed engine."""
    mine = share(batches(1)[0], rank, world)
    engine.backward(engine(input_ids=mine, labels=mine).loss)
    engine.step()


def broken_midway(rank: int, world: int) -> list[str]:
    """An error in the middle of a step, on all ranks here; the step after it."""
    _, optimizer, step = trainer("fsdp2", world)
    data = [share(batch, rank, world) for batch in batches(3)]
    step(data[0])
    from lowrank_ds import pipeline

    original, pipeline.write = pipeline.write, lambda *_: (_ for _ in ()).throw(MemoryError("no room"))
    said = []
    try:
        step(data[1])
    except MemoryError as error:
        said.append(str(error))
    pipeline.write = original
    try:
        step(data[2])
    except lowrank_ds.RankError as error:
        said.append(str(error))
    optimizer.load_state_dict(optimizer.state_dict())
    step(data[2])
    return said


@pytest.fixture(scope="module")
def lonely() -> list[dict[str, Any]]:
    """What `alone` found on each of two ranks, which live on after their errors."""
    return launch(2, alone)


@pytest.mark.parametrize("case", ["fsdp2", "fsdp2 layerwise", "refresh"])
def test_one_ranks_own_error(lonely: list[dict[str, Any]], case: str) -> None:
    """It raises there, nobody waits, that step updates nothing, and the ranks' weights stay the same."""
    errors, weights, skipped = zip(*(found[case] for found in lonely), strict=True)
    at = 3 if case == "refresh" else 1
    said = [e for e in errors[LAST] if e]
    assert len(said) == 1, errors[LAST]
    assert "ValueError" in said[0] and "the learning rate is nan; check the scheduler" in said[0]
    assert errors[LAST][at]
    assert training.largest_difference(*weights) == 0
    if case == "refresh":  # the survey tells the others at once
        assert "RankError" in errors[0][at] and "different learning rate" in errors[0][at]
        return
    assert not any(errors[0]), errors[0]
    assert skipped[0] and set(skipped[0].values()) == {1}


@pytest.mark.parametrize("case", PARTED)
def test_one_ranks_own_error_in_one_group(lonely: list[dict[str, Any]], case: str) -> None:
    """Ranks go on together: SVDs are dealt alike afterwards, and summed micro-batches are skipped by all."""
    errors, weights, skipped = zip(*(found["parted"][case] for found in lonely), strict=True)
    assert not any(errors[0]) and [bool(e) for e in errors[LAST]] == [False, True, False, False], errors
    assert training.largest_difference(*weights) == 0
    assert skipped[0] == skipped[1] and any("layers.0.mlp" in n for n in skipped[0]) is (case == "sums")


def test_diagnostics_on_one_rank_are_told(lonely: list[dict[str, Any]]) -> None:
    """They would wait for exchanges that the others know nothing of."""
    for found in lonely:
        assert "different number of Diagnostics that watch" in found["watched"]
        assert "build it on all of them" in found["watched"]


def test_the_rest_of_the_run_is_as_if_the_step_had_not_been(lonely: list[dict[str, Any]]) -> None:
    """With the rank's error at step 1 the weights are those of one process whose gradient was NaN then."""
    torch.set_num_threads(1)
    model = training.tiny_llama()
    optimizer = training.build("fira", model, update_proj_gap=3)
    for number, batch in enumerate(batches(6)):
        model(input_ids=batch, labels=batch).loss.backward()
        if number == 1:
            for p in model.parameters():
                p.grad.fill_(math.nan)
        optimizer.step()
        optimizer.zero_grad()
    assert training.largest_difference(training.weights_of(model), lonely[0]["fsdp2"][1]) <= 1e-5


def test_ranks_that_disagree_are_told_at_the_refresh(lonely: list[dict[str, Any]]) -> None:
    """Learning rate, weight decay, skipped updates: by name, on all ranks, on shards and on replicas."""
    for found in lonely:
        assert len(found["facts"]) == 6, found["facts"].keys()
        for (fact, _), (number, message) in found["facts"].items():
            assert number == 2  # the next refresh
            assert f"the 2 ranks that share it have a different {fact}" in message
            assert "Nothing was updated" in message


def test_a_zero_lora_a_is_refused_on_all_ranks(lonely: list[dict[str, Any]]) -> None:
    """Also on those that hold nothing of its lora_B."""
    for found in lonely:
        for message in found["zero a"].values():
            assert "lora_A" in message and "is all zeros" in message


def test_a_step_after_a_broken_one(lonely: list[dict[str, Any]]) -> None:
    """Half of the weights are written: it refuses, until a checkpoint is loaded."""
    for found in lonely:
        first, second = found["broken"]
        assert first == "no room"
        assert "failed midway on this rank" in second and "MemoryError: no room" in second


# -- replicas ---------------------------------------------------------------------------------------------------------
def sick_replica(rank: int, world: int, at: int) -> tuple[list[str], dict[str, Any], dict[str, int]]:
    """(errors by step, weights, skipped) when one replica's own gradient is NaN in step `at` (a hardware fault)."""
    model, optimizer, _ = trainer("replicate", world, "galore", update_proj_gap=3)
    errors = []
    for number, batch in enumerate(batches(7)):
        mine = share(batch, rank, world)
        model(input_ids=mine, labels=mine).loss.backward()
        if (rank, number) == (LAST, at):
            for p in model.parameters():
                p.grad._local_tensor.fill_(math.nan)
        try:
            optimizer.step()
            errors.append("")
        except lowrank_ds.RankError as error:
            errors.append(str(error))
            break
        optimizer.zero_grad()
    return errors, training.weights_of(model), optimizer.skipped()


def replicas(rank: int, world: int) -> list[Any]:
    """At a refresh, and between two."""
    return [sick_replica(rank, world, at) for at in (3, 4)]


def test_a_replica_that_sees_a_nan_alone() -> None:
    """At a refresh all keep their bases; at an ordinary step the replicas part, and the next refresh says so."""
    for at_refresh, between in launch(2, replicas):
        errors, _, _ = at_refresh
        assert "number of skipped updates" in errors[-1] and len(errors) == 5, errors
        errors, _, _ = between
        assert "number of skipped updates" in errors[-1] and len(errors) == 7, errors


# -- the words ---------------------------------------------------------------------------------------------------------
def test_messages() -> None:
    """What is said for a closed connection and a timeout, and what is no loss."""
    closed = failures.lost("the all-reduce for a", [0, 2], 2, RuntimeError("[x] Connection closed by peer [::1]:3"))
    assert str(closed).startswith("the all-reduce for a over ranks 0, 2 failed on rank 2. Most likely one of them has")
    assert "--timeout" not in str(closed)
    late = failures.lost("x", None, None, RuntimeError("Timed out waiting 5000ms for recv operation to complete"))
    assert str(late).startswith("x failed. A rank hangs")
    assert failures.some(["a", "", "b", "a", "c", "d", "e"]) == "a, b, c and 2 more"
    for text in ("CUDA out of memory", "shape mismatch"):
        with pytest.raises(RuntimeError, match=text) as caught, failures.watch("training"):
            raise RuntimeError(text)
        assert not isinstance(caught.value, lowrank_ds.RankError)


def test_check() -> None:
    """Rounding is no disagreement; one rank of a thousand is."""

    def sums(values: list[float], last: float = 2e5) -> list[float]:
        steps = [2e5] * (len(values) - 1) + [last]
        facts = [
            torch.tensor([v, 0.0, step, 2.0, 0.0], dtype=torch.float64) for v, step in zip(values, steps, strict=True)
        ]
        zero = torch.zeros(())
        parts = [agreement.contribution(torch.zeros(2), f, zero, True) for f in facts]
        parts.append(agreement.contribution(torch.zeros(2), facts[0] * 3, zero, False))  # holds nothing: not asked
        return torch.stack(parts).sum(0).tolist()

    agreement.check("w", sums([0.1 / 3] * 1000), [0.1 / 3, 0, 2e5, 2, 0, 0])
    with pytest.raises(lowrank_ds.RankError, match="w: the 1000 ranks that share it have a different learning rate"):
        agreement.check("w", sums([0.1 / 3] * 999 + [0.1 / 3 * 1.001]), [0.1 / 3, 0, 2e5, 2, 0, 0])
    with pytest.raises(lowrank_ds.RankError, match="different step number"):
        agreement.check("w", sums([0.1 / 3] * 1000, 2e5 + 1), [0.1 / 3, 0, 2e5, 2, 0, 0])
