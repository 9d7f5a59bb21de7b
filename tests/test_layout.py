"""Properties of layouts: any shape, any cuts or tiles. Every entry is owned once, and every recipe ignores them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_ds import linalg, pipeline
from lowrank_ds.algorithms import ApolloAdamW, FiraAdamW, Flora, GaLoreAdafactor, GaLoreAdamW
from lowrank_ds.job import Job
from lowrank_ds.layout import Flat, Layout, Tiled, torch_chunks
from lowrank_ds.requests import finish_alone
from tests.simulation import cuts_of, layouts, run_ranks

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
PLACES = st.lists(st.integers(0, 90), min_size=0, max_size=5)
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


@PROPERTY
@given(SHAPES, PLACES)
def test_every_entry_lies_in_one_block_of_one_rank(shape: tuple[int, int], places: list[int]) -> None:
    """Blocks, and their pieces, tile the matrix; pad and unpad are inverse; rows are owned once; chunks tile totals."""
    m, n = shape
    matrix, seen = torch.arange(m * n), torch.zeros(m, n, dtype=torch.int64)
    owned, chunks = [], []
    for layout in layouts(shape, cuts_of(m * n, places)):
        entries = matrix[slice(*layout.span(layout.rank))]
        assert len(layout.blocks) <= 3
        for block in layout.blocks:
            whole, part = matrix.view(m, n)[layout.rows_axis.window], seen[layout.rows_axis.window]
            assert torch.equal(block.of(entries), whole[block.rows, block.cols])
            for piece in block.split(4):
                assert torch.equal(piece.of(entries), whole[piece.rows, piece.cols])
                assert layout.position(piece) == (int(piece.of(entries)[0, 0]), n)
                assert piece.of(entries).numel() <= 4 or piece.of(entries).shape[0] == 1
                part[piece.rows, piece.cols] += 1
        assert torch.equal(layout.unpad(layout.pad(entries)), entries)
        owned += list(range(m))[layout.rows_axis.window][layout.owned_rows]
        even = layout.even(7)
        chunks += list(range(*even.kept[layout.rank]))
    assert (seen == 1).all()
    assert owned == list(range(m))
    assert chunks == list(range(7))


def entries_of(layout: Layout, matrix: torch.Tensor) -> torch.Tensor:
    """A copy of what a rank holds of the matrix (m, n), 1-D."""
    if isinstance(layout, Flat):
        return matrix.reshape(-1)[slice(*layout.span(layout.rank))].clone()
    return matrix[layout.rows_axis.window, layout.cols_axis.window].reshape(-1)


def tiles(shape: tuple[int, int], rows: int, cols: int, order: int) -> list[Tiled]:
    """rows x cols ranks with a rectangle each (torch.chunk's intervals), in some order of the ranks."""
    grid = [(r, c) for r in torch_chunks(shape[0], rows) for c in torch_chunks(shape[1], cols)]
    permutation = torch.randperm(len(grid), generator=torch.Generator().manual_seed(order))
    mixed = tuple(grid[i] for i in permutation)
    return [Tiled(shape, mixed, rank, group="simulated") for rank in range(len(grid))]


GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))


def some_ranks(shape: tuple[int, int], places: list[int], grid: tuple[int, int, int] | None) -> list[Layout]:
    """Flat cuts at `places`, or tiles of a grid."""
    return layouts(shape, cuts_of(shape[0] * shape[1], places)) if grid is None else tiles(shape, *grid)


@PROPERTY
@given(SHAPES, GRIDS)
def test_tiles_cover_the_matrix_and_count_every_line_once(shape: tuple[int, int], grid: tuple[int, int, int]) -> None:
    """Each entry is held once, each row and column counted once, each line of every axis kept once."""
    m, n = shape
    matrix = torch.arange(m * n).view(m, n)
    ranks = tiles(shape, *grid)
    pieces = {x.rank: entries_of(x, matrix) for x in ranks}
    assert torch.equal(ranks[0].assemble(pieces), matrix)
    assert sum(x.numel for x in ranks) == m * n
    for which, axes in (("rows", [x.rows_axis for x in ranks]), ("cols", [x.cols_axis for x in ranks])):
        total = axes[0].total
        if not axes[0].settled or grid[which == "rows"] == 1:
            kept = sorted(i for axis in axes for i in range(*axis.kept[axis.rank])[axis.owned])
            assert kept == list(range(total)), which
        touched = [list(range(total))[axis.window] for axis in axes]
        owned = [x.owned_rows if which == "rows" else x.owned_cols for x in ranks]
        assert sorted(i for part, own in zip(touched, owned, strict=True) for i in part[own]) == list(range(total))
    for x in ranks:
        for block in x.blocks:
            assert x.position(block)[0] == int(block.of(pieces[x.rank])[0, 0])


