"""Small dense kernels: norms that are fast on every device, seeded noise, orthonormal factors.

Pure functions of tensors. Legend: m rows, n columns, k or r basis columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowrank_ds.noise import Noise

_CHUNK = 1 << 16  # entries per block of the blocked reductions: stays in a core's L2 cache
_WIDTH = 1 << 13  # entries of a row that a norm sums in one go
_NULL, _TINY = 1e-6, 1e-25  # singular values that count as none: of the largest one, and at all
_SHIFT = 1e-7  # of the squared length of a column: see whiten
LARGEST_GRADIENT = 1e15  # beyond it squared norms overflow fp32, and a moment that was once infinite stays NaN


def row_square_sums(x: Tensor) -> Tensor:
    """Sums of squares of the rows of x (m, n), fp32 (m,). Blocked: no full-size temporary, no long sum in one go."""
    if x.shape[1] <= _WIDTH:
        return _row_norms(x).square_()
    total = x.new_zeros(x.shape[0], dtype=torch.float32)
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


def bound(x: Tensor, squares: Tensor | None = None) -> Tensor:
    """At least the largest magnitude in x (or less than 1e-18), 0-d fp32, and usable (`is_usable`) just where that is.

    On a CPU out of sums of squares, where these are far from overflow: of all of x (numel,), in half the time of
    `peak`, or of parts that cover x, `squares` (parts,), which cost nothing more.
    """
    if type(x) is not Tensor or x.device.type != "cpu" or not x.numel():
        return peak(x)
    if squares is None and x.dtype == torch.float32:
        squares = torch.dot(x, x)
    if squares is not None and (largest := squares.max()) < 1e-4 * LARGEST_GRADIENT**2:  # a NaN is not
        return largest.sqrt()
    return peak(x)


def is_usable(largest: Tensor) -> Tensor:
    """Whether a gradient whose largest magnitude is `largest` can be squared and summed in fp32 (NaN: no)."""
    return largest < LARGEST_GRADIENT


def square_sum(x: Tensor) -> Tensor:
    """The sum of squares of the entries of a contiguous x, 0-d fp32. Blocked: no full-size temporary."""
    size = _CHUNK if x.device.type == "cpu" else 1 << 24
    parts = [torch.dot(part, part) for part in (part.float() for part in x.view(-1).split(size))]
    return torch.stack(parts).sum() if parts else x.new_zeros((), dtype=torch.float32)


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
    return gaussians([(key, rows or slice(0, length))], rank, device)[0]


def gaussians(
    draws: Sequence[tuple[tuple, slice]], rank: int, device: torch.device | None = None
) -> tuple[Tensor, ...]:
    """The rows of each (key, rows), as `gaussian` draws them, in one go; they share their memory."""
    counts = [rows.stop - rows.start for _, rows in draws]
    pairs, count = (rank + 1) // 2, sum(counts)
    noise = Noise(draws, slice(0, 2 * pairs), device)
    out = torch.empty(count, rank, dtype=torch.float32, device=device)
    for part in _row_chunks(count, 2 * pairs, out.device):
        words = noise.words(part)
        size = (words[:, :pairs] | 1).float().abs_().mul_(2.0**-31)  # in (0, 1]: never log(0), and tails up to 6.5
        radius = size.log_().mul_(-2 / rank).sqrt_()
        angle = words[:, pairs:].float().mul_(math.pi * 2.0**-31)
        torch.mul(radius, angle.cos(), out=out[part, :pairs])
        torch.mul(radius[:, : rank - pairs], angle.sin_()[:, : rank - pairs], out=out[part, pairs:])
    return out.split(counts)


def stochastic_round(
    x: Tensor, key: tuple, first: int, stride: int | None = None, out: Tensor | None = None
) -> Tensor:
    """fp32 x to bf16 (`out`), rounding up with probability equal to the distance: E[result] = x.

    The noise belongs to a place: entry (i, j) of a 2-D x is entry first + i * stride + j of a matrix with `stride`
    columns (all of x's rows lie inside it), entry j of a 1-D x is in column first + j of a single row. So the result
    does not depend on sharding. Infinities stay, NaN stays NaN, whatever its payload; beyond the largest bf16 number
    lies infinity.
    """
    lines = x if x.dim() == 2 else x.view(1, -1)
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device) if out is None else out
    count, width = lines.shape
    row, column = (0, first) if stride is None else divmod(first, stride)
    # two rows share a word: its low half is the noise of the even one, the high half that of the odd one
    noise = Noise([(key, slice(row // 2, (row + count + 1) // 2))], slice(column, column + width), x.device)
    parts = list(_row_chunks(count, width, x.device))
    most = max((part.stop - part.start for part in parts), default=0)
    # room for all that happens to a chunk, an odd first or last row included; used again, it costs no page faults
    halves, spare = (torch.empty(most + 2, width, dtype=torch.int32, device=x.device) for _ in range(2))
    for part in parts:
        start, stop = row + part.start, row + part.stop
        words = noise.words(slice(start // 2 - row // 2, (stop + 1) // 2 - row // 2))
        torch.bitwise_and(words, 0xFFFF, out=halves[0 : 2 * len(words) : 2])
        torch.bitwise_and(words.bitwise_right_shift_(16), 0xFFFF, out=halves[1 : 2 * len(words) : 2])
        numbers = lines[part].contiguous()
        bits = numbers.view(torch.int32)
        sums = halves[start % 2 : start % 2 + stop - start].add_(bits)
        if not _seen_finite(numbers):
            # only a NaN with all bits set can overflow, and change its sign: then all bits are set again
            changed = torch.bitwise_xor(sums, bits, out=spare[: stop - start]).bitwise_right_shift_(31)
            sums.bitwise_or_(changed)
        out.view(lines.shape)[part].view(torch.int16).copy_(sums.bitwise_right_shift_(16))
    return out


def _seen_finite(x: Tensor) -> bool:
    """Whether a CPU sees at a glance (that waits for nobody) that there is no NaN in a contiguous fp32 x."""
    seen = type(x) is Tensor and x.device.type == "cpu"
    return seen and bool(torch.dot(x.view(-1), x.view(-1)) < math.inf)


def uniform(key: tuple, first: int, shape: torch.Size, stride: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24, fp32: those of the places first + i * stride + j of a rectangle.

    A number depends on `key` and its place only.
    """
    row, column = divmod(first, stride)
    noise = Noise([(key, slice(row, row + shape[0]))], slice(column, column + shape[1]), device)
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
