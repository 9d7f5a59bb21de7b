"""What a run tells its user while it goes: progress lines, metrics.jsonl, and step times."""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lowrank_ds.checkpoint.rotation import replace_text

DIAGNOSTICS = "diagnostics.jsonl"  # in OUTPUT, of --diagnostics-every
SCALING = "scaling.jsonl"  # in OUTPUT, of --scaling-every


class StopWatch:
    """Times of whole steps and of the optimizer inside them, without stopping a GPU to take them."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple] = []
        self.seconds: dict[str, list[float]] = {"step": [], "optimizer": []}
        self.before: dict[str, float] = {}  # report of the run this one goes on from

    def mark(self):
        """A point in time: a CUDA event, or the clock."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start, optimizer_start, optimizer_end) -> None:
        """One finished step, as three marks."""
        self.marks.append((start, optimizer_start, optimizer_end))

    def settle(self) -> None:
        """Turn marks into seconds. On a GPU this waits for the last step: call it only when logging."""
        for start, middle, end in self.marks:
            if self.on_gpu:
                end.synchronize()
            self.seconds["step"].append(self._between(start, end))
            self.seconds["optimizer"].append(self._between(middle, end))
        self.marks.clear()

    def _between(self, start, end) -> float:
        return start.elapsed_time(end) / 1000 if self.on_gpu else end - start

    def report(self) -> dict[str, float]:
        """Medians, and the optimizer's mean (which includes subspace refreshes), in milliseconds."""
        if not self.seconds["step"]:  # resumed after the last step
            return self.before
        self.settle()
        return {
            "step_ms_median": 1000 * statistics.median(self.seconds["step"]),
            "optimizer_ms_median": 1000 * statistics.median(self.seconds["optimizer"]),
            "optimizer_ms_mean": 1000 * statistics.fmean(self.seconds["optimizer"]),
        }


class Progress:
    """One line on the terminal and one record in metrics.jsonl a report; only the main process writes."""

    def __init__(self, output: Path, steps: int, tokens_per_step: int, is_main: bool):
        self.steps, self.tokens_per_step = steps, tokens_per_step
        self.file = output / "metrics.jsonl" if is_main else None
        self.unwritten: list[str] = []  # lines that found no room on the disk
        self.last_time = time.perf_counter()
        self.last_step = 0
        self.training_seconds = 0.0

    def record(self, **fields) -> None:
        """One JSON record. On a full disk it is kept, and written with a later one: a run does not die of its log."""
        if not self.file:
            return
        self.unwritten.append(json.dumps(fields) + "\n")
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with self.file.open("a") as lines:
                lines.writelines(self.unwritten)
            self.unwritten.clear()
        except OSError as error:
            print(f"WARNING: {self.file}: {error}; {len(self.unwritten)} records wait for room", flush=True)
            with contextlib.suppress(OSError):
                os.truncate(self.file, size)  # part of a line may have found room

    def sync(self) -> None:
        """Have the records on the disk before a checkpoint says that they are."""
        if self.file and self.file.exists():
            with self.file.open("a") as lines, contextlib.suppress(OSError):
                os.fsync(lines.fileno())

    def state(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"training_seconds": self.training_seconds + time.perf_counter() - self.last_time}

    def restore(self, step: int, state: dict[str, float]) -> None:
        """Go on after `step`: records of later steps are dropped, as those steps are done again."""
        self.last_step, self.last_time = step, time.perf_counter()
        self.training_seconds = state.get("training_seconds", 0.0)
        for file in (self.file, *(self.file.with_name(name) for name in (DIAGNOSTICS, SCALING))) if self.file else ():
            if file.exists():
                lines = file.read_text().splitlines()
                kept = [line for line in lines if (found := _step_of(line)) is not None and found <= step]
                replace_text(file, "".join(line + "\n" for line in kept))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """The time this takes does not count as training."""
        start = time.perf_counter()
        yield
        self.last_time += time.perf_counter() - start

    def training(self, step: int, loss: float, lr: float) -> None:
        """Report a training interval that ended after `step` steps."""
        now = time.perf_counter()
        interval, done = now - self.last_time, step - self.last_step
        self.training_seconds += interval
        speed = done * self.tokens_per_step / interval
        self.record(kind="train", step=step, loss=loss, lr=lr, tokens=step * self.tokens_per_step, tokens_per_s=speed)
        if self.file:
            left = time.strftime("%H:%M:%S", time.gmtime(self.training_seconds / step * (self.steps - step)))
            line = f"step {step:>6}/{self.steps}  loss {loss:7.4f}  lr {lr:.2e}  {speed:9.0f} tokens/s  ETA {left}"
            print(line, flush=True)
        self.last_time, self.last_step = now, step

    def evaluation(self, step: int, evaluate: Callable[[], float]) -> float:
        """Report and return the held-out perplexity; the time it takes does not count as training."""
        with self.aside():
            perplexity = evaluate()
        self.record(kind="valid", step=step, perplexity=perplexity)
        if self.file:
            print(f"step {step:>6}/{self.steps}  held-out perplexity {perplexity:.3f}", flush=True)
        return perplexity

    def tokens_per_second(self) -> float:
        """Over the whole run, evaluation excluded."""
        return self.last_step * self.tokens_per_step / self.training_seconds


def _step_of(line: str) -> int | None:
    """Step of a record; None if the line is torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
