"""Where the tensors of param groups live, and the state kept for them: made, found again, loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_ds import engines, options
from lowrank_ds import params as selection
from lowrank_ds.groups import NamedGroups
from lowrank_ds.slots import COUNTERS, Slot, bind


class BoundGroups(NamedGroups):
    """Param groups whose tensors an engine may have cut and moved: `_bind` finds the matrices in them."""

    def _forget(self, projected: set[str]) -> None:
        """Nothing is bound yet."""
        super()._forget(projected)
        self._slots: dict[Tensor, list[Slot]] = {}
        self._bound: dict[Tensor, dict[str, Tensor]] = {}  # the state tensors the slots work on

    def init_state(self) -> None:
        """Create all state now instead of at the first step (the engine must have its final layout)."""
        for group in self.param_groups:
            for index, host in enumerate(group["params"]):
                if host.requires_grad:
                    self._bind(group, index)

    def _bind(self, group: dict[str, Any], index: int) -> list[Slot]:
        """The slots of one tensor, made when it is first met and again when its state was replaced."""
        host = group["params"][index]
        store = self.state[host]
        if host in self._slots and _same(self._bound[host], store):
            return self._slots[host]
        self._slots[host] = self._found(group, index, store)
        self._bound[host] = dict(store)
        return self._slots[host]

    def _found(self, group: Mapping[str, Any], index: int, store: dict[str, Tensor]) -> list[Slot]:
        """The slots of one tensor; their state is made in `store`, or checked and taken over if it is there."""
        hosts, names = group["params"], group["param_names"]
        host = hosts[index]
        unchanged = len(names) == len(hosts) and self._originals[names[index]]() is host
        members = [(name, self._originals[name]()) for name in ([names[index]] if unchanged else names)]
        placements = engines.locate(host, [host] if unchanged else hosts, members, self._shapes)
        for at in placements:
            if at.name in self._projected and group["rank"] is not None:
                selection.check_rank(at.name, at.shape, group["rank"], group["matricize"])
        recipe, alone = self.recipe(group), len(placements) == 1
        if recipe.accumulation is not None and not engines.frees(host, any(p is host for _, p in members)):
            raise RuntimeError(
                f"{placements[0].name if placements else names[index]}: compress_accumulation cannot take gradients "
                "from this engine, which sums whole ones itself (DeepSpeed ZeRO, FSDP1). Leave it out (DeepSpeed: "
                "gradient_accumulation_steps in the ds_config), or use FSDP2."
            )
        return [
            slot
            for at in placements
            for slot in bind(host, at, recipe, at.name in self._projected, group["matricize"], alone, store)
        ]

    def start_anew(self) -> None:
        """Forget all state: the next step is the first."""
        self.state.clear()
        self._slots.clear()
        self._bound.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch.optim does, but keep the dtype of every state tensor (torch would cast to the parameter's).

        Raises:
            ValueError: the state was saved by another algorithm, with options that change its shape or meaning, or for
                the same parameters in another order. Nothing has changed then.
        """
        groups = [
            self._loaded_group(i, ours, theirs)
            for i, (ours, theirs) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False))
        ]
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if all(isinstance(place, int) for place in theirs["params"]):  # (torch.distributed.checkpoint goes by name)
                self._check_order(ours["param_names"], theirs.get("param_names", ours["param_names"]))
        rest = state_dict["param_groups"][len(groups) :]
        self._check_state(groups, state_dict)
        super().load_state_dict({**state_dict, "param_groups": [*groups, *rest], "state": {}})
        ours = [p for group in self.param_groups for p in group["params"]]
        theirs = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, p in zip(theirs, ours, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                counter = name.split("::")[-1] in COUNTERS and torch.as_tensor(value).dim() == 0
                self.state[p][name] = torch.as_tensor(value).detach().clone().to("cpu" if counter else p.device)
        self._slots.clear()
        self._bound.clear()

    def _check_order(self, ours: Sequence[str], theirs: Sequence[str]) -> None:
        """State dicts know places only: with equal shapes, each state would go to another parameter."""
        if list(ours) != list(theirs) and sorted(ours) == sorted(theirs):
            one, other = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
            raise ValueError(
                f"{type(self).__name__}: the state was saved with {other} in the place of {one}. Give the optimizer "
                "its parameters in the same order, or use lowrank_ds.save_checkpoint, which goes by name."
            )

    def _check_state(self, groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the parameter, if loaded state does not fit the tensors as they lie now."""
        for ours, new, saved in zip(self.param_groups, groups, state_dict["param_groups"], strict=False):
            for index, number in enumerate(saved["params"][: len(ours["params"])]):
                store = {k: torch.as_tensor(v) for k, v in state_dict["state"].get(number, {}).items()}
                if not store:
                    continue  # of a fresh optimizer: accelerate loads such state at once
                try:
                    self._found({**new, "params": ours["params"], "param_names": ours["param_names"]}, index, store)
                except RuntimeError:
                    continue  # an engine has the tensors gathered, say: then the first step looks at the state

    def _loaded_group(self, index: int, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
        """A saved group's hyper-parameters over ours; the tensors, names and shape of the state stay ours."""
        where = f"{type(self).__name__}, saved param group {index}"
        # older groups kept what was left open
        theirs = {**theirs, **options.settled({**ours, **theirs}, self.OPTIONS)}
        unknown = sorted(set(theirs) - set(self.OPTIONS) - options.TOLERATED - set(ours))
        if unknown:
            raise ValueError(f"{where}: has {', '.join(unknown)}: it was saved by another optimizer.")
        for name in _SHAPING:
            if name in theirs and theirs[name] != ours[name]:
                raise ValueError(
                    f"{where}: {name} is {theirs[name]!r}, but this optimizer was built with {ours[name]!r}. The state "
                    "only fits the former; build the optimizer with it."
                )
        # how state is kept and computed here is this optimizer's own affair, not the saved one's
        own = ("param_names", "projector_storage", "compile", "compress_accumulation", "accumulation_compression_rank",
               "lazy_refresh", "lazy_threshold")  # fmt: skip
        kept = {k: v for k, v in theirs.items() if k not in own}
        return {**{k: v for k, v in ours.items() if k != "params"}, **kept}


# options that decide what the state is: its shapes, types and meaning
_SHAPING = ("rank", "proj_type", "subspace", "matricize", "seed", "moments", "projector_dtype", "min_8bit_size",
            "quantization")  # fmt: skip


def _same(bound: Mapping[str, Tensor], store: Mapping[str, Tensor]) -> bool:
    """Whether `store` holds the very tensors in `bound`."""
    return bound.keys() == store.keys() and all(store[key] is tensor for key, tensor in bound.items())
