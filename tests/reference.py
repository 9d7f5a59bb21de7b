"""The textbook in float64: one plain function per algorithm, no class, no batching, no distribution.

Every function takes a weight, the list of its gradients and the hyper-parameters, and returns the weight after all
steps. One notation throughout: ``P`` and ``Q`` compress rows and columns, the side that is not compressed has the
identity, so

    coordinates  R = P^T G Q        way back  P N Q^T        a new basis  M <- (P_new^T P_old) M (Q_old^T Q_new).

Conventions shared with the product (each differs from some paper or package, see docs/algorithms.md):

* Adam's eps is added to the uncorrected root of the second moment and the bias correction is folded into the step size.
* Decoupled weight decay comes first, with the step's own learning rate: ``W <- (1 - lr wd) W - lr u``.
* A basis is renewed at steps 0, T, 2T, ... counted before the step, or at the first gradient after that is not zero.
* A parameter's clock (bias correction, decay, refreshes) starts at its first gradient that is not zero (``awake``); a
  zero gradient never fixes a basis nor a limiter.
* Singular vectors have canonical signs; directions below 1e-6 of the largest singular value are dropped.
"""

import functools
import hashlib
import itertools
import math

import torch

# ---------------------------------------------------------------------------------------------------------------- data


def problem(shapes, steps, zeros=(), **gradient):
    """Start weights, and for each the list of its gradients, zero at some steps; they do not depend on the weights."""
    generator = torch.Generator().manual_seed(1)
    weights = [0.3 * torch.randn(shape, generator=generator) for shape in shapes]
    grads = [gradients(shape, steps, seed=i, **gradient) for i, shape in enumerate(shapes)]
    return weights, [[g * (t not in zeros) for t, g in enumerate(each)] for each in grads]


@functools.cache
def gradients(shape, steps, seed=0, ratio=0.8, power=0.0, drift=0.3, size=0.1, true_rank=None):
    """float32 gradients: singular values size ratio^i (i+1)^-power, singular vectors that wander around fixed ones."""
    if len(shape) == 1:
        return [g[0] for g in gradients((1, *shape), steps, seed, drift=drift, size=size)]
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(min(shape), dtype=torch.float64)
    spectrum = size * ratio**order * (order + 1) ** -power
    spectrum[true_rank or len(spectrum) :] = 0
    left, right = (normal(generator, length, min(shape)) for length in shape)
    return [(frame(generator, left, drift) * spectrum @ frame(generator, right, drift).T).float() for _ in range(steps)]


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def frame(generator, fixed, drift):
    return torch.linalg.qr(fixed + drift * normal(generator, *fixed.shape))[0]


# --------------------------------------------------------------------------------------------------------------- bases


def canonical(columns):
    """Each column times the sign of the sum of the cubes of its entries (+1 if that is zero)."""
    return columns * torch.where(columns.pow(3).sum(0) < 0, -1.0, 1.0).to(columns)


def is_left(shape, proj_type="std"):
    """GaLore's ``proj_type``: std compresses the shorter side, columns (right) when the matrix is square."""
    return {"left": True, "right": False, "std": shape[0] < shape[1], "reverse_std": shape[0] >= shape[1]}[proj_type]


def svd_bases(grad, rank, proj_type="std"):
    """(P, Q) from the leading singular vectors, the identity on the side that is not compressed (GaLore section 3)."""
    u, s, vh = torch.linalg.svd(grad, full_matrices=False)
    kept = (s[:rank] >= 1e-6 * s[0]).to(grad)
    p, q = canonical(u[:, :rank]) * kept, canonical(vh[:rank].T) * kept
    if proj_type == "full":
        return p, q
    return one_sided(p if is_left(grad.shape, proj_type) else q, grad.shape, proj_type)


def one_sided(basis, shape, proj_type="std"):
    """(P, Q) from one basis whose columns live on the compressed side."""
    if is_left(shape, proj_type):
        return basis, torch.eye(shape[1], dtype=basis.dtype)
    return torch.eye(shape[0], dtype=basis.dtype), basis


# ------------------------------------------------------------------------------------------------- the parts of a step


def adam_moments(m, v, grad, betas):
    """AdamW (arXiv 1711.05101) Algorithm 2, lines 7-8."""
    return betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2


def adam_step_size(lr, betas, t, correct_bias):
    """AdamW Algorithm 2, lines 9-10, as one factor of the learning rate; t counts from 1."""
    return lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) if correct_bias else lr


