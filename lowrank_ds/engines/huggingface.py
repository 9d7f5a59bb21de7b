"""Hugging Face's Trainer: a factory that is handed the model, hence names, frozen parameters and adapters.

transformers 5 calls a first element of `optimizer_cls_and_kwargs` that is no Optimizer class as
`factory()(model, **kwargs)`. transformers is imported when Trainer builds the optimizer, peft never.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from lowrank_ds import options as option_checks
from lowrank_ds import params as selection
from lowrank_ds.algorithms import ALGORITHMS
from lowrank_ds.engines.trainer import LayerwiseOption
from lowrank_ds.lora_fa import LoRAFA, lorafa_groups
from lowrank_ds.optimizer import LowRankOptimizer

logger = logging.getLogger("lowrank_ds")


def for_trainer(
    algorithm: str | type[LowRankOptimizer],
    args: Any = None,
    layerwise: bool | Mapping[str, Any] = False,
    **options: Any,
) -> tuple[TrainerFactory, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes: `algorithm` on three groups (four if a norm is a matrix).

    Projected; plain with weight decay; plain without (biases and norms, by Trainer's own rule). Frozen parameters are
    left out, peft's adapters are never projected (they are low-rank already; a warning says so).

    Args:
        algorithm: a class of this package or its name, such as "FiraAdamW".
        args: the TrainingArguments. They fill in what `options` does not give: lr (learning_rate), weight_decay, and
            for Adam-based algorithms betas (adam_beta1, adam_beta2) and, only where it is not transformers' default,
            eps (adam_epsilon): the algorithms' default 1e-6 is the published packages', added to the uncorrected
            sqrt(v). They are read when Trainer builds the optimizer, so a hyper-parameter search works. Default None:
            the algorithm's own defaults.
        layerwise: update each parameter inside the backward and free its gradient (`lowrank_ds.layerwise`, which is
            called for you): on one process and under FSDP2. True needs max_grad_norm=0 in `args`. {"clip": "previous"}
            or {"clip": "per_tensor"} clips to args.max_grad_norm, which is set to 0 when training begins, so that
            Trainer does not clip too. Default False.
        **options: the algorithm's options; `rank=None` trains without projection.

    Raises:
        ValueError: an unknown algorithm or option, a value out of range, a relative step, no learning rate, or
            optim_args / optim_target_modules in `args` (Trainer reads them for its own GaLore and APOLLO only);
            layerwise with gradient clipping by Trainer, fp16, auto_find_batch_size or DeepSpeed, or sums in the
            subspace without layerwise.
        TypeError: `args` is not a TrainingArguments, or `layerwise` neither a bool nor a dict.
    """
    factory = TrainerFactory(_class_of(algorithm), args)
    factory.settings(options)
    if layerwise is not False:
        factory = dataclasses.replace(factory, layerwise=LayerwiseOption(args, layerwise))
    elif any(options.get(name) for name in ("compress_accumulation", "accumulation_compression_rank")):
        raise ValueError("for_trainer: Trainer only sums micro-batches in the subspace with layerwise=True.")
    return factory, options


