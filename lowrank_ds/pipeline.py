"""From gradient to weight: the phases of a step for one matrix, as a generator that `collectives.run` drives.

    gather basis, liveness -> (refresh) -> project -> complete lines -> rule -> residual norms -> spread -> write

All matrices go through these phases together, so each `yield` below is one collective for the whole model. The same
code runs on one process, where every request is answered on the spot.

A step never reads a number back from the device; what the host must decide (is a refresh due, has this matrix ever
had a gradient) it decides before, in `optimizer.py`. A non-finite gradient is masked on the device: `live` becomes 0,
moments and weights stay (decoupled weight decay, which does not depend on the gradient, still applies).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_ds import accumulate, dense, linalg, lowbit, observe, scaling
from lowrank_ds.axis import ENTRIES, SCALAR, Stored
from lowrank_ds.job import (
    Job,
    look,
    pieces,
    subtract_elementwise,
    weight_square_sum,
    where_live,
    write,
    write_entries,
    write_piece,
)
from lowrank_ds.layout import Block, Layout
from lowrank_ds.lines import Lines
from lowrank_ds.projection import Left, Right, TwoSided, choose
from lowrank_ds.recipe import Recipe
from lowrank_ds.requests import Steps, Sum, ask, together
from lowrank_ds.rules import SGD, Adafactor, Adam
from lowrank_ds.subspace import CAPTURED, HISTORY, Sharded, factorize, remember, stability


def update(job: Job, projected: bool) -> Steps:
    """One optimizer step of one matrix, written to `job.weight` in place."""
    if not projected:
        return (yield from plain(job))
    if job.recipe.correction:
        return (yield from corrected_gradient(job))
    if job.micro_batches and job.recipe.accumulation.rank is not None:
        job.grad, job.micro_batches = (yield from accumulate.restored(job)), 0
    step = compressed_momentum if job.recipe.momentum else projected_gradient
    return (yield from (step(job) if job.recipe.storage.exact else _low_bit(job, step)))


def _low_bit(job: Job, step: Callable[[Job], Steps], projected: bool = True) -> Steps:
    """A step on state that is kept as codes."""
    opened = yield from lowbit.opened(job, state_shapes(job.layout, job.recipe, projected))
    job = dataclasses.replace(job, state=opened)
    yield from step(job)
    yield from lowbit.closed(job, opened)


# --- state -----------------------------------------------------------------------------------------------------------
def state_shapes(layout: Layout, recipe: Recipe, projected: bool) -> dict[str, Stored]:
    """{state name: shape and type} of the tensors kept for one matrix."""
    sums = accumulate.state_shapes(layout, recipe) if projected else {}
    shapes = lowbit.state_shapes(_rule_shapes(layout, recipe, projected), layout, recipe.storage)
    lazy = {"stability": Stored(rest=(HISTORY,))} if projected and recipe.subspace and recipe.subspace.lazy else {}
    power = projected and recipe.subspace and recipe.subspace.method == "power"
    captured = {"captured": Stored(rest=(CAPTURED,))} if power else {}
    return shapes | sums | lazy | captured | {"skipped": SCALAR}


def _rule_shapes(layout: Layout, recipe: Recipe, projected: bool) -> dict[str, Stored]:
    rule = recipe.rule
    if not projected:
        return _full_shapes(layout, rule)
    if recipe.correction:
        side = correction_side(layout, recipe)
        array, stored = (Stored(axis, (side.rank,)) for axis in (side.lines_axis, side.basis_axis))
        return rule.state_shapes(array, side.lines_axis, layout.even(side.rank)) | {"correction": stored}
    side = side_of(layout, recipe)
    coords = Stored(side.lines_axis, (side.rank,))
    if recipe.momentum:
        return _full_shapes(layout, dataclasses.replace(rule, beta1=None)) | {"exp_avg": coords}
    basis = {} if recipe.subspace.method == "gaussian" else side.basis_axes()
    shapes = rule.state_shapes(coords, side.lines_axis, layout.even(side.rank)) | recipe.residual.state_shapes()
    return shapes | {name: Stored(axis, (side.rank,)) for name, axis in basis.items()}


def _full_shapes(layout: Layout, rule: Adam | Adafactor | SGD) -> dict[str, Stored]:
    """State of a rule that works on the parameter itself."""
    return rule.state_shapes(ENTRIES, layout.rows_axis, layout.even(layout.shape[1]))


def side_of(layout: Layout, recipe: Recipe) -> Right | Left | TwoSided:
    """The projection of a matrix."""
    how = recipe.subspace
    return choose(how.proj_type, layout, how.rank, how.replicated)


def correction_side(layout: Layout, recipe: Recipe) -> Right:
    """G C is a projection from the right by a square basis; its result is not carried back."""
    return Right(layout, layout.shape[1], recipe.correction.replicated)


def random_bases(job: Job) -> list[tuple[tuple, slice, int, torch.device]]:
    """(key, rows touched here, rank, device) of the random bases that this step of a projected matrix takes."""
    how = job.recipe.subspace
    if how is None or (how.method != "gaussian" and job.recipe.momentum is None):
        return []
    side = side_of(job.layout, job.recipe)
    return [(key, side.basis_axis.window, side.rank, job.weight.device) for key in _random_keys(job)]


def _random_keys(job: Job) -> list[tuple]:
    """Of the basis in use; Flora's momentum is still in the one before, and moves from it to a new one."""
    if job.recipe.momentum is None:
        return [(*job.key, job.refresh_count + job.refresh - 1)]
    moves = job.refresh and job.refresh_count
    return [(*job.key, count) for count in (max(job.refresh_count - 1, 0), *([job.refresh_count] if moves else []))]


