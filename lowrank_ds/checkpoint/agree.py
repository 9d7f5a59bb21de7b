"""All ranks together: an error on one of them is raised on all, so that nobody is left waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or is not complete, or does not fit. The message says what to do."""


def place() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) where there is no process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def together(what: str, action: Callable[[], T]) -> list[T]:
    """[action() of every rank]; raised on all ranks where it fails on one. One small all-gather.

    Args:
        what: names the action in the message, such as "saving to DIR".

    Raises:
        CheckpointError: the action raised an exception on some rank.
    """
    value, error = None, None
    try:
        value = action()
    except Exception as caught:
        error = caught
    _, world = place()
    mine = (value, None if error is None else _said(error))
    answers: list = [mine] * world
    if world > 1:
        dist.all_gather_object(answers, mine)
    failed = [(rank, said) for rank, (_, said) in enumerate(answers) if said is not None]
    if failed:
        where = "" if world == 1 else f" on rank {failed[0][0]}" + (f" and {len(failed) - 1} more" * (len(failed) > 1))
        raise CheckpointError(f"{what} failed{where}: {failed[0][1]}") from error
    return [value for value, _ in answers]


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