@PROPERTY
@given(SHAPES, PLACES, st.none() | GRIDS, st.integers(0, 5))
def test_moves_equal_the_whole_matrix(shape, places, grid, owner: int) -> None:
    """complete, spread, send_to, deal and even axes, on any cuts or tiles, equal plain indexing and sums."""
    m, n = shape
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(m * 10 + n))
    ranks = some_ranks(shape, places, grid)
    owner = min(owner, len(ranks) - 1)
    if not ranks[0].shared:
        return  # a matrix that one rank holds takes part in no exchange
    for which, dim in (("rows_axis", 1), ("cols_axis", 0)):
        axes = [getattr(x, which) for x in ranks]
        sums = matrix.sum(dim).unsqueeze(1)

        def partial(x: Layout, dim=dim) -> torch.Tensor:
            return x.pad(entries_of(x, matrix)).sum(dim).unsqueeze(1)

        kept, _ = run_ranks(ranks, lambda x, which=which, partial=partial: getattr(x, which).complete(partial(x)))
        spread, _ = run_ranks(ranks, lambda x, which=which, kept=kept: getattr(x, which).spread(kept[x.rank]))
        dealt, _ = run_ranks(ranks, lambda x, which=which, s=sums: getattr(x, which).deal(owner, s, 1, s))
        for axis, have, everything, got in zip(axes, kept, spread, dealt, strict=True):
            mine = sums[slice(*axis.kept[axis.rank])]
            torch.testing.assert_close(have, mine, atol=1e-5, rtol=1e-5)
            assert torch.equal(got, mine)
            if axis.window.stop > axis.window.start:
                torch.testing.assert_close(everything, sums[axis.window], atol=1e-5, rtol=1e-5)
    whole, _ = run_ranks(ranks, lambda x: x.send_to(owner, entries_of(x, matrix)))
    assert torch.equal(whole[owner], matrix)
    table = torch.randn(11, 2)
    gathered, _ = run_ranks(ranks, lambda x: x.even(11).spread(table[slice(*x.even(11).kept[x.rank])]))
    for layout, got in zip(ranks, gathered, strict=True):
        takes_part = layout.numel or isinstance(layout, Tiled)
        assert torch.equal(got, table if takes_part else table[:0])


def test_a_row_cut_between_ranks_has_the_same_sum_on_each() -> None:
    """The holders of a cut row add its pieces in the same order: bit-identical moments."""
    ranks = layouts((2, 9), (0, 2, 5, 7, 18))
    matrix = torch.randn(2, 9, generator=torch.Generator().manual_seed(3))
    sums, _ = run_ranks(ranks, lambda x: x.rows_axis.complete(x.pad(entries_of(x, matrix)).sum(1).unsqueeze(1)))
    assert sums[0][0] == sums[1][0] == sums[2][0] == sums[3][0]
    torch.testing.assert_close(sums[3][:, 0], matrix.sum(1))


def group_of(cls: type, **settings_: object) -> dict:
    """A complete param group of an optimizer class."""
    return {**cls.OPTIONS, "lr": 1e-2, **settings_}


RECIPES = [
    (GaLoreAdamW, {"proj_type": "right", "weight_decay": 0.1}),
    (GaLoreAdamW, {"proj_type": "left", "subspace": "power", "on_refresh": "rotate"}),
    (GaLoreAdamW, {"proj_type": "right", "subspace": "power", "on_refresh": "rotate"}),
    (GaLoreAdamW, {"proj_type": "full"}),
    (GaLoreAdafactor, {"proj_type": "std", "beta1": 0.9}),
    (FiraAdamW, {"proj_type": "left"}),
    (FiraAdamW, {"proj_type": "right", "subspace": "randomized", "scaling": "matrix"}),
    (ApolloAdamW, {"proj_type": "std"}),
    (Flora, {"proj_type": "right", "kappa": 2}),
    (Flora, {"proj_type": "left", "kappa": 2}),
]


def train(cls: type, options: dict, ranks: list[Layout], steps: int = 4) -> torch.Tensor:
    """The whole weight after a few steps on the given layout, all ranks simulated in this process."""
    generator = torch.Generator().manual_seed(5)
    shape = ranks[0].shape
    start = torch.randn(shape, generator=generator)
    weights = [entries_of(layout, start) for layout in ranks]
    recipe = cls.recipe(group_of(cls, rank=min(2, *shape), **options))
    states = [initial_state(layout, recipe) for layout in ranks]
    owner = next(layout.rank for layout in ranks if layout.numel)
    for step in range(1, steps + 1):
        grad = torch.randn(shape, generator=generator)
        refresh = step == 1 or (step % 2 == 0 if recipe.momentum else step % 2 == 1)

        def job(layout: Layout, step=step, grad=grad, refresh=refresh) -> Job:
            count = step // 2 if not recipe.momentum else (step > 1) + (step - 1) // 2
            return Job(
                layout, recipe, entries_of(layout, grad), weights[layout.rank], states[layout.rank], (0, "w"), step,
                step, 1e-2, options.get("weight_decay", 0.0), refresh, count, owner,
            )  # fmt: skip

        if ranks[0].shared:
            run_ranks(ranks, lambda layout, job=job: pipeline.update(job(layout), True))
        else:
            finish_alone(pipeline.update(job(ranks[0]), True))
    return ranks[0].assemble({x.rank: weights[x.rank] for x in ranks if x.numel})


def initial_state(layout: Layout, recipe) -> dict[str, torch.Tensor]:
    """Fresh state of one rank."""
    shapes = pipeline.state_shapes(layout, recipe, True)
    local = {name: (layout.numel,) if s.entries else s.local for name, s in shapes.items()}
    return {name: torch.full(shape, float("inf") if name == "residual_norm" else 0.0) for name, shape in local.items()}


@pytest.mark.parametrize(("cls", "options"), RECIPES, ids=lambda v: v.__name__ if isinstance(v, type) else None)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    places=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    grid=st.none() | GRIDS,
    replicated=st.booleans(),
)
def test_recipes_do_not_see_the_layout(cls: type, options: dict, shape, places: list[int], grid, replicated) -> None:
    """Any recipe on any cuts or tiles, also several cuts in one row and ranks that hold nothing, equals one rank."""
    ranks = some_ranks(shape, places, grid)
    if not ranks[0].shared:
        return
    if replicated and cls.OPTIONS.get("subspace", "gaussian") != "gaussian":
        options = {**options, "projector_storage": "replicated"}
    whole = train(cls, options, [Flat.whole(shape)])
    torch.testing.assert_close(train(cls, options, ranks), whole, atol=2e-5, rtol=0)


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
