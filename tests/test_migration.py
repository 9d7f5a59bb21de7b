"""What docs/migration.md says of the packages beside what its own blocks check (tests/test_docs.py runs those)."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apollo_torch
import fira
import flora_opt.optimizers.torch.flora as flora_opt
import galore_torch
import lomo_optim
import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from torch import nn

import lowrank_ds
from tests.cluster import batches, tiny_llama
from tests.huggingface import Rows, arguments, forget_engine
from tests.training import largest_difference, weights_of

RANK = 8
TARGETS = ["attn", "mlp"]
SAME, OTHER = 1e-5, 1e-3  # largest difference of a weight after STEPS steps: rounding; not the same update
STEPS = 10
OURS = {
    galore_torch.GaLoreAdamW: lowrank_ds.GaLoreAdamW,
    galore_torch.GaLoreAdafactor: lowrank_ds.GaLoreAdafactor,
    fira.FiraAdamW: lowrank_ds.FiraAdamW,
    apollo_torch.APOLLOAdamW: lowrank_ds.ApolloAdamW,
    flora_opt.Flora: lowrank_ds.Flora,
    lomo_optim.Lomo: lowrank_ds.Lomo,
    lomo_optim.AdaLomo: lowrank_ds.AdaLomo,
}
GALORE = {"rank": RANK, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
APOLLO = GALORE | {"scale": 1.0, "scale_type": "channel", "proj": "svd"}
FIRA = {"rank": RANK, "update_proj_gap": 200, "alpha": 0.25, "proj_type": "std"}


def groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Param groups as the packages' examples make them."""
    inner = [p for n, p in model.named_parameters() if p.dim() == 2 and any(t in n for t in TARGETS)]
    ids = {id(p) for p in inner}
    return [{"params": [p for p in model.parameters() if id(p) not in ids]}, {"params": inner, **options}]


def trained(make: Callable[[nn.Module], Any], steps: int = STEPS) -> tuple[nn.Module, Any]:
    """The tiny LLaMA after some steps, and its optimizer."""
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        optimizer = make(model)
    for batch in batches(steps):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def apart(ours: Callable, theirs: Callable) -> float:
    """Largest difference of a weight."""
    return largest_difference(*(weights_of(trained(make)[0]) for make in (ours, theirs)))


@pytest.mark.parametrize("theirs", OURS, ids=lambda c: c.__name__)
def test_arguments_have_the_packages_names(theirs: type) -> None:
    """Every argument of the package's class is an option here, but those the page's tables name; so are defaults."""
    ours = OURS[theirs].OPTIONS
    renamed = {"self", "params", "model", "no_deprecation_warning"}
    told = {"relative_step", "beta1", "rank", "loss_scale", "loss_scale_args"}  # another default, by the tables
    for name, argument in inspect.signature(theirs.__init__).parameters.items():
        if name not in renamed:
            assert name in ours, f"{theirs.__name__} takes {name}"
            assert name in told or ours[name] == argument.default, (name, ours[name], argument.default)


def test_helpers_have_the_packages_arguments() -> None:
    """divide_params and create_lorafa_optimizer: the same names in the same order."""
    for ours, theirs in (
        (lowrank_ds.divide_params, fira.divide_params),
        (lowrank_ds.create_lorafa_optimizer, create_lorafa_optimizer),
    ):
        wanted = list(inspect.signature(theirs).parameters)
        assert list(inspect.signature(ours).parameters)[: len(wanted)] in (
            wanted,
            ["target_modules_list" if name == "target_modules" else name for name in wanted],
        )


def test_differences_of_the_first_table() -> None:
    """Signs after a second basis, decay order, random matrices: each is there, and is what separates the two."""
    exact = {"lr": 0.01, "subspace": "svd"}
    cases = [
        (galore_torch.GaLoreAdamW, GALORE, exact, {}, SAME, 0),
        (galore_torch.GaLoreAdamW, GALORE | {"update_proj_gap": 3}, exact, {}, 1, OTHER),
        (galore_torch.GaLoreAdamW, GALORE, exact, {"weight_decay": 0.1}, 1e-2, 1e-4),
        (galore_torch.GaLoreAdamW, GALORE, {"lr": 0.01}, {}, 1e-1, SAME),  # power
        (apollo_torch.APOLLOAdamW, APOLLO, {"lr": 0.01}, {}, SAME, 0),
        (apollo_torch.APOLLOAdamW, APOLLO | {"proj": "random"}, {"lr": 0.01}, {}, 1, OTHER),
    ]
    for theirs, options, settings, more, most, least in cases:
        found = apart(
            lambda m, c=OURS[theirs], o=options, s=settings, k=more: c(groups(m, **o), **s, **k),
            lambda m, c=theirs, o=options, k=more: c(groups(m, **o), lr=0.01, **k),
        )
        print(f"{theirs.__name__} {options} {more}: {found:.1e}")
        assert least <= found <= most


def galore(m: nn.Module) -> Any:
    return galore_torch.GaLoreAdamW(groups(m, **GALORE), lr=0.01)


