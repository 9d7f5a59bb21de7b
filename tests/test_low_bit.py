"""Low-bit state: codes and their errors, one step against float64, every cut alike, resume, misuse, bytes."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

import lowrank_ds
from lowrank_ds import pipeline, quantize
from lowrank_ds.job import Job
from lowrank_ds.layout import Flat, Layout
from lowrank_ds.requests import finish_alone
from tests import training
from tests.cluster import batches, launch, tiny_llama
from tests.simulation import layouts, run_ranks
from tests.test_checkpoint import restore, state_of
from tests.test_layout import entries_of, group_of, some_ranks

EIGHT = {"moments": "8bit", "min_8bit_size": 0}
FOUR = {**EIGHT, "projector_dtype": "4bit"}


# -- codes ------------------------------------------------------------------------------------------------------------
def spread_out(rows: int, width: int, signed: bool) -> Tensor:
    """Numbers over six decades."""
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator) * 10 ** (3 - 6 * torch.rand(rows, width, generator=generator))
    return x if signed else x.abs()


def rounded(x: Tensor, signed: bool, step: int = 1, key: tuple = (0, "w", "exp_avg")) -> Tensor:
    """x after being stored in 8 bits."""
    scales, width = quantize.peaks(x, x.shape[1]), x.shape[1]
    noise = quantize.dither(key, step, slice(0, x.shape[0]), slice(0, width), x.device)
    return quantize.decode(quantize.encode(x, scales, signed, noise, width), scales, signed, width)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", [8, 255, 256, 300, 1000])
def test_moments_keep_three_bits(width: int, signed: bool) -> None:
    """Every entry above the smallest code is off by less than an eighth; a block's largest and zeros are exact."""
    x = spread_out(20, width, signed)
    x[3] = 0.0
    x[4, : width // 2] = 0.0
    found, scales = rounded(x, signed), quantize.peaks(x, width)
    size = quantize.blocks(width)[1]
    block = scales.repeat_interleave(size, 1)[:, :width]
    normal = x.abs() > block * 2.0 ** (-15 if signed else -31)
    assert normal.float().mean() > 0.5
    assert ((found - x).abs() < x.abs() / 8)[normal].all()
    assert ((found - x).abs() <= block * 2.0 ** (-15 if signed else -31))[~normal].all()
    assert torch.equal(found[x == 0], torch.zeros(int((x == 0).sum())))
    largest = x.abs() == block
    assert torch.equal(found[largest], x[largest])
    assert torch.equal(found.sign()[normal], x.sign()[normal])
    if not signed:
        assert (found[x > 0] > 0).all()  # a second moment that became zero would make its momentum an update of M / eps


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_is_right_on_average(signed: bool) -> None:
    """Over the steps an entry's error averages out, much faster than random rounding's would."""
    x = spread_out(16, 64, signed)
    scale = quantize.peaks(x, 64)
    x = torch.where(x.abs() > scale * (1e-4 if signed else 1e-8), x, scale)
    steps = 256
    mean = sum(rounded(x, signed, step).double() for step in range(steps)) / steps
    worst = ((mean - x).abs() / x.abs()).max().item()
    assert worst < 0.125 / math.sqrt(steps) / 2
    nearest = (rounded(x, signed, 1) - x).abs() / x.abs()
    assert nearest.max() > 0.05  # so that the average above is not of exact values


def test_thresholds_belong_to_places() -> None:
    """A part of an array has the thresholds of the whole; arrays and steps differ; all of [0, 1) is used."""
    device = torch.device("cpu")
    whole = quantize.dither((0, "w", "exp_avg"), 7, slice(0, 50), slice(0, 90), device)
    part = quantize.dither((0, "w", "exp_avg"), 7, slice(11, 30), slice(40, 41), device)
    assert torch.equal(part, whole[11:30, 40:41])
    assert whole.min() >= 0 and whole.max() < 1 << 20
    assert abs(whole.float().mean() / (1 << 20) - 0.5) < 0.01
    for other in ((0, "w", "exp_avg_sq"), (1, "w", "exp_avg")):
        assert (quantize.dither(other, 7, slice(0, 50), slice(0, 90), device) != whole).all()
    far = quantize.dither((0, "w", "exp_avg"), 7, slice(10**9, 10**9 + 2), slice(0, 90), device)
    assert far.min() >= 0 and far.max() < 1 << 20  # places beyond 2^31 entries


def test_second_moment_keeps_up() -> None:
    """exp_avg_sq follows a gradient that grows fivefold, and one that fades, although a step moves it by 0.1 %."""
    generator = torch.Generator().manual_seed(0)
    steps, exact, stored = 2000, torch.zeros(16, 64), torch.zeros(16, 64)
    trend = torch.where(torch.arange(64) % 2 == 0, 5.0, 0.2)
    for step in range(steps):
        square = (torch.randn(16, 64, generator=generator) * trend ** (step / steps)).square()
        exact.lerp_(square, 1e-3)
        stored.lerp_(square, 1e-3)
        stored = rounded(stored, False, step)
    ratio = (stored / exact).sqrt()
    assert abs(ratio.mean() - 1) < 0.03 and ratio.std() < 0.15 and ratio.min() > 0.5 and ratio.max() < 2.0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [8, 9, 256, 257, 600])
