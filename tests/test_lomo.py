"""Lomo and AdaLomo equal lomo-optim 0.1.1 (as published) and the float64 textbook; what they refuse, they name.

The package steps inside the backward and knows no gradients that are given, so it gets a loss whose gradients are the
test's (`Fused`). It allocates AdaLomo's moments with ``.cuda()``; while it is built that returns the tensor itself.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import lomo_optim
import pytest
import torch
from torch import nn

import lowrank_ds
from tests import reference
from tests.test_published import MATRICES, PLAIN, STEPS, TOLERANCE, assert_different, assert_same, difference, train

NARROW = [(1, 30), (30, 1)]  # the factored second moment is the full one
LOMO_CASES = [{"lr": 3.0}, {"lr": 3.0, "weight_decay": 0.01}]
ADALOMO_CASES = [
    {"lr": 0.05},
    {"lr": 0.05, "weight_decay": 0.5, "clip_threshold": 0.3},
    {"lr": 0.05, "decay_rate": -0.6, "eps": (1e-4, 0.5)},
]
CASES = [("Lomo", hyper) for hyper in LOMO_CASES] + [("AdaLomo", hyper) for hyper in ADALOMO_CASES]
TEXTBOOK = {"Lomo": reference.sgd, "AdaLomo": reference.adalomo}


class Fused:
    """A lomo_optim optimizer that is stepped like any other: the loss sum(W o G) has the gradient G."""

    def __init__(self, name: str, parameters: list[nn.Parameter], **hyper) -> None:
        self.parameters, self.lr, self.two_passes = parameters, hyper["lr"], "clip_grad_norm" in hyper
        self.param_groups: list[dict] = []
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            self.optimizer = getattr(lomo_optim, name)(nn.ParameterList(parameters), **hyper)

    def step(self) -> None:
        grads = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        loss = sum((p * g).sum() for p, g in zip(self.parameters, grads, strict=True))
        if self.two_passes:
            self.optimizer.grad_norm(loss)
        self.optimizer.fused_backward(loss, self.lr)


def theirs(name: str, **hyper):
    """Constructor of the package's optimizer, for `train`."""
    return lambda plain, matrices: Fused(name, [*plain, *matrices], **hyper)


def ours(name: str, before=None, **hyper):
    """Constructor of ours; `before`(parameters) runs before each step."""

    def make(plain: list, matrices: list):
        parameters = [*plain, *matrices]
        optimizer = getattr(lowrank_ds, name)([(f"w{i}", p) for i, p in enumerate(parameters)], **hyper)
        if before is None:
            return optimizer
        return SimpleNamespace(step=lambda: (before(parameters), optimizer.step()), param_groups=[])

    return make


@pytest.mark.parametrize("name, hyper", CASES, ids=str)
def test_equals_the_package(name: str, hyper: dict) -> None:
    assert_same(ours(name, **hyper), theirs(name, **hyper), plain=[*PLAIN, *NARROW])


@pytest.mark.parametrize("name, hyper", CASES, ids=str)
def test_the_textbook_equals_the_package(name: str, hyper: dict) -> None:
    found, moved = train(theirs(name, **hyper))
    start, grads = reference.problem([*PLAIN, *MATRICES], STEPS)
    expected = [TEXTBOOK[name](w, g, **hyper) for w, g in zip(start, grads, strict=True)]
    assert moved > 0.05
    assert difference(expected, found) <= TOLERANCE


@pytest.mark.parametrize("name, lr", [("Lomo", 3.0), ("AdaLomo", 0.05)])
def test_clipping_before_the_step_is_the_packages(name: str, lr: float) -> None:
    """What the refusals of clip_grad_norm and clip_grad_value point to gives the package's numbers."""
    norm, value = nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_
    assert_same(ours(name, lambda p: norm(p, 0.5), lr=lr), theirs(name, lr=lr, clip_grad_norm=0.5))
    assert_same(ours(name, lambda p: value(p, 0.01), lr=lr), theirs(name, lr=lr, clip_grad_value=0.01))


