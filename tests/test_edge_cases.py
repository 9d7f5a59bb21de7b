"""Gradients and parameters that break other packages: each has one defined behaviour."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

import lowrank_ds
from lowrank_ds import ApolloAdamW, FiraAdamW, Flora, GaLoreAdafactor, GaLoreAdamW, job, param_groups
from tests import training
from tests.cluster import batches, tiny_llama

PROJECTING = [
    (GaLoreAdamW, {"update_proj_gap": 3}),
    (GaLoreAdafactor, {"update_proj_gap": 3}),
    (FiraAdamW, {"update_proj_gap": 3}),
    (ApolloAdamW, {"update_proj_gap": 3}),
    (Flora, {"kappa": 3}),
]
EACH = pytest.mark.parametrize(("cls", "options"), PROJECTING, ids=lambda v: v.__name__ if isinstance(v, type) else "")


def run(cls: type, options: dict, grads: list[torch.Tensor | None], weight: torch.Tensor | None = None, **more):
    """(weights after the given gradients, the optimizer) for one matrix named "w"."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(12, 8) if weight is None else weight.clone())
    optimizer = cls([("w", p)], **{"lr": 1e-2, "rank": 4, **options, **more})
    for grad in grads:
        p.grad = None if grad is None else grad.clone()
        optimizer.step()
    return p.detach().clone(), optimizer


