"""Seeded noise: what it is, where it may depend on nothing, and that it looks random where it is used."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lowrank_ds
from lowrank_ds import linalg
from lowrank_ds.draws import grouped
from lowrank_ds.noise import Noise
from tests import reference

KEY = (0, "a.weight", 3)
CPU = torch.device("cpu")


def words(key: tuple, rows: int, columns: int) -> Tensor:
    """The words (rows, columns) of a matrix, int64 in [0, 2^32)."""
    return Noise([(key, slice(0, rows))], slice(0, columns)).words(slice(0, rows)).long() & 0xFFFFFFFF


def excess(counts: Tensor) -> float:
    """Chi-square of counts that should be equal, in standard deviations from what chance gives."""
    expected = counts.sum().double() / counts.numel()
    freedom = counts.numel() - 1
    return (((counts - expected).square() / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


def pairs(a: Tensor, b: Tensor, bits: int = 6) -> float:
    """`excess` of pairs of numbers, by the highest bits of 16."""
    cells = (a >> (16 - bits) << bits) + (b >> (16 - bits))
    return excess(torch.bincount(cells.flatten(), minlength=1 << 2 * bits))


# --- what it is ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 5), (0, 9)), ((10**6, 10**6 + 3), (32760, 32775)), ((7, 8), (9, 10))]
)
def test_words_are_those_of_plain_integers(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """Bit for bit, also across the seam between two lines, and for any part of a rectangle."""
    noise = Noise([(KEY, slice(*rows))], slice(*columns))
    expected = [[reference.noise_word(KEY, i, j) for j in range(*columns)] for i in range(*rows)]
    found = noise.words(slice(0, rows[1] - rows[0])).long() & 0xFFFFFFFF
    assert found.tolist() == expected
    assert (noise.words(slice(rows[1] - rows[0] - 1, rows[1] - rows[0])).long() & 0xFFFFFFFF).tolist() == expected[-1:]


def test_rectangles_below_each_other_are_those_drawn_alone() -> None:
    """Bit for bit, whatever rows of which keys; wide ones too, across the seam between two lines."""
    streams = [(KEY, slice(0, 5)), ((1, "b", 0), slice(10**6, 10**6 + 3)), (KEY, slice(40, 40)), (KEY, slice(7, 9))]
    for columns in (slice(0, 9), slice(32760, 32775)):
        together = Noise(streams, columns).words(slice(0, 10))
        alone = [Noise([stream], columns).words(slice(0, stream[1].stop - stream[1].start)) for stream in streams]
        assert torch.equal(together, torch.cat(alone))
        assert (together[5:8].long() & 0xFFFFFFFF).tolist() == [
            [reference.noise_word((1, "b", 0), i, j) for j in range(columns.start, columns.stop)]
            for i in range(10**6, 10**6 + 3)
        ]


def test_bases_drawn_together() -> None:
    """Groups fill up to their size, by rank; each basis is the one drawn alone, and may be taken once."""
    rows = {"a": slice(0, 4000), "b": slice(5, 3000), "c": slice(0, 9), "d": slice(0, 40000), "e": slice(0, 0)}
    wanted = [((0, name, 2), part, 7 if name == "c" else 32, CPU) for name, part in rows.items()]
    groups = grouped(wanted)
    assert groups[0, "a", 2] is groups[0, "b", 2] is not groups[0, "c", 2]  # another rank
    assert len({id(groups[0, name, 2]) for name in "ade"}) == 3  # one that is too large is drawn by itself
    for key, part, rank, _ in reversed(wanted):
        assert torch.equal(groups[key].take(key), linalg.gaussian(key, 40000, rank, part))
    with pytest.raises(KeyError):
        groups[0, "a", 2].take((0, "a", 2))


@pytest.mark.parametrize("name", ["ApolloAdamW", "Flora"])
def test_a_step_draws_small_bases_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw for all matrices of a step, and the weights of one draw for each."""
    draws, sizes = linalg.gaussians, []

    def counted(streams, rank, device=None):
        sizes.append(len(streams))
        return draws(streams, rank, device)

    monkeypatch.setattr(linalg, "gaussians", counted)
    weights = []
    for most in (1 << 18, 0):
        monkeypatch.setattr("lowrank_ds.draws._TOGETHER_CPU", most)
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(24, 24) for _ in range(5)))
        every = {"kappa": 2} if name == "Flora" else {"update_proj_gap": 2}
        optimizer = getattr(lowrank_ds, name)(model.named_parameters(), rank=4, lr=0.01, **every)
        for _ in range(4):
            model(torch.ones(2, 24)).square().sum().backward()
            optimizer.step()
        weights.append([p.detach() for p in model.parameters()])
    moved = 2 if name == "Flora" else 0  # steps in which the momentum moves to another basis
    assert sizes == [5, *([10, 5] if moved else [5, 5]), 10 if moved else 5] + [1] * (20 + 5 * moved)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_fake_tensors_leave_nothing_behind() -> None:
    """A plan made of fake tensors, before the first draw on a device, does not spoil those that follow."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from lowrank_ds import noise

    known = noise._tables.copy()
    try:
        for cached in (False, True):
            if not cached:
                noise._tables.clear()
            with FakeTensorMode():
                assert isinstance(linalg.gaussian(KEY, 10, 4), FakeTensor)
            assert type(linalg.gaussian(KEY, 10, 4)) is Tensor
    finally:
        noise._tables.update(known)


def test_uses_of_the_words() -> None:
    """Uniform numbers are a word's high bits, the rounding noise of two rows the halves of one word."""
    u = linalg.uniform(KEY, 3 * 50 + 7, (4, 11), 50, CPU)
    expected = [[(reference.noise_word(KEY, i, j) >> 8) / 2**24 for j in range(7, 18)] for i in range(3, 7)]
    assert u.tolist() == expected
    x = torch.full((5, 6), 1.0).view(torch.int32).add(torch.arange(6) * 11000).int().view(torch.float32)
    rounded = linalg.stochastic_round(x, KEY, 3 * 50 + 7, 50).view(torch.int16).int() & 0xFFFF
    for i in range(5):
        for j in range(6):
            noise = reference.noise_word(KEY, (3 + i) // 2, 7 + j) >> 16 * ((3 + i) % 2) & 0xFFFF
            assert rounded[i, j] == (0x3F800000 + 11000 * j + noise) >> 16
    pairs = [[reference.noise_word(KEY, i, j) for j in range(6)] for i in range(4, 7)]
    signed = torch.tensor(pairs).add(2**31).remainder(2**32).sub(2**31).double()
    size = (-2 / 5 * (signed[:, :3].abs() / 2**31).log()).sqrt()
    angle = signed[:, 3:] * math.pi / 2**31
    expected = torch.cat([size * angle.cos(), size * angle.sin()], 1)[:, :5]
    torch.testing.assert_close(linalg.gaussian(KEY, 9, 5, slice(4, 7)).double(), expected, atol=1e-6, rtol=1e-5)


# --- that it looks random --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "columns"), [(2048, 512), (32, 32768), (65536, 16)])
def test_halves_are_even_and_independent(rows: int, columns: int) -> None:
    """Chi-square of the 16-bit halves, of their pairs: in one word, next to each other, in successive keys."""
    w, other = words(KEY, rows, columns), words((0, "a.weight", 4), rows, columns)
    low, high = w & 0xFFFF, w >> 16
    found = {"low": excess(torch.bincount(low.flatten(), minlength=1 << 16))}
    found["high"] = excess(torch.bincount(high.flatten(), minlength=1 << 16))
    found["halves"] = pairs(low, high)
    for name, x, y in (("low", low, other & 0xFFFF), ("high", high, other >> 16)):
        found[f"{name}, keys"] = pairs(x, y)
        found[f"{name}, rows"] = pairs(x[1:], x[:-1])
        for lag in (1, 2, 8):
            found[f"{name}, columns {lag}"] = pairs(x[:, lag:], x[:, :-lag])
            found[f"{name}, low bits, columns {lag}"] = pairs((x[:, lag:] << 10) & 0xFFFF, (x[:, :-lag] << 10) & 0xFFFF)
    assert max(map(abs, found.values())) < 5, found


def test_lines_are_even_one_by_one() -> None:
    """Chi-squares of single rows vary as chance has it: no row's multiplier is a bad one."""
    w = words(KEY, 2048, 4096)
    for half in (w >> 8 & 0xFF, w >> 24):
        counts = torch.zeros(2048, 256, dtype=torch.double).scatter_add_(
            1, half, torch.ones(1).double().expand_as(half)
        )
        chi = ((counts - 16).square() / 16).sum(1).sub(255).div(math.sqrt(510))
        assert abs(chi.mean()) < 0.1 and abs(chi.std() - 1) < 0.1 and chi.max() < 5.5


def test_gaussian_is_normal() -> None:
    """Mean, variance, fourth moment, tails and the distribution itself, by 64 cells of equal probability."""
    x = linalg.gaussian(KEY, 8192, 64) * 8
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5 and abs(x.var() - 1) < 6 / n**0.5 and abs(x.pow(4).mean() - 3) < 40 / n**0.5
    cells = (torch.special.ndtr(x.double()) * 64).long().clamp_(0, 63)
    assert abs(excess(torch.bincount(cells.flatten(), minlength=64))) < 4
    assert 4 < x.abs().max() < 6.6
    for a, b in ((x[:, :32], x[:, 32:]), (x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):  # of one Box-Muller pair; neighbours
        assert abs((a * b).mean()) < 5 / n**0.5 and abs((a.square() * b.square()).mean() - 1) < 12 / n**0.5


# --- stochastic rounding ---------------------------------------------------------------------------------------------
def test_stochastic_rounding_is_unbiased() -> None:
    """E[round(x)] = x for every distance, next to each other and step after step; only neighbours come out."""
    distance = torch.arange(0, 65536, 257, dtype=torch.int32)  # in units of fp32's last place
    x = (distance + 0x3F800000).view(torch.float32).expand(4000, -1).contiguous()
    up = (linalg.stochastic_round(x, KEY, 0, x.shape[1]).view(torch.int16) - 0x3F80).double()
    assert set(up.unique().tolist()) == {0.0, 1.0} and up[:, 0].sum() == 0
    chance = distance.double() / 65536
    error = (up.mean(0) - chance) / (chance * (1 - chance) / 4000).sqrt().clamp_min(1e-9)
    assert error.abs().max() < 4.5 and abs(error.square().mean() - 1) < 0.35
    assert abs((up - chance).mean()) < 4 * 0.41 / up.numel() ** 0.5
    steps = [linalg.stochastic_round(x[:1, 128:129].expand(500, 1), (0, "w", t), 0, 1).float() for t in range(40)]
    assert abs(torch.cat(steps).mean() - x[0, 128]) < 4 * 0.5 * 2**-7 / 20000**0.5


def test_stochastic_rounding_belongs_to_a_place() -> None:
    """Any part, from an odd or even row, rounds as the whole; what bf16 has is left alone."""
    x = torch.full((200, 100), 1.0 + 1 / 512)
    whole = linalg.stochastic_round(x, KEY, 0, 100)
    for i, j in ((30, 17), (31, 0), (199, 99)):
        part = linalg.stochastic_round(x[i:, j:], KEY, i * 100 + j, 100)
        assert torch.equal(part, whole[i:, j:])
    row = linalg.stochastic_round(x[0], KEY, 0)
    assert torch.equal(row, whole[0]) and torch.equal(linalg.stochastic_round(x[0, 9:20], KEY, 9), row[9:20])
    known = torch.randn(64, 64).bfloat16()
    assert torch.equal(linalg.stochastic_round(known.float(), KEY, 0, 64), known)
    assert linalg.stochastic_round(x[:0], KEY, 0, 100).shape == (0, 100)


def test_numbers_that_are_not_finite() -> None:
    """Infinities stay, every NaN stays one, and the largest numbers become the largest of bf16 or infinity."""
    patterns = [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF0001, 0xFFFFFF00, 0]
    x = torch.tensor([p - (p >> 31 << 32) for p in patterns], dtype=torch.int32).view(torch.float32)
    many = linalg.stochastic_round(x.expand(5000, -1), KEY, 0, len(patterns)).float()
    assert (many[:, 0] == math.inf).all() and (many[:, 1] == -math.inf).all()
    assert many[:, 2:8].isnan().all() and (many[:, 8] == 0).all()
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([largest, torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max]).expand(5000, 3)
    many = linalg.stochastic_round(x, KEY, 0, 3).float()
    assert (many[:, 0] == largest).all() and not many.isnan().any()
    assert (many[:, 1] == math.inf).float().mean() > 0.99 and (many[:, 2] == -math.inf).float().mean() > 0.99
