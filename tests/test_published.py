"""Our optimizers equal the published packages: same gradients, same weights after 60 steps and four bases.

Square, wide and tall matrices are trained together with a bias and an embedding that are not projected. The packages
are taken as published, with two differences named here and allowed for:

* singular vectors: ours have canonical signs, the packages keep LAPACK's; their projector modules get an SVD with
  canonical signs (``canonical_svd``), nothing else of torch is changed;
* random bases: ours are keyed by (seed, name, refresh), the packages' by the position in the parameter list; ours get
  the packages' streams (``package_stream``).

The other differences are visible only where a test says so: packages of the AdamW family decay weights after the
update (``test_weight_decay_order``), galore_torch puts the learning rate inside Adafactor's momentum
(``test_learning_rate_inside_momentum``), flora_opt leaves elongated matrices unprojected
(``test_flora_opt_skips_elongated_matrices``), and a zero first gradient locks fira and apollo_torch up
(``test_zero_first_gradient``).
"""

import math
import warnings
from types import SimpleNamespace

import apollo_torch.random_projector
import apollo_torch.svd_projector
import fira
import fira.gradient_projection
import galore_torch
import galore_torch.galore_projector
import pytest
import torch
from flora_opt.optimizers.torch import flora as flora_opt

import lowrank_ds
from tests import reference

MATRICES = [(24, 24), (16, 40), (40, 16)]
PLAIN = [(17,), (50, 12)]
STEPS, GAP = 60, 17  # bases at steps 0, 17, 34 and 51
TOLERANCE = 1e-5
MODULES = [galore_torch.galore_projector, fira.gradient_projection, apollo_torch.svd_projector]


# ------------------------------------------------------------------------------------------------------------- helpers


def canonical_svd(matrix, full_matrices):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=full_matrices)
    return reference.canonical(u), s, reference.canonical(vh.T).T


@pytest.fixture(autouse=True)
def canonical_packages(monkeypatch):
    torch_seen_by_projectors = SimpleNamespace(
        linalg=SimpleNamespace(svd=canonical_svd), matmul=torch.matmul, diag=torch.diag, float=torch.float
    )
    for module in MODULES:
        monkeypatch.setattr(module, "torch", torch_seen_by_projectors)


def use_stream(monkeypatch, stream) -> None:
    """Have all random bases drawn by ``stream``, alone or several at once."""
    monkeypatch.setattr(lowrank_ds.linalg, "gaussian", stream)
    monkeypatch.setattr(
        lowrank_ds.linalg,
        "gaussians",
        lambda draws, rank, device=None: [stream(key, rows.stop, rank, rows) for key, rows in draws],
    )


def package_stream(shapes, first, draw):
    """A stand-in for ``linalg.gaussian`` that answers with a package's own random matrices.

    Names end in the matrix's index, ``first`` is the package's seed of the first of them; ``draw(seed, shape, rank)``
    returns the package's basis as (length, rank).
    """

    def gaussian(key, length, rank, rows=None, device=None):
        _, name, refresh = key
        index = int(name[-1])
        seed = first + index
        for _ in range(refresh):
            seed = apollo_torch.random_projector.next_seed(seed)
        basis = draw(seed, shapes[index], rank)
        assert basis.shape == (length, rank)
        return basis if rows is None else basis[rows]

    return gaussian


def apollo_basis(seed, shape, rank):
    randn = apollo_torch.random_projector.stable_randn
    left = reference.is_left(shape)
    return (randn((shape[0], rank), seed) if left else randn((rank, shape[1]), seed).T) / math.sqrt(rank)


def flora_basis(seed, shape, rank):
    left, right = flora_opt.split_seed(seed)
    if reference.is_left(shape):
        return flora_opt.stable_randn((rank, shape[0]), left).T / math.sqrt(rank)
    return flora_opt.stable_randn((shape[1], rank), right) / math.sqrt(rank)