STATES = {
    "galore-torch": (galore, lambda m: lowrank_ds.GaLoreAdamW(groups(m, **GALORE))),
    "fira": (
        lambda m: fira.FiraAdamW(groups(m, **FIRA), lr=0.01),
        lambda m: lowrank_ds.FiraAdamW(groups(m, **FIRA)),
    ),
    "apollo-torch": (
        lambda m: apollo_torch.APOLLOAdamW(groups(m, **APOLLO), lr=0.01),
        lambda m: lowrank_ds.ApolloAdamW(groups(m, **APOLLO)),
    ),
    "flora-opt": (
        lambda m: flora_opt.Flora(groups(m, rank=RANK), lr=0.01, beta1=0.9),
        lambda m: lowrank_ds.Flora(groups(m, rank=RANK), lr=0.01, beta1=0.9),
    ),
}


@pytest.mark.parametrize("package", STATES)
def test_states_are_refused(package: str) -> None:
    """By name, and before anything changes."""
    theirs, ours = STATES[package]
    state = trained(theirs, 1)[1].state_dict()
    model, optimizer = trained(ours, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((ValueError, KeyError), match="group0.param0|another optimizer"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()["state"]
    for key, tensors in before["state"].items():
        for name, value in tensors.items():
            assert torch.equal(value, after[key][name])


def test_pefts_state_is_refused() -> None:
    """LoRA-FA: state under strings."""

    def lora() -> nn.Module:
        torch.manual_seed(0)
        return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))

    (one, theirs), (two, ours) = (
        (m, make(m, r=4, lora_alpha=8, lr=0.01))
        for make, m in ((create_lorafa_optimizer, lora()), (lowrank_ds.create_lorafa_optimizer, lora()))
    )
    for model, optimizer in ((one, theirs), (two, ours)):
        model(input_ids=batches(1)[0], labels=batches(1)[0]).loss.backward()
        optimizer.step()
    with pytest.raises(ValueError):
        ours.load_state_dict(theirs.state_dict())


# -- transformers' own GaLore and APOLLO ------------------------------------------------------------------------------
def through_trainer(folder: Path, name: str | None, options: dict[str, Any], **settings: Any) -> tuple[dict, Any]:
    """Weights and optimizer after Trainer's STEPS steps; name None: options are TrainingArguments (theirs)."""
    from transformers import Trainer

    plain = {"max_steps": STEPS, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, **settings}
    model, args = tiny_llama(), arguments(folder, **plain, **({} if name else options))
    ours = {"optimizer_cls_and_kwargs": lowrank_ds.for_trainer(name, args, **options)} if name else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = Trainer(model, args, train_dataset=Rows(STEPS), **ours)
        trainer.train()
    forget_engine()
    return weights_of(model), getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def theirs_of(optim: str, more: str = "") -> dict[str, Any]:
    """TrainingArguments of transformers' own low-rank optimizers."""
    return {"optim": optim, "optim_target_modules": TARGETS, "optim_args": f"rank={RANK}{more}"}


TRAINER = {
    "galore_adamw": ("", "GaLoreAdamW", {}, {}),
    "galore_adafactor": ("", "GaLoreAdafactor", {"scale_parameter": False}, {}),
    "apollo_adamw": (",proj=svd", "ApolloAdamW", {}, {"adam_epsilon": 1e-6}),
}


@pytest.mark.parametrize("optim", TRAINER)
def test_trainers_own_are_equal(optim: str, tmp_path: Path) -> None:
    """The same weights with the options the page's table gives."""
    more, name, extra, settings = TRAINER[optim]
    theirs, _ = through_trainer(tmp_path / "theirs", None, theirs_of(optim, more), **settings)
    options = {"rank": RANK, "target_modules": TARGETS, "subspace": "svd", **extra}
    ours, _ = through_trainer(tmp_path / "ours", name, options, **settings)
    assert largest_difference(ours, weights_of(tiny_llama())) > 0.05
    assert largest_difference(ours, theirs) < 1e-4


def test_trainer_drops_weight_decay_and_epsilon(tmp_path: Path) -> None:
    """What the page warns of is still so (if this fails, transformers has mended it: change the page)."""
    _, found = through_trainer(tmp_path / "a", None, theirs_of("galore_adamw"), weight_decay=0.1, adam_epsilon=1e-7)
    assert {(g["weight_decay"], g["eps"]) for g in found.param_groups} == {(0.0, 1e-6)}
    _, found = through_trainer(tmp_path / "b", None, theirs_of("apollo_adamw"), weight_decay=0.1)
    assert [(g["weight_decay"], g["eps"], "rank" in g) for g in found.param_groups] == [
        (0.0, 1e-6, False),
        (0.0, 1e-8, True),
    ]
    _, found = through_trainer(tmp_path / "c", "ApolloAdamW", {"rank": RANK}, weight_decay=0.1)
    assert [(g["weight_decay"], g["eps"]) for g in found.param_groups] == [(0.1, 1e-6), (0.1, 1e-6), (0.0, 1e-6)]


def test_lomo_through_trainer(tmp_path: Path) -> None:
    """for_trainer("Lomo", layerwise=True) equals optim="lomo"."""
    settings = {"max_grad_norm": 0.0, "learning_rate": 0.5}
    theirs, _ = through_trainer(tmp_path / "theirs", None, {"optim": "lomo"}, **settings)
    ours, _ = through_trainer(tmp_path / "ours", "Lomo", {"layerwise": True}, **settings)
    assert largest_difference(ours, weights_of(tiny_llama())) > 0.01
    assert largest_difference(ours, theirs) < SAME
