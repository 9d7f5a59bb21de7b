"""When a run saves, what beside weights and optimizer state, and what a full disk or a signal changes."""

import json
import math
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import lowrank_ds
from launch.engines import Trainer
from launch.processes import Processes
from launch.progress import Progress
from launch.randomness import random_state
from lowrank_ds.checkpoint.agree import CheckpointError
from lowrank_ds.checkpoint.rotation import Rotation

FOLDER = "checkpoints"  # in OUTPUT
PREEMPTED_FILE = "preempted"  # in OUTPUT, while a preempted run waits to go on
PREEMPTED = 75  # exit code, EX_TEMPFAIL of sysexits.h: "the user is invited to retry"


@dataclass
class Position:
    """Where the training loop is: what it keeps in variables.

    step: optimizer steps done. loss: sum of the losses of `since` steps since the last report, this process's, 0-d.
    perplexity: the last evaluation's. best: the lowest of those whose model was kept.
    """

    step: int
    loss: torch.Tensor
    since: int = 0
    perplexity: float = math.nan
    best: float = math.inf


class Saver:
    """Writes checkpoints of this run every `every` steps (0: never), and keeps the `keep_last` newest."""

    def __init__(self, args, run: dict, trainer: Trainer, batches, progress: Progress, processes: Processes):
        self.rotation, self.every = Rotation(Path(args.output) / FOLDER, args.keep_last), args.save_every
        self.trainer, self.batches, self.progress, self.processes = trainer, batches, progress, processes
        self.seed, self.run, self.total = args.seed, run, args.steps
        self.saved: int | None = None  # the newest checkpoint's step
        self.failure = ""  # of the last attempt; "" when it succeeded

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after this step; the last step always gets one."""
        return bool(self.every) and (step % self.every == 0 or step == self.total)

    def save(self, position: Position) -> bool:
        """Write a checkpoint, unless this step has one; whether the run could go on from here.

        A full disk is told and survived: the checkpoints before are intact, and the next attempt may find room. Every
        process must call it, and all get the same answer.

        Raises:
            CheckpointError: what more space would not mend.
            SystemExit: the loss is not finite; such weights must not take the place of good ones.
        """
        if self.saved == position.step:
            return True
        with self.progress.aside():
            path = self.rotation.path(position.step)
            mean = self.processes.mean(position.loss.clone())
            check_loss(mean, position.step)
            self.progress.sync()
            try:
                self.rotation.root.mkdir(parents=True, exist_ok=True)  # if it fails, it does on every process
                extra, local = self.processes.same(self._extra(position, mean)), self._local(position)
                lowrank_ds.save_checkpoint(path, self.trainer.wrapped, self.trainer.optimizer, extra=extra, local=local)
                error = None
            except (CheckpointError, OSError) as caught:
                error = caught
            return self._settle(position.step, error)

    def _settle(self, step: int, error: Exception | None) -> bool:
        """Move `latest`, or tell what went wrong; the same answer on every process."""
        if error is None and self.processes.is_main:
            try:
                self.rotation.commit(step)
            except OSError as caught:  # such as no block left for the line in `latest`
                error = caught
        disk = any(self.processes.gather(int(_is_disk(error))))
        failed = any(self.processes.gather(int(error is not None)))
        if failed and not disk:
            raise error or CheckpointError(f"saving step {step} failed on another process; see its output")
        self.failure = self._told(step, error) if failed else ""
        self.saved = self.saved if failed else step
        return not failed

    def _told(self, step: int, error: Exception | None) -> str:
        """The message about a save that found no room, printed once."""
        folder = self.rotation.root
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
        newest = next(iter(self.rotation.newest_first()), None)
        message = (
            f"WARNING: the checkpoint of step {step} could not be saved in {folder} ({free / 2**20:.1f} MiB free): "
            f"{error}. {f'{newest} is intact' if newest else 'there is no earlier one'}. Make room"
        )
        if self.processes.is_main:
            print(f"{message}; training goes on, and saves again after --save-every {self.every} steps", flush=True)
        return message

    def _extra(self, position: Position, mean_loss: float) -> dict:
        """What is the same on every process (times are the main one's)."""
        return {
            "run": self.run,
            "step": position.step,
            "loss": [mean_loss, position.since],
            "perplexity": None if math.isnan(position.perplexity) else position.perplexity,
            "best": None if math.isinf(position.best) else position.best,
            "schedule": self.trainer.schedule.state_dict(),
            "progress": self.progress.state(),
            "watch": self.trainer.watch.report(),
        }

    def _local(self, position: Position) -> dict[str, torch.Tensor]:
        """What each process has for itself."""
        place = np.frombuffer(json.dumps(self.batches.state()).encode(), dtype=np.uint8)
        return {**random_state(), "loss": position.loss.cpu(), "data": torch.from_numpy(place.copy())}


def check_loss(loss: float, step: int) -> None:
    """End a run that has diverged. loss: of all processes, the same on each."""
    if not math.isfinite(loss):
        raise SystemExit(f"the loss is {loss} by step {step}: lower --lr, or warm up longer (--warmup-steps)")


def _is_disk(error: BaseException | None) -> bool:
    """Whether the operating system refused, here or in what the error was raised from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None


class Preemption:
    """Hears SIGTERM and SIGUSR1, which schedulers send before they end a job, so that the run can save first."""

    def __init__(self, processes: Processes):
        self.processes, self.heard = processes, 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hear)
        # of its own where the others are NCCL's: hosts agree once a step, and no device has to be waited for
        alone = processes.world == 1 or dist.get_backend() == "gloo"
        self.group = None if alone else dist.new_group(backend="gloo")

    def _hear(self, number: int, frame: object) -> None:
        self.heard = number

    def asked(self) -> int:
        """The signal that any process has got, 0 if none has; the same answer on all, who must all ask each step."""
        heard = torch.tensor(self.heard)
        if self.processes.world > 1:
            dist.all_reduce(heard, dist.ReduceOp.MAX, group=self.group)
        return int(heard)