def train(make, schedule=None, steps=STEPS, matrices=MATRICES, plain=PLAIN, **data):
    """The weights after some steps of the optimizer ``make(plain parameters, matrices)``, and the least movement."""
    start, grads = reference.problem([*plain, *matrices], STEPS, **data)
    parameters = [torch.nn.Parameter(w.clone()) for w in start]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        optimizer = make(parameters[: len(plain)], parameters[len(plain) :])
    for step in range(steps):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad[step].clone()
        for group in optimizer.param_groups if schedule else ():
            group["lr"] = schedule(step)
        optimizer.step()
    weights = [p.detach() for p in parameters]
    return weights, min((w - s).abs().max().item() for w, s in zip(weights, start, strict=True))


def difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def pair(make, classes, *arguments, **keys):
    """Ours and theirs, made alike."""
    return [make(cls, *arguments, **keys) for cls in classes]


def assert_same(ours, theirs, **options):
    """Same weights, and every tensor moved far enough for the comparison to mean something."""
    (ours, moved), (theirs, _) = train(ours, **options), train(theirs, **options)
    gap = difference(ours, theirs)
    print(f"moved {moved:.3f}, largest difference {gap:.1e}")
    assert moved > 0.05
    assert gap <= TOLERANCE


def assert_different(ours, theirs, **options):
    assert difference(train(ours, **options)[0], train(theirs, **options)[0]) > 1e-3


def two_groups(plain, matrices, **keys):
    return [{"params": plain}, {"params": matrices, **keys}]


# -------------------------------------------------------------------------------------------------------------- GaLore