# --- GaLore, Fira, APOLLO --------------------------------------------------------------------------------------------
def projected_gradient(job: Job) -> Steps:
    """The gradient is projected, the rule works on the coordinates, the residual decides what joins the update."""
    recipe, state = job.recipe, job.state
    side = side_of(job.layout, recipe)
    if job.refresh and recipe.subspace.method != "gaussian":
        yield from _refresh(job, side)
    elif job.refresh and recipe.subspace.on_refresh == "reset":
        _reset(job)
    known = _line_squares(job, side)
    basis, live = yield from _basis(job, side, known)
    summed = job.micro_batches
    coords, squares = yield from _coordinates(job, side, basis, known)
    if not side.lines_axis.crossed:
        yield ()  # other matrices complete their lines: then all ask for their sums in one round
    coords = where_live(live, coords)
    if job.refresh and len(side.bases) == 2:
        coords = yield from _without_noise(coords, side.lines)
    squares = None if squares is None else where_live(live, squares)
    if job.observe is not None and not summed:
        observe.whole_gradient(job, side, coords, squares, live)
    direction, correction, scale = yield from _direction(job, coords, side.lines, live)
    if job.observe is not None and job.observe.scaling is not None:
        yield from scaling.observe(job, side, coords, direction, live)
    inside = yield from _inside(job, side, basis, coords)
    factor, direction, limit = yield from recipe.residual.combine(
        coords, direction, squares, state, side.lines, live, inside
    )
    factor, direction = (None if x is None else where_live(live, x) for x in (factor, direction))
    kept = coords, squares, factor, direction
    factor, direction = yield from side.spread(factor, direction)
    if job.observe is not None:
        observe.applied(job, side, kept, (factor, direction), basis, job.lr * correction, live)
        job.observe.note(limited=0.0 if limit is None else (limit < 1) * live)
    write(job, side, basis, job.grad, factor, direction, job.lr * correction, scale, live)


def _inside(job: Job, side, basis, coords: Tensor) -> Steps:
    """|B r|^2 of each line (kept,), where a residual asks for it and rounding left B not quite orthonormal."""
    if job.recipe.storage.projector == "fp32" or not job.recipe.residual.needs_inside:
        return None
    gram = yield from side.overlap(basis, basis)
    return ((coords @ gram) * coords).sum(1)


