"""What is said when ranks lose each other: a rank that ended or hangs, or ranks that no longer do the same."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence

# What gloo, the store and NCCL say; torch gives no class of its own to gloo's errors.
_LOST = re.compile(
    r"Connection (closed|reset)|Broken pipe|Socket (closed|Timeout)|caused pair closure|Timed out waiting|"
    r"[Ww]ait timeout|[Oo]peration timed out|NCCL|ncclSystemError|ncclRemoteError|Connection was likely closed",
)
_LATE = re.compile(r"[Tt]imed? ?out|Timeout")
_NAMED = 3  # matrices that a message names


class RankError(RuntimeError):
    """Ranks lost each other during a step, or no longer agree: this process must end, and the job start again.

    Raised on every rank that notices, from the error of the backend (`__cause__`) where there is one. The step is half
    done: weights and state in memory are of no use, those of the last checkpoint are.
    """


def is_lost(error: BaseException) -> bool:
    """Whether `error`, which a collective may have raised, says that another rank is gone or late."""
    return isinstance(error, RankError) or (isinstance(error, RuntimeError) and bool(_LOST.search(str(error))))


@contextlib.contextmanager
def watch(what: str) -> Iterator[None]:
    """Around a training loop: collectives of the engine (torch's, DeepSpeed's) that lose a rank raise RankError too.

    Args:
        what: is going on, such as "training".

    Raises:
        RankError: from what the engine raised. Other errors pass.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankError) or not is_lost(error):
            raise
        raise lost(f"{what}: a collective of the engine", None, None, error) from error


def some(names: Iterable[str]) -> str:
    """The first few of some names, each once, and how many more there are."""
    found = list(dict.fromkeys(name for name in names if name))
    more = len(found) - _NAMED
    return ", ".join(found[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def lost(what: str, ranks: Sequence[int] | None, rank: int | None, error: BaseException) -> RankError:
    """The error to raise when an exchange failed.

    Args:
        what: the exchange, such as "all-gather for lm_head.weight". ranks: who takes part, global numbers; None where
            they cannot be told. rank: this process. error: what the backend said.
    """
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    late = bool(_LATE.search(said))
    cause = (
        "A rank hangs or is stopped, took another path through the code, or needs longer than the process group's "
        "timeout"
        if late
        else "Most likely one of them has ended: killed, out of memory, or an error of its own"
    )
    over = "" if not ranks else f" over rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    longer = (
        " If every rank was alive and only slow, raise the timeout (init_process_group(timeout=...), "
        "launch/pretrain.py --timeout SECONDS)."
        if late
        else ""
    )
    return RankError(
        f"{what}{over} failed{'' if rank is None else f' on rank {rank}'}. {cause}; this error only follows from that. "
        "Look for the first error in each rank's own output and in the launcher's (torchrun: 'Root Cause', deepspeed: "
        f"'exits with return code'), end all ranks and start again from the last checkpoint.{longer} [{said}]"
    )


_BROKEN = (
    "an earlier step() of this optimizer failed midway on this rank, with some weights written and others not, while "
    "other ranks waited for it. It cannot go on: end this process, and start again from the last checkpoint."
)


def broken(name: str, error: BaseException) -> RankError:
    """What a step says that follows one which failed midway with `error`."""
    return RankError(f"{name}: {_BROKEN} [{type(error).__name__}: {error}]")