GALORE_ADAMW = (lowrank_ds.GaLoreAdamW, galore_torch.GaLoreAdamW)
ADAM = {"lr": 0.02, "betas": (0.9, 0.999)}
GALORE = {"rank": 6, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
SIDES = ["std", "reverse_std", "right", "left", "full"]


def exact(cls):
    """Ours are asked for the packages' bases."""
    return {"subspace": "svd"} if cls.__module__.startswith("lowrank_ds") else {}


def galore_adamw(cls, hyper=None, **keys):
    return lambda plain, matrices: cls(
        two_groups(plain, matrices, **{**GALORE, **exact(cls), **keys}), **{**ADAM, **(hyper or {})}
    )


@pytest.mark.parametrize("proj_type", SIDES)
def test_galore_adamw(proj_type):
    assert_same(*pair(galore_adamw, GALORE_ADAMW, proj_type=proj_type))


@pytest.mark.parametrize(
    "hyper", [{"betas": (0.8, 0.95)}, {"eps": 1e-3}, {"correct_bias": False, "lr": 0.005}], ids=str
)
@pytest.mark.parametrize("keys", [{}, {"rank": 4, "scale": 1.0}], ids=str)
def test_galore_adamw_hyperparameters(hyper, keys):
    assert_same(*pair(galore_adamw, GALORE_ADAMW, hyper, **keys))


def test_galore_adamw_schedule():
    assert_same(*pair(galore_adamw, GALORE_ADAMW), schedule=lambda step: 0.03 * (step + 1) / STEPS)


@pytest.mark.parametrize(
    "hyper, keys",
    [({"eps": 1e-2}, {}), ({}, {"rank": 5}), ({}, {"update_proj_gap": 18}), ({}, {"scale": 0.3})],
    ids=str,
)
def test_galore_adamw_control(hyper, keys):
    assert_different(galore_adamw(lowrank_ds.GaLoreAdamW, hyper, **keys), galore_adamw(galore_torch.GaLoreAdamW))


GALORE_ADAFACTOR = (lowrank_ds.GaLoreAdafactor, galore_torch.GaLoreAdafactor)
ADAFACTOR = {"lr": 0.02, "scale_parameter": False, "relative_step": False}
RELATIVE = {"lr": None, "relative_step": True, "scale_parameter": True}
ADAFACTOR_CASES = [
    ADAFACTOR,
    ADAFACTOR | {"beta1": 0.9},
    ADAFACTOR | {"beta1": 0.9, "scale_parameter": True, "lr": 0.05, "weight_decay": 0.1},
    ADAFACTOR | {"weight_decay": 0.1},
    ADAFACTOR | {"scale_parameter": True, "lr": 0.05, "clip_threshold": 0.3},
    RELATIVE,
    RELATIVE | {"decay_rate": -0.6, "eps": (1e-4, 0.5)},
    RELATIVE | {"warmup_init": True, "eps": (1e-30, 1e3)},  # the rate is 1e-6 t: lifted by the floor of RMS(W)
]


def galore_adafactor(cls, hyper=ADAFACTOR, **keys):
    return lambda plain, matrices: cls(
        two_groups(plain, matrices, **{**GALORE, "scale": 1.0, **exact(cls), **keys}), **hyper
    )


@pytest.mark.parametrize("hyper", ADAFACTOR_CASES, ids=str)
def test_galore_adafactor(hyper):
    assert_same(*pair(galore_adafactor, GALORE_ADAFACTOR, hyper))


def test_galore_adafactor_one_line():
    """Rank 1 and one-row parameters: the factored second moment is the full one."""
    assert_same(*pair(galore_adafactor, GALORE_ADAFACTOR, rank=1), plain=[(1, 30), (30, 1)])


@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_galore_adafactor_proj_type(proj_type, beta1):
    assert_same(*pair(galore_adafactor, GALORE_ADAFACTOR, ADAFACTOR | {"beta1": beta1}, proj_type=proj_type))


@pytest.mark.parametrize(
    "hyper, keys",
    [({"decay_rate": -0.6}, {}), ({"clip_threshold": 0.5}, {}), ({"beta1": 0.9}, {}), ({}, {"rank": 5})],
    ids=str,
)
def test_galore_adafactor_control(hyper, keys):
    ours = galore_adafactor(lowrank_ds.GaLoreAdafactor, ADAFACTOR | hyper, **keys)
    assert_different(ours, galore_adafactor(galore_torch.GaLoreAdafactor))


def test_learning_rate_inside_momentum():
    """galore_torch averages lr * update, so it goes on moving at rate 0; ours averages the update and stands still."""
    ours, theirs = pair(galore_adafactor, GALORE_ADAFACTOR, ADAFACTOR | {"beta1": 0.9})
    before, _ = train(ours, steps=STEPS - 1)
    stop = {"schedule": lambda step: 0.02 * (step < STEPS - 1)}
    assert difference(train(ours, **stop)[0], before) == 0
    assert difference(train(theirs, steps=STEPS - 1)[0], before) <= TOLERANCE
    assert difference(train(theirs, **stop)[0], before) > 1e-3


# ---------------------------------------------------------------------------------------------------------------- Fira

FIRA_ADAMW = (lowrank_ds.FiraAdamW, fira.FiraAdamW)
FIRA = {"rank": 6, "update_proj_gap": GAP, "alpha": 0.25, "proj_type": "std"}


def fira_adamw(cls, hyper=None, **keys):
    return lambda plain, matrices: cls(
        two_groups(plain, matrices, **{**FIRA, **exact(cls), **keys}), **{**ADAM, **(hyper or {})}
    )


@pytest.mark.parametrize(
    "hyper, keys",
    [
        ({}, {}),
        ({"betas": (0.8, 0.95)}, {"alpha": 1.0}),
        ({"eps": 1e-3}, {"rank": 4}),
        ({"correct_bias": False, "lr": 0.005}, {}),
        ({}, {"proj_type": "right"}),
        ({}, {"proj_type": "left"}),
        ({}, {"proj_type": "reverse_std"}),
    ],
    ids=str,
)
def test_fira_adamw(hyper, keys):
    assert_same(*pair(fira_adamw, FIRA_ADAMW, hyper, **keys))


def test_fira_code_and_column_are_the_defaults():
    assert_same(fira_adamw(lowrank_ds.FiraAdamW, residual="code", scaling="column"), fira_adamw(fira.FiraAdamW))


@pytest.mark.parametrize(
    "keys",
    [{"residual": "paper"}, {"scaling": "matrix"}, {"limiter": 1.1}, {"alpha": 0.3}, {"update_proj_gap": 18}],
    ids=str,
)
def test_fira_adamw_control(keys):
    assert_different(fira_adamw(lowrank_ds.FiraAdamW, **keys), fira_adamw(fira.FiraAdamW))


# -------------------------------------------------------------------------------------------------------------- APOLLO

CHANNEL = {"rank": 6, "update_proj_gap": GAP, "scale": 4.0, "proj_type": "std", "scale_type": "channel"}
MINI = CHANNEL | {"rank": 1, "scale": 128.0, "scale_type": "tensor"}
SMALL = {"lr": 0.005}


def apollo(cls, keys, hyper=None, **more):
    return lambda plain, matrices: cls(two_groups(plain, matrices, **keys, **more), **{**ADAM, **(hyper or {})})


@pytest.fixture
def apollo_stream(monkeypatch):
    use_stream(monkeypatch, package_stream(MATRICES, len(PLAIN) + 1, apollo_basis))


@pytest.mark.parametrize("proj, subspace", [("random", "gaussian"), ("svd", "svd")])
@pytest.mark.parametrize("hyper", [{}, {"scale_front": True}, {"disable_nl": True}, {"correct_bias": False}], ids=str)
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_apollo_adamw(apollo_stream, proj, subspace, hyper, scale_type):
    keys = CHANNEL | {"scale_type": scale_type}
    ours = apollo(lowrank_ds.ApolloAdamW, keys, hyper, subspace=subspace)
    assert_same(ours, apollo(apollo_torch.APOLLOAdamW, keys, hyper, proj=proj))


def test_apollo_adamw_draws_random_bases_by_default(apollo_stream):
    assert_same(apollo(lowrank_ds.ApolloAdamW, CHANNEL), apollo(apollo_torch.APOLLOAdamW, CHANNEL, proj="random"))


@pytest.mark.parametrize("keys", [MINI, {"rank": 1, "update_proj_gap": GAP}], ids=["given", "defaults"])
def test_apollo_mini(apollo_stream, keys):
    ours = apollo(lowrank_ds.ApolloMini, keys, SMALL)
    assert_same(ours, apollo(apollo_torch.APOLLOAdamW, MINI, SMALL, proj="random"))


@pytest.mark.parametrize(
    "keys", [{"scale": 5.0}, {"rank": 5}, {"scale_type": "tensor"}, {"update_proj_gap": 18}, {"seed": 1}], ids=str
)
def test_apollo_adamw_control(monkeypatch, keys):
    if "seed" not in keys:  # without the package's stream, any seed of ours differs
        stream = package_stream(MATRICES, len(PLAIN) + 1, apollo_basis)
        use_stream(monkeypatch, stream)
    ours = apollo(lowrank_ds.ApolloAdamW, CHANNEL | keys)
    assert_different(ours, apollo(apollo_torch.APOLLOAdamW, CHANNEL, proj="random"))


# --------------------------------------------------------------------------------------------------------------- Flora

FLORA_CLASSES = (lowrank_ds.Flora, flora_opt.Flora)
FLORA = {"lr": 0.02, "kappa": GAP, "beta1": 0.9, "scale_parameter": False, "seed": 5}
FLORA_CASES = [
    FLORA,
    FLORA | {"scale_parameter": True, "lr": 0.05},
    FLORA | {"weight_decay": 0.1, "clip_threshold": 0.3},
    FLORA | {"decay_rate": -0.6, "kappa": 2},
    FLORA | {"lr": None, "relative_step": True, "eps": (1e-30, 0.5), "scale_parameter": True},
    FLORA | {"lr": None, "relative_step": True, "warmup_init": True, "eps": (1e-30, 1e3), "scale_parameter": True},
]


def flora(cls, hyper, rank=6):
    return lambda plain, matrices: cls([{"params": plain, "rank": None}, {"params": matrices, "rank": rank}], **hyper)


@pytest.fixture
def flora_stream(monkeypatch):
    first = FLORA["seed"] + len(PLAIN) + 1
    use_stream(monkeypatch, package_stream(MATRICES, first, flora_basis))


@pytest.mark.parametrize("hyper", FLORA_CASES, ids=str)
def test_flora(flora_stream, hyper):
    assert_same(*pair(flora, FLORA_CLASSES, hyper))


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("factorize_second_moment", [True, False])
def test_flora_without_projection(beta1, factorize_second_moment):
    hyper = FLORA | {"beta1": beta1, "factorize_second_moment": factorize_second_moment}
    assert_same(*pair(flora, FLORA_CLASSES, hyper, rank=None))


def test_flora_drop_in(flora_stream):
    """One list of parameters, and the published argument order from lr to quantization.

    Both leave the bias and the embedding alone: the package by their shapes, ours by their names.
    """
    arguments = (0.02, 6, GAP, (1e-30, 1e-3), 0.7, -0.7, 0.8, 0.05, False, False, False, True, 5, False)
    names = ["bias", "embedding.weight", "w0", "w1", "w2"]
    ours, theirs = (
        lambda plain, matrices, cls=cls: cls(list(zip(names, [*plain, *matrices], strict=True)), *arguments)
        for cls in FLORA_CLASSES
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "hyper", [{"kappa": 18}, {"beta1": 0.8}, {"clip_threshold": 0.5}, {"decay_rate": -0.6}, {"seed": 6}], ids=str
)
def test_flora_control(monkeypatch, hyper):
    if "seed" not in hyper:
        stream = package_stream(MATRICES, FLORA["seed"] + len(PLAIN) + 1, flora_basis)
        use_stream(monkeypatch, stream)
    assert_different(flora(lowrank_ds.Flora, FLORA | hyper), flora(flora_opt.Flora, FLORA))


def test_flora_opt_skips_elongated_matrices(monkeypatch):
    """flora_opt silently keeps the full momentum of a matrix with max/min > 4, ours projects what it was asked to."""
    shapes = [(10, 41)]
    use_stream(monkeypatch, package_stream(shapes, FLORA["seed"] + 2, flora_basis))
    theirs = flora(flora_opt.Flora, FLORA)
    assert_same(flora(lowrank_ds.Flora, FLORA, rank=None), theirs, matrices=shapes)
    assert_different(flora(lowrank_ds.Flora, FLORA), theirs, matrices=shapes)


# ------------------------------------------------------------------------------- differences common to several packages


def apollo_svd(cls, hyper=None):
    return apollo(cls, CHANNEL, hyper, **{"subspace" if cls is lowrank_ds.ApolloAdamW else "proj": "svd"})


FAMILIES = {
    "galore": (galore_adamw, GALORE_ADAMW),
    "fira": (fira_adamw, FIRA_ADAMW),
    "apollo": (apollo_svd, (lowrank_ds.ApolloAdamW, apollo_torch.APOLLOAdamW)),
}


@pytest.mark.parametrize("make, classes", FAMILIES.values(), ids=FAMILIES)
def test_weight_decay_order(make, classes):
    """Packages shrink the weight after the update, hence the update too: once more than ours, exactly."""
    shrink = 1 - ADAM["lr"] * 0.5
    start, _ = reference.problem([*PLAIN, *MATRICES], STEPS)
    (ours, moved), (theirs, _) = (train(make) for make in pair(make, classes, {"weight_decay": 0.5}))
    rest = [shrink**STEPS * w for w in start]
    expected = [r + shrink * (w - r) for r, w in zip(rest, ours, strict=True)]
    assert moved > 0.05
    assert difference(ours, theirs) > 1e-3
    assert difference(expected, theirs) <= TOLERANCE


@pytest.mark.parametrize("make, classes", FAMILIES.values(), ids=FAMILIES)
def test_zero_first_gradient(make, classes):
    """A zero gradient fixes the packages' basis for a gap, their limiter for good (ours: test_reference.py)."""
    assert_different(*pair(make, classes), zeros={0})


# ---------------------------------------------------------------------------------------- the reference is the packages


def stream(first, draw):
    gaussian = package_stream(MATRICES, first, draw)
    size = [min(shape) for shape in MATRICES]
    return lambda i, rank: lambda k, grad=None: gaussian((0, f"group1.param{i}", k), size[i], rank)


def without(keys, *names):
    return {k: v for k, v in keys.items() if k not in names}


REFERENCE_CASES = {
    **{
        f"galore_adamw-{side}": (
            galore_adamw(galore_torch.GaLoreAdamW, proj_type=side),
            lambda w, g, i, side=side: reference.galore_adamw(w, g, **ADAM, **GALORE | {"proj_type": side}),
            lambda w, g: reference.adamw(w, g, **ADAM),
        )
        for side in SIDES
    },
    **{
        f"galore_adafactor-{n}": (
            galore_adafactor(galore_torch.GaLoreAdafactor, hyper),
            lambda w, g, i, hyper=hyper: reference.galore_adafactor(w, g, **GALORE | {"scale": 1.0} | hyper),
            lambda w, g, hyper=hyper: reference.adafactor(w, g, **hyper),
        )
        for n, hyper in enumerate(ADAFACTOR_CASES)
    },
    "fira": (
        fira_adamw(fira.FiraAdamW),
        lambda w, g, i: reference.fira(w, g, **ADAM, **FIRA),
        lambda w, g: reference.adamw(w, g, **ADAM),
    ),
    "apollo": (
        apollo(apollo_torch.APOLLOAdamW, CHANNEL, proj="random"),
        lambda w, g, i: reference.apollo(
            w, g, stream(len(PLAIN) + 1, apollo_basis)(i, 6), **ADAM, **without(CHANNEL, "rank")
        ),
        lambda w, g: reference.adamw(w, g, **ADAM),
    ),
    "apollo_mini": (
        apollo(apollo_torch.APOLLOAdamW, MINI, SMALL, proj="random"),
        lambda w, g, i: reference.apollo(
            w, g, stream(len(PLAIN) + 1, apollo_basis)(i, 1), **ADAM | SMALL, **without(MINI, "rank")
        ),
        lambda w, g: reference.adamw(w, g, **ADAM | SMALL),
    ),
    **{
        f"flora-{n}": (
            flora(flora_opt.Flora, hyper),
            lambda w, g, i, hyper=hyper: reference.flora(
                w, g, stream(FLORA["seed"] + len(PLAIN) + 1, flora_basis)(i, 6), **without(hyper, "seed")
            ),
            lambda w, g, hyper=hyper: reference.flora(w, g, **without(hyper, "seed")),
        )
        for n, hyper in enumerate(FLORA_CASES)
    },
}


@pytest.mark.parametrize("make, projected, plain", REFERENCE_CASES.values(), ids=REFERENCE_CASES)
def test_reference_equals_package(make, projected, plain):
    theirs, moved = train(make)
    start, grads = reference.problem([*PLAIN, *MATRICES], STEPS)
    expected = [plain(w, g) for w, g in zip(start[: len(PLAIN)], grads, strict=False)]
    matrices = zip(start[len(PLAIN) :], grads[len(PLAIN) :], strict=True)
    expected += [projected(w, g, i) for i, (w, g) in enumerate(matrices)]
    print(f"moved {moved:.3f}, largest difference {difference(expected, theirs):.1e}")
    assert moved > 0.05
    assert difference(expected, theirs) <= TOLERANCE
