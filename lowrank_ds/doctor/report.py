"""The doctor's report as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowrank_ds.doctor import links
from lowrank_ds.doctor.findings import Facts, Finding, groups, told
from lowrank_ds.doctor.places import gib, hosts


def text(ranks: Sequence[Facts], findings: Sequence[Finding], measured: dict[str, Any] | None) -> str:
    """The whole report. ranks: facts of those that told any. measured: `links.describe`'s, None: not measured."""
    lines = []
    if ranks:
        lines += [_heading(ranks), "", *_table(ranks), ""]
        lines += [f"versions: {_versions(ranks)}"]
        lines += [f"commit: {told(groups(ranks, lambda facts: facts['commit']))}"]
        lines += [f"threads: {told(groups(ranks, _threads))}", f"environment: {_environment(ranks)}"]
    if measured:
        lines += ["links:", *(f"  {line}" for line in links.describe(ranks, measured))]
    problems, warnings = (sum(finding.level == level for finding in findings) for level in ("problem", "warning"))
    lines += ["", *(str(finding) for finding in sorted(findings, key=lambda f: f.level)), *([""] if findings else [])]
    lines.append(f"{problems} problem(s), {warnings} warning(s)")
    return "\n".join(lines).strip()


def _heading(ranks: Sequence[Facts]) -> str:
    kinds = "CPUs only" if all(facts["device"]["kind"] == "cpu" for facts in ranks) else "GPUs"
    source = told(groups(ranks, lambda facts: facts["source"]))
    return f"lowrank-ds doctor: {len(ranks)} rank(s) on {len(hosts(ranks))} host(s), {kinds}; told by {source}"


def _table(ranks: Sequence[Facts]) -> list[str]:
    rows = [("rank", "host", "local", "pid", "device", "memory free", "of")]
    for facts in ranks:
        device = facts["device"]
        where = (facts["rank"], facts["host"], facts["local_rank"], facts["pid"], device["name"])
        rows.append(tuple(map(str, where)) + (gib(device["free"]), gib(device["total"])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _versions(ranks: Sequence[Facts]) -> str:
    names = dict.fromkeys(name for facts in ranks for name in facts["versions"])
    parts = []
    for name in names:
        found = groups(ranks, lambda facts, name=name: facts["versions"].get(name, "not found"))
        parts.append(f"{name} {next(iter(found)) if len(found) == 1 else '(' + told(found) + ')'}")
    return ", ".join(parts)


def _threads(facts: Facts) -> str:
    return f"{facts['threads']} on {len(facts['cores'])} core(s) ({facts['cpu']})"


def _environment(ranks: Sequence[Facts]) -> str:
    """The variables that are the same everywhere; findings tell of the others."""
    names = sorted({name for facts in ranks for name in facts["environment"]})
    found = {name: groups(ranks, lambda facts, name=name: facts["environment"].get(name, "unset")) for name in names}
    same = [f"{name}={next(iter(values))}" for name, values in found.items() if len(values) == 1]
    return " ".join(same) or "none of the variables looked at is set"
