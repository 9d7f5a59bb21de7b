"""Draws and a step of an optimizer that every rank repeats: what must come out the same.

Whole numbers must agree to the bit. Numbers that went through a logarithm or a GEMM may differ in their last bits
between kinds of processors: ranks that share a matrix broadcast such results, but replicas that each draw their own
(gaussian bases) drift by as much.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowrank_ds import algorithms, linalg
from lowrank_ds.doctor.findings import Facts, Finding, fewer, groups, problem, warning
from lowrank_ds.noise import Noise
from lowrank_ds.params import param_groups

ROWS, COLUMNS, RANK, STEPS = 24, 16, 4, 2
ROUNDING = 1e-5  # of the largest entry: more than processors differ by, less than another method would
KEY = (0, "lowrank_ds.doctor", 1)
WHAT = {
    "noise": "seeded bits (lowrank_ds.noise)",
    "generator": "torch.randn with a seeded CPU generator",
    "gaussian": "a seeded gaussian basis",
    "step": f"{STEPS} steps of FiraAdamW on a {ROWS} x {COLUMNS} matrix",
}


def draw(device: torch.device) -> dict[str, str]:
    """{name: of WHAT, text}: a checksum of whole numbers, base64 of fp32 numbers otherwise."""
    words = Noise([(KEY, slice(0, 64))], slice(0, 64), device).words(slice(0, 64)).cpu()
    bits = hashlib.sha256(bytes(words.view(torch.uint8).flatten().tolist())).hexdigest()[:16]
    normal = torch.randn(256, generator=torch.Generator().manual_seed(0))
    return {
        "noise": bits,
        "generator": _pack(normal),
        "gaussian": _pack(linalg.gaussian(KEY, 64, RANK, device=device)),
        "step": _pack(_train(device)),
    }


def _train(device: torch.device) -> Tensor:
    """The weight (ROWS, COLUMNS) after some steps with gradients made of seeded bits, which are the same everywhere."""
    model = torch.nn.Linear(COLUMNS, ROWS, bias=False, device=device)
    with torch.no_grad():
        model.weight.copy_(_matrix("weight", device))
    optimizer = algorithms.FiraAdamW(param_groups(model, rank=RANK), lr=0.01, update_proj_gap=1)
    for step in range(STEPS):
        model.weight.grad = _matrix(step, device)
        optimizer.step()
    return model.weight.detach()


def _matrix(name: object, device: torch.device) -> Tensor:
    """Entries (ROWS, COLUMNS) in [-1, 1), out of seeded bits."""
    words = Noise([((*KEY, name), slice(0, ROWS))], slice(0, COLUMNS), device).words(slice(0, ROWS))
    return words.double().mul_(2.0**-31).float()


def _pack(x: Tensor) -> str:
    return base64.b64encode(bytes(x.float().contiguous().cpu().view(torch.uint8).flatten().tolist())).decode()


def _unpack(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


def check(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """What did not come out the same."""
    for name, what in WHAT.items():
        found = groups(ranks, lambda facts, name=name: facts["numbers"][name])
        if len(found) == 1:
            continue
        ranks_apart, apart = fewer(found), 1.0
        if name != "noise":
            apart = max(difference(next(iter(found)), other) for other in list(found)[1:])
        if apart <= ROUNDING:
            yield warning(
                f"{what}: other last bits than on most ranks, by up to {apart:.1e} of the largest number",
                "Processors of different kinds do that; replicas that draw their own bases drift by as much",
                ranks_apart,
            )
        else:
            yield problem(
                f"{what}: other numbers than on most ranks" + ("" if name == "noise" else f" (by {apart:.1e})"),
                "Ranks would train apart: use the same code and versions on all, and look for faulty hardware",
                ranks_apart,
            )


def difference(first: str, second: str) -> float:
    """The largest difference of two packed arrays, as a part of the largest magnitude; not finite counts as 1."""
    a, b = _unpack(first), _unpack(second)
    apart = ((a - b).abs().max() / a.abs().max()).item() if a.shape == b.shape else 1.0
    return apart if apart == apart else 1.0