def _line_squares(job: Job, side) -> Tensor | None:
    """What the residual will need of the lines held here (touched,), if a CPU can tell from it that G is finite."""
    whole = job.grad is not None and job.arrived is None and not job.micro_batches
    if not whole or not job.recipe.residual.needs_squares or job.grad.dtype != torch.float32:
        return None
    return side.square_sums(job.grad) if job.grad.device.type == "cpu" else None


def _coordinates(job: Job, side, basis, known: Tensor | None = None) -> Steps:
    """Coordinates (kept, r) of the whole step's gradient and, if the residual needs them, its lines' squared norms.

    known: these, as far as they are held here.
    """
    if job.arrived is not None:
        return job.arrived, None
    before = job.state["accumulated"].clone() if job.micro_batches else None
    if before is not None:
        accumulate.clear(job.state)
    if job.grad is None:
        return before, None
    coords, squares = yield from side.down(job.grad, basis, job.recipe.residual.needs_squares, known)
    return coords if before is None else before.add_(coords), squares


def _refresh(job: Job, side) -> Steps:
    """Replace the stored basis by one of the current gradient; carry, keep or reset the moments."""
    how, state, warm = job.recipe.subspace, job.state, None
    rotate = how.on_refresh == "rotate" and job.refresh_count
    observed = job.observe is not None and job.refresh_count
    compare = rotate or ("stability" in state and job.refresh_count)
    if how.method == "power" and job.refresh_count and not job.cold:
        warm = side.warm(state, (yield side.whole_requests(state)))
    old = {k: v.clone() for k, v in (yield from _gathered(side, state)).items()} if compare or observed else {}
    bases = job.fresh if job.fresh is not None else (yield from new_basis(job, warm))
    for which, basis in bases.items():
        lowbit.put_basis(state, side.bases[which], basis)
    if observed:
        yield from observe.compare(job, side, old, (yield from _gathered(side, state)))
    if how.on_refresh == "reset":
        _reset(job)
    if compare:
        overlap = yield from side.overlap(old, (yield from _gathered(side, state)))
        if rotate:
            state["exp_avg"].copy_(state["exp_avg"] @ overlap)
        if "stability" in state:
            found = stability(overlap, side.basis_axis.total).view(1)
            state["stability"].copy_(torch.cat([state["stability"][1:], found]))


def new_basis(job: Job, warm: Tensor | None = None) -> Steps:
    """The rows kept here of a basis of the current gradient, by side ("left", "right")."""
    side = side_of(job.layout, job.recipe)
    axes = {which: side.basis_axes()[name] for which, name in side.bases.items()}
    key = (*job.key, job.refresh_count)
    grad = Sharded(job.layout, job.grad)
    bases, holds = yield from factorize(job.recipe.subspace, grad, axes, key, warm, job.owner)
    if "captured" in job.state:
        remember(job.state["captured"], holds, warm is None)
    return bases


def mirror_basis(job: Job, bases: dict[str, Tensor] | None) -> Steps:
    """Bring the basis of the replica that computed it (`bases` there, None elsewhere) to all replicas: `job.fresh`."""
    side, mirror = side_of(job.layout, job.recipe), job.layout.mirror
    shapes = {which: (side.basis_axes()[name].count, side.rank) for which, name in side.bases.items()}
    sizes = [rows * width for rows, width in shapes.values()]
    axis, like = mirror.even(sum(sizes)), job.weight.new_empty(0, dtype=torch.float32)
    flat = None if bases is None else torch.cat([bases[which].reshape(-1, 1) for which in shapes])
    part = yield from axis.deal(mirror.members[job.replica], flat, 1, like)  # each a part, then all gather all parts
    parts = (yield from axis.spread(part)).view(-1).split(sizes)
    job.fresh = {which: part.view(shape) for (which, shape), part in zip(shapes.items(), parts, strict=True)}


def _gathered(side, state) -> Steps:
    """The stored basis as the projection needs it."""
    return side.gathered(state, (yield side.requests(state)))


