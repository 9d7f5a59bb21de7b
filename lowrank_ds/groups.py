"""Parameter groups with names: the part of an optimizer that is about what to train, not about how."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_ds import engines, options
from lowrank_ds import params as selection
from lowrank_ds.int8_tensor import Int8Weight
from lowrank_ds.recipe import Recipe

logger = logging.getLogger("lowrank_ds")


class NamedGroups(torch.optim.Optimizer):
    """Parameter groups whose parameters have names, options that are checked, and a choice of what is projected.

    Args:
        params: what torch.optim accepts. Groups that carry 'rank' are projected, then groups without it are not
            (the published packages' form; patterns in such a group choose within it). If no group carries it,
            `rank`, `target_modules` and `exclude` choose the parameters by name, so names must be known: pass
            `model.named_parameters()`, or let a ds_config name the optimizer.
        **settings: the subclass's OPTIONS, also allowed per group.

    Raises:
        ValueError: an unknown option, a value out of range, or nothing to project.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {}
    FIXED: ClassVar[dict[str, Any]] = {}  # what groups need to carry and users cannot set
    ALIASES: ClassVar[dict[str, Callable[[Any], tuple[str, Any]]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        named = [inspect.Parameter(name, keyword, default=value) for name, value in cls.OPTIONS.items()]
        cls.__signature__ = inspect.Signature([inspect.Parameter("params", keyword), *named])

    def __init__(self, params: Iterable[Any], *arguments: Any, **settings: Any) -> None:
        settings = self._positional(arguments, settings)
        self._forget(set())
        self._building = True
        options.check(settings, self.OPTIONS, type(self).__name__)
        groups = self._as_groups(params)
        by_group = any("rank" in group for group in groups)
        if by_group and settings.get("rank") is not None:
            raise ValueError(
                f"{type(self).__name__}: rank={settings['rank']} is given, but param groups carry their own 'rank'."
            )
        if by_group and (settings.get("target_modules") or settings.get("exclude")):
            raise ValueError(
                f"{type(self).__name__}: target_modules and exclude choose by name, but param groups carry their own "
                "'rank', which chooses already. Give one of the two."
            )
        defaults = {**self.FIXED, **self.OPTIONS, **settings}
        if by_group:
            defaults["rank"] = None
        super().__init__(groups, defaults)
        self._building = False
        self._select(self.param_groups, by_group)
        engines.refuse_replacement(type(self))
        engines.allow(type(self))
        logger.info("%s", self.summary())

    def _forget(self, projected: set[str]) -> None:
        """Forget every tensor. `projected`: names of what is projected."""
        self._originals: dict[str, weakref.ref[Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._projected = projected

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: torch's fields, and which names are projected."""
        return {**super().__getstate__(), "projected": sorted(self._projected)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo `__getstate__` (torch also calls this when it loads a state dict, without our key)."""
        projected = state.get("projected")
        super().__setstate__({k: v for k, v in state.items() if k != "projected"})
        if projected is not None:
            self._forget(set(projected))
            self._building = False
            for group in self.param_groups:
                if len(group["params"]) == len(group["param_names"]):  # not so under ZeRO: then they are gone
                    self._remember(group, "")

    # -- what a subclass declares -----------------------------------------------------------------------------------
    @classmethod
    def recipe(cls, group: Mapping[str, Any]) -> Recipe:
        """The recipe of a param group."""
        raise TypeError(f"{cls.__name__} declares no recipe.")

    @classmethod
    def learning_rate(cls, group: Mapping[str, Any], step: int) -> float:
        """The learning rate of step 1, 2, ..."""
        return float(group["lr"])

    @classmethod
    def check_group(cls, group: Mapping[str, Any]) -> None:
        """Raise ValueError for options that do not go together."""
        cls.recipe(group)

    # -- groups -----------------------------------------------------------------------------------------------------
    def _positional(self, arguments: tuple, settings: dict[str, Any]) -> dict[str, Any]:
        names = list(self.OPTIONS)
        if len(arguments) > len(names):
            raise TypeError(f"{type(self).__name__} takes at most {len(names) + 1} positional arguments.")
        given = dict(zip(names, arguments, strict=False))
        twice = sorted(set(given) & set(settings))
        if twice:
            raise TypeError(f"{type(self).__name__}: {', '.join(twice)} given twice.")
        return self._translate({**given, **settings})

    @classmethod
    def _translate(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Other packages' names for our options."""
        translated: dict[str, Any] = {}
        for name, value in settings.items():
            ours, value = cls.ALIASES[name](value) if name in cls.ALIASES else (name, value)
            if ours in translated:
                raise TypeError(f"{cls.__name__}: {ours} is given twice ({name!r} is another name for it).")
            translated[ours] = value
        return translated

    def _as_groups(self, given: Iterable[Any]) -> list[dict[str, Any]]:
        if isinstance(given, torch.nn.Module):
            raise TypeError(f"{type(self).__name__} takes parameters, not a model: pass model.named_parameters().")
        items = [given] if isinstance(given, (Tensor, dict)) else list(given)
        if not items:
            raise ValueError(f"{type(self).__name__}: empty parameter list.")
        return items if isinstance(items[0], dict) else [{"params": items}]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked and named. A group with 'rank' is projected; see the class."""
        index = len(self.param_groups)
        where = f"{type(self).__name__}, param group {index}"
        own = self._translate({k: v for k, v in param_group.items() if k not in options.TOLERATED})
        options.check(own, self.OPTIONS, where)
        kept = {k: v for k, v in param_group.items() if k in options.TOLERATED}
        group = selection.prepare_group({**kept, **own}, index)
        group |= options.settled({**self.defaults, **group}, self.OPTIONS)
        complete = {**self.defaults, **group}
        try:
            self.check_group(complete)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for sentence in options.idle(complete, self.OPTIONS) if complete["rank"] is not None else ():
            logger.warning("%s: %s", where, sentence)
        known = dict(self._originals)
        self._remember(group, where)
        if not self._building:
            try:
                self._select([complete], own.get("rank") is not None, required=False)
            except ValueError:
                self._originals = known
                raise
        super().add_param_group(group)

    def _remember(self, group: Mapping[str, Any], where: str) -> None:
        """Keep (weakly) the tensors a group is built with, by name: engines are asked about them later."""
        for name, p in zip(group["param_names"], group["params"], strict=True):
            known = self._originals.get(name)
            if known is not None and known() is not p:
                raise ValueError(f"{where}: two parameters are named {name!r}.")
            self._originals[name] = weakref.ref(p)
            self._shapes[name] = engines.full_shape(p)

    def _select(self, groups: list[dict[str, Any]], by_group: bool, required: bool = True) -> None:
        """Decide by name what is projected, and check that it can be (frozen matrices: when they first train)."""
        chosen: set[str] = set()
        asking = [g for g in groups if g["rank"] is not None]
        patterns = {repr((g["target_modules"], g["exclude"])): (g["target_modules"], g["exclude"]) for g in asking}
        for key, (targets, exclude) in patterns.items():
            alike = [g for g in asking if repr((g["target_modules"], g["exclude"])) == key]
            named = [(n, self._originals[n]()) for g in alike for n in g["param_names"]]
            if by_group and not targets and not exclude:
                chosen |= {n for n, _ in named}
            else:
                chosen |= set(selection.select(named, targets, exclude, (), required))
        for group in asking:
            for name in (n for n in group["param_names"] if n in chosen):
                p = self._originals[name]()
                if p.requires_grad:
                    selection.check_rank(name, engines.full_shape(p), group["rank"], group["matricize"])
        self._projected |= chosen

    def summary(self) -> str:
        """What is projected and what is not, for people and logs."""
        names = [n for g in self.param_groups for n in g["param_names"]]
        plain = [n for n in names if n not in self._projected]
        ranks = sorted({g["rank"] for g in self.param_groups if g["rank"] is not None})
        coded = sum(isinstance(engines.local(p), Int8Weight) for g in self.param_groups for p in g["params"])
        return (
            f"{type(self).__name__}: {len(names) - len(plain)} parameters projected (rank {ranks}), {len(plain)} plain"
            + (f": {', '.join(plain[:6])}{' ...' if len(plain) > 6 else ''}" if plain else "")
            + (f"; int8: {coded} of them" if coded else "")
        )
