"""`lowrank-ds doctor`: under torchrun, mpirun and by hand; good and broken environments."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import lowrank_ds
from lowrank_ds.doctor import command, facts, links, numbers, places, settings, shared, wire
from lowrank_ds.doctor.findings import Finding, names
from lowrank_ds.launching import Place
from tests import launchers

DOCTOR = ("-m", "lowrank_ds", "doctor")


def _lines(text: str, level: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(level + " (")]


@pytest.fixture
def quiet(tmp_path: Path) -> dict[str, str]:
    """Variables that keep what this machine has in its caches out of the report."""
    return {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}


def test_torchrun(tmp_path: Path, quiet: dict[str, str]) -> None:
    """Two good ranks: status 0, all facts in the report and the JSON, links timed, the shared folder left empty."""
    (tmp_path / "shared").mkdir()
    options = ["--size", 1, "--json", tmp_path / "found.json", "--shared", tmp_path / "shared"]
    done = launchers.run([*launchers.TORCHRUN, 2, *DOCTOR, *options], launchers.clean_environment(**quiet))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("lowrank-ds doctor: 2 rank(s) on 1 host(s), CPUs only") == 1
    assert "\n0 problem(s)" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["status"] == 0 and [rank["rank"] for rank in found["ranks"]] == [0, 1]
    for rank in found["ranks"]:
        assert re.search(
            rf"^{rank['rank']} +{rank['host']} +{rank['local_rank']} +{rank['pid']} +CPU", done.stdout, re.M
        )
        assert rank["versions"]["lowrank_ds"] == lowrank_ds.__version__ and rank["versions"]["mpi4py"]
        assert rank["local_world"] == 2 and rank["device"]["kind"] == "cpu" and rank["device"]["total"] > 1 << 28
    assert len({rank["pid"] for rank in found["ranks"]}) == 2
    assert set(found["links"]["all_reduce"]) == set(found["links"]["broadcast"]) == {"8", str(1 << 20)}
    (pair,) = found["links"]["pairs"]
    assert pair["ranks"] == [0, 1] and 0 < pair["latency"] < 5 and 1e5 < pair["rate"] < 1e12
    assert "slowest between rank 0" in done.stdout and list((tmp_path / "shared").iterdir()) == []


def test_mpirun(tmp_path: Path, quiet: dict[str, str]) -> None:
    """mpirun alone sets no RANK: mpi4py tells who is who. --quick leaves the links out."""
    options = ["--quick", "--json", tmp_path / "found.json"]
    program = [sys.executable, "-m", "mpi4py", *DOCTOR]
    done = launchers.run([*launchers.MPIRUN, 2, *program, *options], launchers.clean_environment(**quiet))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "told by MPI, by mpi4py on ranks 0-1" in done.stdout and "links" not in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(rank["rank"], rank["local_rank"], rank["local_world"]) for rank in found["ranks"]] == [
        (0, 0, 2),
        (1, 1, 2),
    ]
    assert found["links"] is None


@pytest.fixture
def other_installation(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH: this package with another version and other seeded bits, and another transformers."""
    folder = tmp_path / "other"
    package = folder / "lowrank_ds"
    shutil.copytree(launchers.ROOT / "lowrank_ds", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "version.py").write_text('__version__ = "0.0.9"\n')
    noise = (package / "noise.py").read_text()
    (package / "noise.py").write_text(noise.replace("0x846CA68B", "0x846CA68D"))
    distribution = folder / "transformers-0.0.1.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    return folder


def test_a_broken_rank_is_told_from_the_others(tmp_path: Path, quiet: dict[str, str], other_installation: Path) -> None:
    """Other versions, code, draws, variables and a stale lock on rank 1 of 2: status 1 on both, one line for each."""
    extensions = tmp_path / "killed"
    lock = extensions / "py3_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    broken = {
        "PYTHONPATH": f"{other_installation}{os.pathsep}{launchers.ROOT}", "NCCL_ALGO": "Tree", "OMP_NUM_THREADS": "2",
        "PYTHONHASHSEED": "7", "TORCH_EXTENSIONS_DIR": str(extensions),
    }  # fmt: skip
    program = [sys.executable, *DOCTOR, "--quick", "--shared", tmp_path / "nowhere"]
    done = launchers.run_ranks(program, [quiet, broken], folder=tmp_path)
    assert [rank.returncode for rank in done] == [1, 1], [rank.stderr[-2000:] for rank in done]
    assert not done[1].stdout
    report = done[0].stdout
    problems, warnings = _lines(report, "problem"), _lines(report, "warning")
    version = lowrank_ds.__version__
    for start in (
        f"problem (rank 1): lowrank_ds is {version} on rank 0, 0.0.9 on rank 1. ",
        "problem (rank 1): transformers is ",
        "problem (rank 1): the files of lowrank_ds differ",
        "problem (rank 1): seeded bits (lowrank_ds.noise): other numbers",
        "problem (rank 1): a seeded gaussian basis: other numbers",
        f"problem (rank 1): 2 steps of FiraAdamW on a {numbers.ROWS} x",
        "problem (rank 1): NCCL_ALGO is unset on rank 0, Tree on rank 1. ",
        f"problem (rank 1): {lock} is ",
        "problem (rank 0): --shared ",
    ):
        assert sum(line.startswith(start) for line in problems) == 1, (start, report)
    assert len(problems) == 9 and f"rm {lock}" in report
    for name in (
        "OMP_NUM_THREADS is 1 on rank 0, 2 on rank 1",
        "PYTHONHASHSEED is unset on rank 0, 7 on rank 1",
    ):
        assert any(line.startswith(f"warning (rank 1): {name}") for line in warnings), report


