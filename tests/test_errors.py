"""Misuse gets an error that names the parameter or key, says what is wrong and what to do, before anything changes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lowrank_ds
from lowrank_ds import (
    ApolloAdamW,
    ApolloMini,
    FiraAdamW,
    Flora,
    GaLoreAdafactor,
    GaLoreAdamW,
    divide_params,
    param_groups,
)
from lowrank_ds.engines import deepspeed as zero
from tests.cluster import launch, quiet_deepspeed, tiny_llama
from tests.training import ds_config, train_engine


def model() -> nn.Module:
    """Two linear layers and an embedding."""
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 4))


def named() -> list[tuple[str, nn.Parameter]]:
    """Named parameters without the embedding."""
    return [(n, p) for n, p in model().named_parameters() if not n.startswith("0")]


CONSTRUCTOR = [
    # unknown and misspelt names
    (FiraAdamW, {"update_proj_gab": 5}, r"unknown option 'update_proj_gab'; did you mean 'update_proj_gap'"),
    (FiraAdamW, {"scale": 0.25}, r"FiraAdamW: unknown option 'scale'.*Known options:.*alpha"),
    (Flora, {"update_proj_gap": 5}, r"Flora: unknown option 'update_proj_gap'.*kappa"),
    # values out of range
    (GaLoreAdamW, {"rank": 0}, r"rank must be a whole number >= 1.*got 0"),
    (GaLoreAdamW, {"rank": 4.0}, r"rank must be a whole number"),
    (GaLoreAdamW, {"rank": 5}, r"rank 5 is larger than min\(m, n\) = 4 of 2\.weight.*exclude"),
    (GaLoreAdamW, {"proj_type": "standard"}, r"proj_type must be one of 'std', 'reverse_std'.*got 'standard'"),
    (GaLoreAdamW, {"subspace": "qr"}, r"subspace must be one of 'svd'"),
    (GaLoreAdamW, {"on_refresh": "drop"}, r"on_refresh must be one of 'keep', 'rotate', 'reset'"),
    (GaLoreAdamW, {"lr": float("nan")}, r"lr must be a finite number >= 0; got nan"),
    (GaLoreAdamW, {"lr": float("inf")}, r"lr must be a finite number >= 0"),
    (GaLoreAdamW, {"lr": -0.1}, r"lr must be a finite number >= 0"),
    (GaLoreAdamW, {"lr": None}, r"lr is null"),
    (GaLoreAdamW, {"lr": "auto"}, r'lr is "auto", which only Hugging Face'),
    (GaLoreAdamW, {"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
    (GaLoreAdamW, {"eps": (1e-30, 1e-3)}, r"eps must be one number"),
    (GaLoreAdamW, {"weight_decay": -1}, r"weight_decay must be a finite number >= 0"),
    (GaLoreAdamW, {"update_proj_gap": 0}, r"update_proj_gap must be a whole number of steps >= 1"),
    (GaLoreAdamW, {"scale": 0.0}, r"scale must be a finite number > 0"),
    (GaLoreAdamW, {"seed": -1}, r"seed must be a whole number >= 0"),
    (FiraAdamW, {"residual": "arxiv"}, r"residual must be one of 'code', 'paper'"),
    (FiraAdamW, {"scaling": "row"}, r"scaling must be one of 'column', 'matrix'"),
    (FiraAdamW, {"limiter": 1.0}, r"limiter must be a growth factor > 1"),
    (ApolloAdamW, {"scale_type": "chanel"}, r"scale_type must be one of 'channel', 'tensor'"),
    (Flora, {"lr": 0.1, "quantization": "8bit"}, r"quantization must be true or false; got '8bit'"),
    (GaLoreAdamW, {"moments": "int8"}, r"moments must be one of 'fp32', '8bit'; got 'int8'"),
    (GaLoreAdamW, {"projector_dtype": 4}, r"projector_dtype must be one of 'fp32', '8bit', '4bit'; got 4"),
    (GaLoreAdamW, {"min_8bit_size": -1}, r"min_8bit_size must be a whole number >= 0; got -1"),
    (ApolloAdamW, {"projector_dtype": "4bit"}, r"stores no projector.*Leave projector_dtype out"),
    (GaLoreAdafactor, {"lr": 0.1, "eps": 1e-8}, r"eps must be two numbers"),
    (GaLoreAdafactor, {"lr": 0.1, "decay_rate": 0.8}, r"decay_rate must be a number < 0"),
    # combinations that have no meaning
    (FiraAdamW, {"subspace": "gaussian"}, r"Fira's residual needs an orthonormal basis"),
    (FiraAdamW, {"proj_type": "full"}, r"Fira's residual needs an orthonormal basis on one side"),
    (GaLoreAdamW, {"proj_type": "full", "subspace": "power"}, r'proj_type="full" projects both sides'),
    (GaLoreAdamW, {"subspace": "gaussian", "on_refresh": "rotate"}, r'on_refresh="rotate" needs one orthonormal'),
    (ApolloAdamW, {"proj_type": "full"}, r"APOLLO scales one side"),
    (Flora, {"lr": 0.1, "proj_type": "full"}, r"Flora compresses one side"),
    (
        GaLoreAdafactor,
        {"lr": 0.1, "on_refresh": "rotate"},
        r'on_refresh="rotate" moves the momentum, and beta1 is null',
    ),
    (Flora, {"lr": 0.1, "stagger": True}, r"Flora: unknown option 'stagger'"),
    (Flora, {"lr": 0.1, "beta1": None}, r"beta1=None keeps no momentum, so rank=2 would compress nothing"),
    (Flora, {"lr": 0.1, "relative_step": True}, r"lr and relative_step=True exclude each other"),
    (Flora, {"lr": 0.1, "warmup_init": True}, r"warmup_init=True requires relative_step=True"),
    (GaLoreAdafactor, {"relative_step": False}, r"lr is null and relative_step is false"),
    # selection
    (
        GaLoreAdamW,
        {"target_modules": ["attn"]},
        r"target_modules: 'attn' matches no parameter. Names look like: 1\.weight",
    ),
    (GaLoreAdamW, {"exclude": ["norm"]}, r"exclude: 'norm' matches no parameter"),
    (GaLoreAdamW, {"target_modules": "attn"}, r"target_modules must be a list of substrings"),
    (GaLoreAdamW, {"target_modules": ["("]}, r"target_modules must be a list of substrings or regular"),
    (GaLoreAdamW, {"target_modules": ["bias"]}, r"nothing to project: of 4 parameters none"),
]


@pytest.mark.parametrize(("cls", "options", "message"), CONSTRUCTOR, ids=lambda v: str(v)[:40])
def test_constructor_messages(cls: type, options: dict, message: str) -> None:
    """Every option is checked when the optimizer is built."""
    default = {"rank": 2} if "lr" in options or cls in (Flora, GaLoreAdafactor) else {"rank": 2, "lr": 1e-3}
    with pytest.raises(ValueError, match=message):
        cls(named(), **{**default, **options})


PARAMS = [
    (lambda: GaLoreAdamW([p for _, p in named()], rank=2), ValueError, "parameter names are unknown"),
    (lambda: GaLoreAdamW([]), ValueError, "empty parameter list"),
    (lambda: GaLoreAdamW([1, 2]), TypeError, r"expected tensors or \(name, tensor\) pairs, got int"),
    (lambda: GaLoreAdamW(named(), 1e-3, lr=1e-3), TypeError, "lr given twice"),
    (lambda: Flora(named(), *range(40)), TypeError, "at most"),
    (lambda: GaLoreAdamW([*named(), *named()], rank=2), ValueError, "two parameters are named '1.weight'"),
    (lambda: GaLoreAdamW([{"params": named()[:1], "rank": 2}], rank=3), ValueError, "groups carry their own 'rank'"),
    (
        lambda: GaLoreAdamW([{"params": named()[:1], "rank": 2, "alpha": 1.0}]),
        ValueError,
        "param group 0: unknown.*'alpha'",
    ),
    (lambda: GaLoreAdamW([{"params": named(), "rank": 2}]), ValueError, r"1\.bias has shape \(6,\)"),
    (
        lambda: GaLoreAdamW([{"params": [p for _, p in named()], "param_names": ["a"], "rank": 2}]),
        ValueError,
        "1 param_names for 4 params",
    ),
    (
        lambda: param_groups(model(), rank=2, target_modules=["attention"]),
        ValueError,
        "'attention' matches no parameter",
    ),
    (lambda: param_groups(nn.Embedding(5, 4), rank=2), ValueError, "nothing to project"),
    (lambda: divide_params(model(), ["attn", "mlp"]), ValueError, "'attn' matches no parameter"),
    (lambda: ApolloMini(named(), rank=2, proj="raddom"), ValueError, "subspace must be one of"),
    (lambda: ApolloMini(named(), proj="svd", subspace="svd"), TypeError, "subspace is given twice"),
    (lambda: param_groups(model()), TypeError, "rank"),
    (
        lambda: GaLoreAdamW([("w", torch.zeros(4, 4, dtype=torch.complex64))], rank=2),
        ValueError,
        "w is torch.complex64",
    ),
    (
        lambda: GaLoreAdamW([{"params": named()[:1], "rank": 2}], target_modules=["q"]),
        ValueError,
        "target_modules and exclude choose by name, but param groups carry their own 'rank'",
    ),
]


@pytest.mark.parametrize(("build", "error", "message"), PARAMS, ids=[m for _, _, m in PARAMS])
def test_parameter_messages(build, error: type, message: str) -> None:
    """Parameters, names and groups are checked when the optimizer is built."""
    with pytest.raises(error, match=message):
        build()


def test_a_learning_rate_that_becomes_nan_stops_before_the_weights_change() -> None:
    """A scheduler that produces NaN is reported at the step."""
    layers = model()
    optimizer = GaLoreAdamW(param_groups(layers, rank=2), lr=1e-3)
    before = layers[1].weight.clone()
    layers[1].weight.grad = torch.ones_like(before)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="the learning rate is nan; check the scheduler"):
        optimizer.step()
    assert torch.equal(before, layers[1].weight)


def test_a_step_without_gradients_says_so_once(caplog) -> None:
    """torch updates nothing without a word; we say it."""
    optimizer = GaLoreAdamW(param_groups(model(), rank=2), lr=1e-3)
    optimizer.step()
    optimizer.step()
    assert caplog.text.count("step() found no gradient on any parameter") == 1


def test_sparse_gradients_are_refused() -> None:
    """An nn.Embedding(sparse=True) cannot be trained here."""
    layers = nn.Sequential(nn.Embedding(11, 8, sparse=True), nn.Linear(8, 6))
    optimizer = GaLoreAdamW(param_groups(layers, rank=2), lr=1e-3)
    layers(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="0.weight has a sparse gradient; use nn.Embedding"):
        optimizer.step()


def trained_state(cls: type, **options: object) -> dict:
    """State dict after one step."""
    layers = model()
    optimizer = cls(param_groups(layers, rank=options.pop("rank", 2)), lr=1e-3, **options)
    layers(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def reordered() -> dict:
    """State of the same parameters in another order."""
    state = trained_state(GaLoreAdamW)
    state["param_groups"][1]["param_names"].reverse()
    return state


LOADED = [
    (reordered, r"the state was saved with 2\.bias in the place of 0\.weight"),
    (
        lambda: trained_state(GaLoreAdamW, rank=3),
        r"saved param group 0: rank is 3, but this optimizer was built with 2",
    ),
    (
        lambda: trained_state(GaLoreAdamW, proj_type="left"),
        r"proj_type is 'left', but this optimizer was built with 'std'",
    ),
    (lambda: trained_state(FiraAdamW), r"saved param group 0: has alpha, limiter, .*saved by another optimizer"),
    (lambda: trained_state(ApolloAdamW), r"saved param group 0: has disable_nl"),
]


@pytest.mark.parametrize(("saved", "message"), LOADED, ids=[m for _, m in LOADED])
def test_state_of_another_run_is_refused_when_loaded(saved, message: str) -> None:
    """Another rank, side or algorithm is named at load, and nothing has changed."""
    optimizer = GaLoreAdamW(param_groups(model(), rank=2), lr=1e-3)
    before = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved())
    assert before == {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}


@pytest.mark.parametrize(("options", "method"), [({}, "power"), ({"proj_type": "full"}, "svd")])
def test_groups_name_the_subspace_they_have(options: dict, method: str) -> None:
    """Left open, it is shown; state moves between an optimizer that names it and one that does not."""
    state = trained_state(GaLoreAdamW, **options)
    assert {group["subspace"] for group in state["param_groups"]} == {method}
    named = GaLoreAdamW(param_groups(model(), rank=2, subspace=method, **options), lr=1e-3, subspace=method, **options)
    named.load_state_dict(state)
    open_ = [{**group, "subspace": None} for group in state["param_groups"]]  # saved before groups named it
    named.load_state_dict({**state, "param_groups": open_})
    assert {group["subspace"] for group in named.param_groups} == {method}
    other = "svd" if method == "power" else "power"
    if not options:
        with pytest.raises(ValueError, match=f"subspace is '{method}', but this optimizer was built with '{other}'"):
            GaLoreAdamW(param_groups(model(), rank=2), lr=1e-3, subspace=other).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"subspace": "svd", "cold_every": 3}, 'cold_every=3 has no effect: only subspace="power" uses it'),
        ({"subspace": "gaussian", "oversample": 4}, "oversample=4 has no effect"),
        ({"lazy_threshold": 0.9}, "lazy_threshold=0.9 has no effect: only lazy_refresh=True uses it"),
        ({"subspace": "power", "cold_every": 3, "oversample": 4}, None),
        ({"lazy_threshold": 0.9, "lazy_refresh": True}, None),
    ],
)
def test_options_that_nothing_reads_are_told(options: dict, sentence: str | None, caplog) -> None:
    """An option that the other choices leave idle is warned about, with what would use it."""
    GaLoreAdamW(named(), lr=1e-3, rank=2, **options)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (sentence is None and not told) or (len(told) == 1 and sentence in told[0]), told


STATES = [
    (
        lambda: trained_state(GaLoreAdamW, rank=3),
        r"1\.weight: the loaded 'exp_avg' has shape \(8, 3\), expected \(8, 2\)",
    ),
    (lambda: trained_state(ApolloAdamW), r"1\.weight: the loaded state has no 'projector'"),
]


@pytest.mark.parametrize(("saved", "message"), STATES, ids=[m for _, m in STATES])
def test_state_that_does_not_fit_is_refused_by_name(saved, message: str) -> None:
    """State tensors of another shape or algorithm, under matching groups, name the parameter; nothing changes."""
    layers, loaded = model(), saved()
    optimizer = GaLoreAdamW(param_groups(layers, rank=2), lr=1e-3)
    layers(torch.tensor([1, 2])).sum().backward()
    for trained in (False, True):  # before the first step it is known how plain tensors lie, too
        if trained:
            optimizer.step()
        ours = copy.deepcopy(optimizer.state_dict())
        groups = [{**group, "lr": 0.5} for group in ours["param_groups"]]
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict({"state": loaded["state"], "param_groups": groups})
        now = optimizer.state_dict()
        assert now["param_groups"] == ours["param_groups"] and now["state"].keys() == ours["state"].keys()
        for i, own in ours["state"].items():
            assert own.keys() == now["state"][i].keys()
            assert all(torch.equal(value, now["state"][i][key]) for key, value in own.items())


def test_a_name_taken_on_torch_optim_is_refused(monkeypatch) -> None:
    """Two packages cannot both register FiraAdamW."""
    monkeypatch.setattr(torch.optim, "FiraAdamW", nn.Linear)
    with pytest.raises(RuntimeError, match=r"torch.optim.FiraAdamW already exists \(torch.nn"):
        lowrank_ds._register()


def test_an_option_without_a_check_says_where_to_add_one() -> None:
    """Who adds an algorithm with an option of its own meets this first (docs/extend.md)."""

    class Mine(GaLoreAdamW):
        OPTIONS = {**GaLoreAdamW.OPTIONS, "omega": 1.0}

    with pytest.raises(ValueError, match=r"Mine: option 'omega' is in its OPTIONS.*CHECKS has no check of it"):
        Mine(named(), rank=2, omega=2.0)


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.0.0+cu130"])
def test_untested_deepspeed_versions_are_refused(version: str, monkeypatch) -> None:
    """ZeRO's internals are private: other versions are named, with the way out."""
    with pytest.raises(RuntimeError, match=f"DeepSpeed {version.replace('+', '.')} found.*>= 0.19, < 0.20"):
        zero.check_version(version)
    monkeypatch.setenv("LOWRANK_DS_UNTESTED_DEEPSPEED", "1")
    zero.check_version(version)
    zero.check_version("0.19.8")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"swap_optimizer": True}, "offload_optimizer.device is nvme.*Use device cpu"),
        ({"fp32_partitioned_groups_flat": []}, "not one of DeepSpeed's fp32 sub-groups"),
    ],
)
def test_zero3_partitions_we_cannot_place_are_refused(records: dict, message: str) -> None:
    """NVMe swapping and unknown partitions: the key or the tensor is named."""
    optimizer = GaLoreAdamW([("w", weight := nn.Parameter(torch.zeros(8, 6)))], lr=1e-3, rank=2)
    weight.ds_id, weight.ds_shape, weight.ds_numel = 0, (8, 6), 48
    weight._z3_optimizer = SimpleNamespace(**records)
    flat = nn.Parameter(torch.zeros(48))
    flat.grad = torch.ones(48)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_a_tensor_of_unknown_origin_is_refused() -> None:
    """A flat tensor that no engine accounts for is never trained un-projected."""
    optimizer = GaLoreAdamW(param_groups(model(), rank=2), lr=1e-3)
    flat = nn.Parameter(torch.zeros(40))
    flat.grad = torch.ones(40)
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.param_groups[0]["param_names"] = ["1.weight", "2.weight"]
    with pytest.raises(
        RuntimeError, match=r"neither a parameter the optimizer was built with nor a DeepSpeed.*1\.weight"
    ):
        optimizer.step()


