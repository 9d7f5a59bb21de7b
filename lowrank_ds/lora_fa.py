"""LoRA-FA (arXiv:2308.03303; peft's `create_lorafa_optimizer`): lora_A frozen, lora_B trained on a corrected gradient.

With dW = s B A and A fixed, the update of B whose dW is nearest (Frobenius) to the full gradient is

    g' = g (A A^T)^-1 / s^2         g = dL/dB (out x r), A (r x in), s = alpha / r (rsLoRA: alpha / sqrt(r))

then Adam on g'. C = (A A^T)^-1 / s^2 is state of each lora_B ("correction"), made when B is first met and again when A
or s changed. Rows of g' are rows of g times C, so B may be sharded in any way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_ds import engines, linalg, lora_layers, pipeline
from lowrank_ds.collectives import Task, run_all
from lowrank_ds.groups import logger
from lowrank_ds.lora_layers import Adapter
from lowrank_ds.optimizer import LowRankOptimizer
from lowrank_ds.params import canonical
from lowrank_ds.recipe import Correction, Recipe
from lowrank_ds.rules import Adam
from lowrank_ds.slots import Slot

_BUCKET = 1 << 27  # numbers (fp32) of lora_A gathered at once
_DEPENDENT = 1e-6  # squared Cholesky pivot, relative to the mean squared row, below which a row of A is no direction


class _Everyone(NamedTuple):
    """All ranks of a group take part, also those that hold nothing of the matrix."""

    group: Any
    shared: bool = True


class LoRAFA(LowRankOptimizer):
    """AdamW on LoRA's B factors with the gradient corrected for the frozen A; plain AdamW on whatever else is trained.

    W <- (1 - eta wd) (W - eta N), N = Adam(g (A A^T)^-1 / s^2) (peft decays after the update). Build it with
    `create_lorafa_optimizer(model, ...)`, name it in a ds_config, or hand it the parameters of a model that
    `lorafa_groups(model)` has seen. Building it freezes every lora_A.

    Options: lr, betas, eps (added to the uncorrected sqrt(v)), weight_decay, correct_bias, compile;
    projector_storage: C "sharded" like the weights (default) or "replicated"; stochastic_rounding, seed: of bf16 B.

    Raises:
        ValueError: no LoRA layers are known, an adapter that LoRA-FA cannot train (DoRA, embeddings, ...), a zero A.
    """

    OPTIONS = {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True, "compile": False,
        "projector_storage": None, "seed": 0, "stochastic_rounding": True,
    }  # fmt: skip
    FIXED = {
        "rank": None, "target_modules": None, "exclude": None, "matricize": "flatten", "proj_type": None,
        "subspace": None,
    }  # fmt: skip

    @classmethod
    def recipe(cls, group: Mapping[str, Any]) -> Recipe:
        """Adam on corrected gradients, decay last."""
        if group["lr"] is None:
            raise ValueError("lr is null; LoRAFA needs a learning rate.")
        if group["projector_storage"] == "seed":
            raise ValueError('projector_storage="seed": LoRA-FA draws nothing; use "sharded" or "replicated".')
        if isinstance(group["eps"], (tuple, list)):
            raise ValueError(f"eps must be one number, got {group['eps']}.")
        rule = Adam(tuple(group["betas"]), group["eps"], group["correct_bias"], group["compile"])
        correction = Correction(replicated=group["projector_storage"] == "replicated")
        return Recipe(rule, correction=correction, decay_last=True)

    # -- which parameters ---------------------------------------------------------------------------------------------
    def _forget(self, projected: set[str]) -> None:
        super()._forget(projected)
        self._adapters: dict[str, Adapter] = {}  # by the name of lora_B's weight
        self._corrected: dict[str, tuple] = {}  # what the state's C was made of
        self._checked: dict[str, tuple] = {}  # what A was looked at of a lora_B that other ranks hold

    def _select(self, groups: list[dict[str, Any]], by_group: bool, required: bool = True) -> None:
        """Find the adapters of the groups' lora_B, and freeze their lora_A."""
        model = engines.model()
        if model is not None:  # a ds_config names the optimizer: nobody else has seen the model
            lora_layers.record(model)
        named = [(name, self._originals[name]()) for group in groups for name in group["param_names"]]
        for name, p in named:
            adapter = lora_layers.known(p)
            if adapter is None and p.requires_grad and ".lora_B." in name and name.endswith(".weight"):
                raise ValueError(f"LoRAFA: {name} is of a model it has not seen. {_HOW}")
            if adapter is None or (adapter.refusal and not p.requires_grad):
                continue
            if adapter.refusal:
                raise ValueError(f"LoRAFA: {name} is of {adapter.refusal}.")
            self._adapters[name] = adapter
            adapter.a.requires_grad_(False)
        if required and not self._adapters:
            raise ValueError(f"LoRAFA: none of {len(named)} parameters is a lora_B of a model it has seen. {_HOW}")
        self._projected = set(self._adapters)

    def summary(self) -> str:
        """What is corrected and what is not, for people and logs."""
        names = [n for g in self.param_groups for n in g["param_names"]]
        return f"LoRAFA: {len(self._adapters)} lora_B corrected, {len(names) - len(self._adapters)} others plain AdamW"

    # -- the corrections ----------------------------------------------------------------------------------------------
    def _bind(self, group: dict[str, Any], index: int) -> list[Slot]:
        """As the base; the corrections are made for new state, and again when an A or a scaling changed."""
        host, names = group["params"][index], group["param_names"]
        before = self._slots.get(host)
        slots = super()._bind(group, index)
        # one tensor per parameter: also on ranks that hold nothing of it; partitions: what they hold (the same on all
        # ranks where A is partitioned too)
        here = [names[index]] if len(names) == len(group["params"]) else list(dict.fromkeys(s.name for s in slots))
        here = [name for name in here if name in self._projected]
        if len(names) != len(group["params"]):
            self._check_others(set(names) & self._projected - set(here))
        if slots is not before:
            for name in here:
                self._corrected.pop(name, None)
        self._correct(group, index, slots, here)
        return slots

    def _check_others(self, names: Iterable[str]) -> None:
        """Look at whole A of lora_B that other ranks hold alone (ZeRO-1/2): all ranks raise, or none."""
        for name in sorted(names):
            original, adapter = self._originals[name](), self._adapters.get(name)
            if adapter is None or original is None or not original.requires_grad:
                continue
            known = (id(adapter.a), engines.version(adapter.a))
            if self._checked.get(name) != known:
                layout, entries = engines.part(adapter.a_name, adapter.a)
                if layout.world == 1:
                    self._check(adapter, entries)
                self._checked[name] = known

    @torch.no_grad()
    def _correct(self, group: dict[str, Any], index: int, slots: Sequence[Slot], names: Sequence[str]) -> None:
        """Bring the state's C up to date (by all ranks that share an A)."""
        tasks, made_of = {}, {}
        for name in names:
            adapter = self._adapter(name)
            if name in self._corrected and engines.is_dtensor(adapter.a) != engines.is_dtensor(group["params"][index]):
                continue  # FSDP2 has it gathered just now (an update inside the backward)
            made_of[name] = (id(adapter.a), engines.version(adapter.a), adapter.scaling)
            if self._corrected.get(name) != made_of[name]:
                layout, entries = engines.part(adapter.a_name, adapter.a)
                device = entries.device
                everyone, size = _Everyone(layout.group, layout.world > 1), layout.shape[0] * layout.shape[1]
                tasks[name] = Task(everyone, _whole(layout, entries), size, adapter.a_name)
        if not tasks:
            return
        rows = dict(zip(tasks, run_all(tasks.values(), device, _BUCKET), strict=True))
        for name, whole in rows.items():  # by every rank, also one that holds nothing of this lora_B
            self._check(self._adapters[name], whole)
        for slot in slots:
            if slot.name in rows:
                adapter = self._adapters[slot.name]
                axis = pipeline.correction_side(slot.layout, self.recipe(group)).basis_axis
                part = self._inverse(adapter, rows[slot.name])[slice(*axis.kept[axis.rank])].to(
                    slot.state["correction"]
                )
                self._compare(slot, adapter, part)
                slot.state["correction"].copy_(part)
        self._corrected.update({name: made_of[name] for name in tasks})

    def _adapter(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise RuntimeError(f"LoRAFA: a copied optimizer does not know the layer of {name}; build a new one. {_HOW}")
        adapter = self._adapters[name]
        if adapter.a.requires_grad:
            raise RuntimeError(
                f"LoRAFA: {adapter.a_name} requires a gradient again (set_adapter and load_adapter do that), but "
                "LoRA-FA keeps it fixed. Call lowrank_ds.freeze_lora_a(model)."
            )
        return adapter

    @staticmethod
    def _check(adapter: Adapter, a: Tensor) -> None:
        """Raise ValueError for an A (any shape) with which nothing can be trained."""
        if not bool(a.isfinite().all()) or not bool(a.any()):
            raise ValueError(
                f"LoRAFA: {adapter.a_name} is {'all zeros' if not bool(a.any()) else 'not finite'}; with it frozen "
                "nothing can be trained. Initialise it (LoraConfig(init_lora_weights=True)) or load an adapter first."
            )

    def _inverse(self, adapter: Adapter, a: Tensor) -> Tensor:
        """C (r, r) of A (r, in)."""
        inverse, independence = linalg.gram_inverse(a)
        if independence < _DEPENDENT:
            self._warn_once(
                adapter.a_name,
                f"{adapter.a_name} has dependent rows: the adapter's rank is lower than {len(a)}, and the corrected "
                "gradient along the missing directions is rounding noise. Initialise it anew or lower r.",
            )
        return inverse / adapter.scaling**2

    def _compare(self, slot: Slot, adapter: Adapter, part: Tensor) -> None:
        """Say when loaded state belongs to another A."""
        stored = slot.state["correction"]
        if slot.step and bool(stored.any()) and float((stored - part).abs().max()) > 1e-3 * part.abs().max():
            self._warn_once(
                f"moved {slot.name}",
                f"{adapter.a_name} (or its scaling) is not what the optimizer's state was made with: load the adapter "
                "before the optimizer, or start with fresh state. Going on with the A that is in the model.",
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base; corrections are made again from the A in the model, at the next step."""
        super().load_state_dict(state_dict)
        self._corrected.clear()


_HOW = (
    "Use lowrank_ds.create_lorafa_optimizer(model, ...), pass lowrank_ds.lorafa_groups(model), or name LoRAFA in the "
    "ds_config of a model with peft's LoRA layers."
)


def _whole(layout, entries: Tensor) -> pipeline.Steps:
    """All of a matrix (m, n), fp32, on every rank."""
    if layout.world == 1:
        return entries.float().view(layout.shape)
    return (yield from layout.send_to_all(entries.float()))


# -- what people call -------------------------------------------------------------------------------------------------
def freeze_lora_a(model: nn.Module) -> list[Adapter]:
    """Set requires_grad=False on every lora_A that LoRA-FA trains the B of. Before wrapping in DDP.

    Raises:
        ValueError: the model has no LoRA layers, or is wrapped in DDP with a lora_A that is trained.
    """
    adapters = lora_layers.record(model)
    trained = [adapter for adapter in adapters if adapter.a.requires_grad]
    if trained and isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"{trained[0].a_name} is trained in a model that DDP has wrapped already: DDP would wait for its gradient. "
            "Call lowrank_ds.freeze_lora_a(model) before DistributedDataParallel(model)."
        )
    for adapter in trained:
        adapter.a.requires_grad_(False)
    return adapters


def lorafa_groups(model: nn.Module) -> list[dict[str, Any]]:
    """One param group: every lora_B (of adapters that are not active too) and all else that is trained. Freezes lora_A.

    Raises:
        ValueError: no LoRA layers, a kind of LoRA that LoRA-FA cannot train (named), or see `freeze_lora_a`.
    """
    engines.record(model)
    freeze_lora_a(model)
    named = [
        (canonical(name), p)
        for name, p in model.named_parameters()
        if p.requires_grad or (lora_layers.known(p) is not None and lora_layers.known(p).refusal is None)
    ]
    if not any(lora_layers.known(p) is not None for _, p in named):
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers: call peft.get_peft_model(model, LoraConfig(...))."
        )
    return [{"params": [p for _, p in named], "param_names": [name for name, _ in named]}]


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
    **options: Any,
) -> LoRAFA:
    """peft's `create_lorafa_optimizer` for models in one process or sharded in any way. Freezes every lora_A.

    Call it after `fully_shard`; before `DistributedDataParallel` and `deepspeed.initialize` (or let the ds_config name
    LoRAFA).

    Args:
        model: with LoRA layers (`peft.get_peft_model`).
        r, lora_alpha, use_rslora: checked against each layer's own, which are what is used (rank_pattern and
            alpha_pattern make them differ); a disagreement is logged once. use_rslora None: not checked.
        lr, weight_decay: of AdamW, on lora_B and on everything else that is trained.
        **options: further options of `LoRAFA`.

    Raises:
        ValueError: see `lorafa_groups` and `LoRAFA`.
    """
    groups = lorafa_groups(model)
    _check_arguments(lora_layers.record(model), r, lora_alpha, use_rslora)
    return LoRAFA(groups, lr=lr, weight_decay=weight_decay, **options)


def _check_arguments(adapters: Sequence[Adapter], r: int, lora_alpha: float, use_rslora: bool | None) -> None:
    """Log a warning if layers have another rank or scaling than the arguments say."""

    def differs(adapter: Adapter) -> bool:
        rank = adapter.layer.r[adapter.name]
        rooted = adapter.layer.use_rslora[adapter.name] if use_rslora is None else use_rslora
        said = lora_alpha / (math.sqrt(r) if rooted else r)
        return rank != r or not math.isclose(adapter.scaling, said)

    others = [adapter for adapter in adapters if differs(adapter)]
    if others:
        first = others[0]
        logger.warning(
            "create_lorafa_optimizer: %d of %d adapters differ from r=%s, lora_alpha=%s, use_rslora=%s (first: %s, "
            "r=%s, scaling %s); each layer's own are used.",
            len(others), len(adapters), r, lora_alpha, use_rslora, first.path, first.layer.r[first.name], first.scaling,
        )  # fmt: skip