def awake(grads):
    """The gradients in float64, from the first that is not zero."""
    return [g.double() for g in itertools.dropwhile(lambda g: not g.any(), grads)]


def due(t, renewed, gap, grad):
    """Whether step t (from 0) renews the basis, last renewed at step ``renewed`` (None: never)."""
    return (renewed is None or t - renewed >= gap) and bool(grad.any())


def rms(x):
    return x.norm() / math.sqrt(x.numel())


def adafactor_normalise(v, grad, t, eps, decay_rate, factored):
    """Adafactor (arXiv 1804.04235) Algorithms 4 (factored) and 5 (full): the new v and U = G / sqrt(V), unclipped."""
    beta2 = 1 - t**decay_rate
    square = grad**2 + eps[0]
    if not factored:
        v = beta2 * v + (1 - beta2) * square
        return v, grad / v.sqrt()
    row, col = v if isinstance(v, tuple) else (0.0, 0.0)
    row, col = beta2 * row + (1 - beta2) * square.mean(1), beta2 * col + (1 - beta2) * square.mean(0)
    return (row, col), grad / torch.sqrt(torch.outer(row, col) / row.mean())


def relative_rate(lr, t, relative_step, warmup_init):
    """Adafactor section 8, rho_t: the relative step size, or the given learning rate."""
    return min(1e-6 * t if warmup_init else 1e-2, 1 / math.sqrt(t)) if relative_step else lr


def parameter_scale(weight, eps, scale_parameter):
    """Adafactor Algorithm 4, alpha_t = max(eps2, RMS(W)) rho_t: the factor of rho_t."""
    return max(eps[1], rms(weight).item()) if scale_parameter else 1.0


def clip_rms(update, threshold):
    """Adafactor Algorithm 4, line 8: update clipping."""
    return update / max(1.0, rms(update).item() / threshold)


def grow_at_most(update, previous, growth):
    """Fira's norm-growth limiter: the limited update and the norm to remember (never zero)."""
    norm = update.norm().item()
    if previous is not None:
        excess = max(norm / (previous + 1e-8), growth) / growth
        update, norm = update / excess, norm / excess
    return update, norm if norm > 0 else previous


def line_norms(x, left):
    """Norms of the uncompressed lines: rows of R when columns are compressed, columns of R when rows are."""
    return x.norm(dim=0, keepdim=True) if left else x.norm(dim=1, keepdim=True)


def transport(m, old, new):
    """A momentum in the coordinates of the old bases, expressed in the new ones."""
    return (new[0].T @ old[0]) @ m @ (old[1].T @ new[1])


# ---------------------------------------------------------------------------------------------------------- algorithms


def adamw(weight, grads, *, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True):
    """AdamW (arXiv 1711.05101) Algorithm 2."""
    w, m, v = weight.double(), 0.0, 0.0
    for t, grad in enumerate(awake(grads), 1):
        m, v = adam_moments(m, v, grad, betas)
        w = (1 - lr * weight_decay) * w - adam_step_size(lr, betas, t, correct_bias) * m / (v.sqrt() + eps)
    return w


def adafactor(
    weight, grads, *, lr=None, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, beta1=None, weight_decay=0.0,
    scale_parameter=True, relative_step=True, warmup_init=False,
):  # fmt: skip
    """Adafactor (arXiv 1804.04235) Algorithms 4-6; the optional momentum is of scaled updates, before the rate."""
    w, v, m = weight.double(), 0.0, 0.0
    for t, grad in enumerate(awake(grads), 1):
        rate, size = relative_rate(lr, t, relative_step, warmup_init), parameter_scale(w, eps, scale_parameter)
        v, update = adafactor_normalise(v, grad, t, eps, decay_rate, factored=w.ndim == 2)
        update = size * clip_rms(update, clip_threshold)
        if beta1 is not None:
            update = m = beta1 * m + (1 - beta1) * update
        w = (1 - rate * size * weight_decay) * w - rate * update
    return w


def sgd(weight, grads, *, lr, weight_decay=0.0):
    """LOMO (arXiv 2306.09782) Algorithm 1: gradient descent; decoupled decay as in lomo-optim."""
    w = weight.double()
    for grad in awake(grads):
        w = (1 - lr * weight_decay) * w - lr * grad
    return w


