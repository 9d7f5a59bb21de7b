"""Cut a link, kill a host or a process in the middle of a run: who notices when, and how does the run end?

    python -m tests.multinode.faults                                   # all cases
    python -m tests.multinode.faults --cases cut elastic-host --engines fsdp2

Without elasticity every rank that is left must end with an error within --timeout, and the run that is started again
must end as the undisturbed one, bit for bit. An elastic job must go on by itself with the hosts that are left, to the
same weights within rounding.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import last_step
from tests.multinode import jobs
from tests.multinode.hosts import Hosts
from tests.pretraining import same

TIMEOUT = 12  # seconds: pretrain.py --timeout
BOUND = 20  # seconds beside it, on a busy machine, for an error to be raised and Python to end
STEPS, AT, SAVE_EVERY = 40, 13, 5
ELASTIC = {"NNODES": "1:2", "RDZV_CONF": "last_call_timeout=8"}
PLAIN = ("cut", "killed", "power")
CASES = (*PLAIN, "elastic-host", "elastic-power", "elastic-rank", "elastic-join")


@dataclass
class Outcome:
    """ended: {host: seconds from the fault to its last rank's end}. errors: what is wrong, nothing if all is well."""

    ended: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    note: str = ""


def arguments(data: Path, output: Path, engine: str, *more: object) -> list[str]:
    """Flags of a run that saves; the same for the first start and the next ones. torchrun.sh adds --resume auto."""
    schedule = ("--steps", STEPS, "--save-every", SAVE_EVERY, "--timeout", TIMEOUT)
    return jobs.arguments_of(data, output, engine, *schedule, *more)


def fault(hosts: Hosts, job: jobs.Launch, case: str) -> float:
    """Make the fault on the job's second host; the moment of it."""
    victim = job.names[1]
    ranks = job.ranks(victim)
    assert ranks, f"{victim} has no rank:\n{job.printed()[-3000:]}"
    began = time.monotonic()
    if case in ("cut", "power", "elastic-power"):
        hosts.cut(victim)
    if case in ("killed", "power", "elastic-host", "elastic-power"):
        hosts.kill(victim)
    if case == "elastic-rank":
        os.kill(ranks[0], signal.SIGKILL)
    return began


def until(job: jobs.Launch, step: int, timeout: float = 400) -> None:
    """Wait until the job has done a step."""
    deadline = time.monotonic() + timeout
    while last_step(job.output) < step:
        assert job.alive() and time.monotonic() < deadline, f"no step {step}:\n{job.printed()[-5000:]}"
        time.sleep(0.01)


def end_of(running: Callable[[str], list], names: list[str], since: float, timeout: float) -> dict[str, float]:
    """{host: seconds from `since` until nothing was `running` there}; inf after `timeout`."""
    found: dict[str, float] = {}
    while len(found) < len(names) and time.monotonic() - since < timeout:
        for name in names:
            if name not in found and not running(name):
                found[name] = time.monotonic() - since
        time.sleep(0.02)
    return {name: found.get(name, float("inf")) for name in names}


def plain(hosts: Hosts, names: list[str], case: str, way: str, engine: str, data: Path, whole: Path) -> Outcome:
    """One case without elasticity, on two hosts, one process each. whole: output of the undisturbed run."""
    output, began, outcome = whole.parent / f"{case}-{way}-{engine}", time.monotonic(), Outcome()
    given = arguments(data, output, engine, "--resume", "auto")
    job = jobs.train(hosts, names, way, 1, given, output)
    until(job, AT)
    since = fault(hosts, job, case)
    left = names if case == "cut" else names[:1]
    outcome.ended = end_of(job.ranks, left, since, TIMEOUT + 60)
    late = {name: s for name, s in outcome.ended.items() if s > TIMEOUT + BOUND}
    if late:
        outcome.errors.append(f"ranks ended after {late} s, not within {TIMEOUT} + {BOUND} s")
    for log in job.logs[: len(left)]:
        if "RankError" not in log.read_text():
            outcome.errors.append(f"no RankError in {log}: {log.read_text()[-2000:]}")
    stuck = end_of(lambda name: hosts.running(name, str(output)), left, time.monotonic(), BOUND)
    launchers = [name for name, seconds in stuck.items() if seconds == float("inf")]
    outcome.note = f"launcher left behind on {', '.join(launchers)}" if launchers else ""
    if not any(process.poll() for process in job.processes):
        outcome.errors.append(f"no launcher ended with an error: {[process.poll() for process in job.processes]}")
    for name in launchers:
        for pid in hosts.running(name, str(output)):
            os.kill(pid, signal.SIGKILL)
    if case in ("cut", "power"):
        hosts.heal(names[1])
    again = jobs.train(hosts, names, way, 1, given, output)
    again.wait()
    resumed = jobs.resumed_at(again.printed())
    if not resumed or not AT - 2 * SAVE_EVERY < resumed[-1] < STEPS:
        outcome.errors.append(f"went on from steps {resumed}")
    outcome.errors += same(whole, output)
    outcome.seconds = time.monotonic() - began
    return outcome


def elastic(hosts: Hosts, names: list[str], case: str, engine: str, data: Path, whole: Path) -> Outcome:
    """One elastic case: the job must end by itself."""
    output, began, outcome = whole.parent / f"{case}-{engine}", time.monotonic(), Outcome()
    job = jobs.train(hosts, names, "torchrun", 1, arguments(data, output, engine), output, **ELASTIC)
    until(job, AT)
    since = fault(hosts, job, case)
    survivors = names if case == "elastic-rank" else names[:1]
    job.processes = job.processes[: len(survivors)]
    job.wait()
    outcome.ended = {"finished": time.monotonic() - since}
    world, resumed = jobs.processes_of(output), jobs.resumed_at(job.printed())
    if world != len(survivors) or not resumed or resumed[-1] < AT - SAVE_EVERY:
        outcome.errors.append(f"went on from {resumed} with {world} processes, not with {len(survivors)}")
    compare(outcome, whole, output, f"from step {resumed[-1:]} with {world} processes")
    outcome.seconds = time.monotonic() - began
    if case == "elastic-power":
        hosts.heal(names[1])
    return outcome


def compare(outcome: Outcome, whole: Path, output: Path, note: str) -> None:
    """Add to the outcome how far the weights are from the undisturbed run's."""
    largest = jobs.difference(whole, output)
    outcome.note = f"{note}, difference {largest:.1e}"
    if not largest <= jobs.LIMIT:
        outcome.errors.append(f"weights differ by {largest}")


def join(hosts: Hosts, names: list[str], engine: str, data: Path, whole: Path) -> Outcome:
    """A host that comes to a job of one host: its rank saves and ends, and both go on from there."""
    output, began, outcome = whole.parent / f"join-{engine}", time.monotonic(), Outcome()
    given = dict(ELASTIC, RDZV_ENDPOINT=f"{names[0]}:29400", JOB_ID="join")
    job = jobs.train(hosts, names[:1], "torchrun", 1, arguments(data, output, engine), output, **given)
    until(job, AT)
    (rank,) = job.ranks(names[0])
    os.kill(rank, signal.SIGSTOP)  # forty steps are over before another Python has started
    came = jobs.train(hosts, names[1:], "torchrun", 1, arguments(data, output, engine), output, **given)
    while "SIGTERM" not in job.printed():
        assert job.alive() and came.alive(), came.printed()[-3000:]
        time.sleep(0.05)
    os.kill(rank, signal.SIGCONT)
    outcome.ended = {"finished": job.wait()}
    came.wait()
    world, resumed = jobs.processes_of(output), jobs.resumed_at(job.printed())
    if world != 2 or not resumed or resumed[0] % SAVE_EVERY == 0 or "signal 15: saved" not in job.printed():
        outcome.errors.append(f"went on from {resumed} with {world} processes, not from a save between others with 2")
    compare(outcome, whole, output, f"from step {resumed} with {world} processes")
    outcome.seconds = time.monotonic() - began
    return outcome


def undisturbed(hosts: Hosts, names: list[str], engine: str, data: Path) -> Path:
    """Output of the run that nothing happens to."""
    output = data.parent / f"whole-{engine}"
    jobs.train(hosts, names, "torchrun", 1, arguments(data, output, engine), output).wait()
    return output


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Faults on two simulated hosts.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--engines", nargs="+", choices=jobs.ENGINES, default=jobs.ENGINES)
    parser.add_argument("--way", choices=jobs.WAYS, default="torchrun", help="of the cases that are not elastic")
    args = parser.parse_args()
    folder, failed = Path(tempfile.mkdtemp(prefix="multinode-faults-")), []
    data = jobs.data_for(folder)
    try:
        hosts = Hosts(2)
    except OSError as error:
        sys.exit(str(error))
    print(f"--timeout {TIMEOUT}, {STEPS} steps, a save every {SAVE_EVERY}, the fault after step {AT}\n")
    with hosts:
        for engine in args.engines:
            whole = undisturbed(hosts, hosts.names, engine, data)
            for case in args.cases:
                if case in PLAIN:
                    outcome = plain(hosts, hosts.names, case, args.way, engine, data, whole)
                elif case == "elastic-join":
                    outcome = join(hosts, hosts.names, engine, data, whole)
                else:
                    outcome = elastic(hosts, hosts.names, case, engine, data, whole)
                ended = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in outcome.ended.items())
                print(f"{engine} {case}: {ended}; {outcome.seconds:.0f} s in all. {outcome.note}", flush=True)
                for error in outcome.errors:
                    print(f"    FAILED: {error}", flush=True)
                failed += outcome.errors
    if failed:
        sys.exit(f"{len(failed)} failures (kept in {folder})")
    print("every rank ended in time, and every run ended as the undisturbed one")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