def _examine(world: int, others: dict[int, Callable[[Any, wire.Channel], Any]]) -> tuple[int, dict]:
    """(status of rank 0, {rank: what its function returned}) of a job in which only rank 0 and `others` take part.

    Threads stand for processes: no process group is made where a rank is missing.
    """
    given, port, found = command_line("--timeout", "3"), launchers.free_port(), {}

    def join(rank: int) -> wire.Channel:
        channel = wire.Channel(Place(rank, world, rank, None, "127.0.0.1", port, "a test"), given.timeout)
        channel.tell("here", facts.whereabouts(channel.place))
        return channel

    def take_part(rank: int) -> None:
        found[rank] = others[rank](given, join(rank))

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in others]
    for thread in threads:
        thread.start()
    status = command.Examination(given, join(0)).run()
    for thread in threads:
        thread.join(30)
    return status, found


def test_a_missing_rank_is_named(capsys: pytest.CaptureFixture) -> None:
    """Rank 2 of 3 never comes: the others end with status 1 after the timeout, and rank 0 says who is missing."""
    assert _examine(3, {1: command.follow}) == (1, {1: 1})
    (line,) = _lines(capsys.readouterr().out, "problem")
    assert line.startswith("problem (rank 2): of 3 ranks, rank 2 did not come within 3 s; there came ranks 0-1 from ")


def test_a_rank_that_cannot_tell_its_facts(capsys: pytest.CaptureFixture) -> None:
    """Rank 1 hangs, rank 2 has a broken installation; nobody waits for more, and rank 2 hears the verdict."""

    def broken(given: Any, channel: wire.Channel) -> int:
        channel.tell("facts", facts.whereabouts(channel.place) | {"failed": "ImportError: libcuda"})
        assert channel.hear("plan", 0, 30) == {"go": False}
        status = channel.hear("verdict", 0, 30)
        channel.tell("bye", True)
        return status

    assert _examine(3, {1: lambda *_: None, 2: broken}) == (1, {1: None, 2: 1})
    problems = _lines(capsys.readouterr().out, "problem")
    assert [line[:16] for line in problems] == ["problem (rank 1)", "problem (rank 2)"]
    assert (
        "rank 1 came, but told no facts" in problems[0] and "cannot be collected: ImportError: libcuda" in problems[1]
    )


def test_ranks_without_facts_have_their_places(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 3 tells no facts: local ranks 0 and 2 of the others are no second problem."""
    alike = {"local_world": 3, "device": {"kind": "cpu", "id": ""}}
    monkeypatch.setattr(facts, "collect", lambda place: fake(place.rank, local_rank=place.rank, **alike))
    assert _examine(3, {1: lambda *_: None, 2: command.follow}) == (1, {1: None, 2: 1})
    (line,) = _lines(capsys.readouterr().out, "problem")
    assert line.startswith("problem (rank 1): of 3 ranks, rank 1 came, but told no facts")


def test_rank_0_is_missing(
    quiet: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A rank that cannot reach MASTER_ADDR says so; contradictory variables are refused; each is status 1."""
    given = command_line("--timeout", "1")
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = launchers.clean_environment(**quiet, **place, MASTER_PORT=str(launchers.free_port()))
    for name in set(os.environ) - set(environment):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert command.main(given) == 1
    assert "cannot reach rank 0 at 127.0.0.1:" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    assert command.main(given) == 1
    assert "WORLD_SIZE is not set" in capsys.readouterr().err


def command_line(*arguments: str) -> Any:
    """The options of `lowrank-ds doctor`."""
    import argparse

    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["doctor", *arguments])


