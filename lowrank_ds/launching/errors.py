"""What is said when a launcher's variables cannot be used."""

from __future__ import annotations

from collections.abc import Mapping


class LaunchError(RuntimeError):
    """What the launcher says of this process is incomplete or contradicts itself; the text names the variable."""


def number(environ: Mapping[str, str], name: str) -> int:
    """A variable that must be a whole number."""
    text = environ.get(name)
    if text is None or text == "":
        raise LaunchError(
            f"{name} is not set, but this is one of several processes. Start them with torchrun, deepspeed, srun or "
            "mpirun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name} is {text!r}: it must be a whole number") from None


def count(environ: Mapping[str, str], name: str, default: int = 1) -> int:
    """A variable that may be unset or empty."""
    return number(environ, name) if environ.get(name) else default