def test_projector_codes(bits: int, width: int) -> None:
    """Off by at most half a step, with two codes to a byte at 4 bits; a constant row is exact."""
    x = torch.randn(12, width, generator=torch.Generator().manual_seed(width))
    x[5] = 0.25
    codes, ranges = quantize.encode_range(x, bits)
    count, size = quantize.blocks(width)
    assert codes.shape == (12, width if bits == 8 else -(-width // 2)) and codes.dtype == torch.uint8
    assert ranges.shape == (12, 2 * count)
    found = quantize.decode_range(codes, ranges, width, bits)
    step = ranges[:, 1::2].repeat_interleave(size, 1)[:, :width]
    assert ((found - x).abs() <= step * 0.5001 + 1e-7).all()
    assert torch.equal(found[5], x[5])
    assert (found != x).any()
    empty = quantize.decode_range(*quantize.encode_range(x[:0], bits), width, bits)
    assert empty.shape == (0, width)


# -- every cut alike --------------------------------------------------------------------------------------------------
def states_of(ranks: list[Layout], recipe, projected: bool) -> list[dict[str, Tensor]]:
    """Fresh state of every rank."""
    states = []
    for layout in ranks:
        shapes = pipeline.state_shapes(layout, recipe, projected)
        local = {name: (layout.numel,) if s.entries else s.local for name, s in shapes.items()}
        states.append({name: torch.zeros(local[name], dtype=s.dtype) for name, s in shapes.items()})
        if "residual_norm" in states[-1]:
            states[-1]["residual_norm"].fill_(math.inf)
    return states


def train(cls: type, options: dict, ranks: list[Layout], steps: int = 4, broken: int | None = None):
    """(whole weight, state of every rank) after a few steps with gradients known to the last bit.

    broken: a step at which one entry of the gradient is NaN; the state is then that of before and after it.
    """
    generator = torch.Generator().manual_seed(5)
    shape, projected = ranks[0].shape, options.get("rank") is not None
    start = torch.randn(shape, generator=generator)
    weights = [entries_of(layout, start) for layout in ranks]
    recipe = cls.recipe(group_of(cls, **{"rank": None, **options}))
    states = states_of(ranks, recipe, projected)
    owner, around = next(layout.rank for layout in ranks if layout.numel), []
    for step in range(1, steps + 1):
        grad = torch.randn(shape, generator=generator)
        if step == broken:
            grad[0, 0] = math.nan
            around.append([{k: v.clone() for k, v in state.items()} for state in states])
        refresh = projected and step % 2 == 1 and step != broken

        def job(layout: Layout, step=step, grad=grad, refresh=refresh) -> Job:
            return Job(
                layout, recipe, entries_of(layout, grad), weights[layout.rank], states[layout.rank], (0, "w"), step,
                step, 1e-2, 0.1, refresh, step // 2, owner,
            )  # fmt: skip

        if ranks[0].shared:
            run_ranks(ranks, lambda layout, job=job: pipeline.update(job(layout), projected))
        else:
            finish_alone(pipeline.update(job(ranks[0]), projected))
        if step == broken:
            around.append([{k: v.clone() for k, v in state.items()} for state in states])
    return ranks[0].assemble({x.rank: weights[x.rank] for x in ranks if x.numel}), around or states


CUTS = [
    ((6, 16), [5, 7, 9, 40], None),
    ((3, 600), [100, 300, 301, 700, 1799], None),
    ((5, 9), [45, 45], None),  # ranks that hold nothing
    ((4, 300), None, "rows"),
    ((4, 300), None, "columns"),
    ((5, 520), None, "both"),
]


def ranks_of(shape, places, grid) -> list[Layout]:
    """Flat cuts at `places`, or tiles: rows, columns, or both divided."""
    from lowrank_ds.layout import Tiled, torch_chunks

    if places is not None:
        return some_ranks(shape, places, None)
    rows = torch_chunks(shape[0], 2) if grid in ("rows", "both") else ((0, shape[0]),)
    columns = torch_chunks(shape[1], 3) if grid in ("columns", "both") else ((0, shape[1]),)
    tiles = tuple((r, c) for r in rows for c in columns)
    return [Tiled(shape, tiles, rank, "simulated") for rank in range(len(tiles))]


@pytest.mark.parametrize(("shape", "places", "grid"), CUTS)
def test_plain_parameters_do_not_see_the_cuts(shape, places, grid) -> None:
    """Codes, scales and weights of 8-bit AdamW are those of one process to the last bit, wherever the cuts are."""
    ranks = ranks_of(shape, places, grid)
    whole, (expected,) = train(lowrank_ds.GaLoreAdamW, EIGHT, [Flat.whole(shape)])
    found, states = train(lowrank_ds.GaLoreAdamW, EIGHT, ranks)
    assert expected["exp_avg"].dtype == torch.uint8 and expected["exp_avg_sq"].dtype == torch.uint8
    assert torch.equal(found, whole)
    for name in ("exp_avg", "exp_avg_sq"):
        held = {x.rank: states[x.rank][name] for x in ranks if x.numel}
        assert torch.equal(ranks[0].assemble(held), expected[name].view(shape))
        for layout in ranks:
            axis = layout.rows_axis
            mine = expected[f"{name}_scale"][slice(*axis.kept[axis.rank])]
            assert torch.equal(states[layout.rank][f"{name}_scale"], mine)


PROJECTED = [
    (lowrank_ds.GaLoreAdamW, {"proj_type": "right"}),
    (lowrank_ds.GaLoreAdamW, {"proj_type": "left", "subspace": "power", "on_refresh": "rotate"}),
    (lowrank_ds.GaLoreAdamW, {"proj_type": "full"}),
    (lowrank_ds.GaLoreAdafactor, {"beta1": 0.9, "proj_type": "left"}),
    (lowrank_ds.FiraAdamW, {"proj_type": "left", "subspace": "randomized"}),
    (lowrank_ds.FiraAdamW, {"proj_type": "right", "residual": "paper", "scaling": "matrix"}),
]


@pytest.mark.parametrize(("cls", "options"), PROJECTED, ids=lambda v: v.__name__ if isinstance(v, type) else None)
def test_projected_matrices_do_not_see_the_cuts(cls: type, options: dict) -> None:
    """8-bit coordinates and 4-bit bases: weights as on one process.

    Sums of coordinates are rounded in another order on another sharding, so that now and then a code is the next one:
    a direction that is an eighth off, in one of a line's r coordinates, at lr 1e-2.
    """
    for shape, places, grid in (((20, 30), [55, 60, 333], None), ((30, 20), None, "rows"), ((20, 30), None, "both")):
        settings = {**FOUR, "rank": 10, **options}
        whole, (state,) = train(cls, settings, [Flat.whole(shape)])
        assert state["exp_avg"].dtype == state["projector"].dtype == torch.uint8
        found, _ = train(cls, settings, ranks_of(shape, places, grid))
        off = (found - whole).abs()
        plain, _ = train(cls, {"rank": 10, **options}, [Flat.whole(shape)])
        assert off.max() < 1e-3 and off.mean() < 0.02 * (plain - whole).abs().mean()  # of what rounding itself does


@pytest.mark.parametrize("rank", [None, 10])
def test_a_broken_gradient_leaves_codes_alone(rank: int | None) -> None:
    """A NaN anywhere: codes and scales of every rank stay as they are, bit by bit."""
    settings = {**(EIGHT if rank is None else FOUR), "rank": rank}
    for ranks in ([Flat.whole((20, 30))], layouts((20, 30), (0, 55, 333, 600)), ranks_of((20, 30), None, "both")):
        _, (before, after) = train(lowrank_ds.GaLoreAdamW, settings, ranks, broken=3)
        for old, new in zip(before, after, strict=True):
            assert new["skipped"] == 1
            assert all(torch.equal(old[name], new[name]) for name in old if name != "skipped")


@pytest.mark.parametrize("cls", [lowrank_ds.GaLoreAdafactor, lowrank_ds.Flora])
def test_a_broken_gradient_leaves_adafactors_codes_alone(cls: type) -> None:
    """A momentum of whole entries, whatever its codes: rounding it anew would move them, and scales with them."""
    eight = {"quantization": True} if cls is lowrank_ds.Flora else {"moments": "8bit", "beta1": 0.9}
    weight = torch.nn.Parameter(torch.randn(20, 30, generator=torch.Generator().manual_seed(3)))
    optimizer = cls([("w", weight)], lr=1e-2, rank=None, min_8bit_size=0, **eight)
    weight.grad = torch.ones(20, 30)
    optimizer.step()
    state = optimizer.state[weight]
    state["exp_avg"].copy_(torch.arange(600).view(20, 30) % 100 + 1)  # no block has the largest code
    before = {name: tensor.clone() for name, tensor in state.items()}
    weight.grad.fill_(math.nan)
    optimizer.step()
    assert state["skipped"] == 1 and state["exp_avg"].dtype == torch.uint8
    assert all(torch.equal(state[name], old) for name, old in before.items() if name not in ("skipped", "step"))


# -- against the textbook ---------------------------------------------------------------------------------------------
def test_one_step_from_stored_codes() -> None:
    """A step starts from the values of the codes, moves them in full precision and rounds once: float64 agrees."""
    options = {**EIGHT, "rank": None}
    generator = torch.Generator().manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(12, 300, generator=generator))
    optimizer = lowrank_ds.GaLoreAdamW([("w", weight)], lr=1e-2, weight_decay=0.1, **options)
    for step in (1, 2, 3):
        state = {k: v.clone() for k, v in optimizer.state[weight].items()}
        before = weight.detach().double().clone()
        weight.grad = torch.randn(12, 300, generator=generator)
        optimizer.step()
        m, v = (torch.zeros(12, 300).double() for _ in range(2))
        if step > 1:
            m, v = (
                quantize.decode(state[n], state[f"{n}_scale"], n == "exp_avg", 300).double()
                for n in ("exp_avg", "exp_avg_sq")
            )
        grad = weight.grad.double()
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        size = 1e-2 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        expected = before * (1 - 1e-2 * 0.1) - size * m / (v.sqrt() + 1e-6)
        assert (weight.detach() - expected).abs().max() < 1e-6
        now = optimizer.state[weight]
        for name, exact in (("exp_avg", m), ("exp_avg_sq", v)):
            stored = quantize.decode(now[name], now[f"{name}_scale"], name == "exp_avg", 300)
            blocks = quantize.peaks(exact.float(), 300)
            torch.testing.assert_close(now[f"{name}_scale"], blocks, rtol=1e-5, atol=0)
            normal = exact.abs() > blocks.repeat_interleave(150, 1) * 2.0**-15
            assert ((stored - exact).abs() <= exact.abs() / 7.9)[normal].all()


def test_firas_residual_norm_knows_the_rounded_basis() -> None:
    """|g - c B r|^2 from |g|^2, |r|^2 and |B r|^2: right for a basis that 4 bits left not orthonormal."""
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(64, 200, generator=generator)
    exact = torch.linalg.qr(torch.randn(200, 16, generator=generator)).Q
    basis = quantize.decode_range(*quantize.encode_range(exact, 4), 16, 4)
    gram = basis.T @ basis
    assert 0.01 < (gram - torch.eye(16)).abs().max() < 0.2  # what the identity for orthonormal bases would leave out
    residual = lowrank_ds.algorithms.ScaleResidual(alpha=1.0, growth=math.inf)
    coords = grad @ basis
    inside = ((coords @ gram) * coords).sum(1)
    layout = Flat.whole((64, 200))
    lines = lowrank_ds.pipeline.Lines(layout.rows_axis, layout)
    state = {"residual_norm": torch.tensor(math.inf)}
    finish_alone(
        residual.combine(coords, coords.clone(), grad.square().sum(1), state, lines, torch.ones(()), inside)
    )  # phi = 1: the direction is the coordinates
    truth = (grad - coords @ basis.T).norm()
    torch.testing.assert_close(state["residual_norm"], truth, rtol=1e-5, atol=0)


# -- lazy refresh -----------------------------------------------------------------------------------------------------
def refreshes_of(turning: bool, steps: int = 120, **options) -> tuple[int, int]:
    """(refreshes, doublings) of a matrix whose gradient stays in one subspace, or moves to a new one all the time."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, 24, generator=generator))
    settings = {"update_proj_gap": 4, "lazy_refresh": True, "min_8bit_size": 0, "rank": 8, **options}
    optimizer = lowrank_ds.QGaLore([("w", weight)], lr=1e-3, **settings)
    left, right = torch.randn(40, 8, generator=generator), torch.randn(8, 24, generator=generator)
    for _ in range(steps):
        right = torch.randn(8, 24, generator=generator) if turning else right
        weight.grad = (left * torch.randn(8, generator=generator)) @ right
        optimizer.step()
    state = optimizer.state[weight]
    return int(state["refreshes"]), int(state.get("doublings", 0))


def test_lazy_refresh_rests_where_nothing_changes() -> None:
    """A gradient that stays in its subspace: the interval grows; one that leaves it: every refresh takes place."""
    assert refreshes_of(turning=False) == (9, 4)  # steps 0, 4 ... 20, then after 8, 16, 32 and (not yet) 64
    assert refreshes_of(turning=True) == (30, 0)
    assert refreshes_of(turning=False, lazy_refresh=False) == (30, 0)
    assert refreshes_of(turning=False, subspace="power", projector_dtype="fp32") == (9, 4)
    assert refreshes_of(turning=True, lazy_threshold=0.1) == (30, 0)  # random subspaces of this size have 1/3 in common


# -- engines ----------------------------------------------------------------------------------------------------------
STEPS = 8
# RMS difference of two runs' weights, in parts of how far the weights moved. Gradients are summed in another order, so
# here and there a code rounds the other way: an eighth of one entry of a moment. One ulp in the initial weights does as
# much to one process (measured over four draws: up to 5e-4); rounding itself, against fp32 state, about 5e-2.
LIMIT = 2e-3
RECIPES = {
    "plain": ("galore", {**EIGHT, "rank": None}),
    "fira": ("fira", FOUR),
    "lazy": ("galore", {**FOUR, "lazy_refresh": True, "lazy_threshold": 0.05, "update_proj_gap": 1}),
    "flora": ("flora unfactored", {"quantization": True, "min_8bit_size": 0}),
}


def counters(optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, int]]:
    """{matrix: (refreshes, doublings)} of what is projected and held here."""
    slots = [slot for slots in optimizer._slots.values() for slot in slots]
    return {slot.name: (slot.refreshes, slot.doublings) for slot in slots if slot.projected}


def alone(name: str, model=None) -> tuple[dict, dict]:
    """(weights, counters) of a recipe in this process."""
    recipe, more = RECIPES[name]
    model = model or tiny_llama()
    optimizer = training.build(recipe, model, lr=1e-3, **more)
    training.train_sharded(model, optimizer, "one", 0, 1, range(STEPS))
    return training.weights_of(model), counters(optimizer)


def sharded(rank: int, world: int, names: tuple[str, ...], kinds: tuple[str, ...]) -> dict:
    """{(recipe, kind): (weights, counters)} under "zero2", "zero3", and what `training.fully_sharded` knows."""
    found = {}
    for name in names:
        recipe, more = RECIPES[name]
        for kind in kinds:
            if kind.startswith("zero"):
                engine = training.zero_engine(recipe, int(kind[4]), world, settings={"lr": 1e-3, **more})
                training.train_engine(engine, rank, world, STEPS)
                found[name, kind] = training.weights_of(engine.module), counters(engine.basic_optimizer)
                engine.destroy()
                continue
            model = training.fully_sharded(kind, world)
            optimizer = training.build(recipe, model, lr=1e-3, **more)
            training.train_sharded(model, optimizer, kind, rank, world, range(STEPS))
            found[name, kind] = training.weights_of(model), counters(optimizer)
            state = optimizer.state[model.model.embed_tokens.weight]
            assert state["exp_avg" if "flora" not in name else "exp_avg_sq"].dtype == torch.uint8
    return found


def test_engines_agree(capsys: pytest.CaptureFixture) -> None:
    """ZeRO-2 x3, ZeRO-3 x2, FSDP2 x3, HSDP and FSDP x TP 2x2 train as one process; all ranks refresh alike."""
    expected = {name: alone(name) for name in RECIPES}
    runs = [(3, tuple(RECIPES), ("zero2", "fsdp2")), (2, tuple(RECIPES), ("zero3",))]
    runs += [(4, ("plain", "fira"), ("hsdp", "fsdp2 tp"))]
    for world, names, kinds in runs:
        ranks = launch(world, sharded, names, kinds)
        for (name, kind), (weights, counts) in ranks[0].items():
            weights_alone, counts_alone = expected[name]
            off = distance(weights, weights_alone)
            with capsys.disabled():
                print(f"\n{name:6s} {kind} x{world}: {off:.2e}", end="")
            assert off < LIMIT, (name, kind)
            for other in ranks:
                held = other[name, kind][1]
                assert all(counts_alone[matrix] == both for matrix, both in held.items()), (name, kind)
            assert name == "plain" or counts
    assert any(doublings for _, doublings in expected["lazy"][1].values())


def distance(a: dict, b: dict) -> float:
    """Root mean square of a - b over that of the updates, of all weights together."""
    start = training.weights_of(tiny_llama())
    off = sum((a[n] - b[n]).square().sum() for n in b)
    return math.sqrt(off / sum((b[n] - start[n]).square().sum() for n in b))


# -- saving and loading -----------------------------------------------------------------------------------------------
def resumed(name: str, at: int) -> tuple[dict, dict]:
    """(weights of a run that never stopped, of one that went through a file at step `at`), in this process."""
    recipe, more = RECIPES[name]
    runs = []
    for stop in (None, at):
        model = tiny_llama()
        optimizer = training.build(recipe, model, **more)
        training.train_sharded(model, optimizer, "one", 0, 1, range(stop or STEPS))
        if stop:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            model = tiny_llama(seed=3)
            model.load_state_dict(loaded["model"])
            optimizer = training.build(recipe, model, **more)
            optimizer.load_state_dict(loaded["optimizer"])
            training.train_sharded(model, optimizer, "one", 0, 1, range(stop, STEPS))
        runs.append(training.weights_of(model))
    return runs[0], runs[1]


@pytest.mark.parametrize("name", ["plain", "lazy", "flora"])
def test_resume_is_bitwise(name: str) -> None:
    """state_dict() through a file with weights_only=True, in the middle of a run."""
    unbroken, continued = resumed(name, 6)
    assert all(torch.equal(unbroken[n], continued[n]) for n in unbroken)


def through_dcp(rank: int, world: int, folder: str) -> tuple[dict, dict, set[str]]:
    """(weights of an FSDP2 run that never stopped, of one through torch.distributed.checkpoint, its state's dtypes)."""
    recipe, more = RECIPES["lazy"]
    model = training.fully_sharded("fsdp2", world)
    optimizer = training.build(recipe, model, lr=1e-3, **more)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(6))
    dcp.save(state_of(model, optimizer, False), checkpoint_id=folder)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(6, STEPS))
    unbroken = training.weights_of(model)
    model = training.fully_sharded("fsdp2", world, tiny_llama(seed=3))
    optimizer = training.build(recipe, model, lr=1e-3, **more)
    restore(model, optimizer, folder, False)
    dtypes = {str(t.dtype) for state in optimizer.state.values() for t in state.values()}
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(6, STEPS))
    return unbroken, training.weights_of(model), dtypes


