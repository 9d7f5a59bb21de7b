"""The optimizer: the step, and what is summed before it. No mathematics, no collectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_ds import accumulate, agreement, engines, failures, pipeline
from lowrank_ds.binding import BoundGroups
from lowrank_ds.collectives import Task, run_all, several
from lowrank_ds.draws import grouped
from lowrank_ds.groups import logger
from lowrank_ds.job import Job
from lowrank_ds.linalg import LARGEST_GRADIENT
from lowrank_ds.recipe import Recipe
from lowrank_ds.slots import Slot, deal, due, offset
from lowrank_ds.subspace import is_cold

if TYPE_CHECKING:
    from lowrank_ds.backward import InBackward
    from lowrank_ds.diagnostics import Diagnostics
    from lowrank_ds.replicas import InSubspace

Place = tuple[dict[str, Any], int]  # a param group and the index of a tensor in it

_BUCKET = 1 << 27  # numbers (fp32) that shared work keeps alive at once


class LowRankOptimizer(BoundGroups):
    """Base of all algorithms: a subclass declares OPTIONS and maps a param group to a `Recipe`.

    Args:
        params: what torch.optim accepts. Groups that carry 'rank' are projected, groups without it are not (the
            published packages' form). If no group carries it, `rank`, `target_modules` and `exclude` choose the
            parameters by name, so names must be known: pass `model.named_parameters()`, or let a ds_config name the
            optimizer.
        *arguments: options by position, in the order of OPTIONS, which is the package's.
        **settings: options by name, for all groups that do not give their own.

    Raises:
        ValueError: an unknown option, a value out of range, options that exclude each other, or nothing to project.
    """

    def __init__(self, params: Iterable[Any], *arguments: Any, layerwise: Any = None, **settings: Any) -> None:
        """See the class.

        Args:
            layerwise: for a ds_config only, where deepspeed.initialize builds the optimizer (ZeRO-3): true, or a dict
                of `lowrank_ds.layerwise`'s arguments, has it called on the engine.

        Raises:
            ValueError: `layerwise` where no ds_config is at work, or of another kind.
        """
        asked = engines.wants_layerwise(layerwise)
        super().__init__(params, *arguments, **settings)
        if asked is not None:
            from lowrank_ds import backward  # which is built on this class

            known = engines.name_of(self.param_groups[0]["params"][0]) is not None
            engines.expect_layerwise(self, known, lambda engine: backward.layerwise(engine, self, **asked))

    def _forget(self, projected: set[str]) -> None:
        """Nothing has happened yet: no copies, no warnings given."""
        super()._forget(projected)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._warned: set[str] = set()
        self._loads: dict[Any, dict[int, float]] = {}  # exact SVDs given to each rank in this step
        self._in_backward: InBackward | None = None
        self._replicas: InSubspace | None = None
        self._errors: list[Exception] = []  # of this rank, raised when the others need nothing more of it
        self._observer: Diagnostics | None = None
        self._broken: BaseException | None = None  # what ended a step in its middle

    def state_dict(self) -> dict[str, Any]:
        """As torch's; between micro-batches it has what was summed in the subspace.

        Under DeepSpeed ZeRO it also says, in "lowrank_ds", where everything in the partitions lies: DeepSpeed's files
        can then be loaded by any engine and number of ranks (`checkpoint/deepspeed_files.py`).
        """
        from lowrank_ds.checkpoint import deepspeed_files  # which is built on this class

        if self._in_backward is not None:
            self._in_backward.before_saving()
        where = deepspeed_files.describe(self)
        return super().state_dict() | ({} if where is None else {deepspeed_files.KEY: where})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base; a step that failed midway is made good."""
        super().load_state_dict(state_dict)
        self._broken = None
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        """State was loaded: what backward passes have left belongs to the weights and bases of before."""
        if self._in_backward is not None:
            self._in_backward.forget()
        if self._replicas is not None:
            self._replicas.state_loaded()

    # -- the step -----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; under `layerwise`, on those not yet updated.

        Raises:
            RuntimeError: a ZeRO partition without gradient, or a sparse gradient.
            ValueError: a learning rate that is not finite. (Both: of several ranks, this one still takes part in the
                step, which then updates nothing that it shares, so that no other rank waits for it.)
            RankError: another rank has ended, hangs or does something else.
        """
        if self._in_backward is not None:
            return self._in_backward.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._replicas is not None:
            self._replicas.before_step()
        if self._compresses():
            self._warn_once("accumulate", _IDLE)  # unless accumulate() was called before
        held = [p for group in self.param_groups for p in group["params"] if p.numel()]
        missing = bool(held) and not any(engines.has_grad(p) or self._sums(p) for p in held)
        self._loads.clear()  # of a step that raised on this rank alone: owners are dealt alike on all
        done = self._update(self._places())
        if missing:
            what = "every gradient counted as zero" if done else "nothing was updated"
            self._warn_once("no gradient", f"step() found no gradient on any parameter: {what}.")
        self._loads.clear()
        return loss

    def _places(self) -> list[Place]:
        return [(group, index) for group in self.param_groups for index in range(len(group["params"]))]

    @torch.no_grad()
    def _update(self, places: Iterable[Place], clip: Callable[[list], None] | None = None) -> bool:
        """Update these tensors from their gradients. Answers whether there were any.

        clip: scales the gradients in a list of (slot, group, gradient entries, weight entries), in place.
        """
        if self._broken is not None:
            raise failures.broken(type(self).__name__, self._broken)
        places = list(places)
        if self._in_backward is None:
            self._errors.clear()  # of a step that raised something else
        self._copies.clear()  # of an update that raised: written back now they would undo what came since
        if self._compresses():
            self._fold(place for place in places if self._sketches(*place))
        work = [item for group, index in places for item in self._work(group, index)]
        if not work:
            self._raise_errors()
            return False
        if engines.before_reduction(slot.host for slot, *_ in work if slot.layout.group is None):
            self._warn_once("in backward", engines.BEFORE_REDUCTION)
        if clip is not None:
            clip(work)
        try:
            jobs = self._jobs(work)
        except failures.RankError:
            self._raise_errors()  # the better one of the two
            raise
        try:
            self._run(jobs)
        except BaseException as error:
            self._broken = error if several() else None
            raise
        if self._in_backward is None:  # a rank that left the backward would be missing there
            self._raise_errors()
        return True

    def _raise_errors(self) -> None:
        """Raise what went wrong on this rank before the exchanges that it still took part in."""
        errors, self._errors = self._errors, []
        if errors:
            raise errors[0]

    def _spoiled(self, error: Exception, weight: Tensor) -> Tensor:
        """In place of a gradient that this rank cannot give: one that makes every rank skip this tensor's update.

        `error` is raised at once where nobody waits for this rank, else when the step is over.
        """
        if not several():
            raise error
        self._errors.append(error)
        return torch.full_like(weight, math.nan)

    def _spoiled_sums(self, error: Exception, slots: list[Slot]) -> None:
        """The same where all micro-batches were summed already: a gradient now would ask for exchanges of its own."""
        self._errors.append(error)
        for slot in slots:
            (slot.state["accumulated_peak"] if slot.arrived is None else slot.arrived).fill_(math.nan)

    def _run(self, jobs: list[tuple[Slot, Job]]) -> None:
        for device in _devices(job.weight for _, job in jobs):
            tasks = [(s, job) for s, job in jobs if job.weight.device == device]
            self._mirror_bases([job for _, job in tasks], device)
            draws = grouped(basis for slot, job in tasks if slot.projected for basis in pipeline.random_bases(job))
            for _, job in tasks:
                job.draws = draws
            updates = [
                Task(job.layout, pipeline.update(job, slot.projected), job.size, slot.name) for slot, job in tasks
            ]
            run_all(updates, device, _BUCKET)
        while self._copies:
            weight, copy = self._copies.pop()
            weight.copy_(copy)

    # -- micro-batches ------------------------------------------------------------------------------------------
    def accumulate(self, model: torch.nn.Module | None = None) -> None:
        """Add the gradients there are now to the sums in the subspace and free them (`compress_accumulation`).

        Call it after the backward of each micro-batch; `step()` uses the sums. Gradients that are needed whole stay on
        the parameters and add up there: of parameters that are not projected, and of matrices whose basis the coming
        step renews.

        Args:
            model: the DDP-wrapped model; only needed under DDP, where every micro-batch must be averaged (no
                `no_sync()`).

        Raises:
            RuntimeError: no param group sums in a subspace; the engine sums gradients itself (DeepSpeed ZeRO, FSDP1);
                or the gradients of a DDP job are not averaged, or not known to be.
        """
        if not self._compresses():
            raise RuntimeError(
                f"{type(self).__name__}.accumulate() sums nothing in a subspace: build the optimizer with "
                "compress_accumulation=True (Flora: accumulation_compression_rank)."
            )
        engines.check_averaged(model, (p for group in self.param_groups for p in group["params"]))
        self._warned.add("accumulate")
        self._fold(self._places())
        self._raise_errors()

    def _compresses(self) -> bool:
        """Whether some param group is to sum micro-batches in a subspace."""
        return any(self.recipe(group).accumulation for group in self.param_groups)

    @torch.no_grad()
    def _fold(self, places: Iterable[Place]) -> None:
        """Sum the gradients of these tensors in the subspace, where the coming step allows it, and free them."""
        tasks: dict[torch.device, list[Task]] = {}
        staged = len(self._copies)
        for group, index in places:
            recipe, host = self.recipe(group), group["params"][index]
            if recipe.accumulation is None or not engines.has_grad(host):
                continue
            slots = self._bind(group, index)
            if not all(_folds(slot, recipe) for slot in slots):
                continue
            for slot, _, grad, weight in self._work(group, index):
                slot.micro_batches += 1
                slot.write_counters()
                job = self._job(slot, group, recipe, grad, weight, False, advance=False)
                tasks.setdefault(weight.device, []).append(Task(job.layout, accumulate.fold(job), job.size, slot.name))
            engines.drop_grad(host)
        for device, found in tasks.items():
            run_all(found, device, _BUCKET)
        del self._copies[staged:]  # no weight changed

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; sums of micro-batches that no step has used are dropped too."""
        super().zero_grad(set_to_none)
        if self._in_backward is not None:
            self._in_backward.forget()
            for group, index in self._places():
                engines.drop_grad(group["params"][index])
        if self._replicas is not None:
            self._replicas.forget()
        for slot in (slot for slots in self._slots.values() for slot in slots):
            slot.drop_sums()

    def _sketches(self, group: dict[str, Any], index: int) -> bool:
        """Whether a last micro-batch must join the random sketch of those before it (an exact sum needs no basis)."""
        kind = self.recipe(group).accumulation
        return kind is not None and kind.rank is not None and self._sums(group["params"][index])

    def _sums(self, host: Tensor) -> bool:
        """Whether the coming step's gradient of this tensor is here as coordinates (sums of micro-batches, say)."""
        return any(slot.summed for slot in self._slots.get(host, ()))

    @staticmethod
    def _mirror_bases(jobs: list[Job], device: torch.device) -> None:
        """Exact SVDs of replicated matrices: each replica computes its share, then all get all."""
        due_now = [job for job in jobs if job.refresh and job.layout.mirror and job.recipe.subspace.method == "svd"]
        mine = [job for job in due_now if job.replica == job.layout.mirror.rank]
        tasks = [Task(job.layout, pipeline.new_basis(job), job.size, job.name) for job in mine]
        known = {id(job): basis for job, basis in zip(mine, run_all(tasks, device, _BUCKET), strict=True)}
        shares = [
            Task(job.layout.mirror, pipeline.mirror_basis(job, known.get(id(job))), job.size, job.name)
            for job in due_now
        ]
        run_all(shares, device, _BUCKET)

    def _work(self, group: dict[str, Any], index: int) -> list[tuple[Slot, dict, Tensor | None, Tensor]]:
        """(slot, group, gradient entries, weight entries) of one tensor; nothing if it has no gradient.

        The gradient is None where all of it is here as coordinates.
        """
        host, rate = group["params"][index], self.learning_rate(group, 1)
        unknown = None if math.isfinite(rate) else ValueError(f"{type(self).__name__}: {_NO_RATE.format(rate)}")
        if unknown is not None and not several():
            raise unknown
        if not host.requires_grad and not engines.has_grad(host):
            return []  # frozen: no state either
        slots = self._bind(group, index)
        summed = bool(slots) and all(slot.summed for slot in slots)
        grad = None if summed and not engines.has_grad(host) else self._gradient(host, slots)
        if grad is None and not summed:
            return []
        weight = engines.local(host).detach()
        if unknown is not None:
            grad = self._spoiled_sums(unknown, slots) if grad is None else self._spoiled(unknown, weight)
        elif grad is not None and grad.is_sparse:
            what = f"{slots[0].name} has a sparse gradient; use nn.Embedding(sparse=False)."
            grad = self._spoiled(RuntimeError(what), weight)
        grad = None if grad is None else grad.detach().contiguous().view(-1)
        weight = weight if weight.is_contiguous() else self._staged(weight)
        return [
            (slot, group, None if grad is None else slot.entries(grad), slot.weight_entries(weight)) for slot in slots
        ]

    def _gradient(self, host: Tensor, slots: list[Slot]) -> Tensor | None:
        """This rank's part of a gradient; None if it takes no part in this step (the same answer on all ranks)."""
        if any(slot.none_is_zero for slot in slots):
            held = sum(slot.layout.numel for slot in slots)
            if host.numel() != held:
                raise RuntimeError(
                    f"{slots[0].name} has {host.numel()} entries now, its piece on this rank {held}: step() was called "
                    "while the engine had it gathered (FSDP.summon_full_params, say). Call step() outside."
                )
            if not host.requires_grad:
                return None
            return torch.zeros_like(host) if host.grad is None else host.grad
        if not engines.has_grad(host) and not engines.is_dtensor(host) and any(slot.layout.shared for slot in slots):
            error = RuntimeError(
                f"the partition that holds {slots[0].name} has no gradient: call engine.backward(loss) and "
                "engine.step() (not loss.backward() and optimizer.step())."
            )
            return self._spoiled(error, engines.local(host))
        return engines.local_grad(host) if engines.has_grad(host) else None

    def _staged(self, weight: Tensor) -> Tensor:
        """A contiguous copy of a weight with other strides (channels_last), written back after the step."""
        self._copies.append((weight, weight.contiguous()))
        return self._copies[-1][1]

    def _jobs(self, work: list) -> list[tuple[Slot, Job]]:
        """Decide for each matrix, equally on all ranks, whether it steps and refreshes."""
        recipes = {id(group): self.recipe(group) for group in self.param_groups}
        asked = [i for i, (slot, g, _, _) in enumerate(work) if slot.step == 0 or due(slot, recipes[id(g)])]
        facts = [self._facts(*work[i][:2]) for i in asked]
        surveys = dict(zip(asked, agreement.survey([work[i] for i in asked], facts), strict=True))
        jobs = []
        for i, (slot, group, grad, weight) in enumerate(work):
            recipe = recipes[id(group)]
            unusable, non_zero, skipped, notes = surveys.get(i, (0.0, 1.0, 0.0, ()))
            usable = not unusable and bool(non_zero)
            if not usable and recipe.momentum is None and due(slot, recipe) and (sink := self._sink(slot)):
                sink.note(refused=1.0)
            if unusable or skipped:
                self._report_skipped(slot)
            if slot.step == 0 and not usable:
                slot.drop_sums()
                continue  # a parameter without any gradient so far must not start its clock, its basis or its decay
            if i in surveys and slot.projected and recipe.subspace is not None:
                slot.judge(recipe.subspace, notes[0])
            # Flora's change of basis moves what is stored and needs no gradient; the others are made from this one.
            refresh = due(slot, recipe) and (usable or recipe.momentum is not None)
            job = self._job(slot, group, recipe, grad, weight, refresh)
            if refresh and recipe.subspace.method == "svd":
                self._deal(job, self._loads)
            if refresh and recipe.subspace.method == "power":
                job.cold = is_cold(recipe.subspace, job.refresh_count, notes[1:])
            jobs.append((slot, job))
            slot.write_counters()
        return jobs

    @staticmethod
    def _deal(job: Job, loads: dict[Any, dict[int, float]]) -> None:
        """Choose the replica, and the rank in it, that computes an exact SVD; the same choice on every rank."""
        layout, mirror = job.layout, job.layout.mirror
        if mirror is not None:
            # ranks of one layout group are in different mirrors; both together see the same matrices
            job.replica = deal(loads.setdefault((layout.group, mirror.group), {}), layout, mirror.world)
        if layout.shared and (mirror is None or job.replica == mirror.rank):
            job.owner = deal(loads.setdefault(layout.group, {}), layout, layout.world)

    def _job(self, slot: Slot, group, recipe: Recipe, grad, weight: Tensor, refresh: bool, advance: bool = True) -> Job:
        """What the mathematics is given. advance: this is a step, not a micro-batch before it."""
        count, step = slot.refreshes, slot.step + 1
        if refresh:
            stagger = recipe.subspace.stagger and count == 0
            slot.last_refresh = slot.step - (offset(slot.name, recipe.subspace.every) if stagger else 0)
            slot.refreshes += 1
            if recipe.subspace.on_refresh == "reset":
                slot.moment_step = 0
        job = Job(
            slot.layout, recipe, grad, weight, slot.state, (group["seed"], slot.name), step, slot.moment_step + 1,
            self._rate(group, step), float(group["weight_decay"]), refresh, count, slot.layout.rank,
            group["stochastic_rounding"], micro_batches=slot.micro_batches,
            observe=self._sink(slot) if advance else None, arrived=slot.arrived if advance else None,
        )  # fmt: skip
        if advance:
            slot.step, slot.moment_step, slot.micro_batches, slot.arrived = step, slot.moment_step + 1, 0, None
        return job

    def _rate(self, group: dict[str, Any], step: int) -> float:
        """The learning rate of step 1, 2, ...; 0 where there is none, so that decay leaves the weights alone."""
        rate = self.learning_rate(group, step)
        return rate if math.isfinite(rate) else 0.0

    def _sink(self, slot: Slot) -> Any:
        """Where diagnostics want to see the matrix, None where they do not."""
        return None if self._observer is None else self._observer.sink(slot)

    def _facts(self, slot: Slot, group: dict[str, Any]) -> list[float]:
        """What must be the same on all ranks that share a matrix, in the order of `agreement.FACTS`."""
        watched = 0.0 if self._observer is None else 1.0 + self._observer.scaling
        return [self._rate(group, slot.step + 1), float(group["weight_decay"]), slot.step, slot.refreshes, watched]

    def _report_skipped(self, slot: Slot) -> None:
        self._warn_once(
            slot.name,
            f"{slot.name}: the gradient is not finite (or larger than {LARGEST_GRADIENT:.0e}; or some rank had an "
            f"error of its own and gave none), seen at step {slot.step}; its basis is kept and the update skipped. "
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


_NO_RATE = "the learning rate is {}; check the scheduler."

_IDLE = (
    "compress_accumulation (accumulation_compression_rank) has no effect: nothing was summed in the subspace before "
    "the first step(). Call accumulate() after the backward of each micro-batch, or layerwise(model, optimizer, "
    "accumulation_steps); with one micro-batch a step leave the option out."
)


def _folds(slot: Slot, recipe: Recipe) -> bool:
    """Whether the coming step needs no more of this matrix' gradient than its sum in the subspace."""
    return slot.projected and (recipe.accumulation.rank is not None or not due(slot, recipe))


def _devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The devices of some tensors, each once, in order."""
    return list(dict.fromkeys(t.device for t in tensors))