def _without_noise(coords: Tensor, lines: Lines) -> Steps:
    """Zero the coordinates that are rounding noise: P^T G Q is diagonal when both bases are singular vectors of G.

    Adam would turn the noise beside the diagonal into full-size updates, different on every sharding.
    """
    total = yield from lines.square_sum(coords)
    return torch.where(coords.square() > 1e-12 * total, coords, 0.0)


def _reset(job: Job) -> None:
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"):
        if name in job.state:
            job.state[name].zero_()


def _basis(job: Job, side, squares: Tensor | None = None) -> Steps:
    """The basis as the projection needs it, and whether the whole gradient is finite (1.0 or 0.0, on the device).

    squares: sums of squares of parts of the gradient held here, where they are known.
    """
    gaussian = job.recipe.subspace.method == "gaussian"
    asked = () if gaussian else side.requests(job.state)
    known = None if squares is None else linalg.bound(job.grad, squares)
    *answers, peaks = yield (*asked, accumulate.ask_peaks(job, known))
    if gaussian:
        (key,) = _random_keys(job)
        basis = side.random(key, job.weight.device, job.draws)
    else:
        basis = side.gathered(job.state, tuple(answers))
    return basis, _live(job, peaks)


def _live(job: Job, peaks: Tensor) -> Tensor:
    """1.0 if the whole gradient can be used, 0.0 if not (then it is counted), on the device."""
    largest = peaks.max() if peaks.numel() > 1 else peaks.view(())
    if job.micro_batches:
        largest = torch.maximum(largest, job.state["accumulated_peak"])
    job.live = live = look(linalg.is_usable(largest).float())
    if not getattr(live, "known", False):
        job.state["skipped"].add_(1 - live)
    if job.observe is not None:
        job.observe.note(skipped=1 - live, steps=1.0)
    return live


def _direction(job: Job, x: Tensor, lines: Lines, live: Tensor) -> Steps:
    """(direction, step-size factor, Adafactor's parameter scale or None) of the rule on complete lines x (lines, r).

    The direction is the caller's to change.
    """
    rule, state = job.recipe.rule, job.state
    if not isinstance(rule, Adafactor):
        return rule.update(x, state, live), rule.correction(job.moment_step), None
    raw = yield from rule.precondition(x, state, lines, live, job.moment_step)
    square, scale = yield from together(lines.square_sum(raw), _parameter_scale(job))
    update = raw.mul_(rule.shrink(square, lines.total * x.shape[1]) * scale)
    return (_momentum(rule, update, state, live).clone() if rule.beta1 else update), 1.0, scale


def _momentum(rule: Adafactor, update: Tensor, state, live: Tensor) -> Tensor:
    if not rule.beta1:
        return update
    exp_avg = state["exp_avg"]
    return exp_avg.lerp_(where_live(live, update).view_as(exp_avg), live * (1 - rule.beta1)).view_as(update)


def _parameter_scale(job: Job) -> Steps:
    """Adafactor's max(eps, RMS(W)), 0-d; 1 when `scale_parameter` is off."""
    rule = job.recipe.rule
    if not rule.scale_parameter:
        return torch.ones((), dtype=torch.float32, device=job.weight.device)
    total = yield Sum(weight_square_sum(job))
    return rule.parameter_scale(total, job.layout.shape[0] * job.layout.shape[1])