def reshard(rank: int, world: int, folder: str) -> dict:
    """Weights of the run that `through_dcp` saved, continued on this many ranks."""
    recipe, more = RECIPES["lazy"]
    model = training.fully_sharded("fsdp2", world, tiny_llama(seed=3))
    optimizer = training.build(recipe, model, lr=1e-3, **more)
    restore(model, optimizer, folder, False)
    training.train_sharded(model, optimizer, "fsdp2", rank, world, range(6, STEPS))
    return training.weights_of(model)


def test_fsdp2_checkpoints(tmp_path) -> None:
    """Codes are DTensors: bitwise on as many ranks, and cut anew with their rows on another number of them."""
    unbroken, continued, dtypes = launch(3, through_dcp, str(tmp_path))[0]
    assert dtypes == {"torch.float32", "torch.uint8"}
    assert all(torch.equal(unbroken[name], continued[name]) for name in unbroken)
    assert distance(launch(2, reshard, str(tmp_path))[0], unbroken) < LIMIT


LOADS = [  # options of the saved state, of the optimizer that loads it, the message
    ({}, EIGHT, r"moments is 'fp32', but this optimizer was built with '8bit'.*build the optimizer with it"),
    (EIGHT, {}, r"moments is '8bit', but this optimizer was built with 'fp32'"),
    (EIGHT, FOUR, r"projector_dtype is 'fp32', but this optimizer was built with '4bit'"),
    (EIGHT, {"moments": "8bit"}, r"min_8bit_size is 0, but this optimizer was built with 4096"),
]


