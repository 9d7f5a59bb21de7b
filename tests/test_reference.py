"""Our optimizers in float32 equal the textbook in float64 (reference.py): every form and option the packages lack."""

import functools
import itertools

import pytest
import torch

import lowrank_ds
from tests import reference

MATRICES = [(24, 24), (16, 40), (40, 16)]
PLAIN = [(17,), (50, 12)]
STEPS, GAP, SEED = 60, 17, 3  # bases at steps 0, 17, 34 and 51
TOLERANCE = 1e-5


def train(cls, hyper, keys, matrices=MATRICES, **data):
    """Weights after STEPS steps; projected matrices are named w0, w1, ... and make up the second group."""
    start, grads = reference.problem([*PLAIN, *matrices], STEPS, **data)
    parameters = [torch.nn.Parameter(w.clone()) for w in start]
    named = [(f"w{i}", p) for i, p in enumerate(parameters[len(PLAIN) :])]
    plain = [(f"b{i}", p) for i, p in enumerate(parameters[: len(PLAIN)])]
    optimizer = cls([{"params": plain, "rank": None}, {"params": named, **keys}], seed=SEED, **hyper)
    for step in range(STEPS):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad[step].clone()
        optimizer.step()
    return [p.detach() for p in parameters]


def expect(plain, projected, hyper, keys, matrices=MATRICES, **data):
    start, grads = reference.problem([*PLAIN, *matrices], STEPS, **data)
    expected = [plain(w, g, **hyper) for w, g in zip(start[: len(PLAIN)], grads, strict=False)]
    both = zip(start[len(PLAIN) :], grads[len(PLAIN) :], strict=True)
    return start, expected + [projected(f"w{i}", w, g, **hyper, **keys) for i, (w, g) in enumerate(both)]


def difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def check(algorithm, hyper, keys, **data):
    cls, projected, plain = ALGORITHMS[algorithm]
    start, expected = expect(plain, projected, hyper, keys, **data)
    moved = min((w - s).abs().max().item() for w, s in zip(expected, start, strict=True))
    exact = {"subspace": "svd"} if algorithm in EXACT else {}
    gap = difference(train(cls, hyper, exact | keys, **data), expected)
    print(f"moved {moved:.3f}, largest difference {gap:.1e}")
    assert moved > 0.05
    assert gap <= TOLERANCE


def our_bases(name, shape, rank, proj_type="std"):
    """The random bases the product draws for a parameter, one for each refresh."""
    length = shape[0 if reference.is_left(shape, proj_type) else 1]
    return lambda k, grad=None: lowrank_ds.linalg.gaussian((SEED, name, k), length, rank)


def svd_basis(shape, rank, proj_type="std"):
    return lambda k, grad: reference.svd_bases(grad, rank, proj_type)[0 if reference.is_left(shape, proj_type) else 1]


def galore_adamw(name, weight, grads, **options):
    return reference.galore_adamw(weight, grads, **options)


def galore_adafactor(name, weight, grads, **options):
    return reference.galore_adafactor(weight, grads, **options)


def fira(name, weight, grads, **options):
    return reference.fira(weight, grads, **options)


def apollo(name, weight, grads, rank, subspace="gaussian", proj_type="std", **options):
    source = functools.partial(our_bases, name) if subspace == "gaussian" else svd_basis
    bases = source(weight.shape, rank, proj_type)
    return reference.apollo(weight, grads, bases, proj_type=proj_type, **options)


def mini(name, weight, grads, **options):
    return apollo(name, weight, grads, **{"scale": 128.0, "scale_type": "tensor", **options})


def flora(name, weight, grads, rank, **options):
    return reference.flora(weight, grads, our_bases(name, weight.shape, rank), **options)


ALGORITHMS = {
    "galore": (lowrank_ds.GaLoreAdamW, galore_adamw, reference.adamw),
    "galore_adafactor": (lowrank_ds.GaLoreAdafactor, galore_adafactor, reference.adafactor),
    "fira": (lowrank_ds.FiraAdamW, fira, reference.adamw),
    "apollo": (lowrank_ds.ApolloAdamW, apollo, reference.adamw),
    "mini": (lowrank_ds.ApolloMini, mini, reference.adamw),
    "flora": (lowrank_ds.Flora, flora, reference.flora),
    "lomo": (lowrank_ds.Lomo, None, reference.sgd),
    "adalomo": (lowrank_ds.AdaLomo, None, reference.adalomo),
}
ADAM = {"lr": 0.02}
ADAFACTOR = {"lr": 0.02, "scale_parameter": False, "relative_step": False}
FLORA = {"lr": 0.02, "kappa": GAP, "beta1": 0.9, "scale_parameter": False}
DECAY = {"weight_decay": 0.5}
LOW_RANK = {"rank": 6, "update_proj_gap": GAP}
SIDES = ["std", "reverse_std", "right", "left"]