# --- Flora -----------------------------------------------------------------------------------------------------------
def compressed_momentum(job: Job) -> Steps:
    """The rule works on the whole gradient; its momentum is kept in a random subspace and moved when that changes."""
    momentum, beta1 = job.state["exp_avg"], job.recipe.momentum.beta1
    side, numel = side_of(job.layout, job.recipe), job.layout.shape[0] * job.layout.shape[1]
    bases = [side.random(key, job.weight.device, job.draws) for key in _random_keys(job)]
    overlaps = (side.overlap(bases[0], basis) for basis in bases)
    update, live, found = yield from _preconditioned(job, _parameter_scale(job), side.spread(None, momentum), *overlaps)
    scale, (_, old), gram, *moved = found
    # a round also where nothing is asked for: then all matrices' sums share the next one
    *coords, _ = yield from together(*(update.down(side, basis) for basis in bases), ask(()))
    coords = [linalg.finite_(each) for each in coords]
    square = yield from _mixed_square(side, update.square_sum(), coords[0], momentum, gram, beta1)
    square = where_live(live, square)
    size = live * scale * job.recipe.rule.shrink(square, numel)
    if job.observe is not None:
        job.observe.note(update=square * (job.lr * size).square())
    direction = beta1 * size * old
    for overlap in moved:
        momentum.copy_(momentum @ overlap)
    momentum.lerp_(coords[-1], live * (1 - beta1))
    dense.write(job, update, (1 - beta1) * size, scale, dense.LowRank(side, bases[0], direction))


def _mixed_square(side, own: Tensor, coords: Tensor, momentum: Tensor, gram: Tensor, beta1: float) -> Steps:
    """|(1 - b1) U + b1 M B^T|^2 without forming M B^T: <U, M B^T> = <U B, M>, |M B^T|^2 = <M (B^T B), M>.

    own: |U|^2 of the entries held here.
    """
    counted = side.lines_axis.owned
    ours = momentum[counted].reshape(-1)
    mixed, past = (torch.dot(each[counted].reshape(-1), ours) for each in (coords, momentum @ gram))
    own, mixed, past = yield Sum(torch.stack([own, mixed, past]))
    return ((1 - beta1) ** 2 * own + 2 * beta1 * (1 - beta1) * mixed + beta1**2 * past).clamp_min(0)


def _preconditioned(job: Job, *more: Steps) -> Steps:
    """(Adafactor's raw update of the whole matrix as `dense.Update`, liveness, what `more` found), moments moved.

    Everything is asked for at once. Beside GaLore's matrices, which ask for their basis, then complete their lines, and
    then ask for sums, the sums wait for two rounds, so that they share theirs.
    """
    layout, rule, state = job.layout, job.recipe.rule, job.state
    decay = 1 - rule.decay(job.step)
    if not rule.is_factored(*layout.shape):
        peaks, *found = yield from together(ask(accumulate.ask_peaks(job)), *more)
        live = _live(job, peaks)
        update = dense.Full(job, state["exp_avg_sq"].view(-1))
        update.move(live * decay, rule.eps[0])
        if not rule.momentum_first:
            yield ()  # for the rounds of those that are factored
            yield ()
        return update, live, found
    sums, columns = dense.square_sums(job), layout.even(layout.shape[1])
    first = ask(accumulate.ask_peaks(job, sums.bound))
    rest = (
        layout.rows_axis.complete(sums.rows.unsqueeze(1)),
        ask(rule.ask_columns(sums.columns, state, columns, layout.cols_axis.window)),
        *more,
    )
    if rule.momentum_first:
        peaks, rows, means, *found = yield from together(first, *rest)
    else:
        peaks = yield from first
        yield ()
        rows, means, *found = yield from together(*rest)
    live = _live(job, peaks)
    rows, means = where_live(live, rows.squeeze(1)), torch.stack([where_live(live, means[0]), means[1]])
    rows, across = rule.factors(rows, means, state, layout.shape[0], columns, live * decay)
    return dense.Factored(job, rows, (yield from layout.rows_axis.spread(rows)), across), live, found


