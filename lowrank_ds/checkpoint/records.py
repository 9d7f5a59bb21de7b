"""Where the tensors of an optimizer's state dict lie in the whole: for those who save it by other means."""

from __future__ import annotations

from typing import Any

from lowrank_ds.checkpoint import places, runs
from lowrank_ds.optimizer import LowRankOptimizer
from lowrank_ds.slots import Slot, stored


def records(optimizer: LowRankOptimizer) -> list[list[dict[str, Any]]]:
    """Where the state dict's tensors lie in the whole: for each tensor, in the order of `state_dict()`, its matrices.

    A matrix is {"name", "parameter", "shape": the parameter's, "weight": [start, Run or None], "prefix": of its keys,
    "state": {key: [full shape, Run or None]}}: `start` is where its entries begin in the tensor's, and `Run` (start,
    count, length, stride) says which entries of the whole parameter (of the whole state) they are; None: no entries.
    Tensors without state are []. JSON-able.
    """
    found = []
    for group in optimizer.param_groups:
        recipe = optimizer.recipe(group)
        for index, host in enumerate(group["params"]):
            slots = optimizer._bind(group, index) if host in optimizer.state else []
            found.append([_record(optimizer, slot, recipe) for slot in slots])
    return found


def _record(optimizer: LowRankOptimizer, slot: Slot, recipe: Any) -> dict[str, Any]:
    shape = optimizer._shapes[slot.parameter]
    weight = next(iter(runs.of_layout(slot.layout, places.first_entry(slot))), None)
    state = {name: places.state_part(slot, name, how, shape) for name, how in stored(slot, recipe).items()}
    return {
        "name": slot.name, "parameter": slot.parameter, "shape": list(shape), "prefix": slot.prefix,
        "weight": [slot.start, weight and list(weight)],
        "state": {k: [list(part.shape), list(part.run) if part.run.size else None] for k, part in state.items()},
    }  # fmt: skip
