"""Small dense kernels: norms that are fast on every device, seeded noise, orthonormal factors.

Pure functions of tensors. Legend: m rows, n columns, k or r basis columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank_ds.noise import Noise

_CHUNK = 1 << 16  # entries per block of the blocked reductions: stays in a core's L2 cache
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


def square_sum(x: Tensor) -> Tensor:
    """The sum of squares of the entries of a contiguous x, 0-d fp32. Blocked: no full-size temporary."""
    size = _CHUNK if x.device.type == "cpu" else 1 << 24
    parts = [torch.dot(part, part) for part in (part.float() for part in x.view(-1).split(size))]
    return torch.stack(parts).sum()


def finite_(x: Tensor) -> Tensor:
    """x with 0 in place of what is not finite. (`torch.where` with numbers is 4x slower on CPU.)"""
    return x.nan_to_num_(0.0, 0.0, 0.0)


# --- seeded noise that depends on a key and a place only ---------------------------------------------------------
def gaussian(
    key: tuple[int, str, int], length: int, rank: int, rows: slice | None = None, device: torch.device | None = None
) -> Tensor:
    """Rows `rows` of a (length, rank) matrix with independent N(0, 1/rank) entries, fp32.

    Box-Muller on counter-based bits (`noise.py`): an entry depends on `key` = (run seed, parameter name, refresh
    number), its place and `rank` only, so a rank can draw just its own rows, and device, world size and call order do
    not matter (but for the last bit of a device's logarithm and cosine).
    """
    rows = rows or slice(0, length)
    pairs, count = (rank + 1) // 2, rows.stop - rows.start
    noise = Noise(key, rows, slice(0, 2 * pairs), device)
    out = torch.empty(count, rank, dtype=torch.float32, device=device)
    for part in _row_chunks(count, 2 * pairs, out.device):
        words = noise.words(part)
        size = (words[:, :pairs] | 1).float().abs_().mul_(2.0**-31)  # in (0, 1]: never log(0), and tails up to 6.5
        radius = size.log_().mul_(-2 / rank).sqrt_()
        angle = words[:, pairs:].float().mul_(math.pi * 2.0**-31)
        torch.mul(radius, angle.cos(), out=out[part, :pairs])
        torch.mul(radius[:, : rank - pairs], angle.sin_()[:, : rank - pairs], out=out[part, pairs:])
    return out


def stochastic_round(x: Tensor, key: tuple, first: int, stride: int | None = None) -> Tensor:
    """fp32 x to bf16, rounding up with probability equal to the distance: E[result] = x.

    The noise belongs to a place: entry (i, j) of a 2-D x is entry first + i * stride + j of a matrix with `stride`
    columns (all of x's rows lie inside it), entry j of a 1-D x is in column first + j of a single row. So the result
    does not depend on sharding. Infinities stay, NaN stays NaN, whatever its payload; beyond the largest bf16 number
    lies infinity.
    """
    lines = x if x.dim() == 2 else x.view(1, -1)
    out = torch.empty(lines.shape, dtype=torch.bfloat16, device=x.device)
    count, width = lines.shape
    row, column = (0, first) if stride is None else divmod(first, stride)
    # two rows share a word: its low half is the noise of the even one, the high half that of the odd one
    noise = Noise(key, slice(row // 2, (row + count + 1) // 2), slice(column, column + width), x.device)
    parts = list(_row_chunks(count, width, x.device))
    most = max((part.stop - part.start for part in parts), default=0)
    # room for all that happens to a chunk, an odd first or last row included; used again, it costs no page faults
    halves, spare = (torch.empty(most + 2, width, dtype=torch.int32, device=x.device) for _ in range(2))
    for part in parts:
        start, stop = row + part.start, row + part.stop
        words = noise.words(slice(start // 2 - row // 2, (stop + 1) // 2 - row // 2))
        torch.bitwise_and(words, 0xFFFF, out=halves[0 : 2 * len(words) : 2])
        torch.bitwise_and(words.bitwise_right_shift_(16), 0xFFFF, out=halves[1 : 2 * len(words) : 2])
        bits = lines[part].contiguous().view(torch.int32)
        sums = halves[start % 2 : start % 2 + stop - start].add_(bits)
        # only a NaN with all bits set can overflow, and change its sign: then all bits are set again
        changed = torch.bitwise_xor(sums, bits, out=spare[: stop - start]).bitwise_right_shift_(31)
        out[part].view(torch.int16).copy_(sums.bitwise_or_(changed).bitwise_right_shift_(16))
    return out.view(x.shape)


def uniform(key: tuple, first: int, shape: torch.Size, stride: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24, fp32: those of the places first + i * stride + j of a rectangle.

    A number depends on `key` and its place only.
    """
    row, column = divmod(first, stride)
    noise = Noise(key, slice(row, row + shape[0]), slice(column, column + shape[1]), device)
    out = torch.empty(shape, dtype=torch.float32, device=device)
    for part in _row_chunks(*shape, device):
        out[part].copy_(noise.words(part).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF))
    return out.mul_(2.0**-24)


def _row_chunks(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of `count` rows whose temporaries stay in a core's cache, an even number of rows each where possible."""
    step = max(1, _CHUNK // max(1, width)) if device.type == "cpu" else max(1, count)
    step += step % 2
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


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
