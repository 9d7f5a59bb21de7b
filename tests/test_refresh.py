"""New bases: what block power captures, what it costs, when it starts cold, and that rounding has no say in it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import lowrank_ds
from lowrank_ds import GaLoreAdamW, linalg
from lowrank_ds.bench.tracking import Tracker
from lowrank_ds.layout import Flat
from lowrank_ds.projection import choose
from lowrank_ds.requests import finish_alone
from lowrank_ds.subspace import Sharded, Subspace, factorize, is_cold

SHAPES = [(192, 640), (640, 192), (300, 300)]
SPECTRA = {
    "slow": lambda i: i**-0.7,
    "steep": lambda i: 0.8**i,
    "tail": lambda i: torch.where(i <= 20, 1 - i / 40, 0.02),
    "few": lambda i: torch.where(i <= 10, 1 / i, 0.0),
}


def matrix(shape: tuple[int, int], spectrum: str, seed: int) -> Tensor:
    """fp32, with these singular values and random singular vectors."""
    generator, q = torch.Generator().manual_seed(seed), min(shape)
    left, right = (torch.linalg.qr(torch.randn(d, q, generator=generator, dtype=torch.float64))[0] for d in shape)
    values = SPECTRA[spectrum](torch.arange(1, q + 1, dtype=torch.float64))
    return (left * values @ right.T).float()


def basis_of(grad: Tensor, how: Subspace, previous: Tensor | None = None) -> tuple[Tensor, list[float]]:
    """(the basis (d, r) of the compressed side, what it holds) of one refresh on one process."""
    layout = Flat.whole(tuple(grad.shape))
    side = choose("std", layout, how.rank)
    ((which, name),) = side.bases.items()
    axes = {which: side.basis_axes()[name]}
    source = Sharded(layout, grad.contiguous().view(-1))
    bases, holds = finish_alone(factorize(how, source, axes, (0, "w", 1), previous, 0))
    return bases[which], [] if holds is None else holds.tolist()


def short(grad: Tensor) -> Tensor:
    """G or its transpose in fp64: the compressed side first."""
    return (grad if grad.shape[0] < grad.shape[1] else grad.T).double()


def captured(basis: Tensor, grad: Tensor) -> float:
    """The energy in the subspace over the best possible."""
    best = torch.linalg.svdvals(short(grad))[: basis.shape[1]].square().sum()
    return ((basis.double().T @ short(grad)).square().sum() / best).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_what_a_refresh_captures(shape: tuple[int, int], spectrum: str) -> None:
    """Cold, warm after a change of 15 %, and warm after everything changed, of which a warm start knows nothing."""
    rank, before = 24, matrix(shape, spectrum, 0)
    other = matrix(shape, spectrum, 1)
    exact, _ = basis_of(before, Subspace("svd", rank))
    assert captured(exact, before) == pytest.approx(1, abs=1e-6)
    power = Subspace("power", rank)
    cases = {"cold": (other, None, 0.99), "warm": (before + 0.15 * other, exact, 0.995), "lost": (other, exact, 0.95)}
    for name, (grad, previous, least) in cases.items():
        basis, (share, full) = basis_of(grad, power, previous)
        energy = captured(basis, grad)
        print(f"{name}: {energy:.5f}")
        assert least <= energy <= 1 + 1e-6, name
        best = torch.linalg.svdvals(short(grad))
        live = min(rank, int((best > 1e-6 * best[0]).sum()))
        gram = basis.double().T @ basis.double()
        assert round(full * rank) == int(gram.diagonal().round().sum()) <= live
        assert full * rank >= live or spectrum != "few"
        assert (gram - torch.diag(gram.diagonal().round())).abs().max() < 1e-6
        truth = energy * (best[:rank].square().sum() / best.square().sum()).item()
        assert truth - 0.1 < share < truth + 1e-3, name
    assert captured(basis_of(other, Subspace("randomized", rank))[0], other) == captured(
        basis_of(other, power)[0], other
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_direction_that_emerges_is_found_at_once(shape: tuple[int, int]) -> None:
    """It lies outside the previous basis and its image: only the random columns can bring it in."""
    grad, generator = matrix(shape, "slow", 0), torch.Generator().manual_seed(2)
    previous, _ = basis_of(grad, Subspace("svd", 24))
    known = torch.linalg.qr(short(grad).T @ previous.double())[0]
    new, other = (torch.randn(len(b), generator=generator, dtype=torch.float64) for b in (previous, known))
    new, other = (v - b.double() @ (b.double().T @ v) for v, b in ((new, previous), (other, known)))
    turned = short(grad) + 0.5 * torch.outer(new / new.norm(), other / other.norm())
    turned = (turned if shape[0] < shape[1] else turned.T).float()
    assert captured(basis_of(turned, Subspace("power", 24), previous)[0], turned) > 0.99
    assert captured(basis_of(turned, Subspace("power", 24, oversample=0), previous)[0], turned) < 0.93


def test_products_with_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two large products for a warm refresh, four for a cold one; no tall QR, no SVD."""
    counted = []
    for name in ("times", "transpose_times"):
        plain = getattr(Sharded, name)
        monkeypatch.setattr(Sharded, name, lambda self, x, plain=plain: counted.append(x.shape) or plain(self, x))
    for name in ("qr", "svd"):
        monkeypatch.setattr(torch.linalg, name, lambda *_, name=name: pytest.fail(name))
    grad = torch.randn(40, 90, generator=torch.Generator().manual_seed(0))
    basis, _ = basis_of(grad, Subspace("power", 8))
    assert len(counted) == 4
    basis_of(grad, Subspace("power", 8), basis)
    assert counted[4:] == [(40, 24), (90, 24)]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("start", ["cold", "warm", "lost"])