@pytest.mark.parametrize(
    "name, hyper",
    [("Lomo", {"weight_decay": 0.02}), ("Lomo", {"lr": 2.99})]
    + [
        ("AdaLomo", {key: value}) for key, value in [("decay_rate", -0.7), ("clip_threshold", 0.5), ("eps", (1e-30, 1))]
    ],
    ids=str,
)
def test_another_setting_is_seen(name: str, hyper: dict) -> None:
    """The comparison can fail."""
    base = (LOMO_CASES if name == "Lomo" else ADALOMO_CASES)[0]
    assert_different(ours(name, **base | hyper), theirs(name, **base))


def test_state_is_nothing_or_two_means() -> None:
    """Lomo keeps two counters a parameter, AdaLomo besides them one mean a row and one a column."""
    for name, expected in (("Lomo", 2), ("AdaLomo", 2 + 40 + 16)):
        weight = nn.Parameter(torch.ones(40, 16))
        optimizer = getattr(lowrank_ds, name)([("w", weight)])
        optimizer.init_state()
        assert sum(t.numel() for t in optimizer.state[weight].values()) == expected, name


def test_bf16_gradient_that_is_not_finite_changes_nothing() -> None:
    """It is skipped and counted, as everywhere, also by the rule without state."""
    for name in ("Lomo", "AdaLomo"):
        weight = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
        optimizer = getattr(lowrank_ds, name)([("w", weight)], lr=0.5)
        for grad in (1.0, float("nan")):
            before, weight.grad = weight.detach().clone(), torch.full_like(weight, grad)
            optimizer.step()
            assert torch.equal(before, weight) == (grad != 1.0), name
        assert optimizer.skipped() == {"w": 1}


ERRORS = [
    ({"rank": 8}, "rank=8: .*Lomo projects nothing.*GaLoreAdafactor"),
    ({"target_modules": ["attn"]}, "target_modules=.*projects nothing"),
    ({"clip_grad_norm": 1.0}, r'clip_grad_norm must be null.*layerwise\(.*clip="two_pass", max_grad_norm=.*got 1.0'),
    ({"clip_grad_value": 0.1}, "clip_grad_value must be null.*clip_grad_value_ before step"),
    ({"lr": None}, "lr is null; .*Lomo needs a learning rate"),
    ({"update_proj_gap": 200}, "unknown option 'update_proj_gap'"),
]


@pytest.mark.parametrize("cls", [lowrank_ds.Lomo, lowrank_ds.AdaLomo])
def test_what_is_refused_is_named(cls: type) -> None:
    """The package's arguments that are not taken over, and projection."""
    weight = nn.Parameter(torch.ones(8, 8))
    for settings, message in ERRORS:
        with pytest.raises(ValueError, match=message):
            cls([("w", weight)], **settings)
    with pytest.raises(ValueError, match="param group 0: rank=8: .*GaLoreAdafactor"):
        cls([{"params": [weight], "rank": 8}])
    with pytest.raises(TypeError, match="model.named_parameters"):
        cls(nn.Linear(2, 2), lr=0.1)  # lomo-optim takes the model
    scaling = "loss_scale" if cls is lowrank_ds.AdaLomo else "loss_scale_args"
    with pytest.raises(ValueError, match=f"{scaling} must be null.*belongs to the engine"):
        cls([("w", weight)], **{scaling: 1024})
    assert getattr(torch.optim, cls.__name__) is cls  # a ds_config can name it


def test_pretrain_builds_them_from_names() -> None:
    """launch/optimizers.py needs no rank for them, and still gives embeddings, head and norms their own rate."""
    from launch.optimizers import end_names, torch_optimizer
    from tests.cluster import tiny_llama

    model = tiny_llama()
    optimizer = torch_optimizer("AdaLomo", model, {"lr": 0.1}, 0.2, end_names(model))
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates["lm_head.weight"] == rates["model.norm.weight"] == 0.2
    assert rates["model.layers.1.mlp.up_proj.weight"] == 0.1
    with pytest.raises(SystemExit, match="--optimizer Lomo .*rank=8"):
        torch_optimizer("Lomo", model, {"lr": 0.1, "rank": 8}, None, end_names(model))
