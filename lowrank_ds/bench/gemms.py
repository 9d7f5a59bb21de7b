"""The floor of a step: its own matrix products, recorded from it and done again with nothing around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_ds.bench.clock import Clock

_aten = torch.ops.aten
# {operation: where its two factors are among the arguments}; an addend is argument 0 of the latter half
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.addmm_: 1, _aten.baddbmm: 1, _aten.baddbmm_: 1}


class Product(NamedTuple):
    """One recorded product: out = beta addend + alpha left right; `addend` None: out = left right."""

    left: Tensor
    right: Tensor
    addend: Tensor | None
    out: Tensor
    beta: float
    alpha: float

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.left.numel() * self.right.shape[-1]


class Recorder(TorchDispatchMode):
    """Records the matrix products done while this is entered; those with a vector are none.

    What they worked on stays alive until the recorder is gone, so that no two tensors share an address by accident.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do the operation, and note it if it is a product."""
        result = func(*args, **(kwargs or {}))
        at = _PRODUCTS.get(func.overloadpacket)
        if at is not None and isinstance(result, Tensor):
            left, right = args[at], args[at + 1]
            if min(*left.shape[-2:], right.shape[-1]) > 1:
                scales = {"beta": 1.0, "alpha": 1.0} | (kwargs or {})
                addend = args[0] if at else None
                self.products.append(Product(left, right, addend, result, scales["beta"], scales["alpha"]))
        return result


def record(step: Callable[[], object]) -> list[Product]:
    """The matrix products of one step."""
    with Recorder() as recorder:
        step()
    return recorder.products


def replay(products: list[Product]) -> Callable[[], None]:
    """The same products on memory of its own, allocated now: same shapes, strides, dtypes and overlaps."""
    copies: dict[tuple[int, torch.dtype], Tensor] = {}

    def twin(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        storage = t.untyped_storage()
        flat = copies.get((storage._cdata, t.dtype))
        if flat is None:
            flat = torch.empty(storage.nbytes() // t.element_size(), dtype=t.dtype, device=t.device).normal_(std=1e-2)
            copies[storage._cdata, t.dtype] = flat
        return flat.as_strided(t.shape, t.stride(), t.storage_offset())

    work = [
        _call(product._replace(**{name: twin(getattr(product, name)) for name in _TENSORS})) for product in products
    ]

    @torch.no_grad()
    def run() -> None:
        for call in work:
            call()

    return run


_TENSORS = ("left", "right", "addend", "out")


def _call(p: Product) -> Callable[[], Any]:
    batched = p.left.dim() == 3
    if p.addend is None:
        return lambda: (torch.bmm if batched else torch.mm)(p.left, p.right, out=p.out)
    if p.addend.data_ptr() == p.out.data_ptr():
        update = p.out.baddbmm_ if batched else p.out.addmm_
        return lambda: update(p.left, p.right, beta=p.beta, alpha=p.alpha)
    add = torch.baddbmm if batched else torch.addmm
    return lambda: add(p.addend, p.left, p.right, beta=p.beta, alpha=p.alpha, out=p.out)


def best_layout(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, device: torch.device, clock: Clock
) -> tuple[str, Callable[[], None]]:
    """(which, two products) of G's coordinates and of writing a rank-r update, in the fastest of four layouts.

    The basis (d, r) and the coordinates (l, r) are each stored by rows or by columns; G and W by rows, always. A
    stricter floor than the layout our step happens to use. Half precision is computed in fp32, as our step does.
    """
    dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    make = lambda *size: torch.empty(size, dtype=dtype, device=device).normal_(std=1e-2)
    grad, weight = make(*shape), make(*shape)
    if shape[0] < shape[1]:
        grad, weight = grad.T, weight.T
    lines, compressed = grad.shape

    def pair(basis_rows: bool, coords_rows: bool) -> Callable[[], None]:
        basis = make(compressed, rank) if basis_rows else make(rank, compressed).T
        coords = make(lines, rank) if coords_rows else make(rank, lines).T

        def run() -> None:
            torch.mm(grad, basis, out=coords)
            weight.addmm_(coords, basis.T, alpha=-1e-4)

        return run

    runs = {
        f"basis by {'rows' if b else 'columns'}, coordinates by {'rows' if c else 'columns'}": pair(b, c)
        for b in (True, False)
        for c in (True, False)
    }
    quickest = {name: min(clock.time(run)[clock.main] for _ in range(4)) for name, run in runs.items()}
    name = min(quickest, key=quickest.__getitem__)
    return name, runs[name]