def gradients(count: int, shape: tuple[int, ...] = (12, 8)) -> list[torch.Tensor]:
    """Random gradients, the same at every call."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@EACH
def test_zero_first_gradients_change_nothing_at_all(cls: type, options: dict) -> None:
    """Steps before the first real gradient fix no basis, no limiter, no clock: the run equals one without them."""
    grads = gradients(8)
    plain, _ = run(cls, options, grads, weight_decay=0.1)
    delayed, _ = run(cls, options, [torch.zeros(12, 8), torch.zeros(12, 8), *grads], weight_decay=0.1)
    assert torch.equal(plain, delayed)


@EACH
@pytest.mark.parametrize("value", [1.0, float("nan")])
@pytest.mark.parametrize("rank", [4, None])
def test_what_a_gpu_masks_a_cpu_skips(cls: type, options: dict, value: float, rank: int | None, monkeypatch) -> None:
    """Where looking at the device would wait, results are masked; where it would not, they are skipped: the same."""
    if rank is None and cls is Flora:
        options = options | {"beta1": None}
    grads = [*gradients(4), torch.full((12, 8), value), *gradients(3)]
    more = {"weight_decay": 0.1, "rank": rank}
    skipped, one = run(cls, options, grads, **more)
    monkeypatch.setattr(job, "_host_sees", lambda live: False)
    masked, other = run(cls, options, grads, **more)
    assert torch.equal(skipped, masked) and skipped.isfinite().all()
    for a, b in zip(one.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("cls", [FiraAdamW, ApolloAdamW])
def test_masking_copies_some_rows_at_a_time(cls: type, monkeypatch) -> None:
    """What is not looked at is masked in pieces with the same result: no second gradient is made."""
    grads, pieces = gradients(3), []
    whole, _ = run(cls, {}, grads)
    monkeypatch.setattr(job, "_host_sees", lambda live: False)
    monkeypatch.setattr(job, "_PIECE", 3 * 8)
    where = job.where_live
    monkeypatch.setattr(job, "where_live", lambda live, x: (pieces.append(tuple(x.shape)), where(live, x))[1])
    masked, _ = run(cls, {}, grads)
    assert torch.equal(whole, masked)
    assert pieces.count((3, 8)) == 4 * len(grads) and (12, 8) not in pieces


@EACH
@pytest.mark.parametrize("value", [1.0, float("nan")])
@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("unfactored", [False, True])
def test_gradients_are_left_as_they_are(
    cls: type, options: dict, value: float, rank: int | None, unfactored: bool
) -> None:
    """A step only reads `p.grad`, also one that is not usable."""
    if unfactored:
        if cls is not Flora:
            return  # the others have no such option
        options = options | {"factorize_second_moment": False}
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(12, 8))
    optimizer = cls(
        [("w", p)], **{"lr": 1e-2, **options, "rank": rank, **({"beta1": None} if cls is Flora and not rank else {})}
    )
    for grad in [*gradients(2), torch.full((12, 8), value)]:
        p.grad = grad.clone()
        optimizer.step()
        assert torch.equal(p.grad.nan_to_num(7.0), grad.nan_to_num(7.0))


@EACH
def test_a_zero_gradient_later_does_not_lock(cls: type, options: dict) -> None:
    """A zero gradient in the middle (also at a refresh step) leaves the run able to move at its usual pace."""
    grads = gradients(12)
    before, _ = run(cls, options, [*grads[:3], torch.zeros(12, 8), *grads[3:6]])
    after, _ = run(cls, options, [*grads[:3], torch.zeros(12, 8), *grads[3:12]])
    usual, _ = run(cls, options, grads[:6])
    later, _ = run(cls, options, grads[:12])
    assert (after - before).norm() > 0.3 * (later - usual).norm() > 0


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_gradient_inside_the_subspace_does_not_lock_the_residual(noise: float) -> None:
    """A first gradient of rank <= r has no residual but rounding noise, which must not become the limiter's memory."""
    generator = torch.Generator().manual_seed(4)
    low = torch.randn(12, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    first = low + noise * torch.randn(12, 8, generator=generator)
    options = {"update_proj_gap": 100, "residual": "paper"}
    _, optimizer = run(FiraAdamW, options, [first, *gradients(3)])
    _, usual = run(FiraAdamW, options, gradients(4))
    norms = [float(o.state_dict()["state"][0]["residual_norm"]) for o in (optimizer, usual)]
    assert norms[0] > 0.1 * norms[1] > 0


@EACH
@pytest.mark.parametrize("step", [0, 2, 3], ids=["first", "between", "refresh"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gradient_is_skipped_and_counted(
    cls: type, options: dict, step: int, value: float, caplog
) -> None:
    """Weights do not move, moments stay finite, the basis is kept, the next step works; it is counted and reported."""
    grads = gradients(7)
    bad = grads[0].clone()
    bad[5, 3] = value
    start, _ = run(cls, options, grads[:step])
    with caplog.at_level(logging.WARNING, "lowrank_ds"):
        stopped, optimizer = run(cls, options, [*grads[:step], bad])
    assert torch.equal(start, stopped)
    if step == 3 and cls is not Flora or step == 0:
        assert "w: the gradient is not finite" in caplog.text
    if step:
        assert optimizer.skipped() == {"w": 1}
    after, optimizer = run(cls, options, [*grads[:step], bad, *grads[step:]])
    assert after.isfinite().all() and not torch.equal(after, stopped)
    assert all(t.isfinite().all() for k, t in optimizer.state_dict()["state"][0].items() if k != "residual_norm")


def test_a_skipped_refresh_is_made_up_for() -> None:
    """When the gradient of a refresh step is not finite, the basis is renewed at the next step."""
    grads = gradients(5)
    bad = torch.full((12, 8), float("nan"))
    _, optimizer = run(GaLoreAdamW, {"update_proj_gap": 3}, [*grads[:3], bad])
    assert optimizer.state_dict()["state"][0]["refreshes"] == 1
    _, optimizer = run(GaLoreAdamW, {"update_proj_gap": 3}, [*grads[:3], bad, grads[3]])
    assert optimizer.state_dict()["state"][0]["refreshes"] == 2


@pytest.mark.parametrize("recipe", ["galore", "fira", "apollo", "flora"])
def test_frozen_and_unused_parameters_are_left_alone(recipe: str) -> None:
    """A frozen and an unused matrix keep their bits (no decay either), the others train as without them."""
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.unused = nn.Linear(20, 16)
    start = training.weights_of(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    name, settings = training.settings_of(recipe, weight_decay=0.1)
    optimizer = getattr(lowrank_ds, name)(named, **settings)
    for batch in batches(3):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    end = training.weights_of(model)
    still = {n for n in start if torch.equal(start[n], end[n])}
    assert still == {"model.layers.0.self_attn.q_proj.weight", "unused.weight", "unused.bias"}


def test_a_tied_embedding_is_one_plain_parameter() -> None:
    """The tied matrix appears once, is not projected, and trains with the plain rule."""
    model = tiny_llama(tie_word_embeddings=True)
    projected, plain = param_groups(model, rank=8)
    assert "model.embed_tokens.weight" in plain["param_names"]
    assert not any("embed" in n or "lm_head" in n for n in projected["param_names"])
    optimizer = GaLoreAdamW([projected, plain], lr=1e-2)
    start = training.weights_of(model)
    batch = batches(1)[0]
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    assert optimizer.state[model.get_input_embeddings().weight]["exp_avg"].shape == (61, 36)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not torch.equal(start["model.embed_tokens.weight"], model.lm_head.weight)


def test_a_vector_in_a_projected_group_is_refused_by_name() -> None:
    """Asking to project a 1-D parameter raises; selecting by name takes the matrices and leaves vectors plain."""
    layer = nn.Linear(8, 6)
    with pytest.raises(ValueError, match=r"bias has shape \(6,\).*group with 'rank'"):
        GaLoreAdamW([{"params": list(layer.named_parameters()), "rank": 2}], lr=1e-2)
    optimizer = GaLoreAdamW(layer.named_parameters(), lr=1e-2, rank=2)
    assert "1 parameters projected (rank [2]), 1 plain: bias" in optimizer.summary()


def same_as_matrix(parameter: torch.Tensor, options: dict, view: tuple[int, int]) -> None:
    """Training `parameter` equals training its (m, n) view."""
    grads = gradients(7, tuple(parameter.shape))
    direct, _ = run(FiraAdamW, {"update_proj_gap": 3, "rank": 2, **options}, grads, parameter)
    matrix, _ = run(
        FiraAdamW, {"update_proj_gap": 3, "rank": 2}, [g.reshape(view) for g in grads], parameter.reshape(view)
    )
    assert torch.equal(direct.reshape(view), matrix)


def test_convolutions_are_matrices_of_out_by_rest() -> None:
    """A 4-D weight (out, in, kh, kw) is trained as out x (in kh kw)."""
    same_as_matrix(torch.randn(6, 4, 3, 3), {}, (6, 36))


def test_channels_last_weights_are_written_back() -> None:
    """A 4-D weight with other strides gets the same values as a contiguous one."""
    weight = torch.randn(6, 4, 3, 3)
    grads = gradients(5, (6, 4, 3, 3))
    plain, _ = run(FiraAdamW, {"update_proj_gap": 3, "rank": 2}, grads, weight)
    p = nn.Parameter(weight.clone().to(memory_format=torch.channels_last))
    optimizer = FiraAdamW([("w", p)], lr=1e-2, rank=2, update_proj_gap=3)
    for grad in grads:
        p.grad = grad.clone().to(memory_format=torch.channels_last)
        optimizer.step()
    assert p.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, p.detach())


def test_stacked_experts_are_independent_matrices() -> None:
    """A 3-D weight (experts, m, n) has a basis per expert; an expert without gradient does not start its clock."""
    exact = {"update_proj_gap": 3, "rank": 2, "subspace": "svd"}  # random sketches go by the name, which differs
    weight, grads = torch.randn(3, 6, 5), gradients(7, (3, 6, 5))
    for g in grads[:2]:
        g[1] = 0
    together, optimizer = run(FiraAdamW, exact, grads, weight)
    state = optimizer.state_dict()["state"][0]
    assert [int(state[f"w[{e}]::step"]) for e in range(3)] == [7, 5, 7]
    for e in range(3):
        alone, _ = run(FiraAdamW, exact, [g[e] for g in grads], weight[e])
        assert torch.equal(together[e], alone)


def test_matricize_flatten_makes_one_matrix_of_a_stack() -> None:
    """matricize="flatten": a Conv1d weight (out, in, k) is out x (in k)."""
    same_as_matrix(torch.randn(6, 4, 3), {"matricize": "flatten"}, (6, 12))


def test_bf16_weights_round_stochastically_and_keep_fp32_state() -> None:
    """Updates far below half a bf16 ulp still arrive on average; with rounding to nearest nothing moves.

    (Over 9600 entries the mean of the rounding is some percent of the movement, whatever is drawn.)
    """
    grads = [torch.ones(120, 80).bfloat16() + torch.eye(120, 80).bfloat16()] * 40
    options = {"update_proj_gap": 100, "rank": 8, "scale": 1.0, "lr": 1e-4}
    start = torch.ones(120, 80).bfloat16()
    moved, optimizer = run(GaLoreAdamW, options, grads, start)
    exact, _ = run(GaLoreAdamW, options, [g.float() for g in grads], start.float())
    stuck, _ = run(GaLoreAdamW, {**options, "stochastic_rounding": False}, grads, start)
    assert torch.equal(stuck, start)
    assert abs((moved.float() - exact).mean()) < 0.1 * abs((exact - 1).mean())
    state = optimizer.state_dict()["state"][0]
    assert all(t.dtype == torch.float32 for t in state.values())


def test_float64_weights_keep_their_precision() -> None:
    """A float64 weight is updated in place; bits below fp32's survive an update that does not reach them."""
    weight = torch.full((12, 8), 1.0 + 1e-12, dtype=torch.float64)
    moved, _ = run(FiraAdamW, {"update_proj_gap": 3}, [g.double() for g in gradients(2)], weight, lr=1e-20)
    assert torch.equal(moved, weight)


@EACH
def test_a_finite_gradient_too_large_to_square_is_skipped(cls: type, options: dict) -> None:
    """1e20 is finite, its square is not: the update is skipped and counted, and the run goes on."""
    grads = gradients(6)
    huge = grads[0].clone()
    huge[0, 0] = 1e20
    before, _ = run(cls, options, grads[:2])
    skipped, optimizer = run(cls, options, [*grads[:2], huge])
    assert torch.equal(before, skipped)
    assert optimizer.skipped() == {"w": 1}
    after, _ = run(cls, options, [*grads[:2], huge, *grads[2:]])
    assert after.isfinite().all() and not torch.equal(after, skipped)


@pytest.mark.parametrize("cls", [GaLoreAdafactor, Flora])
@pytest.mark.parametrize("rank", [None, 4])
def test_adafactor_survives_empty_rows_beside_large_gradients(cls: type, rank: int | None) -> None:
    """Rows without gradient (tokens not seen) beside large ones stay finite and unmoved."""
    grads = [g * 1e6 for g in gradients(4)]
    for g in grads:
        g[3] = 0
    start, _ = run(cls, {}, [], rank=rank)
    end, _ = run(cls, {}, grads, rank=rank)
    assert end.isfinite().all() and not torch.equal(start, end)
    if rank is None:
        assert torch.equal(start[3], end[3])


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
def test_two_sided_projection_does_not_amplify_rounding(scale: float) -> None:
    """proj_type="full": the coordinates beside the diagonal are noise at a refresh; one ulp must not become a step."""
    options = {"update_proj_gap": 3, "proj_type": "full", "scale": 1.0}
    grads = [g * scale for g in gradients(4)]
    nudged = [
        g * (1 + 1e-7 * torch.randn(12, 8, generator=torch.Generator().manual_seed(i))) for i, g in enumerate(grads)
    ]
    one, other = (run(GaLoreAdamW, options, series)[0] for series in (grads, nudged))
    start, _ = run(GaLoreAdamW, options, [])
    assert (one - other).abs().max() < 1e-3 * (one - start).abs().max()


def test_a_matrix_unfrozen_later_is_projected() -> None:
    """Selection does not depend on requires_grad: what is frozen at construction trains projected afterwards."""
    layer = nn.Linear(8, 6)
    layer.weight.requires_grad_(False)
    optimizer = GaLoreAdamW(layer.named_parameters(), lr=1e-2, rank=2)
    layer.weight.requires_grad_(True)
    layer(torch.ones(3, 8)).square().sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["exp_avg"].shape == (8, 2)  # wide: lines are the 8 columns


def test_state_replaced_from_outside_is_taken_up() -> None:
    """optimizer.state is the truth: tensors put there (moved, converted, cleared) are the ones the next step uses."""
    grads = gradients(4)
    straight, _ = run(FiraAdamW, {}, grads)
    _, optimizer = run(FiraAdamW, {}, grads[:2])
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}
    for grad in grads[2:]:
        p.grad = grad.clone()
        optimizer.step()
    assert torch.equal(straight, p.detach())
    assert optimizer.state_dict()["state"][0]["step"] == 4
    optimizer.state.clear()
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_train_on(copier) -> None:
    """copy.deepcopy and pickle of (parameter, optimizer) give a working pair with the same future."""
    grads = gradients(6)
    straight, _ = run(FiraAdamW, {"update_proj_gap": 3}, grads)
    _, optimizer = run(FiraAdamW, {"update_proj_gap": 3}, grads[:2])
    other = copier(optimizer)
    (p,) = other.param_groups[0]["params"]
    for grad in grads[2:]:
        p.grad = grad.clone()
        other.step()
    assert torch.equal(straight, p.detach())


def test_a_plain_group_can_be_added_and_a_bad_one_leaves_no_trace() -> None:
    """add_param_group: vectors join a by-name optimizer as plain; a refused group is not kept."""
    optimizer = GaLoreAdamW([("w", nn.Parameter(torch.randn(8, 6)))], lr=1e-2, rank=2)
    optimizer.add_param_group({"params": [("late.bias", nn.Parameter(torch.randn(6)))]})
    with pytest.raises(ValueError, match="two parameters are named 'w'"):
        optimizer.add_param_group({"params": [("w", nn.Parameter(torch.randn(8, 6)))]})
    with pytest.raises(ValueError, match="rank 9 is larger than"):
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.randn(8, 6)))], "rank": 9})
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.randn(8, 6)))]})
    assert "2 parameters projected (rank [2]), 1 plain: late.bias" in optimizer.summary()


