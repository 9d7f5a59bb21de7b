"""Who a process is, from each launcher's environment; and what is refused."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest

from lowrank_ds.launching import LaunchError, find_place, mpi, slurm
from tests import launchers

RANKS = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_NTASKS": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[08-10]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}  # fmt: skip


def test_given_ranks_are_taken_as_they_are() -> None:
    """torchrun's, deepspeed's (LOCAL_SIZE) and exported variables; nothing is changed."""
    environ = {**RANKS, "LOCAL_SIZE": "2"}
    place = find_place(environ)
    assert (place.rank, place.world, place.local_rank, place.local_world) == (1, 4, 1, 2)
    assert (place.address, place.port) == ("a", 29500)
    assert environ == {**RANKS, "LOCAL_SIZE": "2"}
    assert find_place(dict(RANKS)).local_world is None


def test_a_process_started_by_hand_is_alone() -> None:
    """It becomes a world of one with a free port, for torch and DeepSpeed too; also in an srun step of one task."""
    for environ in ({}, {"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, {"WORLD_SIZE": "1"}):
        place = find_place(environ)
        assert (place.rank, place.world, place.local_rank, place.local_world) == (0, 1, 0, 1)
        assert environ["RANK"] == "0" and environ["WORLD_SIZE"] == "1" and int(environ["MASTER_PORT"]) > 0
        assert environ["MASTER_ADDR"] == "127.0.0.1" and environ["LOCAL_RANK"] == "0"


def test_srun() -> None:
    """SLURM's variables are mapped; an address and port that are given stay."""
    environ = dict(STEP)
    place = find_place(environ)
    assert (place.rank, place.world, place.local_rank, place.local_world) == (3, 5, 1, 2)
    assert place.address == environ["MASTER_ADDR"] == "gpu08"
    assert 10000 <= place.port < 30000
    last = find_place({**STEP, "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"})
    assert (last.local_world, last.address, last.port) == (1, "gpu08", place.port)
    assert find_place({**STEP, "SLURM_STEP_ID": "3"}).port != place.port
    given = find_place({**STEP, "MASTER_ADDR": "b", "MASTER_PORT": "7"})
    assert (given.address, given.port) == ("b", 7)


def test_torchrun_inside_srun_keeps_its_ranks() -> None:
    """srun -N 2 torchrun --nproc-per-node 2: SLURM tells of two tasks, torchrun of four ranks."""
    assert find_place({**STEP, "SLURM_NTASKS": "2", **RANKS}).world == 4


def test_one_process_in_an_interactive_step() -> None:
    """salloc's own shell has a step of a reserved number (0xfffffffa), and SLURM_NTASKS of the allocation."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_ID": "4294967290"}
    assert find_place({**STEP, **alone}).world == 1


def test_host_lists() -> None:
    """SLURM's notation, with padding, several brackets and plain names."""
    assert slurm.expand_hosts("a[01-03,10],b7,r[1-2]n[8-9]-x") == [
        "a01", "a02", "a03", "a10", "b7", "r1n8-x", "r1n9-x", "r2n8-x", "r2n9-x",
    ]  # fmt: skip
    assert slurm.expand_hosts("login") == ["login"]
    assert slurm.expand_hosts("n[098-101]")[-2:] == ["n100", "n101"]
    for wrong in ("", "a[1-", "a[0x1f]", "a,,b", "a[1-2]]"):
        with pytest.raises(ValueError, match="is not a"):
            slurm.expand_hosts(wrong)


