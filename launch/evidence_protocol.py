"""What launch/evidence.py trains: the methods, how each is tuned, and which runs are still wanted.

Tuning is the same for all. The learning rate of the projected matrices is searched over a grid with factors of two at
seed 0, and a grid grows while its best value lies at an end. Embeddings, head and norms, which every method trains
with plain Adam (Flora: Adafactor), have a learning rate of their own: AdamW's own best, for all. (With one rate for
everything a table like this compares the rate of the head.) The best is then repeated with other seeds, which change
initial weights, data order and random columns.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

EMBED_LRS = (0.005, 0.01, 0.02)  # searched with AdamW at its best learning rate, which is then searched again
FIRST_EMBED_LR = 0.01
GAP, RANK = 50, 32  # a quarter of the width, as in the published 60M rows
GROWTH = 3  # a grid may grow by so many values


class Run(NamedTuple):
    """One training run."""

    method: str
    lr: float
    embed_lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.method}-lr{self.lr:g}-embed{self.embed_lr:g}-seed{self.seed}"


def perplexities(results: dict[Run, dict]) -> dict[Run, float]:
    """Held-out perplexity of each finished run; infinite for one that diverged (kept as null)."""
    kept = {run: record["perplexity"] for run, record in results.items()}
    return {run: math.inf if value is None else value for run, value in kept.items()}


@dataclass(frozen=True)
class Method:
    """An optimizer of the table. grid: learning rates of stage one; `like` takes another method's best instead."""

    name: str
    label: str
    optimizer: str
    options: dict = field(default_factory=dict)
    grid: tuple[float, ...] = ()
    like: str | None = None
    tier: int = 0  # made after all runs of lower tiers, so that a table cut short has whole rows

    @property
    def is_refresh(self) -> bool:
        """Whether it differs from the method it is like in how bases are found or moments carried over."""
        return self.like is not None and bool({"subspace", "on_refresh"} & self.options.keys())


def _projected(**options) -> dict:
    return {"rank": RANK, "update_proj_gap": GAP} | options