@pytest.mark.parametrize(("saved", "mine", "message"), LOADS)
def test_other_storage_is_refused(saved: dict, mine: dict, message: str) -> None:
    """State kept in another way is not reinterpreted."""
    model = tiny_llama()
    optimizers = [lowrank_ds.GaLoreAdamW(model.named_parameters(), rank=8, **options) for options in (saved, mine)]
    optimizers[0].init_state()
    with pytest.raises(ValueError, match=message):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    groupless = optimizers[0].state_dict()
    for group in groupless["param_groups"]:
        for name in ("moments", "projector_dtype", "min_8bit_size"):
            del group[name]  # as from a release that did not have them, or through a tool that drops options
    with pytest.raises(ValueError, match=r"moments=|projector_dtype="):
        optimizers[1].load_state_dict(groupless)


def test_lazy_refresh_is_refused_without_a_basis_to_compare() -> None:
    """Random bases and two-sided ones."""
    for options in ({"proj_type": "full"}, {"subspace": "gaussian"}):
        with pytest.raises(ValueError, match="lazy_refresh compares one orthonormal basis.*leave lazy_refresh out"):
            lowrank_ds.GaLoreAdamW(tiny_llama().named_parameters(), rank=8, lazy_refresh=True, **options)
    with pytest.raises(ValueError, match=r"lazy_threshold must be a number in \(0, 1\]"):
        lowrank_ds.QGaLore(tiny_llama().named_parameters(), rank=8, lazy_threshold=1.5)


