"""Small dense kernels: norms that are fast on every device, seeded noise, orthonormal factors.

Pure functions of tensors. Legend: m rows, n columns, k or r basis columns.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_CHUNK = 1 << 16  # entries per block of the blocked reductions: stays in a core's L2 cache
_WIDTH = 1 << 13  # entries of a row that a norm sums in one go
_MASK32 = 0xFFFFFFFF
LARGEST_GRADIENT = 1e15  # beyond it squared norms overflow fp32, and a moment that was once infinite stays NaN


def row_square_sums(x: Tensor) -> Tensor:
    """Sums of squares of the rows of x (m, n), fp32 (m,). Blocked: no full-size temporary, no long sum in one go."""
    if x.shape[1] <= _WIDTH:
        return _row_norms(x).square_()
    total = x.new_zeros(x.shape[0], dtype=torch.float32)
    folded = x.shape[1] // _WIDTH if x.is_contiguous() else 0  # rows far longer than others, a whole parameter, say
    if folded > 1 and x.shape[0] == 1:
        total += row_square_sums(x[0, : folded * _WIDTH].view(folded, _WIDTH)).sum()
        x = x[:, folded * _WIDTH :]
    for part in x.split(_WIDTH, 1):
        total += _row_norms(part).square_()
    return total


def _row_norms(x: Tensor) -> Tensor:
    """Norms of the rows of x (m, n), fp32 (m,)."""
    if x.dtype == torch.float32 or x.device.type != "cpu":
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    step = max(1, _CHUNK // max(1, x.shape[1]))  # on CPU it would make an fp32 copy of all
    return torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in x.split(step)])


def column_square_sums(x: Tensor) -> Tensor:
    """Sums of squares of the columns of x (m, n), fp32 (n,). Blocked: `torch.norm(dim=0)` is 7-15x slower on CPU."""
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
    step = min(x.shape[0], max(1, _CHUNK // max(1, x.shape[1])))
    total = x.new_zeros(step, x.shape[1], dtype=torch.float32)
    for part in x.split(max(1, step)):
        total[: len(part)].addcmul_(part.float(), part.float())
    return total.sum(0)


def peak(x: Tensor) -> Tensor:
    """Largest magnitude in x, 0-d fp32: 0 for a zero (or empty) tensor, NaN if any entry is."""
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    low, high = torch.aminmax(x)  # one pass without temporaries; on CPU 10x faster than an infinity norm
    return torch.maximum(-low, high).float()


def is_usable(largest: Tensor) -> Tensor:
    """Whether a gradient whose largest magnitude is `largest` can be squared and summed in fp32 (NaN: no)."""
    return largest < LARGEST_GRADIENT


# --- seeded noise that depends on a key and a position only ------------------------------------------------------
def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (Wellons' lowbias32) in int64 lanes; multiplication wraps, the low 32 bits are right."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK32
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK32
    return x ^ (x >> 16)


def _bits(key: tuple, index: Tensor) -> Tensor:
    """32 pseudo-random bits (int64) for each entry of `index`, a function of `key` and the index alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    first, second = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    return _mix(_mix((index & _MASK32) ^ first) + (index >> 32) + second & _MASK32)


def gaussian(
    key: tuple[int, str, int], length: int, rank: int, rows: slice | None = None, device: torch.device | None = None
) -> Tensor:
    """Rows `rows` of a (length, rank) matrix with independent N(0, 1/rank) entries, fp32.

    A counter-based generator: an entry depends on `key` = (run seed, parameter name, refresh number), its place
    and `rank` only, so a rank can draw just its own rows, and device, world size and call order do not matter.
    """
    rows = rows or slice(0, length)
    pairs = (rank + 1) // 2
    index = torch.arange(rows.start * pairs, rows.stop * pairs, device=device, dtype=torch.int64)
    bits = _bits(key, index * 2), _bits(key, index * 2 + 1)
    uniform = [((b >> 8).float() + 0.5) / (1 << 24) for b in bits]  # in (0, 1): Box-Muller never sees log(0)
    radius, angle = (-2 * uniform[0].log()).sqrt(), 2 * math.pi * uniform[1]
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return normal.view(rows.stop - rows.start, 2 * pairs)[:, :rank] / math.sqrt(rank)