def test_rounding_has_no_say(spectrum: str, start: str) -> None:
    """Sums in another order (what another sharding does) give the same basis, also of a gradient of low rank.

    Directions that are compared are those above 1e-3 of the largest: closer to rounding, an fp32 G has none itself. (Of
    20 equal ones in the tail it has none either.)
    """
    rank, before, other = 24, matrix((192, 640), spectrum, 0), matrix((192, 640), spectrum, 1)
    previous = None if start == "cold" else basis_of(before, Subspace("svd", rank))[0]
    grad = before + 0.15 * other if start == "warm" else other
    order = torch.randperm(640, generator=torch.Generator().manual_seed(3))
    power = Subspace("power", rank, oversample=16)
    one, _ = basis_of(grad, power, previous)
    two, _ = basis_of(grad[:, order], power, previous)
    large = (one.double().T @ grad.double()).norm(dim=1)
    large = large > (0.1 if spectrum == "tail" else 1e-3) * large.max()
    assert large.sum() >= 10
    assert (one - two)[:, large].abs().max() < 2e-5


@pytest.mark.parametrize("shape", [(20, 64), (64, 20), (40, 50), (50, 40), (30, 30), (1, 9)], ids=str)
def test_exact_singular_vectors(shape: tuple[int, int]) -> None:
    """By the shorter side's Gram matrix or by LAPACK: the same vectors on both sides, null directions zero."""
    rank = min(shape)
    values = torch.logspace(0, -8, rank, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64))[0] for d in shape)
    x = left * values @ right.T
    live = values > 1e-6
    for source, tolerance in ((x.float(), 1e-6),):
        found = linalg.leading_singular_vectors(source, rank)
        for ours, exact in ((found["left"], left), (found["right"], right)):
            assert ours.dtype == torch.float32 and ours.is_contiguous()
            cosine = (ours.double() * exact).sum(0)
            signs = linalg.canonical_signs(exact)
            clear = values > 1e-3
            assert (cosine * signs - 1)[clear].abs().max() < tolerance
            gram = ours.double().T @ ours.double()
            dead = gram.diagonal() == 0
            assert (dead[~live]).all() or shape == (30, 30) or not dead.any()
            assert not dead[values > 2e-6].any()
            assert (gram - torch.diag((~dead).double())).abs().max() < 1e-5
        only = linalg.leading_singular_vectors(source, rank, ("right",))
        assert only.keys() == {"right"} and torch.equal(only["right"], found["right"])


# --- memory ----------------------------------------------------------------------------------------------------------
def transients(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> list[float]:
    """Largest bytes beside weights, gradients and state of a cold and a warm refresh step, over 4 m n."""
    weight, found = torch.nn.Parameter(torch.zeros(shape, dtype=dtype)), []
    optimizer = GaLoreAdamW([{"params": [weight], "rank": rank}], update_proj_gap=1, subspace="power")
    for seed in range(2):
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        with Tracker() as tracker:
            tracker.name("gradients", [weight, weight.grad])
            tracker.name("state", optimizer.state.get(weight, {}).values())
            optimizer.step()
            tracker.name("state", optimizer.state[weight].values())
        found.append(tracker.peak().own["other"] / (4 * weight.numel()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1024, 4096), (2048, 2048)], ids=str)