# --- LoRA-FA ---------------------------------------------------------------------------------------------------------
def corrected_gradient(job: Job) -> Steps:
    """The rule works on G C (`Correction`), row by row: only rows that a cut divides need another rank."""
    side, rule = correction_side(job.layout, job.recipe), job.recipe.rule
    stored = {"projector": job.state["correction"]}
    *answers, peaks = yield (*side.requests(stored), accumulate.ask_peaks(job))
    live = _live(job, peaks)
    coords, _ = yield from side.down(job.grad, side.gathered(stored, tuple(answers)), False)
    direction = where_live(live, rule.update(where_live(live, coords), job.state, live))
    if job.observe is not None:
        size = job.lr * rule.correction(job.step)
        job.observe.add(update=direction[side.lines_axis.owned].square().sum() * size**2)
    _, direction = yield from side.spread(None, direction)
    entries = job.layout.unpad(direction[:, job.layout.cols_axis.window])
    write_entries(job, entries, job.lr * rule.correction(job.step), None)


# --- parameters that are not projected ------------------------------------------------------------------------------
def plain(job: Job) -> Steps:
    """The recipe's rule on the parameter itself: biases, norms, embeddings."""
    shapes = {} if job.recipe.storage.exact else state_shapes(job.layout, job.recipe, False)
    coded = [name for name, stored in shapes.items() if stored.code is not None]
    if isinstance(job.recipe.rule, Adafactor):
        return (yield from (_low_bit(job, _plain_adafactor, False) if coded else _plain_adafactor(job)))
    live = _live(job, (yield accumulate.ask_peaks(job)))
    return (yield from _coded_elementwise(job, live, coded)) if coded else _elementwise(job, live)


def _plain_adafactor(job: Job) -> Steps:
    """Adafactor on the parameter itself: piece by piece, as an embedding may be the largest of all."""
    rule, numel = job.recipe.rule, job.layout.shape[0] * job.layout.shape[1]
    update, live, _ = yield from _preconditioned(job)
    momentum = dense.Kept(job, job.state["exp_avg"].view(-1)) if rule.beta1 else None
    if rule.momentum_first:
        if momentum is not None:
            momentum.move(update, 1.0, live * (1 - rule.beta1))
            update = momentum
        yield ()  # Flora's matrices complete their coordinates
    square, scale = yield from together(ask(Sum(where_live(live, update.square_sum()))), _parameter_scale(job))
    size = rule.shrink(square, numel) * scale
    if momentum is not None and not rule.momentum_first:
        momentum.move(update, size, live * (1 - rule.beta1))
        update, size = momentum, 1.0
    dense.write(job, update, size * live, scale)


def _elementwise(job: Job, live: Tensor) -> None:
    """Adam, SGD, in place; what needs fp32 copies piece by piece, as an embedding is the largest parameter."""
    state = {name: job.state[name].view(-1) for name in _full_shapes(job.layout, job.recipe.rule)}
    whole = job.recipe.rule.makes_no_copies(job.weight, job.grad)
    for piece in job.layout.blocks if whole else pieces(job):
        subtract_elementwise(job, piece, {name: tensor[piece.entries] for name, tensor in state.items()}, live)


def _coded_elementwise(job: Job, live: Tensor, names: list[str]) -> Steps:
    """The same with moments kept as codes. Pieces of rows that are divided are updated twice: the ranks must agree on
    the scales before anyone can round."""
    codes = lowbit.EntryCodes(job, names)
    yield from codes.fetch()
    for piece in filter(codes.is_cut, pieces(job)):
        moments = {name: codes.read(name, piece) for name in names}
        _piece_update(job, piece, {name: values.view(-1) for name, values in moments.items()}, live)
        codes.measure(piece, moments)
    yield from codes.agree()
    for piece in pieces(job):
        moments = {name: codes.read(name, piece) for name in names}
        update = _piece_update(job, piece, {name: values.view(-1) for name, values in moments.items()}, live)
        if not codes.is_cut(piece):
            codes.measure(piece, moments)
        codes.write(piece, moments)
        write_piece(job, piece, update, job.lr * job.recipe.rule.correction(job.step), None)
    codes.close()


def _piece_update(job: Job, piece: Block, state: dict[str, Tensor], live: Tensor) -> Tensor:
    """The rule's direction (entries,) for a piece of the entries, and its moments moved in place."""
    grad = where_live(live, job.grad[piece.entries].float())
    return job.recipe.rule.update_by_entry(grad, state, live)
