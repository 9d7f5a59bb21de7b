"""Environment variables that differ between ranks, and known traps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lowrank_ds.doctor.findings import Facts, Finding, fewer, groups, problem, told, warning
from lowrank_ds.doctor.places import hosts

_FREE = re.compile(r"CUDA_VISIBLE_DEVICES|NCCL_DEBUG.*|NVIDIA_VISIBLE_DEVICES|.*_FILE|.*_DIR")  # may differ
_BY_HOST = re.compile(r"NCCL_SOCKET_IFNAME|NCCL_IB_.*|GLOO_SOCKET_IFNAME")  # interfaces may have other names elsewhere
_HARD = re.compile(  # ranks that differ in these hang, or compute something else
    r"DS_ACCELERATOR|NCCL_.*|ACCELERATE_.*|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32.*|MASTER_ADDR|MASTER_PORT|WORLD_SIZE"
)
_WHY = {
    "PYTHONHASHSEED": "Sets of names would be iterated in another order: set the same on all, or none",
    "OMP_NUM_THREADS": "The rank with fewer threads sets the pace",
}
_YES = ("1", "true", "yes", "on", "y", "t")


def check_variables(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Variables that are not the same everywhere."""
    for name in sorted({name for facts in ranks for name in facts["environment"]}):
        found = groups(ranks, lambda facts, name=name: facts["environment"].get(name, "unset"))
        if len(found) == 1 or _FREE.fullmatch(name):
            continue
        action = _WHY.get(name, "Set the same on all ranks (mpirun -x, srun --export, .deepspeed_env)")
        if _BY_HOST.fullmatch(name):
            make, action = warning, "Right if the hosts' interfaces have different names"
        else:
            make = problem if _HARD.fullmatch(name) else warning
        yield make(f"{name} is {told(found)}", action, fewer(found))


def missing_interfaces(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Interfaces that gloo is told to use and that are not there: a process group could not be made."""
    for facts in ranks:
        wanted = [name for name in facts["environment"].get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        absent = [name for name in wanted if name not in facts["interfaces"]]
        if absent:
            there = f"{facts['host']} has {', '.join(facts['interfaces'])}"
            yield problem(
                f"GLOO_SOCKET_IFNAME names {', '.join(absent)}, but {there}",
                "Name the interface of that host which joins the hosts (ip -br address shows them)",
                [facts["rank"]],
            )


def check_threads(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """More threads than cores, of a host or of those that a rank is bound to."""
    for members in hosts(ranks).values():
        threads, who = sum(facts["threads"] for facts in members), [facts["rank"] for facts in members]
        cores = len({core for facts in members for core in facts["cores"]})
        bound = [facts for facts in members if facts["threads"] > len(facts["cores"])]
        if threads > cores and len(members) > 1:
            yield warning(
                f"{len(members)} ranks with {threads} threads in all share {cores} core(s) of {members[0]['host']}",
                f"Set OMP_NUM_THREADS={max(1, cores // len(members))}; if mpirun binds them to a few, --bind-to none",
                who,
            )
        elif bound:
            yield warning(
                f"{bound[0]['threads']} threads are bound to {len(bound[0]['cores'])} core(s)",
                "Do not bind (mpirun --bind-to none, srun --cpu-bind=none), or bind to a core for each thread",
                [facts["rank"] for facts in bound],
            )


def check_traps(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Settings that make later runs hang, or train something else, without a word."""
    yield from _check_locks(ranks)
    several = [facts for facts in ranks if len({version for _, version in facts["ninjas"]}) > 1]
    if several:
        found = ", ".join(f"{path} ({version})" for path, version in several[0]["ninjas"])
        yield warning(
            f"ninjas of different versions are on PATH: {found}; the first is used",
            "Each compiles anew what another has compiled: keep one of them first on PATH, in every shell",
            [facts["rank"] for facts in several],
        )
    on = [f for f in ranks if _is_on(f, "ACCELERATE_USE_CPU") and f["versions"].get("deepspeed") != "not installed"]
    if on:
        make = problem if any(_is_on(facts, "ACCELERATE_USE_DEEPSPEED") for facts in on) else warning
        yield make(
            "ACCELERATE_USE_CPU is set: HF's Trainer and accelerate leave DeepSpeed out without a word",
            "Unset it; TrainingArguments(use_cpu=True) and DS_ACCELERATOR=cpu keep DeepSpeed",
            [facts["rank"] for facts in on],
        )
    hidden = [f for f in ranks if f["environment"].get("DS_ACCELERATOR") == "cpu" and f["device"]["kind"] == "cuda"]
    if hidden:
        who = [facts["rank"] for facts in hidden]
        yield warning("DS_ACCELERATOR is cpu though there is a GPU", "Unset it, or DeepSpeed computes on the CPU", who)


def _check_locks(ranks: Sequence[Facts]) -> Iterator[Finding]:
    for path, who in _locked(ranks, stale=True).items():
        age = next(lock["age"] for f in ranks for lock in f["locks"] if lock["path"] == path)
        yield problem(
            f"{path} is {age} s old and no process of the host has it open: what was compiling there was killed, and "
            "whoever loads that extension (DeepSpeed's init_distributed on CPUs) waits for ever",
            f"rm {path} (unless another host that shares the folder compiles just now)",
            who,
        )
    for path, who in _locked(ranks, stale=False).items():
        action = "Wait for it, or end that process and rm the lock"
        yield warning(f"an extension is being compiled ({path})", action, who)


def _locked(ranks: Sequence[Facts], stale: bool) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for facts in ranks:
        for lock in facts["locks"]:
            if lock["open"] != stale:
                found.setdefault(lock["path"], []).append(facts["rank"])
    return found


def _is_on(facts: Facts, name: str) -> bool:
    return facts["environment"].get(name, "").lower() in _YES