EXACT = ("galore", "galore_adafactor", "fira")  # whose bases in reference.py are exact; the others name theirs
REFRESH = ["keep", "rotate", "reset"]
FORMS = {"residual": ["code", "paper"], "scaling": ["column", "matrix"]}


def grid(algorithm, hyper, **choices):
    """A case for every combination of the choices."""
    combinations = itertools.product(*choices.values())
    return [(algorithm, hyper, dict(zip(choices, values, strict=True))) for values in combinations]


CASES = [
    *grid("galore", ADAM, proj_type=SIDES, on_refresh=REFRESH),
    *grid("galore", ADAM, proj_type=["full"], on_refresh=["keep", "reset"]),
    *grid("galore", ADAM | DECAY, scale=[0.25, 1.0]),
    *grid("galore", ADAM | DECAY | {"betas": (0.8, 0.95), "correct_bias": False, "eps": 1e-4}, scale=[0.5]),
    *grid("galore_adafactor", ADAFACTOR | DECAY, proj_type=[*SIDES, "full"]),
    *grid("galore_adafactor", DECAY, scale=[1.0]),
    *grid("galore_adafactor", ADAFACTOR | {"beta1": 0.9, "scale_parameter": True, "lr": 0.05}, scale=[1.0]),
    *grid("galore_adafactor", ADAFACTOR | {"beta1": 0.9}, on_refresh=REFRESH, proj_type=SIDES),
    *grid("galore_adafactor", ADAFACTOR | {"beta1": 0.9}, on_refresh=["keep", "reset"], proj_type=["full"]),
    *grid("fira", ADAM, **FORMS, proj_type=SIDES),
    *grid("fira", ADAM, residual=["code", "paper"], on_refresh=REFRESH),
    *grid("fira", ADAM | DECAY, **FORMS),
    *grid("fira", ADAM, limiter=[1.1], alpha=[0.7], residual=["paper"]),
    *grid("apollo", ADAM | DECAY, scale=[4.0], scale_type=["channel", "tensor"], subspace=["gaussian", "svd"]),
    *grid("apollo", ADAM | DECAY, scale=[4.0], scale_type=["channel", "tensor"], scale_front=[True]),
    *grid("apollo", ADAM, disable_nl=[True], proj_type=["std", "reverse_std"]),
    *grid("mini", {"lr": 0.005} | DECAY, rank=[1]),
    *grid("flora", FLORA | DECAY),
    *grid("flora", FLORA | DECAY | {"scale_parameter": True, "lr": 0.05, "clip_threshold": 0.3}),
]


@pytest.mark.parametrize("algorithm, hyper, keys", CASES, ids=str)
def test_equals_reference(algorithm, hyper, keys):
    keys = {"rank": 6} | keys if algorithm == "flora" else LOW_RANK | keys
    check(algorithm, hyper, keys)


PLAIN_CASES = [
    ("galore", ADAM | DECAY),
    ("fira", ADAM | {"betas": (0.8, 0.95), "eps": 1e-4}),
    ("apollo", ADAM | {"correct_bias": False, "lr": 0.005}),
    ("galore_adafactor", ADAFACTOR | DECAY),
    ("galore_adafactor", ADAFACTOR | {"beta1": 0.9, "decay_rate": -0.6, "clip_threshold": 0.5}),
    ("galore_adafactor", {"beta1": 0.9}),
    ("galore_adafactor", {"warmup_init": True, "eps": (1e-30, 1e3)}),
    ("lomo", {"lr": 3.0, "weight_decay": 0.01}),
    ("adalomo", {"lr": 0.05}),
    ("adalomo", {"lr": 0.05, "decay_rate": -0.6, "clip_threshold": 0.5, "eps": (1e-4, 0.5)} | DECAY),
]


@pytest.mark.parametrize("algorithm, hyper", PLAIN_CASES, ids=str)
def test_groups_without_rank(algorithm, hyper):
    cls, _, plain = ALGORITHMS[algorithm]
    _, expected = expect(plain, lambda name, *args, **options: plain(*args, **options), hyper, {})
    assert difference(train(cls, hyper, {"rank": None}), expected) <= TOLERANCE