def adalomo(weight, grads, *, lr, **options):
    """AdaLomo (arXiv 2310.10195) Algorithm 1: Adafactor with a given rate and no momentum, scaled by RMS(W)."""
    return adafactor(weight, grads, lr=lr, scale_parameter=True, relative_step=False, beta1=None, **options)


def moments_at_refresh(on_refresh, old, new, m, v, start, t):
    """Moments and the step their bias correction counts from, after a change of basis (the first is none)."""
    if old is not None and on_refresh == "rotate":
        m = transport(m, old, new)
    if old is not None and on_refresh == "reset":
        m, v, start = 0.0, 0.0, t
    return m, v, start


def galore_adamw(
    weight, grads, *, rank, lr, update_proj_gap=200, scale=0.25, proj_type="std", on_refresh="keep",
    betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True,
):  # fmt: skip
    """GaLore (arXiv 2403.03507) Algorithm 2."""
    w, m, v, bases, renewed, start = weight.double(), 0.0, 0.0, None, None, 0
    for t, grad in enumerate(awake(grads)):
        if due(t, renewed, update_proj_gap, grad):
            old, bases, renewed = bases, svd_bases(grad, rank, proj_type), t
            m, v, start = moments_at_refresh(on_refresh, old, bases, m, v, start, t)
        p, q = bases
        m, v = adam_moments(m, v, p.T @ grad @ q, betas)
        direction = p @ (m / (v.sqrt() + eps)) @ q.T
        step_size = adam_step_size(lr, betas, t + 1 - start, correct_bias)
        w = (1 - lr * weight_decay) * w - step_size * scale * direction
    return w


def galore_adafactor(
    weight, grads, *, rank, update_proj_gap=200, scale=0.25, proj_type="std", on_refresh="keep", lr=None,
    eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, beta1=None, weight_decay=0.0, scale_parameter=True,
    relative_step=True, warmup_init=False,
):  # fmt: skip
    """GaLore (arXiv 2403.03507) Algorithm 1 with Adafactor as the inner rule; RMS(W) is that of the full weight."""
    w, v, m, bases, renewed, start = weight.double(), 0.0, 0.0, None, None, 0
    for t, grad in enumerate(awake(grads)):
        if due(t, renewed, update_proj_gap, grad):
            old, bases, renewed = bases, svd_bases(grad, rank, proj_type), t
            if old is not None and on_refresh == "rotate" and beta1 is not None:
                m = transport(m, old, bases)
            if old is not None and on_refresh == "reset":
                v, m, start = 0.0, 0.0, t
        p, q = bases
        rate, size = relative_rate(lr, t + 1, relative_step, warmup_init), parameter_scale(w, eps, scale_parameter)
        v, update = adafactor_normalise(v, p.T @ grad @ q, t + 1 - start, eps, decay_rate, factored=True)
        update = size * clip_rms(update, clip_threshold)
        if beta1 is not None:
            update = m = beta1 * m + (1 - beta1) * update
        w = (1 - rate * size * weight_decay) * w - rate * scale * p @ update @ q.T
    return w


def fira(
    weight, grads, *, rank, lr, update_proj_gap=200, alpha=0.25, proj_type="std", residual="code", scaling="column",
    limiter=1.01, on_refresh="keep", betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True,
):  # fmt: skip
    """Fira (arXiv 2410.01623) Algorithm 1: residual, norm-based scaling by column or by matrix, norm-growth limiter.

    ``paper``: alpha (P N Q^T + S) with S from G - P R Q^T; ``code`` (fira 1.0.2): alpha P N Q^T + S with S from
    G - alpha P R Q^T.
    """
    w, m, v, bases, renewed, start, previous = weight.double(), 0.0, 0.0, None, None, 0, None
    left = is_left(weight.shape, proj_type)
    inside, outside = {"code": (alpha, 1.0), "paper": (1.0, alpha)}[residual]
    for t, grad in enumerate(awake(grads)):
        if due(t, renewed, update_proj_gap, grad):
            old, bases, renewed = bases, svd_bases(grad, rank, proj_type), t
            m, v, start = moments_at_refresh(on_refresh, old, bases, m, v, start, t)
        p, q = bases
        r = p.T @ grad @ q
        m, v = adam_moments(m, v, r, betas)
        n = m / (v.sqrt() + eps)
        size = (lambda x: line_norms(x, left)) if scaling == "column" else torch.norm
        s = (size(n) / (size(r) + 1e-8)) * (grad - inside * p @ r @ q.T)
        s, previous = grow_at_most(s, previous, limiter)
        step_size = adam_step_size(lr, betas, t + 1 - start, correct_bias)
        w = (1 - lr * weight_decay) * w - step_size * (alpha * p @ n @ q.T + outside * s)
    return w