def stochastic_round(x: Tensor, key: tuple, first: int, stride: int | None = None) -> Tensor:
    """fp32 x to bf16, rounding up with probability equal to the distance: E[result] = x.

    The noise belongs to a place: entry i of a 1-D x is at first + i, entry (i, j) of a 2-D x at first + i * stride + j.
    So the result does not depend on sharding.
    """
    width = x.shape[-1]
    flat = stride in (None, width) or x.shape[0] <= 1
    lines = x.reshape(-1, 1) if flat else x
    out = torch.empty(lines.shape, dtype=torch.bfloat16, device=x.device)
    step = max(1, _CHUNK // max(1, lines.shape[1])) if x.device.type == "cpu" else max(1, lines.shape[0])
    for start in range(0, lines.shape[0], step):
        part = lines[start : start + step].contiguous()
        if flat:
            noise = _noise16(key, first + start, part.shape[0], x.device).view(-1, 1)
        else:
            noise = _noise16_tile(key, first + start * stride, part.shape, stride, x.device)
        rounded = (part.view(torch.int32) + noise) & -0x10000
        out[start : start + step] = torch.where(part.isfinite(), rounded.view(torch.float32), part).to(torch.bfloat16)
    return out.view(x.shape)


def uniform(key: tuple, first: int, shape: torch.Size, stride: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24, fp32: those of the places first + i * stride + j of a rectangle.

    A number depends on `key` and its place only.
    """
    rows, columns = (torch.arange(size, device=device, dtype=torch.int64) for size in shape)
    return (_bits(key, first + rows.unsqueeze(1) * stride + columns) >> 8).float().div_(1 << 24)


def _noise16(key: tuple, first: int, count: int, device: torch.device) -> Tensor:
    """16 random bits (int32) for each of the positions first, first + 1, ...: two positions share a 32-bit hash."""
    pairs = torch.arange(first // 2, (first + count + 1) // 2, device=device, dtype=torch.int64)
    bits = _bits(key, pairs)
    both = torch.stack([bits & 0xFFFF, bits >> 16], 1).view(-1)
    return both[first % 2 : first % 2 + count].to(torch.int32)


def _noise16_tile(key: tuple, first: int, shape: torch.Size, stride: int, device: torch.device) -> Tensor:
    """The noise of the positions first + i * stride + j of a rectangle of `shape`."""
    rows, columns = (torch.arange(size, device=device, dtype=torch.int64) for size in shape)
    index = first + rows.unsqueeze(1) * stride + columns
    bits = _bits(key, index >> 1)
    return torch.where(index & 1 == 1, bits >> 16, bits & 0xFFFF).to(torch.int32)


# --- orthonormal factors -----------------------------------------------------------------------------------------
def canonical_signs(basis: Tensor) -> Tensor:
    """+1 or -1 per column of (d, r): the sign of the sum of cubes. Singular vectors are unique only up to sign."""
    return torch.where(basis.double().pow(3).sum(0) < 0, -1.0, 1.0).to(basis.dtype)


def mask_null(basis: Tensor, singular: Tensor) -> Tensor:
    """Zero the columns of (d, r) whose singular value (r,) is below 1e-6 of the largest.

    Coordinates along such directions are rounding noise, which Adam would turn into full-size updates.
    """
    return basis * (singular > 1e-6 * singular.max().clamp_min(torch.finfo(singular.dtype).tiny)).to(basis.dtype)


def leading_singular_vectors(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading left (m, r) and right (n, r) singular vectors of x (m, n): exact SVD, canonical signs, null mask."""
    u, s, vh = torch.linalg.svd(x.float(), full_matrices=False)
    s = s[:rank]
    left, right = u[:, :rank].contiguous(), vh[:rank].T.contiguous()  # contiguous copies: u and vh can be freed
    return mask_null(left * canonical_signs(left), s), mask_null(right * canonical_signs(right), s)


def orthonormalize(y: Tensor) -> Tensor:
    """An orthonormal basis (n, k) of the columns of y (n, k), n >= k. Householder: orthonormal for every y, also 0."""
    return torch.linalg.qr(y).Q


def inverse_root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (k, k) and singular values (k,), descending, of a factor with Gram matrix `gram` (k, k) fp64."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(-1), values.flip(-1).clamp_min(0).sqrt()


def gram_inverse(rows: Tensor, damping: float = 1e-7) -> tuple[Tensor, float]:
    """((X X^T + damping t I)^-1 fp32, independence) of rows X (r, n), t the mean squared row norm; in fp64.

    independence: the smallest squared Cholesky pivot over t; about `damping` or less when a row depends on others.
    """
    gram = rows.double() @ rows.double().T
    size = gram.diagonal().mean()
    damped = gram + damping * size * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(damped)
    return torch.cholesky_inverse(factor).float(), float(factor.diagonal().min() ** 2 / size)


def cholesky_correction(gram: Tensor) -> Tensor:
    """C (r, r) fp32 such that Y C is orthonormal when Y^T Y = gram (r, r) fp64 is near the identity.

    Columns that are exactly zero (masked) stay zero.
    """
    dead = gram.diagonal() < 0.25
    factor = torch.linalg.cholesky_ex(gram + torch.diag(dead.to(gram.dtype)))[0]
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False).T.float()
