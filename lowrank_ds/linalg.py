"""Small dense kernels: norms that are fast on every device, seeded noise, orthonormal factors.

Pure functions of tensors. Legend: m rows, n columns, k or r basis columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 16  # entries per block of the blocked reductions: stays in a core's L2 cache
_MASK32 = 0xFFFFFFFF
_NULL, _TINY = 1e-6, 1e-25  # singular values that count as none: of the largest one, and at all
_SHIFT = 1e-7  # of the squared length of a column: see whiten
LARGEST_GRADIENT = 1e15  # beyond it squared norms overflow fp32, and a moment that was once infinite stays NaN


def row_square_sums(x: Tensor) -> Tensor:
    """Sums of squares of the rows of x (m, n), fp32 (m,). Blocked: no full-size temporary."""
    step = max(1, _CHUNK // max(1, x.shape[1])) if x.device.type == "cpu" else x.shape[0]
    parts = [part.float().square().sum(1) for part in x.split(max(1, step))] if x.shape[0] else []
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.float32)


def column_square_sums(x: Tensor) -> Tensor:
    """Sums of squares of the columns of x (m, n), fp32 (n,). Blocked: `torch.norm(dim=0)` is 7-15x slower on CPU."""
    total = x.new_zeros(x.shape[1], dtype=torch.float32)
    step = max(1, _CHUNK // max(1, x.shape[1])) if x.device.type == "cpu" else max(1, x.shape[0])
    for part in x.split(step):
        total += part.float().square().sum(0)
    return total


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


def leading_singular_vectors(x: Tensor, rank: int, sides: Sequence[str] = ("left", "right")) -> dict[str, Tensor]:
    """Leading singular vectors of x (m, n), exact: {"left": (m, r), "right": (n, r)}, canonical signs, null mask.

    Where one side is twice the other or more: from the shorter side's fp64 Gram matrix, which is as accurate as an fp32
    SVD down to 1e-7 of the largest singular value, and four times faster. Else by LAPACK's SVD, which is then smaller.
    """
    m, n = x.shape
    if max(m, n) >= 2 * min(m, n):
        return _from_gram(x.T, rank, sides, "left", "right") if m < n else _from_gram(x, rank, sides, "right", "left")
    u, s, vh = torch.linalg.svd(x.float(), full_matrices=False)
    s, found = s[:rank], {"left": u[:, :rank], "right": vh[:rank].T}
    live = (s > _NULL * s.max()).float()
    # contiguous copies: u and vh can be freed
    return {side: (found[side] * (canonical_signs(found[side]) * live)).contiguous() for side in sides}


def _from_gram(tall: Tensor, rank: int, sides: Sequence[str], short: str, long: str) -> dict[str, Tensor]:
    """The same of a tall matrix (d, k), whose columns are on side `short` and whose rows are on `long`."""
    vectors, singular = leading_directions(gram(tall), rank)
    found = {short: (vectors * canonical_signs(vectors)).float().contiguous()}
    if long in sides:
        rotation, y = _over(vectors, singular), vectors.new_empty(len(tall), rank, dtype=torch.float32)
        for rows in _slices(tall):
            torch.mm(tall[rows].float(), rotation, out=y[rows])
        found[long] = y @ orthonormal_correction(gram(y), (y.square() * y).sum(0))
    return {side: found[side] for side in sides}


def gram(x: Tensor) -> Tensor:
    """The lower triangle of X^T X (k, k) in fp64, for x (d, k); a piece of x is in fp64 at a time.

    Above it there is nothing to use; `eigh` and `cholesky` do not look there.
    """
    k = x.shape[1]
    out = torch.zeros(k, k, dtype=torch.float64, device=x.device)
    width = max(72, k // 8) if x.device.type == "cpu" else k  # GPU: one product
    for rows in _slices(x):
        part = x[rows].double()
        for j in range(0, k, width):
            out[j:, j : j + width].addmm_(part[:, j:].T, part[:, j : j + width])
    return out


def _slices(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x (d, k) that are small beside it, or beside a cache."""
    step = max(1, (_CHUNK << 2 if x.device.type == "cpu" else _CHUNK << 8) // max(1, x.shape[1]))
    return (slice(first, min(first + step, len(x))) for first in range(0, len(x), step))


def leading_directions(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The r leading eigenvectors (k, r) of a Gram matrix (k, k; `gram`), fp64, and singular values (r,), descending.

    Below 1e-6 of the largest (or 1e-25) both are zeros: coordinates along such directions are rounding noise, which
    Adam would turn into full-size updates.
    """
    values, vectors = torch.linalg.eigh(gram)
    singular = values[-rank:].flip(0).clamp_min(0).sqrt()
    live = (singular > (_NULL * singular[0]).clamp_min(_TINY)).double()
    return vectors[:, -rank:].flip(1) * live, singular * live


def leading_rotation(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """C (k, r) fp32 such that Y C are the r leading left singular vectors of Y with Y^T Y = gram (k, k) fp64.

    Also the singular values (r,), fp64; zeros, as the columns of C, for null directions (`leading_directions`).
    """
    vectors, singular = leading_directions(gram, rank)
    return _over(vectors, singular), singular


def _over(vectors: Tensor, singular: Tensor) -> Tensor:
    """Columns (k, r) over their singular values (r,), fp32; zero columns where these are zero."""
    return (vectors / torch.where(singular > 0, singular, 1.0)).float()


def whiten(x: Tensor, gram: Tensor) -> Tensor:
    """An orthonormal basis of the columns of x (d, k), fp32; gram (k, k) fp64 is X^T X over all ranks.

    Cholesky of the Gram matrix of columns scaled to length 1, with a shift, so it never fails. What is left of a column
    beside those before it comes out shorter than 1 from 3e-4 of its length on: it is rounding by then, and a unit
    vector of rounding would make the result another on every sharding.
    """
    scale = gram.diagonal().sqrt()
    scale = scale.clamp_min((1e-4 * scale.max()).clamp_min(_TINY))
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky_ex(gram / torch.outer(scale, scale) + _SHIFT * identity)[0]
    return x @ (torch.linalg.solve_triangular(factor, identity, upper=False).T / scale.unsqueeze(1)).float()


def orthonormal_correction(gram: Tensor, cubes: Tensor) -> Tensor:
    """C (r, r) fp32 such that Y C is orthonormal and has canonical signs, for Y^T Y = gram (r, r) near the identity.

    Triangular: a column is corrected by those before it only, which are larger singular vectors and more exact. Columns
    that are zero (masked) stay zero. cubes (r,): the sums of the cubes of each column of Y.
    """
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    dead = torch.diag((gram.diagonal() < 0.25).to(gram.dtype))
    factor = torch.linalg.cholesky_ex(gram + dead + 1e-7 * identity)[0]
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False).T
    return (inverse * torch.where(cubes < 0, -1.0, 1.0)).float()


def gram_inverse(rows: Tensor, damping: float = 1e-7) -> tuple[Tensor, float]:
    """((X X^T + damping t I)^-1 fp32, independence) of rows X (r, n), t the mean squared row norm; in fp64.

    independence: the smallest squared Cholesky pivot over t; about `damping` or less when a row depends on others.
    """
    gram = rows.double() @ rows.double().T
    size = gram.diagonal().mean()
    damped = gram + damping * size * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(damped)
    return torch.cholesky_inverse(factor).float(), float(factor.diagonal().min() ** 2 / size)
