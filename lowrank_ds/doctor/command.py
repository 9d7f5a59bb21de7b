"""`lowrank-ds doctor`: who waits for whom.

Every rank says where it is ("here"), then its facts; rank 0 waits for both, compares, and says what comes next
("plan"); all look at the shared folder, make a process group and time its links ("links"); rank 0 reports and tells the
status ("verdict"). A rank that waits for longer than the timeout says for whom, and fails.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from lowrank_ds.doctor import facts, links, numbers, places, report, settings, shared, wire
from lowrank_ds.doctor.findings import Facts, Finding, names, problem
from lowrank_ds.launching import LaunchError, Place, find_place, slurm

GRACE = 5.0  # seconds that rank 0 keeps the store for ranks that read the verdict


def add_parser(commands: argparse._SubParsersAction) -> None:
    """`doctor` among the commands of `lowrank-ds`."""
    parser = commands.add_parser(
        "doctor", help="check every rank's versions, device, settings and links before training",
        description="Start it as training would be started: torchrun ... -m lowrank_ds doctor, mpirun ... lowrank-ds "
        "doctor, srun lowrank-ds doctor, or alone. Rank 0 reports; the exit status, the same on all ranks, is 1 where "
        "there is a problem (warnings are none).",
    )  # fmt: skip
    add = parser.add_argument
    add("--quick", action="store_true", help="do not time the links")
    add("--timeout", type=float, default=60.0, metavar="SECONDS", help="to wait for a rank (default 60)")
    add("--shared", type=pathlib.Path, metavar="DIR", help="check that all ranks see the same files in DIR")
    add("--size", type=int, default=16, metavar="MIB", help="of the messages timed for bandwidth (default 16)")
    add("--json", type=pathlib.Path, metavar="FILE", help="rank 0 also writes everything it found to FILE")


def main(given: argparse.Namespace) -> int:
    """Examine; 1 if there is a problem."""
    if given.size < 1 or given.timeout <= 0:
        print("lowrank-ds doctor: --size must be at least 1 and --timeout above 0", file=sys.stderr)
        return 1
    try:
        place = find_place()
        channel = wire.Channel(place, given.timeout)
        channel.tell("here", facts.whereabouts(place))
        return Examination(given, channel).run() if place.rank == 0 else follow(given, channel)
    except (LaunchError, wire.WireError) as error:
        print(f"lowrank-ds doctor: {error}", file=sys.stderr, flush=True)
        return 1


def _own_facts(place: Place) -> Facts:
    try:
        return facts.collect(place)
    except Exception as error:  # a broken driver or installation is what the doctor is there to report
        return facts.whereabouts(place) | {"failed": f"{type(error).__name__}: {error}"}


def follow(given: argparse.Namespace, channel: wire.Channel) -> int:
    """What every rank but 0 does. Returns the exit status that rank 0 tells."""
    channel.tell("facts", _own_facts(channel.place))
    plan = channel.hear("plan", 0, 3 * given.timeout)
    if plan["go"]:
        channel.tell("links", take_part(given, channel, plan))
    status = channel.hear("verdict", 0, 4 * given.timeout)
    channel.tell("bye", True)
    return status


def take_part(given: argparse.Namespace, channel: wire.Channel, plan: dict[str, Any]) -> dict[str, Any]:
    """The second half of an examination, on every rank; collective where `plan` says so.

    plan: {"shared": name of rank 0's file or None, "machines": of each rank; None: make no process group}.

    Returns:
        {"clock", "shared": what went wrong, "failed": why there is no process group, "links": `wire.measure`'s}.
    """
    found: dict[str, Any] = {"clock": time.time()}  # first: all ranks were waiting for the plan
    if plan["shared"]:
        found["shared"] = shared.look(given.shared, plan["shared"], channel.place.rank)
    if plan["machines"]:
        device = facts.device_of(channel.place)
        try:
            found["backend"] = wire.join(channel, device, given.timeout)
            if not given.quick:
                found["links"] = wire.measure(plan["machines"], device, given.size << 20)
            wire.leave()
        except wire.WireError as error:
            found["failed"] = str(error)
    return found


class Examination:
    """What rank 0 does: listen, compare, report."""

    def __init__(self, given: argparse.Namespace, channel: wire.Channel) -> None:
        self.given, self.channel, self.world = given, channel, channel.place.world
        self.findings: list[Finding] = []
        self.ranks: list[Facts] = []  # by rank, once all have told them
        self.links: dict[str, Any] | None = None

    def run(self) -> int:
        """Returns the exit status of all ranks."""
        own = _own_facts(self.channel.place)
        self.channel.tell("facts", own)
        here = self._listen("here", "did not come")
        plan = {"go": False}
        if len(here) == self.world:
            told = self._listen("facts", "came, but told no facts (a driver that hangs?)")
            self.ranks = self._complete(told)
            self.findings += compare(self.ranks, [here[rank] for rank in sorted(here)])
            plan = self._plan() if len(self.ranks) == self.world else plan
        self.channel.tell("plan", plan)
        if plan["go"]:
            self._second_half(plan)
        return self._finish()

    def _listen(self, topic: str, otherwise: str) -> dict[int, Any]:
        """What all ranks say, and a problem for those who say nothing in time."""
        told = self.channel.hear_all(topic, self.given.timeout)
        silent = sorted(set(range(self.world)) - set(told))
        if silent:
            what = f"of {self.world} ranks, {names(silent)} {otherwise} within {self.given.timeout:g} s"
            here = self.channel.hear_all("here", 0) if topic != "here" else told
            self.findings.append(problem(what + _who_came(here, silent), _LOOK, silent))
        return told

    def _complete(self, told: dict[int, Facts]) -> list[Facts]:
        """The facts of the ranks that could tell them; problems for the others."""
        for rank, found in told.items():
            if "failed" in found:
                what = f"its facts on {found['host']} cannot be collected: {found['failed']}"
                self.findings.append(problem(what, "Mend that installation; `lowrank-ds info` there says more", [rank]))
        return [told[rank] for rank in sorted(told) if "failed" not in told[rank]]

    def _plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = {"go": True, "shared": None, "machines": None}
        if self.given.shared is not None:
            try:
                plan["shared"] = shared.offer(self.given.shared)
            except OSError as error:
                what = f"--shared {self.given.shared}: {error.strerror}"
                self.findings.append(problem(what, "Name a folder that rank 0 can write into", [0]))
        hopeless = [*places.missing_devices(self.ranks), *settings.missing_interfaces(self.ranks)]
        if self.world > 1 and not hopeless:
            plan["machines"] = [found["machine"] for found in self.ranks]
        return plan

    def _second_half(self, plan: dict[str, Any]) -> None:
        self.channel.tell("links", take_part(self.given, self.channel, plan))
        told = self._listen("links", "hung or ended in the check of links")
        self.findings += places.check_clocks(self.ranks, {rank: found["clock"] for rank, found in told.items()})
        if plan["shared"]:
            self._clear_shared(plan["shared"], told)
        failed = {rank: found["failed"] for rank, found in told.items() if "failed" in found}
        for text in dict.fromkeys(failed.values()):
            self.findings.append(problem(text, _NO_GROUP, [rank for rank in failed if failed[rank] == text]))
        timed = {rank: found["links"] for rank, found in told.items() if "links" in found}
        if len(timed) == self.world and not failed:
            pairs = links.pairs_of(timed, self.given.size << 20)
            self.links = {**timed[0], "backend": told[0]["backend"], "pairs": pairs}
            self.findings += links.check(self.ranks, pairs)

    def _clear_shared(self, name: str, told: dict[int, dict]) -> None:
        wrong = {rank: found.get("shared", "") for rank, found in told.items()}
        unseen = shared.clear(self.given.shared, name, [rank for rank, text in wrong.items() if not text])
        wrong |= {rank: "a file that it wrote there is not seen by rank 0" for rank in unseen}
        self.findings += shared.check(self.ranks, wrong, self.given.shared)

    def _finish(self) -> int:
        """Report, tell all ranks the status, and keep the store until they know."""
        status = int(any(finding.level == "problem" for finding in self.findings))
        print(report.text(self.ranks, self.findings, self.links), flush=True)
        if self.given.json is not None:
            found = {"status": status, "findings": [finding.as_dict() for finding in self.findings]}
            found |= {"ranks": self.ranks, "links": self.links}
            try:
                self.given.json.parent.mkdir(parents=True, exist_ok=True)
                self.given.json.write_text(json.dumps(found, indent=1) + "\n")
            except OSError as error:
                print(f"lowrank-ds doctor: --json {self.given.json}: {error.strerror}", file=sys.stderr, flush=True)
                status = 1
        self.channel.tell("bye", True)
        self.channel.tell("verdict", status)
        self.channel.hear_all("bye", GRACE, self.channel.hear_all("facts", 0))
        return status


def compare(ranks: Sequence[Facts], here: Sequence[Facts]) -> list[Finding]:
    """All that the ranks' facts say. here: whereabouts of all that came, also of those that told no facts."""
    checks = (
        places.check_versions, places.check_devices, places.check_addresses, settings.check_variables,
        settings.missing_interfaces, settings.check_threads, settings.check_traps, numbers.check,
    )  # fmt: skip
    found = [finding for check in checks for finding in check(ranks)] if ranks else []
    return [*places.check_places(here), *found]


def _who_came(here: dict[int, Facts], silent: Sequence[int]) -> str:
    """Where the ranks are that came, and which hosts none came from, where the launcher lists hosts."""
    found: dict[str, list[int]] = {}
    for rank, facts_of in here.items():
        found.setdefault(facts_of["host"], []).append(rank)
    text = "; there came " + ", ".join(f"{names(ranks)} from {host}" for host, ranks in found.items())
    listed = os.environ.get("SLURM_STEP_NODELIST") if "SLURM_PROCID" in os.environ else None
    try:
        hosts = slurm.expand_hosts(listed) if listed else []
    except ValueError:
        return text
    empty = [host for host in hosts if host.split(".")[0] not in {name.split(".")[0] for name in found}]
    return text + (f"; none from {', '.join(empty)}" if empty else "")


_LOOK = (
    "Look at its own output and the launcher's: was it started, with this MASTER_ADDR and MASTER_PORT, and can its "
    "host reach them? If it is only slow, raise --timeout"
)
_NO_GROUP = (
    "Look for a firewall between the hosts, and set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the interface that "
    "joins them; NCCL_DEBUG=INFO or TORCH_CPP_LOG_LEVEL=INFO says more"
)
