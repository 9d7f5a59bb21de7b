"""Who is where: hosts, local ranks, devices, clocks, versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowrank_ds.doctor.findings import Facts, Finding, fewer, groups, problem, told, warning

SKEW = 1.0  # seconds that clocks may differ by: what decides whether a file is newer than another
FREE = 0.9  # of a GPU's memory


def hosts(ranks: Sequence[Facts]) -> dict[str, list[Facts]]:
    """The ranks of each host."""
    found: dict[str, list[Facts]] = {}
    for facts in ranks:
        found.setdefault(facts["machine"], []).append(facts)
    return found


def check_versions(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Packages, Python and our code, the same everywhere."""
    for name in dict.fromkeys(name for facts in ranks for name in facts["versions"]):
        found = groups(ranks, lambda facts, name=name: facts["versions"].get(name, "not found"))
        if len(found) == 1:
            continue
        if name == "source":
            where = told(groups(ranks, lambda facts: facts["code"]))
            what = f"the files of lowrank_ds differ, their checksum is {told(found)}"
            action = f"Install one commit everywhere; it was loaded from {where}"
        else:
            what, action = f"{name} is {told(found)}", "Install the same version everywhere"
        yield problem(what, action, fewer(found))
    found = groups(ranks, lambda facts: facts["commit"])
    if len(found) > 1:
        yield warning(f"the checkout is {told(found)}", "Check out the same commit everywhere", fewer(found))


def check_places(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Local ranks: 0 to n - 1 on each host; no two hosts of one name."""
    by_host = hosts(ranks)
    names_of = [members[0]["host"] for members in by_host.values()]
    for host in sorted({host for host in names_of if names_of.count(host) > 1}):
        yield problem(
            f"{names_of.count(host)} machines call themselves {host}",
            "Give every host its own name (hostname): local ranks and links are told by it",
            [facts["rank"] for facts in ranks if facts["host"] == host],
        )
    for members in by_host.values():
        who, host = [facts["rank"] for facts in members], members[0]["host"]
        local = sorted(facts["local_rank"] for facts in members)
        if local != list(range(len(members))):
            yield problem(
                f"the local ranks on {host} are {local}, not 0 to {len(members) - 1}",
                "Let the launcher set LOCAL_RANK, or set it to the number of the process on its host",
                who,
            )
        wrong = [f for f in members if f["local_world"] not in (None, len(members))]
        if wrong:
            yield problem(
                f"LOCAL_WORLD_SIZE is {wrong[0]['local_world']} but {host} has {len(members)} ranks",
                "Set it to the number of processes on the host: HSDP takes its copies from it",
                [facts["rank"] for facts in wrong],
            )


def check_devices(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """One device for each rank, of the same kind, with its memory free."""
    yield from missing_devices(ranks)
    gpus = [facts for facts in ranks if facts["device"]["kind"] == "cuda"]
    for what in ("name", "total"):
        found = groups(gpus, lambda facts, what=what: facts["device"][what])
        if len(found) > 1:
            text = told(found) if what == "name" else told({gib(size): who for size, who in found.items()})
            action = "The slowest sets the pace and the smallest the batch"
            yield warning(f"the device {'is' if what == 'name' else 'has'} {text}", action, fewer(found))
    for facts in gpus:
        device = facts["device"]
        if device["free"] < FREE * device["total"]:
            yield warning(
                f"{gib(device['free'])} of {gib(device['total'])} are free on {facts['host']}",
                "See nvidia-smi for who holds the rest",
                [facts["rank"]],
            )


def missing_devices(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Ranks that cannot have a device of their own: a process group would hang."""
    for facts in ranks:
        if facts["device"]["kind"] == "none":
            yield problem(
                f"local rank {facts['local_rank']} has no GPU: {facts['device']['visible']} can be seen",
                "Start fewer processes on that host, or let CUDA_VISIBLE_DEVICES (srun --gpus-per-node) show more",
                [facts["rank"]],
            )
    having = [facts for facts in ranks if facts["device"]["kind"] != "none"]
    kinds = groups(having, lambda facts: facts["device"]["kind"])
    if len(kinds) > 1:
        yield problem(f"the device is {told(kinds)}", "Use one kind; see nvidia-smi and the driver there", fewer(kinds))
    for members in hosts(ranks).values():
        for device, who in groups(members, lambda facts: facts["device"]["id"]).items():
            if device and len(who) > 1:
                action = "Give each its own: LOCAL_RANK must be the number of the process on its host"
                yield problem(f"all on the same device {device} of {members[0]['host']}", action, who)


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB"


def check_clocks(ranks: Sequence[Facts], clocks: dict[int, float]) -> Iterator[Finding]:
    """clocks: {rank: seconds since the epoch, all read at the same moment}."""
    for members in hosts(ranks).values():
        apart = [clocks[f["rank"]] - clocks[0] for f in members if f["rank"] in clocks and 0 in clocks]
        least = min(apart, key=abs, default=0.0)
        if abs(least) > SKEW:
            side = "ahead of" if least > 0 else "behind"
            yield warning(
                f"the clock of {members[0]['host']} is {abs(least):.1f} s {side} rank 0's",
                "Set it (chronyc, ntpdate): files on a shared disk look too new, and compilations start again",
                [facts["rank"] for facts in members],
            )


def check_addresses(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Names that mean another machine on each host."""
    if len(hosts(ranks)) == 1:
        return
    away = [facts for facts in ranks if facts["machine"] != ranks[0]["machine"]]
    loops = [facts for facts in away if _loops(facts, facts["environment"].get("MASTER_ADDR", ""))]
    if loops:
        yield problem(
            f"MASTER_ADDR={loops[0]['environment']['MASTER_ADDR']} is an address of the rank's own host there",
            "Set MASTER_ADDR to an address of rank 0's host that the others can reach; see /etc/hosts",
            [facts["rank"] for facts in loops],
        )
    own = [f for f in ranks if _loops(f, f["host"]) and not f["environment"].get("GLOO_SOCKET_IFNAME")]
    if own:
        make = problem if own[0]["device"]["kind"] == "cpu" else warning
        addresses = ", ".join(own[0]["addresses"][own[0]["host"]])
        yield make(
            f"the host's own name means {addresses} there, which gloo offers to other hosts",
            "Set GLOO_SOCKET_IFNAME to the interface that joins the hosts, or mend /etc/hosts",
            [facts["rank"] for facts in own],
        )
    elsewhere = [f["rank"] for f in ranks if f["addresses"].get(f["host"]) == []]
    if elsewhere:
        yield warning(
            "the host's own name has no address there",
            "Add it to /etc/hosts, or set GLOO_SOCKET_IFNAME",
            elsewhere,
        )


def _loops(facts: Facts, name: str) -> bool:
    """Whether a name means this host itself on the rank."""
    found = facts["addresses"].get(name, [])
    return bool(found) and all(address.startswith("127.") or address == "::1" for address in found)