@pytest.mark.parametrize("algorithm", ["galore", "fira", "apollo"])
@pytest.mark.parametrize("zeros", [{0}, {0, 1, GAP + 2}, {5, GAP, GAP + 1}], ids=str)
def test_zero_gradients(algorithm, zeros):
    """A zero gradient fixes neither a basis nor a limiter: the next real gradient does."""
    keys = LOW_RANK | ({"subspace": "svd"} if algorithm == "apollo" else {})
    check(algorithm, ADAM | DECAY, keys, zeros=zeros)


@pytest.mark.parametrize("algorithm", ["galore", "fira"])
def test_rank_above_the_gradients_own(algorithm):
    """Directions the gradient does not have are dropped, or Adam would turn their rounding noise into full steps."""
    check(algorithm, ADAM, LOW_RANK, true_rank=3)


def test_reference_adamw_is_torchs():
    (weight, *_), (grads, *_) = reference.problem([(16, 40)], STEPS)
    parameter = torch.nn.Parameter(weight.double())
    optimizer = torch.optim.AdamW([parameter], lr=0.02, eps=0, weight_decay=0.5)
    for grad in grads:
        parameter.grad = grad.double()
        optimizer.step()
    expected = reference.adamw(weight, grads, lr=0.02, eps=0, weight_decay=0.5)
    assert difference([parameter.detach()], [expected]) < 1e-12


def captured(step, grad, rank, left):
    """The share of the best possible energy that is captured by the subspace in which a step moved the weight."""
    u, s, vh = torch.linalg.svd(step.double())
    assert s[rank] < 1e-5 * s[0]
    coordinates = u[:, :rank].T @ grad if left else grad @ vh[:rank].T
    return (coordinates.norm() ** 2 / torch.linalg.svdvals(grad)[:rank].square().sum()).item()


@pytest.mark.parametrize("subspace, least", [("svd", 0.99999), ("randomized", 0.995), ("power", 0.995)])
@pytest.mark.parametrize("shape", [(192, 320), (320, 192), (256, 256)], ids=str)
@pytest.mark.parametrize("spectrum", [{"ratio": 0.9}, {"ratio": 1.0, "power": 0.7}], ids=str)
def test_captured_energy(subspace, least, shape, spectrum):
    rank, left = 16, reference.is_left(shape)
    weight = torch.nn.Parameter(torch.zeros(shape))
    group = {"params": [weight], "rank": rank, "update_proj_gap": 1, "subspace": subspace}
    optimizer = lowrank_ds.GaLoreAdamW([group], lr=1.0, scale=1.0)
    for grad in reference.gradients(shape, 6, **spectrum):
        weight.data.zero_()
        weight.grad = grad.clone()
        optimizer.step()
        share = captured(weight.detach(), grad.double(), rank, left)
        print(f"{share:.5f}")
        assert least <= share <= 1 + 1e-5


def test_random_subspace_captures_little():
    weight = torch.nn.Parameter(torch.zeros(96, 160))
    group = {"params": [weight], "rank": 8, "update_proj_gap": 1, "subspace": "gaussian"}
    (grad,) = reference.gradients(weight.shape, 1, ratio=0.9)
    weight.grad = grad.clone()
    lowrank_ds.GaLoreAdamW([group], lr=1.0, scale=1.0).step()
    assert captured(weight.detach(), grad.double(), 8, left=True) < 0.5


def test_random_bases():
    """N(0, 1/rank), a function of key and place: any rows can be drawn alone, any other key is independent."""
    draw = lowrank_ds.linalg.gaussian
    full = draw((0, "w", 0), 4096, 16)
    assert torch.equal(full[100:300], draw((0, "w", 0), 4096, 16, slice(100, 300)))
    assert full.mean().abs() < 5e-3
    assert (16 * full.var() - 1).abs() < 2e-2
    assert ((full * 4) ** 4).mean() == pytest.approx(3, abs=0.2)
    assert torch.allclose(full.T @ full / 256, torch.eye(16), atol=0.1)
    for key in [(1, "w", 0), (0, "v", 0), (0, "w", 1)]:
        other = draw(key, 4096, 16)
        assert torch.corrcoef(torch.stack([full.flatten(), other.flatten()]))[0, 1].abs() < 2e-2