_LOW = (0.005, 0.01, 0.02)
METHODS = (
    Method("adamw", "AdamW (torch, fp32)", "AdamW", {"weight_decay": 0.0}, (0.00125, 0.0025, 0.005)),
    Method("galore", "GaLore", "GaLoreAdamW", _projected(), _LOW),
    Method("fira", "Fira (as its code)", "FiraAdamW", _projected(), _LOW),
    Method("apollo", "APOLLO", "ApolloAdamW", _projected(), _LOW),
    Method("galore-svd", "GaLore, exact SVD", "GaLoreAdamW", _projected(subspace="svd"), like="galore"),
    Method("fira-svd", "Fira, exact SVD", "FiraAdamW", _projected(subspace="svd"), like="fira"),
    Method("fira-rotate", "Fira, power, rotate", "FiraAdamW", _projected(on_refresh="rotate"), like="fira", tier=1),
    Method("fira-randomized", "Fira, randomized", "FiraAdamW", _projected(subspace="randomized"), like="fira", tier=1),
    Method("apollo-mini", "APOLLO-Mini", "ApolloMini", {"rank": 1, "update_proj_gap": GAP}, _LOW, tier=3),
    Method("fira-paper", "Fira (as its paper)", "FiraAdamW", _projected(residual="paper"), _LOW, tier=2),
    Method("flora", "Flora", "Flora", {"rank": RANK, "kappa": GAP}, _LOW, tier=3),
    Method("fira-paper-half", "Fira (as its paper), rank 16", "FiraAdamW",
           _projected(residual="paper", rank=RANK // 2), like="fira-paper", tier=2),
    Method("fira-paper-24", "Fira (as its paper), rank 24", "FiraAdamW",
           _projected(residual="paper", rank=RANK * 3 // 4), like="fira-paper", tier=2),
    Method("apollo-half", "APOLLO, rank 16", "ApolloAdamW", _projected(rank=RANK // 2), like="apollo", tier=4),
)  # fmt: skip


def grown(grid: tuple[float, ...], found: dict[float, float]) -> list[float]:
    """Values to try: the grid, and beyond it by factors of two while the best of what was found lies at an end."""
    values = sorted(grid)
    for _ in range(GROWTH):
        if any(value not in found for value in values):
            break
        best = min(values, key=found.get)
        if values[0] < best < values[-1]:
            break
        values = [best / 2, *values] if best == values[0] else [*values, best * 2]
    return values


@dataclass(frozen=True)
class Protocol:
    """Settings of a table, and the rule that says which runs it needs."""

    steps: int = 300
    seeds: int = 3
    only: list[str] | None = None
    model: str = "ds_configs/models/llama_tiny.json"
    batch: int = 16
    seq_len: int = 128
    clip: float = 1.0

    def facts(self) -> dict:
        """What results are only comparable with (not how many seeds or methods there are)."""
        return {key: value for key, value in asdict(self).items() if key not in ("seeds", "only")}

    def methods(self) -> list[Method]:
        """Those asked for; AdamW is always tuned, since the others take its learning rate of the embeddings."""
        known = {method.name: method for method in METHODS}
        asked = self.only or list(known)
        if unknown := sorted(set(asked) - set(known)):
            raise SystemExit(f"--only {' '.join(unknown)}: the methods are {', '.join(known)}")
        needed = {"adamw", *asked, *(known[name].like for name in asked)}
        return [method for method in METHODS if method.name in needed]

    def flags(self, run: Run, corpus: Path) -> list[str]:
        """Arguments of pretrain.py for a run, but --output."""
        method = next(method for method in METHODS if method.name == run.method)
        return [
            *("--model", self.model, "--tokenizer", str(corpus / "tokenizer")),
            *("--train-data", str(corpus / "train.jsonl"), "--valid-data", str(corpus / "valid.jsonl")),
            *("--cache-dir", str(corpus / "tokens"), "--seq-len", str(self.seq_len)),
            *("--batch-size", str(self.batch), "--micro-batch", str(self.batch), "--steps", str(self.steps)),
            *("--gradient-clipping", str(self.clip), "--seed", str(run.seed), "--dtype", "fp32"),
            *("--optimizer", method.optimizer, "--optimizer-args", json.dumps(method.options)),
            *("--lr", repr(run.lr), "--embed-lr", repr(run.embed_lr)),
        ]

    def wanted(self, found: dict[Run, float]) -> list[Run]:
        """Runs that are not there yet and can be named already, the most telling first."""
        methods, missing = self.methods(), []
        for tier in sorted({method.tier for method in methods}):
            for stage in (self._tuning, self._repeats):
                for method in (each for each in methods if each.tier == tier):
                    missing += [run for run in stage(method, found) if run not in found and run not in missing]
        return missing

    def _tuning(self, method: Method, found: dict[Run, float]) -> Iterator[Run]:
        """Stage one: the grid at seed 0, and AdamW's learning rate of the embeddings."""
        if method.like:
            return
        embed = FIRST_EMBED_LR if method.name == "adamw" else self.embed_lr(found)
        if embed is None:
            return
        grid = [Run(method.name, lr, embed, 0) for lr in self.grid(method, embed, found)]
        yield from grid
        if method.name == "adamw" and all(run in found for run in grid):
            yield from self._embeddings(found)
            yield from self._again(found)

    def grid(self, method: Method, embed: float, found: dict[Run, float]) -> list[float]:
        """Learning rates of the projected matrices to try."""
        tried = {run.lr: value for run, value in found.items() if run == Run(method.name, run.lr, embed, 0)}
        return grown(method.grid, tried)

    def _embeddings(self, found: dict[Run, float]) -> list[Run]:
        lr = self._best_rate("adamw", FIRST_EMBED_LR, found)
        tried = {run.embed_lr: value for run, value in found.items() if run == Run("adamw", lr, run.embed_lr, 0)}
        return [Run("adamw", lr, embed, 0) for embed in grown(EMBED_LRS, tried)]

    def _again(self, found: dict[Run, float]) -> list[Run]:
        """AdamW's learning rate once more, at the embeddings' best: the baseline must not be the one left untuned."""
        embed, first = self.embed_lr(found), self._best_rate("adamw", FIRST_EMBED_LR, found)
        if embed is None:
            return []
        tried = {run.lr: value for run, value in found.items() if run == Run("adamw", run.lr, embed, 0)}
        return [Run("adamw", lr, embed, 0) for lr in grown((first / 2, first, first * 2), tried)]

    def _best_rate(self, name: str, embed: float, found: dict[Run, float]) -> float | None:
        """The best of a finished grid, or None."""
        method = next(method for method in METHODS if method.name == name)
        grid = {lr: found.get(Run(name, lr, embed, 0)) for lr in self.grid(method, embed, found)}
        return None if None in grid.values() else min(grid, key=grid.get)

    def embed_lr(self, found: dict[Run, float]) -> float | None:
        """AdamW's best learning rate of embeddings, head and norms, or None while it is not known."""
        if self._best_rate("adamw", FIRST_EMBED_LR, found) is None:
            return None
        tried = {run.embed_lr: found.get(run) for run in self._embeddings(found)}
        return None if None in tried.values() else min(tried, key=tried.get)

    def chosen(self, method: Method, found: dict[Run, float]) -> Run | None:
        """The run of seed 0 whose settings are repeated, or None while it is not known."""
        embed = self.embed_lr(found)
        if embed is None:
            return None
        if method.name == "adamw":
            tried = self._again(found)
            return min(tried, key=found.get) if all(run in found for run in tried) else None
        lr = self._best_rate(method.like or method.name, embed, found)
        return None if lr is None else Run(method.name, lr, embed, 0)

    def _repeats(self, method: Method, found: dict[Run, float]) -> list[Run]:
        """Stage two: the chosen settings with every seed."""
        run = self.chosen(method, found)
        return [] if run is None else [run._replace(seed=seed) for seed in range(self.seeds)]
