"""State kept in 8 or 4 bits: the one place where codes become fp32 numbers and numbers codes.

A recipe says how its state is kept (`Storage`); `state_shapes` turns the fp32 tensors that rules and projections
declare into codes and scales. A step opens them (`opened`): rules, residuals and projections see fp32 temporaries and
do not know. Afterwards what they left is encoded (`closed`).

    exp_avg, exp_avg_sq            uint8, of the shape the fp32 tensor would have
    exp_avg_scale, exp_avg_sq_scale   fp32 (lines, blocks of a line): the largest magnitude in each block
    projector                      uint8 (rows, r), or (rows, ceil(r / 2)) with 4 bits
    projector_range                fp32 (rows, 2 blocks): (smallest value, step) of each block

Coordinates and bases are kept line by line, so their codes concern one rank. A plain parameter may be cut inside a row:
the ranks that hold pieces of a block then agree on its largest magnitude (one exchange of these rows, `agree`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ds import quantize
from lowrank_ds.axis import Stored
from lowrank_ds.job import Job
from lowrank_ds.layout import Block, Layout
from lowrank_ds.recipe import Storage
from lowrank_ds.requests import Steps

SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # moments that may be coded
BASES = ("projector", "projector_left")
NARROWEST = 8  # numbers in a line that are worth a scale of their own


@dataclass(frozen=True)
class Moment:
    """8-bit codes with dithered rounding, in rows of `width` entries."""

    width: int
    signed: bool


@dataclass(frozen=True)
class Affine:
    """Codes of `bits` bits between the smallest and the largest of a block, in rows of `width` entries."""

    width: int
    bits: int


def state_shapes(shapes: Mapping[str, Stored], layout: Layout, storage: Storage) -> dict[str, Stored]:
    """{state name: shape} where `storage` asks for codes, from that of the fp32 tensors of a matrix."""
    if storage.exact or layout.shape[0] * layout.shape[1] < storage.smallest:
        return dict(shapes)
    coded: dict[str, Stored] = {}
    for name, stored in shapes.items():
        coded |= _coded(name, stored, layout, storage)
    return coded


def _coded(name: str, stored: Stored, layout: Layout, storage: Storage) -> dict[str, Stored]:
    width = layout.shape[1] if stored.entries else stored.rest[-1] if stored.rest else 1
    lines = layout.shape[0] if stored.entries else stored.axis.total if stored.axis else 1
    if width < NARROWEST or lines == 1:  # vectors, whose only row every rank would hold a piece of, are small
        return {name: stored}
    count, _ = quantize.blocks(width)
    axis = layout.rows_axis if stored.entries else stored.axis
    if name in SIGNED and storage.moments == "8bit":
        code = Moment(width, SIGNED[name])
        return {
            name: dataclasses.replace(stored, dtype=torch.uint8, code=code),
            f"{name}_scale": Stored(axis, (count,)),
        }
    if name in BASES and storage.projector != "fp32":
        code = Affine(width, {"8bit": 8, "4bit": 4}[storage.projector])
        rest = (quantize.code_width(width, code.bits),)
        return {name: Stored(axis, rest, dtype=torch.uint8, code=code), f"{name}_range": Stored(axis, (2 * count,))}
    return {name: stored}


# --- opening and closing ---------------------------------------------------------------------------------------------
class Opened(dict):
    """The state of a matrix with its coded tensors as fp32 temporaries."""

    def __init__(self, job: Job, shapes: Mapping[str, Stored]) -> None:
        super().__init__(job.state)
        self.stored = job.state
        self.codes = {name: stored for name, stored in shapes.items() if stored.code is not None}
        self.entries: EntryCodes | None = None
        for name, stored in self.codes.items():
            if isinstance(stored.code, Affine):
                self[name] = read_basis(job.state, name, stored.code)
            elif not stored.entries:
                scales = job.state[f"{name}_scale"]
                self[name] = quantize.decode(job.state[name], scales, stored.code.signed, stored.code.width)


def put_basis(state: dict[str, Tensor], name: str, basis: Tensor) -> None:
    """Store the rows (kept, r) of a new basis; from now on the basis is what its codes say."""
    if not isinstance(state, Opened) or name not in state.codes:
        state[name].copy_(basis)
        return
    code = state.codes[name].code
    codes, ranges = quantize.encode_range(basis, code.bits)
    state.stored[name].copy_(codes)
    state.stored[f"{name}_range"].copy_(ranges)
    state[name] = read_basis(state.stored, name, code)


def read_basis(state: Mapping[str, Tensor], name: str, code: Affine | None) -> Tensor:
    """The kept rows (kept, r) of a stored basis, fp32."""
    if code is None:
        return state[name]
    return quantize.decode_range(state[name], state[f"{name}_range"], code.width, code.bits)


def opened(job: Job, shapes: Mapping[str, Stored]) -> Steps:
    """The state of a matrix as the mathematics sees it."""
    state = Opened(job, shapes)
    names = [name for name, stored in state.codes.items() if stored.entries]
    if names:
        state.entries = EntryCodes(job, names)
        yield from state.entries.fetch()
        for name in names:
            values = torch.empty(job.state[name].shape, dtype=torch.float32, device=job.weight.device)
            for block in job.layout.blocks:
                block.of(values.view(-1)).copy_(state.entries.read(name, block))
            state[name] = values
    return state


def closed(job: Job, state: Opened) -> Steps:
    """Encode what a step left in the opened `state`. Nothing changes if the gradient was not usable."""
    for name, stored in state.codes.items():
        if isinstance(stored.code, Moment) and not stored.entries:
            _close_lines(job, state, name, stored)
    if state.entries is not None:
        state.entries.job = job  # which knows by now whether the gradient was usable
        yield from _close_entries(job, state.entries, state)


def _close_lines(job: Job, state: Opened, name: str, stored: Stored) -> None:
    """Encode a moment of coordinates: whole lines, kept here."""
    values, code, axis = state[name], stored.code, stored.axis
    scales = quantize.peaks(values, code.width)
    noise = quantize.dither(
        (*job.key, name), job.step, slice(*axis.kept[axis.rank]), slice(0, code.width), values.device
    )
    codes = quantize.encode(values, scales, code.signed, noise, code.width)
    # Flora moves its momentum to a new basis whatever the gradient is
    live = None if job.refresh and name == "exp_avg" else job.live
    _put(state.stored[name], codes, live)
    _put(state.stored[f"{name}_scale"], scales, live)


def _close_entries(job: Job, entries: EntryCodes, state: Mapping[str, Tensor]) -> Steps:
    blocks = job.layout.blocks
    for block in blocks:
        entries.measure(block, {name: block.of(state[name].view(-1)) for name in entries.names})
    yield from entries.agree()
    for block in blocks:
        entries.write(block, {name: block.of(state[name].view(-1)) for name in entries.names})
    entries.close()


def _put(stored: Tensor, value: Tensor, live: Tensor | None) -> None:
    stored.copy_(value if live is None else torch.where(live > 0, value, stored))


# --- moments of a plain parameter ------------------------------------------------------------------------------------
class EntryCodes:
    """The coded moments of a plain parameter, rectangle by rectangle: fetch, read, measure, agree, write, close.

    names: of the moments, all coded alike. A rectangle is *cut* if it has not all columns of its rows: other ranks hold
    the rest of its blocks.
    """

    def __init__(self, job: Job, names: list[str]) -> None:
        self.job, self.names, self.layout = job, names, job.layout
        self.width = job.layout.shape[1]
        self.count, _ = quantize.blocks(self.width)

    def fetch(self) -> Steps:
        """Bring the scales of the rows that are touched here."""
        stored = torch.cat([self.job.state[f"{name}_scale"] for name in self.names], 1)
        self.old = yield from self.layout.rows_axis.spread(stored)  # (touched, names x k)
        self.new = torch.zeros_like(self.old)
        self.kept = self.new  # scales to store; other than `new` where one of the ranks keeps those of a cut row

    def is_cut(self, block: Block) -> bool:
        """Whether other ranks hold entries of this rectangle's rows."""
        return block.cols.stop - block.cols.start < self.width

    def read(self, name: str, block: Block) -> Tensor:
        """The fp32 values (rows, columns) of a rectangle."""
        codes = block.of(self.job.state[name].view(-1))
        return quantize.decode(codes, self._scales(self.old, name, block), SIGNED[name], self.width, self._first(block))

    def measure(self, block: Block, values: Mapping[str, Tensor]) -> None:
        """Take note of the largest magnitudes of new values {name: (rows, columns)}."""
        for name in self.names:
            known = self._scales(self.new, name, block)
            found = quantize.peaks(values[name], self.width, self._first(block))
            torch.maximum(known, found, out=known)

    def agree(self) -> Steps:
        """Once every cut rectangle was measured: the ranks that hold pieces of a row take the largest of them all."""
        axis = self.layout.rows_axis
        if axis.crossed:
            self.kept = yield from axis.complete(self.new, torch.maximum)
            self.new = yield from axis.spread(self.kept)

    def write(self, block: Block, values: Mapping[str, Tensor]) -> None:
        """Encode the new values {name: (rows, columns)} of a rectangle that was measured."""
        rows, columns = self.layout.rows_axis.window.start, self.layout.cols_axis.window.start
        places = (
            slice(rows + block.rows.start, rows + block.rows.stop),
            slice(columns + block.cols.start, columns + block.cols.stop),
        )
        for name in self.names:
            noise = quantize.dither((*self.job.key, name), self.job.step, *places, values[name].device)
            scales = self._scales(self.new, name, block)
            codes = quantize.encode(values[name], scales, SIGNED[name], noise, self.width, self._first(block))
            _put(block.of(self.job.state[name].view(-1)), codes, self.job.live)

    def close(self) -> None:
        """Store the scales; after all rectangles were written."""
        for i, name in enumerate(self.names):
            _put(self.job.state[f"{name}_scale"], self.kept[:, i * self.count : (i + 1) * self.count], self.job.live)

    def _first(self, block: Block) -> int:
        return self.layout.cols_axis.window.start + block.cols.start

    def _scales(self, table: Tensor, name: str, block: Block) -> Tensor:
        """The scales (rows, k) of a rectangle's rows, a view of `old` or `new`."""
        i = self.names.index(name)
        return table[block.rows, i * self.count : (i + 1) * self.count]
