"""Adafactor on whole matrices, block by block: what the blocks add up to, and how little memory they take."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lowrank_ds
from lowrank_ds import dense, linalg
from lowrank_ds.bench.tracking import Tracker
from lowrank_ds.job import Job
from lowrank_ds.layout import Flat
from lowrank_ds.projection import Left, Right
from lowrank_ds.recipe import Recipe
from lowrank_ds.requests import finish_alone
from lowrank_ds.rules import Adafactor

SHAPE = (1024, 300)  # several blocks: they hold 2^17 entries
PLAIN = {"rank": None}


def job_of(grad: Tensor) -> Job:
    """A whole matrix with this gradient."""
    return Job(Flat.whole(tuple(grad.shape)), Recipe(Adafactor()), grad.view(-1), grad.new_zeros(grad.numel()), {},
               (0, "w"), 1, 1, 1.0, 0.0)  # fmt: skip


def updates(grad: Tensor) -> list[tuple[dense.Update, Tensor]]:
    """(update, the same formed at once in fp64) of each kind."""
    job, generator = job_of(grad), torch.Generator().manual_seed(1)
    rows, columns, each = (torch.rand(s, generator=generator) + 0.1 for s in (SHAPE[0], SHAPE[1], grad.numel()))
    g = grad.double()
    return [
        (dense.Factored(job, rows, rows, columns), rows.double()[:, None] * g * columns.double()),
        (dense.Full(job, each), g / each.double().view(SHAPE).sqrt()),
        (dense.Kept(job, each), each.double().view(SHAPE)),
    ]


def gradient() -> Tensor:
    """Entries of very different size, a row and a column of zeros."""
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, SHAPE[1])
    grad[5], grad[:, 7] = 0, 0
    return grad


@pytest.mark.parametrize("kind", range(3), ids=["factored", "full", "kept"])
def test_blocks_are_those_of_the_whole(kind: int) -> None:
    """Values, sum of squares, coordinates from either side, and what is written."""
    update, whole = updates(gradient())[kind]
    job = update.job
    chunks = list(dense.chunks(job))
    assert len(chunks) == 3
    for chunk in chunks:
        torch.testing.assert_close(update.of(chunk).double(), whole[chunk.rows], rtol=1e-6, atol=0)
    assert update.square_sum().item() == pytest.approx(whole.square().sum().item(), rel=1e-6)
    for cls in (Left, Right):
        side = cls(job.layout, 8)
        basis = side.random((0, "w", 0), torch.device("cpu"))
        found = finish_alone(update.down(side, basis))
        g = whole if cls is Right else whole.T
        torch.testing.assert_close(found.double(), g @ basis["projector"].double(), rtol=1e-4, atol=1e-4)
        job.weight.fill_(0.5)
        size, direction = torch.tensor(0.25), torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
        job.lr, job.weight_decay = 0.1, 0.5
        dense.write(job, update, size, torch.tensor(2.0), dense.LowRank(side, basis, direction))
        low = direction.double() @ basis["projector"].double().T
        expected = 0.5 * (1 - 0.1 * 2.0 * 0.5) - 0.1 * (0.25 * whole + (low if cls is Right else low.T))
        torch.testing.assert_close(job.weight.view(SHAPE).double(), expected, rtol=1e-5, atol=1e-5)


def test_sums_of_squares_and_the_largest() -> None:
    """Rows, columns and a bound of the peak in one pass; NaN anywhere makes it NaN."""
    grad = gradient()
    found = dense.square_sums(job_of(grad))
    torch.testing.assert_close(found.rows.double(), grad.double().square().sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.columns.double(), grad.double().square().sum(0), rtol=1e-6, atol=0)
    assert grad.abs().max() <= found.bound == found.rows.max().sqrt()
    grad[700, 3] = math.nan
    assert dense.square_sums(job_of(grad)).bound.isnan()
    grad[700, 3] = -math.inf
    assert dense.square_sums(job_of(grad)).bound == math.inf


@pytest.mark.parametrize("kind", ["all", "rows", "columns", "bf16 rows"])
def test_the_bound_is_usable_just_where_the_largest_magnitude_is(kind: str) -> None:
    """On both sides of the limit, with many large entries whose squares add up beyond it, NaN, infinity, nothing."""
    limit = linalg.LARGEST_GRADIENT
    for large in (0.0, 1e-30, 1.0, 1e12, 1e13, 1e14, 0.9999 * limit, 1.0001 * limit, 3e19, 1e38, math.inf, math.nan):
        for filled in (1, 900):
            x = torch.full((30, 30), 1e-3)
            x.view(-1)[-filled:] = -large
            x = x.bfloat16() if kind == "bf16 rows" else x
            sums = None if kind == "all" else x.float().square().sum(0 if kind == "columns" else 1)
            found, peak = linalg.bound(x.view(-1), sums), linalg.peak(x)
            assert bool(linalg.is_usable(found)) == bool(linalg.is_usable(peak)), (large, filled)
            tiny = peak < 1e-18  # its square is 0
            assert found.isnan() if peak.isnan() else tiny or found >= peak * (1 - 1e-6)
    assert linalg.bound(torch.zeros(0), None if kind == "all" else torch.zeros(0)) == 0


def cells() -> list:
    """(class, options) of every path through `dense.py`."""
    flora = {"rank": 32, "lr": 1e-2}
    return [
        (lowrank_ds.Flora, flora),
        (lowrank_ds.Flora, flora | {"proj_type": "left", "scale_parameter": False}),
        (lowrank_ds.Flora, flora | {"kappa": 1}),
        (lowrank_ds.Flora, flora | {"factorize_second_moment": False}),
        (lowrank_ds.Flora, flora | PLAIN),
        (lowrank_ds.Flora, flora | PLAIN | {"factorize_second_moment": False}),
        (lowrank_ds.GaLoreAdafactor, {"lr": 1e-2, **PLAIN}),
        (lowrank_ds.GaLoreAdafactor, {"lr": 1e-2, "beta1": 0.9, **PLAIN}),
        (lowrank_ds.AdaLomo, {"lr": 1e-2}),
        (lowrank_ds.GaLoreAdafactor, {"lr": 1e-2, "rank": 32, "beta1": 0.9}),
    ]


def steps(
    cls: type, options: dict, grads: list[Tensor], dtype: torch.dtype = torch.float32
) -> tuple[nn.Parameter, dict]:
    """The weight and its state after steps on these gradients."""
    p = nn.Parameter((0.1 * torch.randn(grads[0].shape, generator=torch.Generator().manual_seed(3))).to(dtype))
    optimizer = cls([("w", p)], **options)
    for grad in grads:
        p.grad = grad.to(dtype)
        optimizer.step()
    return p, optimizer.state[p]


@pytest.mark.parametrize(("cls", "options"), cells(), ids=str)
def test_a_step_makes_no_second_matrix(cls: type, options: dict) -> None:
    """Temporaries of a step are a part of a matrix, whatever the rule."""
    p = nn.Parameter(torch.ones(2048, 1024) * 0.1)
    optimizer = cls([("w", p)], **options)
    for t in range(2):
        p.grad = torch.ones_like(p)
        if t == 0 and cls is lowrank_ds.GaLoreAdafactor:
            optimizer.step()  # its first basis factorises the whole gradient
            continue
        with Tracker() as tracker:
            optimizer.step()
        tracker.name("weights", [p, p.grad])
        tracker.name_model(nn.ParameterList([p]), optimizer)
        found = tracker.peak().own["other"] / p.nbytes
        print(f"{found:.3f}")
        assert 0 < found <= 0.5  # coordinates and the like are (2048 + 1024) x 32 numbers, 0.05 of it


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize(("cls", "options"), cells(), ids=str)
def test_unusable_gradients_change_nothing(cls: type, options: dict, bad: float) -> None:
    """One entry in the second block: weights and moments stay bit for bit, and the next step goes on."""
    good, spoiled = gradient(), gradient()
    spoiled[600, 30] = bad
    if options.get("kappa") == 1:  # a new basis at each step moves the momentum whatever the gradient is
        options = options | {"kappa": 100}
    before, old = steps(cls, options, [good, good])
    after, new = steps(cls, options, [good, good, spoiled])
    assert torch.equal(before, after)
    assert new["skipped"] == 1
    for name in old.keys() - {"step", "moment_step", "skipped"}:
        assert torch.equal(old[name], new[name]), name
    assert steps(cls, options, [good, good, spoiled, good])[0].isfinite().all()


def test_bf16_gradients_and_weights() -> None:
    """The same update as of the fp32 numbers, rounded."""
    grads = [gradient().bfloat16().float() for _ in range(3)]
    for cls, options in cells():
        start, _ = steps(cls, options, [torch.zeros(SHAPE)], torch.bfloat16)
        moved, _ = steps(cls, options, grads[:1], torch.bfloat16)
        p = nn.Parameter(start.detach().float())
        optimizer = cls([("w", p)], **options)
        p.grad = grads[0]
        optimizer.step()
        ulp = 2.0**-8 * p.detach().abs().clamp_min(1e-3) * 2
        assert ((moved.float() - p).abs() <= ulp).all(), (cls, options)
