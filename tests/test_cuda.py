"""On a GPU: the same numbers as on the CPU, and no host synchronisation in an ordinary step (law 4)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_ds
from lowrank_ds import AdaLomo, ApolloAdamW, FiraAdamW, Flora, GaLoreAdafactor, GaLoreAdamW, Lomo
from lowrank_ds.algorithms import ALGORITHMS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

GAP = 4
CASES = [
    (GaLoreAdamW, {"update_proj_gap": GAP}),
    (GaLoreAdamW, {"update_proj_gap": GAP, "proj_type": "full"}),
    (GaLoreAdamW, {"update_proj_gap": GAP, "subspace": "power", "on_refresh": "rotate"}),
    (GaLoreAdamW, {"update_proj_gap": GAP, "subspace": "randomized"}),
    (GaLoreAdafactor, {"update_proj_gap": GAP, "beta1": 0.9}),
    (FiraAdamW, {"update_proj_gap": GAP, "weight_decay": 0.1}),
    (FiraAdamW, {"update_proj_gap": GAP, "residual": "paper", "scaling": "matrix"}),
    (ApolloAdamW, {"update_proj_gap": GAP}),
    (Flora, {"kappa": GAP}),
    (Lomo, {"rank": None}),
    (AdaLomo, {"rank": None}),
]


def parameters(device: str, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Tall, wide and square matrices and a vector, the same values on every device."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"tall": (96, 40), "wide": (40, 96), "square": (64, 64), "bias": (64,)}
    return {n: nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for n, s in shapes.items()}


def set_gradients(params: dict[str, nn.Parameter], step: int) -> None:
    """Well conditioned gradients with a decaying spectrum."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params.values():
        g = torch.randn(p.shape, generator=generator)
        if g.dim() == 2:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            g = u @ torch.diag(torch.logspace(0, -1.5, min(g.shape))) @ vh
        p.grad = g.to(p.device, p.dtype)


def train(cls: type, options: dict, device: str, steps: int = 10) -> dict[str, torch.Tensor]:
    """Weights after a few steps on a device."""
    params = parameters(device)
    optimizer = cls(params.items(), **{"lr": 1e-2, "rank": 8, **options})
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return {n: p.detach().cpu() for n, p in params.items()}


@pytest.mark.parametrize(("cls", "options"), CASES, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_cuda_equals_cpu(cls: type, options: dict) -> None:
    """Three bases, fp32: CUDA and CPU agree to a few rounding errors (cuSOLVER and LAPACK differ in the last bits)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    here, there = train(cls, options, "cpu"), train(cls, options, "cuda")
    for name in here:
        assert (here[name] - there[name]).abs().max() <= 5e-5, name


@pytest.mark.parametrize("cls", ALGORITHMS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ordinary_step_never_waits_for_the_device(cls: type, dtype: torch.dtype) -> None:
    """Between refreshes no operation synchronises: CUDA's sync debug mode turns any into an error."""
    params = parameters("cuda", dtype)
    rank = {lowrank_ds.ApolloMini: 1, lowrank_ds.Lomo: None, lowrank_ds.AdaLomo: None}.get(cls, 8)
    optimizer = cls(params.items(), lr=1e-3, rank=rank, weight_decay=0.1)
    for step in range(3):
        set_gradients(params, step)
        if step:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_noise_is_the_same_on_both_devices() -> None:
    """A random basis drawn on the GPU equals the CPU's, so a run can move between them."""
    cpu = lowrank_ds.linalg.gaussian((0, "w", 1), 500, 8)
    gpu = lowrank_ds.linalg.gaussian((0, "w", 1), 500, 8, None, torch.device("cuda")).cpu()
    assert (cpu - gpu).abs().max() < 1e-5
