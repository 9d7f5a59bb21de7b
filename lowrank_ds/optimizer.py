"""The optimizer: param groups, where their tensors live, state, and the step. No mathematics, no collectives."""

from __future__ import annotations

import inspect
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_ds import engines, options, params, pipeline
from lowrank_ds.collectives import run_all
from lowrank_ds.job import Job
from lowrank_ds.recipe import Recipe
from lowrank_ds.slots import COUNTERS, Slot, adopt_state, cut, deal, due, offset

logger = logging.getLogger("lowrank_ds")
_BUCKET = 1 << 27  # matrix entries whose shared work is alive at once


class LowRankOptimizer(torch.optim.Optimizer):
    """Base of all algorithms: a subclass declares OPTIONS and maps a param group to a `Recipe`.

    Args:
        params: what torch.optim accepts. Groups that carry 'rank' are projected, then groups without it are not
            (the published packages' form). If no group carries it, `rank`, `target_modules` and `exclude` choose the
            parameters by name, so names must be known: pass `model.named_parameters()`, or let a ds_config name
            the optimizer.
        **settings: the subclass's OPTIONS, also allowed per group.

    Raises:
        ValueError: an unknown option, a value out of range, or nothing to project.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {}
    ALIASES: ClassVar[dict[str, Callable[[Any], tuple[str, Any]]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        named = [inspect.Parameter(name, keyword, default=value) for name, value in cls.OPTIONS.items()]
        cls.__signature__ = inspect.Signature([inspect.Parameter("params", keyword), *named])

    def __init__(self, params_: Iterable[Any], *arguments: Any, **settings: Any) -> None:
        settings = self._positional(arguments, settings)
        self._slots: dict[Tensor, list[Slot]] = {}
        self._originals: dict[str, weakref.ref[Tensor]] = {}
        self._projected: set[str] = set()
        self._warned: set[str] = set()
        self._building = True
        options.check(settings, self.OPTIONS, type(self).__name__)
        groups = self._as_groups(params_)
        by_group = any("rank" in group for group in groups)
        if by_group and settings.get("rank") is not None:
            raise ValueError(
                f"{type(self).__name__}: rank={settings['rank']} is given, but param groups carry their own 'rank'."
            )
        defaults = {**self.OPTIONS, **settings}
        if by_group:
            defaults["rank"] = None
        super().__init__(groups, defaults)
        self._building = False
        self._select(self.param_groups, by_group)
        engines.allow(type(self))
        logger.info("%s", self.summary())

    # -- what a subclass declares -----------------------------------------------------------------------------------
    @classmethod
    def recipe(cls, group: Mapping[str, Any]) -> Recipe:
        """The recipe of a param group."""
        raise TypeError(f"{cls.__name__} declares no recipe.")

    @classmethod
    def learning_rate(cls, group: Mapping[str, Any], step: int) -> float:
        """The learning rate of step 1, 2, ..."""
        return float(group["lr"])

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

    def _translate(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Other packages' names for our options."""
        pairs = (self.ALIASES[k](v) if k in self.ALIASES else (k, v) for k, v in settings.items())
        return dict(pairs)

    def _as_groups(self, given: Iterable[Any]) -> list[dict[str, Any]]:
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
        group = params.prepare_group({**kept, **own}, index)
        self._validate({**self.defaults, **group}, where)
        super().add_param_group(group)
        added = self.param_groups[-1]
        for name, p in zip(added["param_names"], added["params"], strict=True):
            known = self._originals.get(name)
            if known is not None and known() is not p:
                raise ValueError(f"{where}: two parameters are named {name!r}.")
            self._originals[name] = weakref.ref(p)
        if not self._building:
            self._select([added], "rank" in own)

    def _validate(self, group: Mapping[str, Any], where: str) -> None:
        try:
            self.recipe(group)
            self.learning_rate(group, 1)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def _select(self, groups: list[dict[str, Any]], by_group: bool) -> None:
        """Decide by name what is projected, and check that it can be."""
        named = [(n, self._originals[n](), g) for g in groups for n in g["param_names"] if g["rank"] is not None]
        trained = [(n, p, g) for n, p, g in named if p.requires_grad]
        if not named:
            return
        if by_group:
            chosen = {n for n, _, _ in trained}
        else:
            first = named[0][2]
            chosen = set(params.select([(n, p) for n, p, _ in trained], first["target_modules"], first["exclude"]))
        for name, p, group in trained:
            if name in chosen:
                params.check_rank(name, engines.full_shape(p), group["rank"], group["matricize"])
        self._projected |= chosen

    def summary(self) -> str:
        """What is projected and what is not, for people and logs."""
        names = [n for g in self.param_groups for n in g["param_names"]]
        plain = [n for n in names if n not in self._projected]
        ranks = sorted({g["rank"] for g in self.param_groups if g["rank"] is not None})
        return (
            f"{type(self).__name__}: {len(names) - len(plain)} parameters projected (rank {ranks}), {len(plain)} plain"
            + (f": {', '.join(plain[:6])}{' ...' if len(plain) > 6 else ''}" if plain else "")
        )

    # -- where tensors live, and their state --------------------------------------------------------------------------
    def init_state(self) -> None:
        """Create all state now instead of at the first step (the engine must have its final layout)."""
        for group in self.param_groups:
            for host in group["params"]:
                self._bind(group, host)

    def _bind(self, group: dict[str, Any], host: Tensor) -> list[Slot]:
        if host not in self._slots:
            members = [(name, self._originals[name]()) for name in group["param_names"]]
            placements = engines.locate(host, group["params"], members)
            slots = [s for at in placements for s in cut(host, at, at.name in self._projected, group["matricize"])]
            for slot in slots:
                single = len(slots) == 1 and slot.layout.numel == host.numel()
                adopt_state(slot, self.recipe(group), self.state[host], single)
            self._slots[host] = slots
        return self._slots[host]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch.optim does, but keep the dtype of every state tensor (torch would cast to the parameter's)."""
        super().load_state_dict({**state_dict, "state": {}})
        ours = [p for group in self.param_groups for p in group["params"]]
        theirs = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, p in zip(theirs, ours, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                counter = name.split("::")[-1] in COUNTERS
                self.state[p][name] = value.detach().clone().to("cpu" if counter else p.device)
        self._slots.clear()

    # -- the step -----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient.

        Raises:
            RuntimeError: a ZeRO partition without gradient, or a sparse gradient.
            ValueError: a learning rate that is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (slot, group, grad, weight)
            for group in self.param_groups
            for host in group["params"]
            for slot, grad, weight in self._work(group, host)
        ]
        if not work:
            if any(group["params"] for group in self.param_groups):
                self._warn_once("no gradient", "step() found no gradient on any parameter: nothing was updated.")
            return loss
        device = work[0][3].device
        jobs = self._jobs(work, device)
        run_all([(job.layout, pipeline.update(job, slot.projected)) for slot, job in jobs], device, _BUCKET)
        for host in {slot.host: None for slot, _, _, _ in work}:
            self._write_back(host)
        return loss

    def _work(self, group: dict[str, Any], host: Tensor) -> list[tuple[Slot, Tensor, Tensor]]:
        """(slot, gradient entries, weight entries) of one tensor; nothing if it has no gradient."""
        if not math.isfinite(self.learning_rate(group, 1)):
            raise ValueError(f"{type(self).__name__}: the learning rate is {group['lr']}; check the scheduler.")
        slots = self._bind(group, host)
        if host.grad is None:
            if any(slot.layout.shared for slot in slots):
                raise RuntimeError(
                    f"the partition that holds {slots[0].name} has no gradient: call engine.backward(loss) and "
                    "engine.step() (not loss.backward() and optimizer.step())."
                )
            return []
        if host.grad.is_sparse:
            raise RuntimeError(f"{slots[0].name} has a sparse gradient; use nn.Embedding(sparse=False).")
        weight = host.detach() if host.is_contiguous() else self._staged(host)
        grad = host.grad.detach().contiguous().view(-1)
        return [(slot, slot.entries(grad), slot.entries(weight.view(-1))) for slot in slots]

    def _staged(self, host: Tensor) -> Tensor:
        """A contiguous copy of a weight with other strides (channels_last), written back after the step."""
        self._copies = getattr(self, "_copies", {})
        self._copies[host] = host.detach().contiguous()
        return self._copies[host]

    def _write_back(self, host: Tensor) -> None:
        copy = getattr(self, "_copies", {}).pop(host, None)
        if copy is not None:
            host.copy_(copy)

    def _jobs(self, work: list, device: torch.device) -> list[tuple[Slot, Job]]:
        """Decide for each matrix, equally on all ranks, whether it steps and refreshes."""
        recipes = {id(group): self.recipe(group) for _, group, _, _ in work}
        asked = [i for i, (slot, g, _, _) in enumerate(work) if slot.step == 0 or due(slot, recipes[id(g)])]
        surveys = dict(zip(asked, self._survey([work[i] for i in asked], device), strict=True))
        loads: dict[Any, dict[int, float]] = {}
        jobs = []
        for i, (slot, group, grad, weight) in enumerate(work):
            recipe = recipes[id(group)]
            non_finite, non_zero = surveys.get(i, (0.0, 1.0))
            usable = not non_finite and bool(non_zero)
            if non_finite:
                self._report_non_finite(slot)
            if slot.step == 0 and not usable:
                continue  # a parameter without any gradient so far must not start its clock, its basis or its decay
            refresh = usable and due(slot, recipe)
            job = self._job(slot, group, recipe, grad, weight, refresh)
            if refresh and recipe.subspace.method == "svd" and slot.layout.shared:
                job.owner = deal(loads.setdefault(slot.layout.group, {}), slot.layout)
            jobs.append((slot, job))
            slot.write_counters()
        return jobs

    def _job(self, slot: Slot, group, recipe: Recipe, grad: Tensor, weight: Tensor, refresh: bool) -> Job:
        count = slot.refreshes
        if refresh:
            stagger = recipe.subspace.stagger and count == 0
            slot.last_refresh = slot.step - (offset(slot.name, recipe.subspace.every) if stagger else 0)
            slot.refreshes += 1
            if recipe.subspace.on_refresh == "reset":
                slot.moment_step = 0
        slot.step += 1
        slot.moment_step += 1
        return Job(
            slot.layout, recipe, grad, weight, slot.state, (group["seed"], slot.name), slot.step, slot.moment_step,
            self.learning_rate(group, slot.step), float(group["weight_decay"]), refresh, count,
            slot.layout.rank, group["stochastic_rounding"],
        )  # fmt: skip

    def _survey(self, work: list, device: torch.device) -> list[tuple[float, float]]:
        """(non-finite, non-zero) of each gradient over all ranks: one all-reduce and one read for all of them."""
        if not work:
            return []
        found = run_all([(s.layout, pipeline.survey(g)) for s, _, g, _ in work], device, _BUCKET)
        return torch.stack([each.to(device) for each in found]).tolist()

    def _report_non_finite(self, slot: Slot) -> None:
        self._warn_once(
            slot.name,
            f"{slot.name}: the gradient is not finite at step {slot.step}; its basis is kept and its update skipped. "
            "optimizer.skipped() counts such steps.",
        )

    def skipped(self) -> dict[str, int]:
        """{matrix name: updates skipped because the gradient was not finite}, of the matrices held here."""
        slots = [slot for slots in self._slots.values() for slot in slots if "skipped" in slot.state]
        return {slot.name: int(slot.state["skipped"]) for slot in slots if int(slot.state["skipped"])}

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning("%s: %s", type(self).__name__, message)