def apollo(
    weight, grads, basis, *, lr, update_proj_gap=200, scale=1.0, scale_type="channel", scale_front=False,
    disable_nl=False, proj_type="std", betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True,
):  # fmt: skip
    """APOLLO (arXiv 2412.05270) Algorithm 1; APOLLO-Mini is rank 1 with ``scale_type="tensor"``.

    ``basis(k, grad)`` is the k-th basis, (length of the compressed side, rank). ``scale`` enters as its root.
    """
    w, m, v, previous, count, renewed = weight.double(), 0.0, 0.0, None, 0, None
    left, root = is_left(weight.shape, proj_type), math.sqrt(scale)
    for t, grad in enumerate(awake(grads)):
        if due(t, renewed, update_proj_gap, grad):
            p, q = one_sided(basis(count, grad).double(), grad.shape, proj_type)
            count, renewed = count + 1, t
        r = p.T @ grad @ q
        m, v = adam_moments(m, v, r, betas)
        n = m / (v.sqrt() + eps)
        size = (lambda x: line_norms(x, left)) if scale_type == "channel" else torch.norm
        update = (size(n) / (size(r) + 1e-8)) * grad * (root if scale_front else 1.0)
        if not disable_nl:
            update, previous = grow_at_most(update, previous, 1.01)
        update = update * (1.0 if scale_front else root)
        w = (1 - lr * weight_decay) * w - adam_step_size(lr, betas, t + 1, correct_bias) * update
    return w


def flora(
    weight, grads, basis=None, *, lr=None, kappa=1000, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8,
    beta1=None, weight_decay=0.0, scale_parameter=True, relative_step=False, warmup_init=False,
    factorize_second_moment=True,
):  # fmt: skip
    """Flora (arXiv 2402.03293) Algorithm 2 on Adafactor, as flora_opt: momentum of the normalised update, then clipped.

    ``basis(k)`` is the k-th basis A^T, (length of the shorter side, rank), moved to at every kappa-th step; without
    it the momentum is full.
    """
    w, v, m = weight.double(), 0.0, 0.0
    bases = None if basis is None else one_sided(basis(0).double(), weight.shape)
    for t, grad in enumerate(awake(grads), 1):
        rate = relative_rate(lr, t, relative_step, warmup_init) * parameter_scale(w, eps, scale_parameter)
        factored = w.ndim == 2 and factorize_second_moment
        v, update = adafactor_normalise(v, grad, t, eps, decay_rate, factored)
        if beta1 and bases is None:
            update = m = beta1 * m + (1 - beta1) * update
        elif beta1:
            raw, old = update, bases
            m = torch.zeros_like(old[0].T @ raw @ old[1]) if t == 1 else m
            update = beta1 * old[0] @ m @ old[1].T + (1 - beta1) * raw
            if t % kappa == 0:
                bases = one_sided(basis(t // kappa).double(), weight.shape)
                m = transport(m, old, bases)
            m = beta1 * m + (1 - beta1) * bases[0].T @ raw @ bases[1]
        w = (1 - rate * weight_decay) * w - rate * clip_rms(update, clip_threshold)
    return w


# --- seeded noise, in Python's integers --------------------------------------------------------------------------
def noise_word(key, row: int, column: int) -> int:
    """The 32 random bits of a place, 0 <= word < 2^32 (`lowrank_ds/noise.py`)."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    block, place = divmod(column, 1 << 15)
    line = _splitmix(row * 0x9E3779B97F4A7C15 + seed + block * 0xD1342543DE82EF95)
    x = (_splitmix((place + 1) * 0x9E3779B97F4A7C15) + line) * (line >> 32 | 1)
    x = (x + _shifted(x, 15)) * 0x846CA68B
    return (x + _shifted(x, 16)) % 2**32


def _splitmix(x: int) -> int:
    """splitmix64's finaliser."""
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _shifted(x: int, by: int) -> int:
    """The low 32 bits of x as a signed number, shifted to the right."""
    return ((x + 2**31) % 2**32 - 2**31) >> by
