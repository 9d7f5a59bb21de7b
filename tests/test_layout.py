"""Properties of layouts: any shape, any cuts. Every entry is owned once, and every recipe ignores the cuts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_ds import linalg, pipeline
from lowrank_ds.algorithms import ALGORITHMS, FiraAdamW, Flora, GaLoreAdafactor, GaLoreAdamW
from lowrank_ds.job import Job
from lowrank_ds.layout import Layout
from lowrank_ds.requests import Gather, finish_alone
from tests.simulation import cuts_of, layouts, run_ranks

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
PLACES = st.lists(st.integers(0, 90), min_size=0, max_size=5)
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


@PROPERTY
@given(SHAPES, PLACES)
def test_every_entry_lies_in_one_block_of_one_rank(shape: tuple[int, int], places: list[int]) -> None:
    """Blocks tile the matrix; pad and unpad are inverse; each row is owned once; chunks tile any total."""
    m, n = shape
    matrix, seen = torch.arange(m * n), torch.zeros(m, n, dtype=torch.int64)
    owned, chunks = [], []
    for layout in layouts(shape, cuts_of(m * n, places)):
        entries = matrix[slice(*layout.span(layout.rank))]
        first = layout.touched(layout.rank).start
        assert len(layout.blocks) <= 3
        for block in layout.blocks:
            rows = slice(block.rows.start + first, block.rows.stop + first)
            assert torch.equal(block.of(entries), matrix.view(m, n)[rows, block.cols])
            seen[rows, block.cols] += 1
        assert torch.equal(layout.unpad(layout.pad(entries)), entries)
        owned += list(layout.touched(layout.rank))[layout.owned_rows]
        chunks += list(range(7))[layout.chunk(7)]
    assert (seen == 1).all()
    assert owned == list(range(m))
    assert chunks == list(range(7))


@PROPERTY
@given(SHAPES, PLACES, st.integers(0, 5))
def test_sums_and_moves_equal_the_whole_matrix(shape: tuple[int, int], places: list[int], owner: int) -> None:
    """complete_rows, reduce_chunks, send_to, deal_rows and Gather on any cuts equal plain indexing and sums."""
    m, n = shape
    matrix = torch.randn(m * n, generator=torch.Generator().manual_seed(m * 10 + n))
    ranks = layouts(shape, cuts_of(m * n, places))
    owner = min(owner, len(ranks) - 1)
    if not ranks[0].shared:
        return  # a matrix that one rank holds takes part in no exchange

    def entries(layout: Layout) -> torch.Tensor:
        return matrix[slice(*layout.span(layout.rank))]

    rows, _ = run_ranks(ranks, lambda x: x.complete_rows(x.pad(entries(x)).clone()))
    columns, _ = run_ranks(ranks, lambda x: x.reduce_chunks(x.pad(entries(x)).sum(0).unsqueeze(1)))
    whole, _ = run_ranks(ranks, lambda x: x.send_to(owner, entries(x)))
    for layout, got, chunk, full in zip(ranks, rows, columns, whole, strict=True):
        assert torch.equal(got, matrix.view(m, n)[list(layout.touched(layout.rank))])
        expected = matrix.view(m, n).sum(0).unsqueeze(1)[layout.chunk(n)]
        torch.testing.assert_close(chunk, expected, atol=1e-5, rtol=1e-5)
        if layout.rank == owner:
            assert torch.equal(full, matrix.view(m, n))

    table = torch.randn(11, 2)
    gathered, _ = run_ranks(ranks, lambda x: ask(Gather(table[x.chunk(11)], 11)))
    for layout, got in zip(ranks, gathered, strict=True):
        assert torch.equal(got, table if layout.numel else torch.zeros(11, 2))


def ask(request):
    """A generator that asks once."""
    return (yield request)


def group_of(cls: type, **settings_: object) -> dict:
    """A complete param group of an optimizer class."""
    return {**cls.OPTIONS, "lr": 1e-2, **settings_}


RECIPES = [
    (GaLoreAdamW, {"proj_type": "right", "weight_decay": 0.1}),
    (GaLoreAdamW, {"proj_type": "left", "subspace": "power", "on_refresh": "rotate"}),
    (GaLoreAdamW, {"proj_type": "full"}),
    (GaLoreAdafactor, {"proj_type": "std", "beta1": 0.9}),
    (FiraAdamW, {"proj_type": "left"}),
    (FiraAdamW, {"proj_type": "right", "subspace": "randomized", "scaling": "matrix"}),
    (ALGORITHMS[3], {"proj_type": "std"}),
    (Flora, {"proj_type": "right", "kappa": 2}),
    (Flora, {"proj_type": "left", "kappa": 2}),
]


def train(cls: type, options: dict, shape: tuple[int, int], cuts: tuple[int, ...], steps: int = 4) -> torch.Tensor:
    """The whole weight after a few steps with the given cuts, all ranks simulated in this process."""
    generator = torch.Generator().manual_seed(5)
    m, n = shape
    weight = torch.randn(m * n, generator=generator)
    recipe = cls.recipe(group_of(cls, rank=2, **options))
    ranks = layouts(shape, cuts) if len(cuts) > 2 else [Layout.whole(shape)]
    states = [initial_state(layout, recipe) for layout in ranks]
    for step in range(1, steps + 1):
        grad = torch.randn(m * n, generator=generator)
        refresh = step == 1 or (step % 2 == 0 if recipe.momentum else step % 2 == 1)

        def job(layout: Layout, step=step, grad=grad, refresh=refresh) -> Job:
            span = slice(*layout.span(layout.rank))
            count = step // 2 if not recipe.momentum else (step > 1) + (step - 1) // 2
            return Job(
                layout, recipe, grad[span], weight[span], states[layout.rank], (0, "w"), step, step, 1e-2,
                options.get("weight_decay", 0.0), refresh, count, layout.holders[0],
            )  # fmt: skip

        if ranks[0].shared:
            run_ranks(ranks, lambda layout, job=job: pipeline.update(job(layout), True))
        else:
            finish_alone(pipeline.update(job(ranks[0]), True))
    return weight.clone()


def initial_state(layout: Layout, recipe) -> dict[str, torch.Tensor]:
    """Fresh state of one rank."""
    shapes = pipeline.state_shapes(layout, recipe, True, (layout.numel,))
    return {name: torch.full(shape, float("inf") if name == "residual_norm" else 0.0) for name, shape in shapes.items()}


@pytest.mark.parametrize(("cls", "options"), RECIPES, ids=lambda v: v.__name__ if isinstance(v, type) else None)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(3, 8), st.integers(3, 8)), places=st.lists(st.integers(1, 60), min_size=1, max_size=4)
)
def test_recipes_do_not_see_the_cuts(cls: type, options: dict, shape: tuple[int, int], places: list[int]) -> None:
    """Any recipe on any cuts, also several inside one row and ranks that hold nothing, equals the whole matrix."""
    numel = shape[0] * shape[1]
    cuts = cuts_of(numel, places)
    if len(Layout(shape, cuts).holders) < 2:
        return
    whole = train(cls, options, shape, (0, numel))
    torch.testing.assert_close(train(cls, options, shape, cuts), whole, atol=2e-5, rtol=0)


def test_gaussian_depends_on_key_and_place_only() -> None:
    """Slices equal the whole draw, keys differ, and the moments are those of N(0, 1/r)."""
    whole = linalg.gaussian((0, "a.weight", 3), 4000, 8)
    assert torch.equal(linalg.gaussian((0, "a.weight", 3), 4000, 8, slice(17, 31)), whole[17:31])
    others = [linalg.gaussian(key, 4000, 8) for key in ((1, "a.weight", 3), (0, "b.weight", 3), (0, "a.weight", 4))]
    scaled = whole * 8**0.5
    assert abs(scaled.mean()) < 0.02 and abs(scaled.std() - 1) < 0.02 and abs(scaled.pow(4).mean() - 3) < 0.15
    for other in others:
        assert abs((whole * other).mean() * 8) < 0.02
    gram = whole.T @ whole * 8 / 4000
    assert (gram - torch.eye(8)).abs().max() < 0.08


def test_stochastic_rounding_is_unbiased_and_placed() -> None:
    """E[round(x)] = x, neighbours only, and the noise belongs to the position."""
    x = torch.full((20000,), 1.0 + 1 / 512)
    rounded = linalg.stochastic_round(x, (0, "w", 1), 0).float()
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    assert abs(rounded.mean() - x[0]) < 2e-4
    assert torch.equal(linalg.stochastic_round(x[:100], (0, "w", 1), 50).float(), rounded[50:150])
    odd = torch.tensor([float("inf"), float("nan"), -2.0, 0.0])
    kept = linalg.stochastic_round(odd, (0, "w", 1), 0)
    assert kept[0] == float("inf") and kept[1].isnan() and kept[2] == -2.0 and kept[3] == 0.0
