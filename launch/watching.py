"""What a run records of its optimizer beside the loss: --diagnostics-every and --scaling-every."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import lowrank_ds
from launch.optimizers import end_names
from launch.progress import DIAGNOSTICS, SCALING
from lowrank_ds import scaling
from lowrank_ds.params import canonical


def watch(args, trainer, first: int) -> list[tuple[int, Callable[[int], None]]]:
    """What --diagnostics-every and --scaling-every ask for: (steps between, what writes the numbers of a step).

    first: steps done before this process began.
    """
    output, optimizer = Path(args.output), trainer.optimizer
    flags = [name for name in ("diagnostics_every", "scaling_every") if getattr(args, name)]
    if not flags:
        return []
    try:
        if flags == ["scaling_every"] and isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            monitor = scaling.AdamFactors(optimizer, inner_matrices(trainer.module))
        else:
            if args.scaling_every and first:
                raise ValueError(
                    "the full-rank moments that scaling factors are compared with are in no checkpoint, and this run "
                    f"goes on from step {first}. Leave --scaling-every out, or start again"
                )
            monitor = lowrank_ds.Diagnostics(optimizer, compare_scaling=bool(args.scaling_every))
    except (TypeError, ValueError) as error:
        names = " and ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in flags)
        raise SystemExit(f"{names}: {error}") from None
    watchers = [(args.diagnostics_every, lambda step: monitor.jsonl(output / DIAGNOSTICS, step))]
    watchers += [(args.scaling_every, lambda step: write_scaling(output / SCALING, step, monitor))]
    return [(every, write) for every, write in watchers if every]


def write_scaling(path: Path, step: int, monitor: lowrank_ds.Diagnostics | scaling.AdamFactors) -> None:
    """Append the scaling factors since the last time; all processes must call it, the first one writes."""
    found = monitor.scaling_factors()
    if not dist.is_initialized() or dist.get_rank() == 0:
        scaling.append(path, step, found)


def inner_matrices(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, weight) of the matrices that low-rank optimizers project: all but embeddings and output head."""
    ends = end_names(model)
    return [(canonical(name), p) for name, p in model.named_parameters() if canonical(name) not in ends]
