"""Ranks that end, stop, or fail alone: what each of the others says, and when."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import queue
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import lowrank_ds
from lowrank_ds import collectives, failures
from tests import training
from tests.cluster import _context, batches, share

LAST = 1  # the rank that something happens to


class Outcome(NamedTuple):
    """How one rank's function ended: its result or its error, and the time (s since the epoch)."""

    result: Any
    kind: str
    message: str
    at: float


def outcomes(
    world: int, function: Callable[..., Any], *arguments: Any, doomed: bool = True, wait: float = 60
) -> Callable[[], tuple[dict[int, Outcome], float]]:
    """Start `function(rank, world, *arguments)` on `world` gloo ranks that nobody ends but themselves.

    Answers a function that waits, and answers ({rank: Outcome} without the doomed one's, the time of its fate).
    """
    context, folder = _context(), tempfile.TemporaryDirectory()
    told: Any = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, world, folder.name, told, function, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()

    def collect() -> tuple[dict[int, Outcome], float]:
        found: dict[int, Outcome] = {}
        deadline = time.monotonic() + wait
        try:
            while len(found) < world - doomed and time.monotonic() < deadline:
                with contextlib.suppress(queue.Empty):
                    rank, *rest = told.get(timeout=0.2)
                    found[rank] = Outcome(*rest)
            fate = Path(folder.name, "fate")
            since = float(fate.read_text()) if fate.exists() else 0.0
        finally:
            for process in processes:
                process.kill()
            folder.cleanup()
        missing = sorted(set(range(world)) - set(found) - ({LAST} if doomed else set()))
        assert not missing, f"ranks {missing} still hang after {wait} s, or ended without a word"
        return found, since

    return collect


def _rank(rank: int, world: int, folder: str, told: Any, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world), DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", FATE=f"{folder}/fate",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", datetime.timedelta(seconds=60), world, rank)
    result, kind, message = None, "", ""
    try:
        result = function(rank, world, *arguments)
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    told.put((rank, result, kind, message, time.time()))
    told.close()
    told.join_thread()
    if kind:
        os._exit(1)  # as an uncaught error would end it, without the interpreter's farewell to broken groups


def trainer(engine: str, world: int, recipe: str = "fira", **settings: Any) -> tuple[Any, Any, Callable[[Any], None]]:
    """(model, our optimizer, a function that trains on one batch of this rank) under an engine."""
    if engine.startswith("zero"):
        model = training.zero_engine(recipe, int(engine[4]), world, settings=settings)

        def step(batch: Any) -> None:
            model.backward(model(input_ids=batch, labels=batch).loss)
            model.step()

        return model, model.basic_optimizer, step
    if engine == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(training.tiny_llama())
    else:
        model = training.fully_sharded(engine.split()[0], world)
    optimizer = training.build(recipe, model, **settings)
    if "layerwise" in engine:
        lowrank_ds.layerwise(model, optimizer)

    def step(batch: Any) -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def train_until(rank: int, world: int, engine: str, fate: str, step_of_fate: int, timeout: float) -> float:
    """Train; at `step_of_fate` the last rank meets its fate in the middle of the step's exchanges."""
    _, optimizer, step = trainer(engine, world)
    with failures.watch("training"):
        for number, batch in enumerate(batches(step_of_fate + 3)):
            if number == 1:
                from launch.processes import limit_waits

                limit_waits(timeout)
            if number == step_of_fate and rank == LAST:
                _arrange(fate, engine, optimizer)
            step(share(batch, rank, world))
    return time.time()


def _arrange(fate: str, engine: str, optimizer: Any) -> None:
    """Let this process end or stop when it starts its second exchange from now; or raise in the step."""
    started = [0]

    def now() -> None:
        Path(os.environ["FATE"]).write_text(str(time.time()))
        if fate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    if fate == "fails":
        Path(os.environ["FATE"]).write_text(str(time.time()))
        for group in optimizer.param_groups:
            group["lr"] = math.nan
        return
    if engine == "ddp":  # no exchange of ours: end in the update itself
        from lowrank_ds import optimizer

        optimizer.run_all = lambda *_: now()
        return
    original = collectives._Round.start

    def start(self: Any, keys: Any, collective: Any, *arguments: Any) -> Any:
        started[0] += 1
        if started[0] == 2:
            now()
        return original(self, keys, collective, *arguments)

    collectives._Round.start = start