def test_scontrol_reads_what_we_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another notation is passed to scontrol; without it the message says what to set."""
    environ = {**STEP, "SLURM_STEP_NODELIST": "bgl[000x133]"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="set MASTER_ADDR"):
        find_place(dict(environ))
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$3" = "bgl[000x133]" ] && echo bgl000 && echo bgl001\n')
    (tmp_path / "scontrol").chmod(0o755)
    assert find_place(dict(environ)).address == "bgl000"


REFUSED = {
    "no world": ({"RANK": "0"}, "WORLD_SIZE is not set"),
    "no rank": ({"WORLD_SIZE": "2"}, "RANK is not set"),
    "rank beyond world": ({**RANKS, "RANK": "4"}, "RANK is 4 but WORLD_SIZE is 4"),
    "not a number": ({**RANKS, "RANK": "one"}, "RANK is 'one'"),
    "no local rank": ({k: v for k, v in RANKS.items() if k != "LOCAL_RANK"}, "LOCAL_RANK is not set"),
    "local rank beyond host": ({**RANKS, "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1 but LOCAL_WORLD_SIZE"),
    "host beyond world": ({**RANKS, "LOCAL_WORLD_SIZE": "8"}, "is 8 but WORLD_SIZE is 4"),
    "no address": ({k: v for k, v in RANKS.items() if k != "MASTER_ADDR"}, "MASTER_ADDR is not set"),
    "no port": ({k: v for k, v in RANKS.items() if k != "MASTER_PORT"}, "MASTER_PORT is not set"),
    "port": ({**RANKS, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
    "alone in a step": ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE is 1 but SLURM_NTASKS is 5"),
    "world in a step": ({**STEP, "WORLD_SIZE": "1"}, "WORLD_SIZE is 1 but SLURM_NTASKS is 5"),
    "alone in mpirun": ({"OMPI_COMM_WORLD_SIZE": "2", "RANK": "0", "WORLD_SIZE": "1"}, "would train alone"),
    "alone in mpiexec": ({"PMI_SIZE": "2", "RANK": "0", "WORLD_SIZE": "1"}, "would train alone"),
    "a batch script": ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "was not started by srun"),
    "no local id": ({k: v for k, v in STEP.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
    "a shell of salloc": ({**STEP, "SLURM_STEP_ID": "4294967290"}, "was not started by srun"),
    "a host beyond the list": ({**STEP, "SLURM_NODEID": "3"}, "SLURM_NODEID is 3 but SLURM_STEP_TASKS_PER_NODE=2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused(name: str) -> None:
    """With the variable's name; the environment stays as it was."""
    environ, message = REFUSED[name]
    kept = dict(environ)
    with pytest.raises(LaunchError, match=message):
        find_place(kept)
    assert kept == environ


def test_whose_job_it_is() -> None:
    """mpirun inside an allocation of SLURM counts as mpirun; srun --mpi=pmi2, which sets PMI_SIZE too, as srun."""
    assert mpi.started({"OMPI_COMM_WORLD_SIZE": "4", **STEP})
    assert mpi.started({"PMI_SIZE": "4"}) and mpi.started({"PMI_SIZE": "4", "MPI_LOCALRANKID": "0", **STEP})
    assert not mpi.started({"PMI_SIZE": "5", **STEP}) and slurm.started({"PMI_SIZE": "5", **STEP})
    assert not mpi.started({"OMPI_COMM_WORLD_SIZE": "1"}) and not mpi.started({})
    assert not slurm.started({k: v for k, v in STEP.items() if k != "SLURM_STEP_ID"})


def test_local_ranks_of_mpirun() -> None:
    """The launcher's where it tells them, counted otherwise; two hosts of one name are noticed."""
    assert mpi.local_ranks([("a", None), ("b", None), ("a", None)]) == [0, 0, 1]
    assert mpi.local_ranks([("a", 1), ("b", 0), ("a", 0)]) == [1, 0, 0]
    with pytest.raises(LaunchError, match="ranks 0 and 1 are both local rank 0 of a"):
        mpi.local_ranks([("a", 0), ("a", 0)])


def test_addresses_offered_to_other_hosts() -> None:
    """The loopback only where all are here; then the named interface, the way to the others, and the host's name."""
    assert mpi.candidates([], {}) == ["127.0.0.1"]
    found = mpi.candidates(["no-such-host.invalid"], {"GLOO_SOCKET_IFNAME": "no-such-interface"})
    assert socket.gethostname() in found and not any(address.startswith("127.") for address in found)


FAILING = """
import os, time
from lowrank_ds.launching import find_place
place = find_place()
print("PLACE", place.rank, place.world, place.local_rank, place.local_world, place.address, place.source, flush=True)
time.sleep(1)  # or mpirun may end the job before it has passed on what was printed
if place.rank == 1:
    raise RuntimeError("rank 1 fails")
time.sleep(150)
"""


def test_mpirun_finds_ranks_and_a_failing_rank_ends_the_job() -> None:
    """Two ranks with nothing in the environment but mpirun's own; and no wait in MPI_Finalize for the other rank."""
    start = time.monotonic()
    done = launchers.run([*launchers.MPIRUN, 2, sys.executable, "-c", FAILING], launchers.clean_environment())
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("PLACE"))
    assert lines == [f"PLACE {rank} 2 {rank} 2 127.0.0.1 MPI, by mpi4py" for rank in (0, 1)], done.stderr[-2000:]
    assert done.returncode != 0 and "rank 1 fails" in done.stderr
    assert time.monotonic() - start < 100
