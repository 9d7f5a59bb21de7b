"""Kill a training job with SIGKILL, again and again, and see whether it ends where the undisturbed one does.

    python -m tests.faults --kills 24 --engine fsdp2 --seed 0

Every life of the job is started with `--resume auto` and killed, one rank or all of them, at a random moment: at some
step, while it starts, or during a save. A kill counts as during a save only if it left a half-written checkpoint (or a
half-removed one) behind. In the end weights, metrics.jsonl and the last checkpoint, with optimizer state and random
numbers, are compared byte for byte. `--launcher torchrun` starts each life with torchrun (about ten seconds each).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.pretraining import ENGINES, Job, TorchrunJob, flags, prepare, run, same


@dataclass(frozen=True)
class Plan:
    """One kill: when ("start", "step" or "save"), not before which step, who ("all" or a rank), how much later (s)."""

    when: str
    step: int
    who: str
    delay: float


@dataclass(frozen=True)
class Life:
    """What became of it. resumed: step it went on from. step: the last one reported. waited: s until all had ended."""

    plan: Plan | None
    resumed: int
    step: int
    during_save: bool
    seconds: float
    waited: float


def plans(kills: int, steps: int, save_every: int, world: int, seed: int) -> list[Plan]:
    """Kills spread over the run: a third at saves, a sixth at starts, the last at the end; half of them of one rank."""
    draw, found = random.Random(seed), []
    last = steps - save_every
    for number in range(kills):
        when = ("step", "save", "step", "save", "step", "start")[number % 6]
        step = round(1 + (last - 1) * (number + draw.random()) / kills)
        if number == kills - 1:
            when, step = "step", steps  # the last save, evaluation, or what a finished run writes
        delay = draw.uniform(0, {"step": 0.1, "save": 0.02, "start": 2.0}[when])
        found.append(Plan(when, step, draw.choice(["all", str(draw.randrange(world))]), delay))
    return found


def live(start: Callable[[], Job], output: Path, plan: Plan | None, timeout: float = 300) -> Life:
    """One life of a job: start it, kill it as planned (None: let it end), see what is left."""
    before, began, waited = _halves(output), time.monotonic(), 0.0
    job = start()
    if plan is not None:
        _until(job, output, plan, began + timeout)
        job.kill(list(range(len(job.processes))) if plan.who == "all" else [int(plan.who)])
        killed = time.monotonic()
        # a rank that dies before the others have met it leaves them waiting at the door; a launcher ends them
        late = job.end(1.0 if plan.when == "start" else 60.0)
        assert plan.when == "start" or not late, f"ranks {late} did not hear of it:\n{job.printed()[-3000:]}"
        waited = time.monotonic() - killed
    else:
        codes = job.wait(timeout)
        assert not any(codes), f"exit codes {codes}:\n{job.printed()[-3000:]}"
    found = re.findall(r"resumed from \S+: (\d+) of", job.printed())
    resumed = int(found[-1]) if found else 0
    seconds = time.monotonic() - began
    return Life(plan, resumed, last_step(output), bool(_halves(output) - before), seconds, waited)


def _until(job: Job, output: Path, plan: Plan, deadline: float) -> None:
    """Wait for the moment of a kill, or for the end of the job."""
    known = _halves(output)
    if plan.when != "start":  # the records of steps that are done again are gone when it says what it trains
        wait_for(job, lambda: "tokens a step" in job.printed(), deadline)
        wait_for(job, lambda: last_step(output) >= plan.step, deadline)
    if plan.when == "save":
        wait_for(job, lambda: bool(_halves(output) - known), deadline)
    time.sleep(plan.delay)


def wait_for(job: Job, condition: Callable[[], bool], deadline: float = math.inf) -> None:
    """Until it holds, the job has ended, or it is too late."""
    while job.alive() and not condition() and time.monotonic() < deadline:
        time.sleep(0.0005)


def _halves(output: Path) -> set[str]:
    """Half-written and half-removed checkpoints."""
    folder = output / "checkpoints"
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names if ".partial" in name or ".removed" in name}


def last_step(output: Path) -> int:
    """Of the last record in metrics.jsonl, 0 if there is none."""
    try:
        lines = (output / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (FileNotFoundError, ValueError):  # a line that is being written
        return 0


def fault_run(folder: Path, engine: str, kills: list[Plan], world: int, jobs: type[Job] = Job, *more: object):
    """(lives, what differs from the undisturbed run, nothing if all is well). more: flags for pretrain.py."""
    reference, output = folder / f"{engine}-whole", folder / f"{engine}-killed"
    if not (reference / "summary.json").exists():
        codes, printed = run(world, flags(folder / "data", reference, engine, *more), folder / f"{engine}-whole.log")
        assert not any(codes), printed[-3000:]
    lives = []
    for number, plan in enumerate([*kills, None]):
        arguments = flags(folder / "data", output, engine, *more, "--resume", "auto")
        log = folder / f"{engine}-life-{number}.log"
        lives.append(live(lambda a=arguments, log=log: jobs(world, a, log), output, plan))
        if (output / "summary.json").exists():
            break
    return lives, same(reference, output)


def table(lives: list[Life]) -> str:
    """A line a life."""
    rows = ["life  from    killed  at step  during a save  wall s  others end s"]
    for number, life in enumerate(lives, 1):
        who, during = "finished", ""
        if life.plan is not None:
            who = "all" if life.plan.who == "all" else f"rank {life.plan.who}"
            during = "yes" if life.during_save else "starting" if life.plan.when == "start" else "no"
        row = f"{number:>4} {life.resumed:>5} {who:>9} {life.step:>8} {during:>14} {life.seconds:>7.1f}"
        rows.append(f"{row} {life.waited:>13.2f}")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Kill a training job at random moments; compare its end.")
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="fsdp2")
    parser.add_argument("--world", type=int, help="processes (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 4 a kill)")
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--launcher", choices=["fork", "torchrun"], default="fork")
    args = parser.parse_args()
    world, steps = args.world or 2, args.steps or 4 * args.kills
    folder, began = Path(tempfile.mkdtemp(prefix="faults-")), time.monotonic()
    prepare(folder / "data")
    kills = plans(args.kills, steps, args.save_every, world, args.seed)
    jobs = TorchrunJob if args.launcher == "torchrun" else Job
    more = "--steps", steps, "--save-every", args.save_every
    lives, different = fault_run(folder, args.engine, kills, world, jobs, *more)
    print(table(lives))
    done = [life for life in lives if life.plan is not None]
    print(
        f"{args.engine}, {world} processes, {steps} steps, a save every {args.save_every}, {args.launcher}: "
        f"{len(done)} kills, {sum(life.during_save for life in done)} during a save, "
        f"{time.monotonic() - began:.0f} s in all"
    )
    if different:
        sys.exit(f"DIFFERENT from the undisturbed run: {different[:10]} (kept in {folder})")
    print("weights, metrics.jsonl and the last checkpoint equal the undisturbed run's, bit for bit")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