# -- bytes ------------------------------------------------------------------------------------------------------------
def bytes_and_size(shape: tuple[int, ...], **options) -> int:
    """Bytes of state of one parameter, less the 0-d tensors and the three numbers of `captured`."""
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = lowrank_ds.GaLoreAdamW([("w", weight)], **options)
    optimizer.init_state()
    state = optimizer.state[weight]
    small = sum(t.nbytes for name, t in state.items() if t.dim() == 0 or name == "captured")
    return lowrank_ds.state_bytes(optimizer) - small


def test_state_bytes_are_as_computed() -> None:
    """What is stored, byte by byte; small parameters, vectors and narrow lines stay fp32."""
    m, n, r = 600, 300, 20
    eight, four = {"moments": "8bit"}, {"moments": "8bit", "projector_dtype": "4bit"}
    assert bytes_and_size((m, n), rank=r) == 4 * (2 * m * r + n * r)
    assert bytes_and_size((m, n), rank=r, **eight) == 2 * m * (r + 4) + 4 * n * r
    assert bytes_and_size((m, n), rank=r, **four) == 2 * m * (r + 4) + n * (r // 2 + 8)
    assert bytes_and_size((m, n), rank=r, **{**four, "projector_dtype": "8bit"}) == 2 * m * (r + 4) + n * (r + 8)
    assert bytes_and_size((m, n), rank=None, **eight) == 2 * m * (n + 2 * 4)
    assert bytes_and_size((m * n,), rank=None, **eight) == 2 * 4 * m * n
    assert bytes_and_size((63, 65), rank=None, **eight) == 2 * 4 * 63 * 65
    assert bytes_and_size((64, 64), rank=None, **eight) == 2 * 64 * (64 + 4)
    assert bytes_and_size((m, n), rank=7, **four) == 4 * (2 * m * 7 + n * 7)


# -- in the backward, in micro-batches --------------------------------------------------------------------------------
def test_layerwise_is_the_same() -> None:
    """Updates inside the backward: the weights of step(), bit by bit."""
    expected, _ = alone("lazy")
    recipe, more = RECIPES["lazy"]
    model = tiny_llama()
    optimizer = training.build(recipe, model, lr=1e-3, **more)
    lowrank_ds.layerwise(model, optimizer)
    training.train_sharded(model, optimizer, "one", 0, 1, range(STEPS))
    assert distance(training.weights_of(model), expected) < LIMIT / 100


def test_micro_batches_are_summed_in_the_rounded_subspace() -> None:
    """compress_accumulation with a 4-bit projector: as whole gradients, which are projected once."""
    found = []
    for compressed in (False, True):
        model = tiny_llama()
        more = {**FOUR, "update_proj_gap": 3, "compress_accumulation": compressed}
        optimizer = training.build("galore", model, lr=1e-3, **more)
        for batch in batches(STEPS):
            for mine in batch.chunk(2):
                (model(input_ids=mine, labels=mine).loss / 2).backward()
                if compressed:
                    optimizer.accumulate()
            optimizer.step()
            optimizer.zero_grad()
        found.append(training.weights_of(model))
    assert distance(found[1], found[0]) < LIMIT