# --- what is concluded from facts ---------------------------------------------------------------------------------
def fake(rank: int, host: str = "a", **changes: Any) -> dict[str, Any]:
    """Facts of a good rank of 4 on two hosts with two GPUs each."""
    gpu = {"kind": "cuda", "name": "H100", "id": f"{host}{rank % 2}", "total": 80 << 30, "free": 79 << 30, "visible": 2}
    good: dict[str, Any] = {
        "rank": rank, "host": host, "machine": f"{host} 1234", "pid": 100 + rank, "local_rank": rank % 2,
        "local_world": 2, "source": "x", "versions": {"torch": "2.13", "deepspeed": "0.19", "source": "abc"},
        "commit": "1", "code": "/x", "device": gpu, "cpu": "c", "cores": [*range(8)], "threads": 1, "environment": {},
        "addresses": {"a": ["10.0.0.1"], "b": ["10.0.0.2"]}, "interfaces": ["e0", "e1"], "locks": [],
        "ninjas": [["/bin/ninja", ""]],
        "numbers": {name: packed(1.0, 2.0) for name in numbers.WHAT},
    }  # fmt: skip
    return good | {key: good[key] | value if isinstance(value, dict) else value for key, value in changes.items()}


def packed(*values: float) -> str:
    """As `numbers` packs arrays."""
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def job(*changed: dict[str, Any]) -> list[dict[str, Any]]:
    """Four good ranks, two on each of hosts a and b, some replaced."""
    ranks = {rank: fake(rank, "ab"[rank // 2]) for rank in range(4)}
    return list((ranks | {facts_of["rank"]: facts_of for facts_of in changed}).values())


def test_good_facts_give_no_finding() -> None:
    """Also with what may differ between ranks."""
    free = fake(3, "b", environment={"CUDA_VISIBLE_DEVICES": "1", "NCCL_DEBUG": "INFO"})
    assert all(command.compare(good, good) == [] for good in (job(), job(free), [fake(0, local_world=1)]))


STALE = {"path": "/e/lock", "age": 5, "open": False}
CASES: dict[str, tuple[list[dict], str, str, tuple[int, ...]]] = {
    "version": (job(fake(1, versions={"torch": "2.12"})), "problem", "torch is 2.13 on ranks 0, 2-3, 2.12 on", (1,)),
    "not installed": (job(fake(1, versions={"deepspeed": "not installed"})), "problem", "deepspeed is 0.19", (1,)),
    "checkout": (job(fake(1, commit="2")), "warning", "the checkout is 1 on ranks 0, 2-3, 2 on rank 1", (1,)),
    "local rank": (job(fake(1, local_rank=0, device={"id": "z"})), "problem", r"local ranks on a are \[0, 0\]", (0, 1)),
    "local world": (job(fake(1, local_world=4)), "problem", "LOCAL_WORLD_SIZE is 4 but a has 2 ranks", (1,)),
    "same name": (job(fake(2, "a", machine="a 9", addresses={}), fake(3, "a", machine="a 9", addresses={})), "problem",
                  "2 machines call themselves a", (0, 1, 2, 3)),
    "one GPU for two": (job(fake(1, device={"id": "a0"})), "problem", "all on the same device a0 of a", (0, 1)),
    "no GPU left": (job(fake(3, "b", device={"kind": "none", "name": "none"})), "problem",
                    "local rank 1 has no GPU: 2 can be seen", (3,)),
    "other GPU": (job(fake(3, "b", device={"name": "A100"})), "warning", "the device is H100 .* A100 on rank 3", (3,)),
    "other size": (job(fake(3, "b", device={"total": 81 << 30})), "warning", "the device has 80.0 GiB on", (3,)),
    "used GPU": (job(fake(3, "b", device={"free": 40 << 30})), "warning", "40.0 GiB of 80.0 GiB are free on b", (3,)),
    "loopback master": ([fake(0, local_world=1, environment={"MASTER_ADDR": "a"}, addresses={"a": ["10.1"]}),
                         fake(1, "b", local_rank=0, local_world=1, environment={"MASTER_ADDR": "a"},
                              addresses={"a": ["127.0.0.1"]})], "problem", "MASTER_ADDR=a is an address of the", (1,)),
    "loopback name": (job(fake(2, "b", addresses={"b": ["127.0.1.1", "::1"]})), "warning",
                      "own name means 127.0.1.1, ::1", (2,)),
    "no name": (job(fake(2, "b", addresses={"b": []})), "warning", "own name has no address", (2,)),
    "accelerator": (job(fake(2, "b", environment={"DS_ACCELERATOR": "cuda"})), "problem", "DS_ACCELERATOR is", (2,)),
    "interface": (job(fake(2, "b", environment={"GLOO_SOCKET_IFNAME": "e1"})), "warning", "GLOO_SOCKET", (2,)),
    "no interface": ([fake(0, local_world=1, environment={"GLOO_SOCKET_IFNAME": "e1,e2"})], "problem",
                     "GLOO_SOCKET_IFNAME names e2, but a has e0, e1", (0,)),
    "torch variable": (job(fake(2, "b", environment={"TORCH_LOGS": "all"})), "warning", "TORCH_LOGS is", (2,)),
    "threads": (job(fake(0, threads=8)), "warning", "with 9 threads in all share 8 core", (0, 1)),
    "bound": (job(fake(0, threads=2, cores=[5])), "warning", r"2 threads are bound to 1 core\(s\)", (0,)),
    "lock": (job(fake(0, locks=[STALE])), "problem", "/e/lock is 5 s old and no process", (0,)),
    "busy lock": (job(fake(0, locks=[STALE | {"open": True}])), "warning", "an extension is being compiled", (0,)),
    "ninjas": (job(fake(0, ninjas=[["/a", "1.1"], ["/b", "1.2"]])), "warning", r"PATH: /a \(1.1\), /b \(1.2\)", (0,)),
    "hidden GPU": ([fake(0, local_world=1, environment={"DS_ACCELERATOR": "cpu"})], "warning", "there is a GPU", (0,)),
    "last bits": (job(fake(1, numbers={"step": packed(1.0, 2.000001)})), "warning", "2 steps of .* to 4.8e-07", (1,)),
    "other numbers": (job(fake(1, numbers={"generator": packed(1.0, 2.1)})), "problem", "torch.randn .* 5.0e-02", (1,)),
    "not a number": (job(fake(1, numbers={"gaussian": packed(1.0, float("nan"))})), "problem", r"1.0e\+00", (1,)),
    "bits": (job(fake(1, numbers={"noise": packed(1.0, 2.000001)})), "problem", "seeded bits", (1,)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_thing_wrong_is_one_finding(name: str) -> None:
    """Its level, its text and the ranks it names; nothing else is said."""
    ranks, level, text, who = CASES[name]
    (found,) = command.compare(ranks, ranks)
    assert (found.level, found.ranks) == (level, who) and re.search(text, found.what), found
    assert str(found).startswith(f"{level} ({names(who)}): ")


def test_accelerate_without_deepspeed() -> None:
    """A warning where it may be meant, a problem where DeepSpeed is asked for; none where it is not installed."""
    on = {"ACCELERATE_USE_CPU": "true"}
    asked = on | {"ACCELERATE_USE_DEEPSPEED": "true"}
    alone = lambda **changes: list(settings.check_traps([fake(0, **changes)]))
    assert [f.level for f in alone(environment=on)] == ["warning"]
    assert [f.level for f in alone(environment=asked)] == ["problem"]
    assert alone(environment=asked, versions={"deepspeed": "not installed"}) == []
    assert alone(environment={"ACCELERATE_USE_CPU": "false"}) == []


def test_gloo_cannot_be_met_at_a_loopback_name() -> None:
    """On CPUs a problem, unless the interface is named."""
    cpu = {"kind": "cpu", "id": ""}
    ranks = [fake(rank, host, device=cpu, addresses={host: ["127.0.1.1"]}) for rank, host in ((0, "a"), (1, "b"))]
    assert [(f.level, f.ranks) for f in places.check_addresses(ranks)] == [("problem", (0, 1))]
    named = [facts_of | {"environment": {"GLOO_SOCKET_IFNAME": "e"}} for facts_of in ranks]
    assert list(places.check_addresses(named)) == list(places.check_addresses(ranks[:1])) == []


def test_clocks() -> None:
    """The host that is off, not a rank of it that was slow to look at its clock."""
    clocks = {0: 100.0, 1: 103.0, 2: 97.5, 3: 98.0}
    (found,) = places.check_clocks(job(), clocks)
    assert found.ranks == (2, 3) and "b is 2.0 s behind rank 0's" in found.what


def _timed(**seconds: tuple[float, float]) -> list[dict[str, Any]]:
    """Pairs from r01=(latency, seconds of 1 MiB), as `wire.measure` tells them."""
    pairs = [[int(name[1]), int(name[2]), *times] for name, times in seconds.items()]
    return links.pairs_of({0: {"pairs": pairs[:2]}, 1: {"pairs": pairs[2:]}}, 1 << 20)


def test_slow_links_are_named() -> None:
    """Slowest first; half the median's bandwidth or five times its latency is a warning."""
    fast = (1e-4, 0.01)
    pairs = _timed(r01=fast, r02=(1e-4, 0.03), r03=fast, r12=fast, r13=(1e-3, 0.01), r23=fast)
    assert pairs[0]["ranks"] == [0, 2] and pairs[0]["rate"] == pytest.approx((1 << 20) / 0.03)
    found = list(links.check(job(), pairs))
    assert [f.ranks for f in found] == [(0, 2), (1, 3)] and "(a) and rank 2 (b)" in found[0].what
    assert list(links.check(job(), _timed(r01=(1e-3, 0.03), r02=fast)[:1])) == []


def test_a_host_with_slow_links_is_named_once() -> None:
    """Not as two slow pairs of three, or three of six."""
    (found,) = links.check(job(), _timed(r01=(1e-4, 0.01), r02=(1e-4, 0.05), r12=(1e-4, 0.04)))
    assert found.ranks == (2,) and "all links of rank 2 (b) are slow: 0.21 Gbit/s at best" in found.what
    fast, slow = (1e-4, 0.01), (1e-4, 0.05)
    (found,) = links.check(job(), _timed(r01=fast, r02=fast, r03=slow, r12=fast, r13=slow, r23=slow))
    assert found.ranks == (3,)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_every_pair_meets_once(count: int) -> None:
    """In as few rounds as possible, and no rank twice in a round."""
    ranks = [3 * i for i in range(count)]
    found = wire.rounds(ranks)
    assert len(found) == count - 1 + count % 2
    pairs = [pair for part in found for pair in part]
    assert sorted(pairs) == [(a, b) for a in ranks for b in ranks if a < b]
    assert all(len({rank for pair in part for rank in pair}) == 2 * len(part) for part in found)


def test_who_plays() -> None:
    """One rank of each host; where there is one host only, its first few ranks."""
    assert wire.players(["a", "a", "b", "b", "c"]) == [0, 2, 4]
    assert wire.players(["a"] * 20) == list(range(8))


def test_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder: nothing is said and nothing left. Another one, or one that is not writable back: named."""
    monkeypatch.setattr(shared, "PATIENCE", 0.0)
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir(), other.mkdir()
    name = shared.offer(mine)
    assert shared.look(mine, name, 0) == "" and "not seen" in shared.look(other, name, 1)
    assert shared.look(tmp_path / ("x" * 300), name, 1)  # a folder that cannot even be looked into is told, too
    assert shared.clear(mine, name, [0, 2]) == [2]
    assert list(mine.iterdir()) == []
    (found,) = shared.check(job(), {0: "", 1: "a file that rank 0 wrote is not seen", 2: ""}, mine)
    assert found.ranks == (1,) and found.level == "problem"


def test_locks_that_a_process_holds_are_not_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's FileBaton keeps its file open as long as it compiles; of a killed process only the file is left."""
    from torch.utils.file_baton import FileBaton

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "some_op"
    folder.mkdir()
    assert facts.locks() == []
    baton = FileBaton(str(folder / "lock"))
    assert baton.try_acquire()
    (found,) = facts.locks()
    assert found["open"] and found["path"] == str(folder / "lock")
    os.close(baton.fd)  # as the system does for a process that is killed
    (found,) = facts.locks()
    assert not found["open"] and found["age"] < 100


def test_ninjas_in_the_order_of_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links to one file count once; versions are asked for only where there are several."""
    for number, folder in enumerate(("x", "y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ninja").write_text(f"#!/bin/sh\necho 1.{number}\n")
        (tmp_path / folder / "ninja").chmod(0o755)
    (tmp_path / "z").symlink_to(tmp_path / "x")
    paths = [str(tmp_path / folder) for folder in "xzy"]
    monkeypatch.setenv("PATH", os.pathsep.join(paths))
    assert facts.ninjas() == [[f"{paths[0]}/ninja", "1.0"], [f"{paths[2]}/ninja", "1.1"]]
    monkeypatch.setenv("PATH", os.pathsep.join(paths[:2]))
    assert facts.ninjas() == [[f"{paths[0]}/ninja", ""]]


def test_names_of_ranks() -> None:
    """Neighbours are joined."""
    expected: dict[str, Iterable[int]] = {"rank 4": [4], "ranks 0-2, 5": [5, 0, 2, 1], "ranks 1, 3": (3, 1)}
    for text, ranks in expected.items():
        assert names(ranks) == text
    assert Finding("problem", "x", "y", (1, 2)).as_dict()["ranks"] == [1, 2]