def unusual_dtensors(rank: int, world: int) -> list[str]:
    """Messages for placements that low-rank state cannot follow."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh, messages = init_device_mesh("cpu", (world,)), []
    for shape, placement in (((4, 4, 2, 2), Shard(2)), ((4, 4, 2, 2), Shard(3)), ((4, 6), Partial())):
        part = torch.ones([s // world if i == getattr(placement, "dim", None) else s for i, s in enumerate(shape)])
        weight = nn.Parameter(DTensor.from_local(part, mesh, [placement]))
        optimizer = GaLoreAdamW([("conv.weight", weight)], lr=1e-3, rank=2)
        try:
            optimizer.init_state()
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def test_dtensor_placements_that_cannot_work_are_refused_by_name() -> None:
    """A shard that is neither rows nor columns, and unsummed weights, are refused before anything is stored."""
    rows, columns, partial = launch(2, unusual_dtensors)[0]
    for message in (rows, columns):
        assert (
            "conv.weight of shape (4, 4, 2, 2) is sharded on dimension" in message and "shard_placement_fn" in message
        )
    assert "conv.weight has the placement" in partial


DS_MISUSE = {
    "unknown key": ({"optimizer": {"type": "FiraAdamW", "params": {"lr": 1e-3, "rang": 4}}}, "did you mean 'rank'"),
    "rank too large": (
        {"optimizer": {"type": "FiraAdamW", "params": {"lr": 1e-3}}},
        r"rank 128 is larger than min(m, n)",
    ),
    "no match": (
        {"optimizer": {"type": "FiraAdamW", "params": {"lr": 1e-3, "rank": 4, "target_modules": ["attn_proj"]}}},
        "target_modules: 'attn_proj' matches no parameter. Names look like: model.embed_tokens.weight",
    ),
    "wrong case": ({"optimizer": {"type": "firaadamw", "params": {"lr": 1e-3}}}, "firaadamw"),
}


def ds_misuse(rank: int, world: int) -> dict[str, str]:
    """{case: message} of configs that cannot work, and of a step without backward."""
    deepspeed, found = quiet_deepspeed(), {}
    for stage in (2, 3):
        for case, (more, _) in DS_MISUSE.items():
            try:
                deepspeed.initialize(model=tiny_llama(), config=ds_config(None, stage, world, **more))
            except (ValueError, AssertionError) as error:
                found[f"{case}, zero{stage}"] = str(error)
    engine = deepspeed.initialize(model=tiny_llama(), config=ds_config("fira", 2, world))[0]
    train_engine(engine, rank, world, 1)
    try:
        engine.basic_optimizer.step()
    except RuntimeError as error:
        found["optimizer.step() by hand"] = str(error)
    return found


def test_ds_config_messages() -> None:
    """A ds_config that cannot work says which key and why, on every stage."""
    found = launch(2, ds_misuse)[0]
    for case, (_, message) in DS_MISUSE.items():
        for stage in (2, 3):
            assert message in found[f"{case}, zero{stage}"], (case, found[f"{case}, zero{stage}"])
    assert "has no gradient: call engine.backward(loss) and engine.step()" in found["optimizer.step() by hand"]