@dataclasses.dataclass(frozen=True)
class TrainerFactory:
    """`factory()(model, **options)` builds the optimizer; see `for_trainer`."""

    algorithm: type[LowRankOptimizer]
    args: Any = None
    layerwise: LayerwiseOption | None = None

    def __call__(self) -> Any:
        """The function that Trainer calls with the model."""
        return self.build

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options over what the TrainingArguments say, checked.

        Raises:
            ValueError, TypeError: see `for_trainer`.
        """
        name = self.algorithm.__name__
        given = self.algorithm._translate(options)
        settings = {**_from_arguments(self.algorithm, self.args), **given}
        option_checks.check(settings, self.algorithm.OPTIONS, name)
        if settings.get("relative_step"):
            raise ValueError(
                f"{name}: relative_step=True sets the learning rate at each step, and so does Trainer's scheduler. "
                "Leave relative_step out and give learning_rate (or lr)."
            )
        if settings.get("lr", self.algorithm.OPTIONS["lr"]) is None:
            raise ValueError(f"{name}: no learning rate, which Trainer's scheduler needs. Pass the TrainingArguments.")
        return settings

    def build(self, model: nn.Module, **options: Any) -> LowRankOptimizer:
        """The optimizer for the trainable parameters of `model`.

        Raises:
            ValueError: a pattern matches nothing, nothing is left to project, or a rank is too large.
            RuntimeError: layerwise under an engine that cannot do it.
        """
        settings = {**self.algorithm.OPTIONS, **self.settings(options)}
        decay = settings.pop("weight_decay")
        groups = lorafa_groups(model) if self.algorithm is LoRAFA else self._groups(model, settings)
        optimizer = self.algorithm(_by_decay(groups, _decayed(model), decay), **settings)
        if self.layerwise is not None:
            self.layerwise.arrange(model, optimizer)
        return optimizer

    def _groups(self, model: nn.Module, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """The param groups by name; takes what chooses them out of `settings`."""
        name = self.algorithm.__name__
        rank, targets, exclude = (settings.pop(key) for key in ("rank", "target_modules", "exclude"))
        if rank is not None:
            return _projected_and_plain(name, model, rank, targets, exclude)
        if targets or exclude:
            raise ValueError(f"{name}: rank=None projects nothing, but target_modules or exclude is given.")
        settings["rank"] = None
        return [_everything(model)]


def _class_of(algorithm: str | type[LowRankOptimizer]) -> type[LowRankOptimizer]:
    if isinstance(algorithm, type) and issubclass(algorithm, LowRankOptimizer):
        return algorithm
    known = {cls.__name__: cls for cls in (*ALGORITHMS, LoRAFA)}
    if algorithm not in known:
        near = difflib.get_close_matches(str(algorithm), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"for_trainer: unknown algorithm {algorithm!r}{hint} Known: {', '.join(known)}.")
    return known[algorithm]


def _from_arguments(algorithm: type[LowRankOptimizer], args: Any) -> dict[str, Any]:
    """The options that TrainingArguments decide."""
    if args is None:
        return {}
    if not hasattr(args, "learning_rate") or not hasattr(args, "adam_epsilon"):
        raise TypeError(f"for_trainer: args must be a TrainingArguments or None, got {type(args).__name__}.")
    for name in ("optim_args", "optim_target_modules"):
        if getattr(args, name, None):
            raise ValueError(
                f"for_trainer: TrainingArguments has {name}={getattr(args, name)!r}, which Trainer reads for its own "
                "GaLore and APOLLO only. Give the options to for_trainer instead: rank=..., target_modules=[...]."
            )
    settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if "betas" in algorithm.OPTIONS:
        settings["betas"] = (args.adam_beta1, args.adam_beta2)
        if args.adam_epsilon != type(args).__dataclass_fields__["adam_epsilon"].default:
            settings["eps"] = args.adam_epsilon
    return settings


def _everything(model: nn.Module) -> dict[str, Any]:
    named = [(selection.canonical(n), p) for n, p in model.named_parameters() if p.requires_grad]
    return {"params": [p for _, p in named], "param_names": [n for n, _ in named]}


def _projected_and_plain(
    name: str, model: nn.Module, rank: int, targets: list[str] | None, exclude: list[str] | None
) -> list[dict[str, Any]]:
    """`param_groups` without adapters in the projected group.

    Raises:
        ValueError: as `param_groups`, or because only adapters are trained.
    """
    adapters = _adapters(model)
    if not adapters:
        return selection.param_groups(model, rank, targets, exclude)
    never = f"^(?:{'|'.join(map(re.escape, adapters))})$"
    try:
        groups = selection.param_groups(model, rank, targets, [*(exclude or ()), never])
    except ValueError as error:
        if "nothing to project" not in str(error):
            raise
        raise ValueError(
            f"{name}: the model trains {len(adapters)} adapter parameters (such as {adapters[0]}), which are low-rank "
            "already, and no other matrix that could be projected. Train the whole model, or some layers of it (peft's "
            "modules_to_save), or pass rank=None to train the adapters without projection."
        ) from None
    logger.warning(
        "%s: %d adapter parameters (such as %s) are trained without projection: they are low-rank already.",
        name,
        len(adapters),
        adapters[0],
    )
    return groups


def _adapters(model: nn.Module) -> list[str]:
    """Names of the trainable parameters that peft's tuners added (not whole copies made by modules_to_save)."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return []
    found = [
        selection.canonical(f"{path}.{name}")
        for path, layer in model.named_modules()
        if isinstance(layer, tuners.BaseTunerLayer)
        for name, p in layer.named_parameters()
        if p.requires_grad and name.split(".")[0] in layer.adapter_layer_names
    ]
    return list(dict.fromkeys(found))


def _decayed(model: nn.Module) -> set[str]:
    """Names of the parameters with weight decay, by Trainer's rule: no biases, no norms."""
    from transformers import Trainer

    return {selection.canonical(name) for name in Trainer.get_decay_parameter_names(None, model)}


def _by_decay(groups: list[dict[str, Any]], decayed: set[str], decay: float) -> list[dict[str, Any]]:
    """Each group cut into one with weight decay and one without; empty ones left out."""
    split = []
    for group in groups:
        rest = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for inside in (True, False):
            kept = [
                (n, p) for n, p in zip(group["param_names"], group["params"], strict=True) if (n in decayed) == inside
            ]
            if kept:
                part = {"params": [p for _, p in kept], "param_names": [n for n, _ in kept]}
                split.append({**part, **rest, "weight_decay": decay if inside else 0.0})
    return split
