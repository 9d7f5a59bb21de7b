"""Plans as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lowrank_ds.plan.calculate import GIB, Plan
from lowrank_ds.plan.ledger import CATEGORIES
from lowrank_ds.plan.ours import Traffic
from lowrank_ds.plan.settings import Settings

_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
NOT_COUNTED = (
    "Counted: tensors, on the rank that needs most, in a step that renews no basis. Not counted: the CUDA context, "
    "buffers of NCCL, workspaces of kernels, fragmentation."
)


def describe(plan: Plan) -> str:
    """The configuration in one line."""
    s = plan.settings
    parts = [s.recipe, f"rank {s.subspace_rank}" if s.projects else "", s.engine, f"{s.nodes} x {s.gpus} GPUs"]
    parts += [
        f"shards of {s.shards}" if s.engine == "hsdp" else "",
        s.dtype,
        f"{s.micro_batch} x {s.seq} tokens a rank",
    ]
    parts += ["layer-wise" if s.layerwise else "", "activation checkpointing" if s.checkpointing else ""]
    parts += [f"{name}={value}" for name, value in s.options.items()]
    return ", ".join(part for part in parts if part)


def size(count: float) -> str:
    """Bytes in GiB, or MiB where they are few."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def text(plan: Plan, beside: Plan | None, fitting: dict[str, int], memory: int) -> str:
    """Everything about a configuration, AdamW's beside it.

    fitting: {"plan", "beside": largest micro-batch}. memory: bytes, of a GPU.
    """
    plans = [plan] + ([beside] if beside else [])
    names = [plan.settings.recipe] + (["AdamW"] if beside else [])
    parameters = sum(_numel(plan))
    lines = [describe(plan), f"{parameters / 1e9:.2f} G parameters, {len(plan.settings.shapes)} tensors", ""]
    rows = [["memory of a rank at the worst moment", *names]]
    rows += [[f"  {c}", *(size(p.peak.at[c]) for p in plans)] for c in CATEGORIES]
    rows += [["  total", *(size(p.total) for p in plans)]]
    rows += [["largest in the " + phase, *(size(p.phases[phase].total) for p in plans)] for phase in plan.phases]
    rows += [[f"largest micro-batch in {size(memory)}", *(str(fitting[k]) for k in ("plan", "beside")[: len(plans)])]]
    lines += [table(rows), ""]
    lines += [f"worst moment: {p.peak.name} ({n})" for p, n in zip(plans, names, strict=True)]
    lines += ["", "traffic of a step, number and bytes (of whole tensors)"]
    lines += [table([["", *_KINDS]] + [row for p, n in zip(plans, names, strict=True) for row in _traffic(p, n)]), ""]
    if plan.refresh is not None:
        need = size(plan.refresh.temporaries)
        lines += [f"A step that renews all bases needs {need} beside weights, gradients and state.", ""]
    return "\n".join([*lines, NOT_COUNTED])


def _numel(plan: Plan) -> list[int]:
    return [math.prod(shape) for shape in plan.settings.shapes.values()]


def _traffic(plan: Plan, name: str) -> list[list[str]]:
    rows = [[f"{name}: engine", *_cells(plan.engine)]]
    if plan.settings.algorithm is not None:
        rows += [[f"{name}: optimizer", *_cells(plan.ours)]]
    if plan.refresh is not None:
        rows += [[f"{name}: optimizer, new bases", *_cells(plan.refresh.traffic)]]
    return rows


def _cells(traffic: Traffic) -> list[str]:
    return [f"{traffic.calls[k]}  {size(traffic.sizes[k])}" if traffic.calls[k] else "-" for k in _KINDS]


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON can hold it; bytes."""
    s = plan.settings
    return {
        "configuration": {
            "recipe": s.recipe, "rank": s.subspace_rank, "engine": s.engine, "nodes": s.nodes, "gpus": s.gpus,
            "shards": s.shards, "seq": s.seq, "micro_batch": s.micro_batch, "layerwise": s.layerwise,
            "activation_checkpointing": s.checkpointing, "dtype": s.dtype, "options": dict(s.options),
        },
        "shard": plan.rank, "total": plan.total, "at_peak": plan.peak.at, "peak": plan.peak.name,
        "phases": {phase: {"total": m.total, "moment": m.name, "at": m.at} for phase, m in plan.phases.items()},
        "state": plan.state, "traffic": {"engine": _plain(plan.engine), "optimizer": _plain(plan.ours)},
        "refresh": None if plan.refresh is None else {
            "temporaries": plan.refresh.temporaries, "traffic": _plain(plan.refresh.traffic)},
    }  # fmt: skip


def _plain(traffic: Traffic) -> dict[str, dict[str, int]]:
    return {kind: {"calls": n, "bytes": traffic.sizes[kind]} for kind, n in sorted(traffic.calls.items()) if n}


def found(rows: Sequence[Any], smallest: Plan | None, settings: Settings, memory: int) -> str:
    """What `find.find` answered, as a table."""
    head = f"{settings.recipe}, {settings.micro_batch} x {settings.seq} tokens a rank, {settings.world} GPUs of which "
    head += f"{size(memory)} may be used"
    if not rows:
        least = "" if smallest is None else f" The least is {size(smallest.total)}: {describe(smallest)}."
        return f"{head}: nothing fits.{least} Take more GPUs, fewer tokens, or a smaller rank."
    lines = [["engine", "rank", "updates", "activations", "state", "memory", "traffic a step", "compute"]]
    for one in rows:
        s = one.plan.settings
        kinds = zip(("moments", "bases"), s.stored, strict=False)
        coded = [f"{dtype.replace('bit', '-bit')} {kind}" for kind, dtype in kinds if dtype.endswith("bit")]
        bits = ", ".join(coded) or s.stored[0]
        lines.append([
            s.engine, str(s.subspace_rank or "-"), "layer-wise" if s.layerwise else "step()",
            "checkpointed" if s.checkpointing else "kept", bits, size(one.plan.total), size(one.traffic),
            f"{one.compute:.2f}",
        ])  # fmt: skip
    return f"{head}; the cheapest first\n\n{table(lines)}\n\n{NOT_COUNTED}"
