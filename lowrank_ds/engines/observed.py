"""Diagnostics in Hugging Face's Trainer: a callback that adds the summary to what Trainer logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lowrank_ds.diagnostics import Diagnostics


class DiagnosticsCallback(TrainerCallback):
    """Adds "lowrank/<number>" of `Diagnostics`' summary to every log of the training loss (args.logging_steps).

    They are in `trainer.state.log_history`, and in what callbacks that come later are given: put it before those of
    TensorBoard and the like with `trainer.callback_handler.callbacks.insert(0, callback)`, or give `writer`.

    Args:
        path: of a JSONL file to append to, with the numbers of every matrix, as `Diagnostics.jsonl`. Default None.
        writer: a SummaryWriter for the summary, as `Diagnostics.tensorboard`. Default None.
    """

    def __init__(self, path: str | Path | None = None, writer: Any = None) -> None:
        self.path, self.writer = path, writer
        self.monitor: Diagnostics | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Watch the optimizer that Trainer has built."""
        self.monitor = Diagnostics(optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Collect with the loss (all processes come here) and add the summary."""
        if self.monitor is None or "loss" not in (logs or {}):
            return
        report = self.monitor.collect()
        found = {f"lowrank/{key}": value for key, value in report.summary.items()}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)
        if self.path is not None:
            self.monitor.jsonl(self.path, state.global_step, report)
        if self.writer is not None:
            self.monitor.tensorboard(self.writer, state.global_step, report)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop watching."""
        if self.monitor is not None:
            self.monitor.remove()
            self.monitor = None