def test_memory_of_a_refresh(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Two matrices at most; without the step's own fp32 copy of a bf16 gradient, a refresh takes less than one."""
    for rank in (128, 256):
        found = transients(shape, rank, dtype)
        print(rank, [round(x, 2) for x in found])
        assert max(found) <= (1.0 if dtype == torch.float32 else 1.5)


def test_a_narrow_gradient_is_never_copied_whole() -> None:
    grad = torch.randn(1024, 4096).bfloat16()
    with Tracker() as tracker:
        tracker.name("gradients", [grad])
        basis_of(grad, Subspace("power", 64))
    assert tracker.peak().own["other"] <= 0.6 * 4 * grad.numel()


# --- cold restarts ---------------------------------------------------------------------------------------------------
def test_when_a_refresh_starts_cold() -> None:
    how = Subspace("power", 8, cold_every=4)
    fine = (0.7, 0.75, 1.0)
    assert [is_cold(how, n, fine) for n in range(9)] == [n % 4 == 0 for n in range(9)]
    assert is_cold(how, 1, (0.7, 0.75, 7 / 8))  # the basis was not full
    assert is_cold(how, 1, (0.67, 0.75, 1.0))  # it lost a tenth of what the cold one had
    assert not is_cold(how, 1, (0.9, 0.75, 1.0))
    assert is_cold(how, 1, (0.0, 0.0, 0.0))  # nothing known


def trained(monkeypatch: pytest.MonkeyPatch, stop: int | None = None, **options: object) -> tuple:
    """(weight, state, refreshes that started cold) after 20 steps on gradients that turn away at step 6."""
    weight, asked = torch.nn.Parameter(torch.zeros(48, 80)), []
    monkeypatch.setattr("lowrank_ds.optimizer.is_cold", lambda *now: asked.append(is_cold(*now)) or asked[-1])

    def build() -> torch.optim.Optimizer:
        group = {"params": [weight], "rank": 6, "update_proj_gap": 2, "subspace": "power", **options}
        return GaLoreAdamW([group], lr=1e-2)

    optimizer = build()
    for step in range(20):
        if step == stop:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = build()
            optimizer.load_state_dict(saved)
        weight.grad = matrix((48, 80), "steep" if step < 6 else "slow", step // 6)
        optimizer.step()
    cold = [number for number, yes in enumerate(asked) if yes]
    return weight.detach(), {k: v.clone() for k, v in optimizer.state[weight].items()}, cold


def test_cold_restarts_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Periodic, and when the captured share fell: known from the state, so a resumed run does the same, bit for bit."""
    assert trained(monkeypatch)[2] == [0, 4]  # refresh 3 meets other directions and a flatter spectrum, and tells 4
    assert trained(monkeypatch, cold_every=3)[2] == [0, 3, 6, 9]  # 3 was cold itself
    straight = trained(monkeypatch)
    for stop in (5, 7, 8, 9):
        resumed = trained(monkeypatch, stop)
        assert straight[2] == resumed[2]
        assert torch.equal(straight[0], resumed[0])
        assert all(torch.equal(straight[1][name], resumed[1][name]) for name in straight[1])


def test_a_gradient_of_low_rank_restarts_cold_until_the_basis_is_full() -> None:
    """A masked basis has nothing to start from beside its few directions."""
    weight, generator = torch.nn.Parameter(torch.zeros(40, 60)), torch.Generator().manual_seed(1)
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 30, "update_proj_gap": 1, "subspace": "power"}])
    live = []
    for true_rank in (3, 3, 40, 40):
        weight.grad = torch.randn(40, true_rank, generator=generator) @ torch.randn(true_rank, 60, generator=generator)
        optimizer.step()
        live.append(int(optimizer.state[weight]["projector"].square().sum(0).round().sum()))
    assert live == [3, 3, 30, 30]


def test_the_state_is_there_from_the_start() -> None:
    weight = torch.nn.Parameter(torch.zeros(40, 60))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 4, "subspace": "power"}])
    optimizer.init_state()
    assert optimizer.state[weight]["captured"].tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="cold_every must be a whole number of refreshes >= 1; got 0"):
        lowrank_ds.FiraAdamW([{"params": [weight], "rank": 4, "cold_every": 0}])


def test_what_is_taken_when_nothing_is_said() -> None:
    def method(cls: type, **options: object) -> str:
        return cls.recipe({**cls.OPTIONS, "lr": 1e-3, **options}).subspace.method

    for cls in (GaLoreAdamW, lowrank_ds.GaLoreAdafactor, lowrank_ds.FiraAdamW, lowrank_ds.QGaLore):
        assert method(cls) == "power"
    assert method(GaLoreAdamW, proj_type="full") == "svd"
    assert method(lowrank_ds.ApolloAdamW) == method(lowrank_ds.Flora) == "gaussian"
    with pytest.raises(ValueError, match='proj_type="full" projects both sides and needs subspace="svd". Leave'):
        method(GaLoreAdamW, proj_type="full", subspace="power")