def test_groups_use_their_own_targets() -> None:
    """target_modules of a group choose within that group."""
    params = {n: nn.Parameter(torch.randn(8, 6)) for n in ("a.q", "a.v", "b.q", "b.v")}
    groups = [
        {"params": [(n, params[n]) for n in ("a.q", "a.v")], "target_modules": ["q"]},
        {"params": [(n, params[n]) for n in ("b.q", "b.v")], "target_modules": ["v"]},
    ]
    assert "2 plain: a.v, b.q" in GaLoreAdamW(groups, lr=1e-2, rank=2).summary()
    with_rank = [{**group, "rank": 2} for group in groups]
    assert "2 plain: a.v, b.q" in GaLoreAdamW(with_rank, lr=1e-2).summary()
    with pytest.raises(ValueError, match="target_modules: 'k' matches no parameter"):
        GaLoreAdamW([{**groups[0], "rank": 2, "target_modules": ["k"]}], lr=1e-2)


def test_randomness_is_keyed_by_name_not_by_position() -> None:
    """Reordering the parameters does not change a run with random bases (apollo-torch: it does)."""
    grads = gradients(6)

    def train(order: list[str]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        params = {n: nn.Parameter(torch.randn(12, 8, generator=torch.Generator().manual_seed(1))) for n in "ab"}
        optimizer = ApolloAdamW([(n, params[n]) for n in order], lr=1e-2, rank=4, update_proj_gap=2)
        for grad in grads:
            for p in params.values():
                p.grad = grad.clone()
            optimizer.step()
        return params

    one, other = train(["a", "b"]), train(["b", "a"])
    assert torch.equal(one["a"], other["a"]) and torch.equal(one["b"], other["b"])
    assert not torch.equal(one["a"], one["b"])


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact_and_weights_only(cls: type, options: dict, dtype: torch.dtype, tmp_path) -> None:
    """Save after 4 of 9 steps, load with torch's safe loader into a new optimizer, continue: the same bits."""
    grads = [g.to(dtype) for g in gradients(9)]
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    straight, _ = run(cls, options, grads, weight)
    half, optimizer = run(cls, options, grads[:4], weight)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    p = nn.Parameter(half.clone())
    resumed = cls([("w", p)], **{"lr": 1e-2, "rank": 4, **options})
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for grad in grads[4:]:
        p.grad = grad.clone()
        resumed.step()
    assert torch.equal(straight, p.detach())


def test_init_state_creates_everything_the_first_step_would() -> None:
    """init_state() before any step makes the same keys and shapes; an empty state loads as it is."""
    p = nn.Parameter(torch.randn(12, 8))
    optimizer = FiraAdamW([("w", p)], lr=1e-2, rank=4)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.init_state()
    before = {k: tuple(v.shape) for k, v in optimizer.state[p].items()}
    p.grad = torch.randn(12, 8)
    optimizer.step()
    assert before == {k: tuple(v.shape) for k, v in optimizer.state[p].items()}


def test_schedulers_and_closures_work() -> None:
    """A torch LR scheduler changes the step size, and step(closure) returns the loss."""
    p = nn.Parameter(torch.randn(12, 8))
    optimizer = GaLoreAdamW([("w", p)], lr=1.0, rank=4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    scheduler.step()
    held = p.detach().clone()
    optimizer.step(closure)
    assert torch.equal(held, p.detach())
