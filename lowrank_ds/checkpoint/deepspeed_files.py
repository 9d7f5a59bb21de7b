"""Folders that `engine.save_checkpoint` wrote, read as if they were ours: any engine and world size can load them.

DeepSpeed keeps, for each rank, its fp32 partitions and whatever `optimizer.state_dict()` answered. Ours says there
where everything in the partitions lies (`describe`), so nothing has to be worked out again from shapes and padding.
Files are read with `weights_only=True`, and without DeepSpeed: the few classes of its own that it pickles become inert
stand-ins, anything else is refused. Nothing is in memory but what is asked for (mmap).

    optimizer file   optimizer_state_dict: base_optimizer_state (ZeRO-3: optimizer_state_dict), the state dict;
                     single_partition_of_fp32_groups (ZeRO-3: fp32_flat_groups), its tensors in the same order
    model file       module, buffer_names, shared_params, frozen_param_shapes, frozen_param_fragments, counters
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ds.checkpoint import format
from lowrank_ds.checkpoint.agree import CheckpointError, place
from lowrank_ds.checkpoint.format import Entry, Key, Manifest, Piece
from lowrank_ds.checkpoint.read import Checkpoint
from lowrank_ds.checkpoint.records import records
from lowrank_ds.checkpoint.runs import Run, Taken
from lowrank_ds.engines import deepspeed, deepspeed_checkpoint
from lowrank_ds.groups import logger
from lowrank_ds.optimizer import LowRankOptimizer
from lowrank_ds.version import __version__

KEY = "lowrank_ds"  # of what `describe` answers, in the optimizer's state dict
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_ITS_OWN = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "lr_scheduler",
    "frozen_param_fragments", "data_sampler", "random_ltd", "skipped_steps", "global_steps", "global_samples",
    "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version",
    "sparse_tensor_module_names",
}  # fmt: skip


class _Inert:
    """Stands for a class of DeepSpeed: what was pickled of it, and none of its code."""

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def _member(owner: Any, name: str) -> _Inert:
    """In place of `getattr`, which is how Python 3.11.0 to 3.11.3 pickle ZeroStageEnum's members; of nothing else."""
    if owner is not _Inert or not isinstance(name, str):
        raise pickle.UnpicklingError(f"getattr of {owner!r}")
    return _Inert(name)


_CLASSES = [(_member, "builtins.getattr")] + [
    (_Inert, f"deepspeed.{name}")
    for name in (
        "runtime.fp16.loss_scaler.LossScaler", "runtime.fp16.loss_scaler.DynamicLossScaler",
        "utils.tensor_fragment.fragment_address", "runtime.zero.config.ZeroStageEnum",
    )
]  # fmt: skip


# -- written into the state dict --------------------------------------------------------------------------------------
def describe(optimizer: LowRankOptimizer) -> dict[str, Any] | None:
    """Where the partitions' entries and their state lie, for `optimizer.state_dict()`; None if no engine cut them."""
    originals = [p for reference in optimizer._originals.values() if (p := reference()) is not None]
    if not any(deepspeed.is_partitioned(p) for p in originals):
        return None
    names = {own: deepspeed.name_of(p) for own, ref in optimizer._originals.items() if (p := ref()) is not None}
    return {
        "format": format.FORMAT,
        "version": __version__,
        "algorithm": type(optimizer).__name__,
        "projected": sorted(optimizer._projected),
        "names": {own: name for own, name in names.items() if name is not None},
        "records": records(optimizer),
    }


# -- read -------------------------------------------------------------------------------------------------------------
def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is what engine.save_checkpoint was given, or a tag's folder in it."""
    return _tag_folder(Path(path)) is not None


def open_checkpoint(path: str | os.PathLike[str], verify: bool = True) -> Checkpoint:
    """A checkpoint of either kind, ours or DeepSpeed's.

    Raises:
        CheckpointError: it is neither, or damaged.
    """
    return DeepSpeedCheckpoint(path, verify) if is_folder(path) else Checkpoint(path, verify=verify)


def _tag_folder(path: Path) -> Path | None:
    latest = path / "latest"
    folder = path / latest.read_text().strip() if latest.is_file() else path
    return folder if folder.is_dir() and any(_OPTIMIZER.fullmatch(p.name) for p in folder.iterdir()) else None


class DeepSpeedCheckpoint(Checkpoint):
    """A folder of `engine.save_checkpoint` under ZeRO-1, 2 or 3 with one of our optimizers."""

    def __init__(self, path: str | os.PathLike[str], verify: bool = True) -> None:
        """Read all files' tables (not their tensors).

        Args:
            verify: compare the checksums inside the files, each rank those of every world-th file.

        Raises:
            CheckpointError: a file is missing, damaged, of another optimizer, or holds code.
        """
        folder = _tag_folder(Path(path))
        if folder is None:
            raise CheckpointError(f"{path} is no ZeRO folder of engine.save_checkpoint: it has no *_optim_states.pt")
        self._folder, self._verify = folder, verify
        self._tensors: dict[tuple[str, str], Tensor] = {}
        self._taken: dict[Key, Taken] = {}
        self._entries: dict[Key, Entry] = {}
        self._trained: set[str] = set()  # the optimizer may have been given frozen parameters, too
        super().__init__(path, self._manifest())

    def check_files(self, verify: bool = True) -> None:
        """Nothing: what could be read was checked when it was opened."""

    def fetch(self, piece: Piece, first: int, last: int) -> Tensor:
        """Entries [first, last) of a piece, 1-D on the CPU."""
        return self._tensors[piece.file, piece.tensor][first:last]

    def _manifest(self) -> Manifest:
        files = sorted((int(m[1]), m[0]) for p in self._folder.iterdir() if (m := _OPTIMIZER.fullmatch(p.name)))
        first: dict[str, Any] | None = None
        for number, (rank, name) in enumerate(files):
            if rank != number:
                raise CheckpointError(f"{self._folder}: the optimizer file of rank {number} is missing")
            saved = self._load(number, name)["optimizer_state_dict"]
            self._add_partitions(name, saved, _state_dict(self._folder / name, saved))
            first = saved if first is None else first
        if not self._trained:  # where entries lie is settled in the first step
            raise CheckpointError(
                f"{self._folder} was saved before the optimizer's first step and does not say where its entries lie. "
                "Load it with engine.load_checkpoint at the number of ranks that saved it, or save after a step."
            )
        model = self._add_model(len(files))
        for key, entry in self._entries.items():
            if self._taken[key].size != entry.numel:
                raise CheckpointError(
                    f"{key}: the files have {self._taken[key].size} of its {entry.numel} entries; some are missing"
                )
        base = _state_dict(self._folder, first)
        groups = _plain([{k: v for k, v in group.items() if k != "params"} for group in base["param_groups"]])
        for group in groups:
            group["param_names"] = [name for name in group["param_names"] if name in self._trained]
        projected = sorted(self._trained.intersection(base[KEY]["projected"]))
        said, sizes = base[KEY], {name: ((self._folder / name).stat().st_size, "") for _, name in files}
        return Manifest(
            said["version"], said["algorithm"], len(files), groups, projected, _client_state(model),
            _counters(model, first), sizes, self._entries,
        )  # fmt: skip

    def _load(self, number: int, name: str) -> dict[str, Any]:
        """A file's contents, tensors still on disk."""
        path, (rank, world) = self._folder / name, place()
        try:
            zipped = zipfile.is_zipfile(path)
            if zipped and self._verify and number % world == rank and zipfile.ZipFile(path).testzip() is not None:
                raise CheckpointError(f"{path} is damaged (a checksum in it is another). Use another checkpoint.")
            with torch.serialization.safe_globals(_CLASSES):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            reason = " ".join(str(error).split("(1)")[0].split())[:200]
            raise CheckpointError(
                f"{path} is torn, or holds code, which is not run: {reason}. Use another checkpoint, or save without "
                "objects in client_state."
            ) from error
        except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is missing or torn ({error}). Use another checkpoint.") from error

    def _add(self, key: Key, shape: Sequence[int], run: Run, entries: Tensor, file: str, name: str) -> None:
        """Note that `entries` (run.size,) are these of a tensor; what another file has already is left out."""
        entry = self._entries.setdefault(key, Entry(tuple(shape), format.name_of(entries.dtype)))
        for new in self._taken.setdefault(key, Taken()).claim(run):
            tensor, skip = f"{name}@{new.start}", new.start - run.start if new != run else 0
            self._tensors[file, tensor] = entries[skip : skip + new.size]
            entry.pieces.append(Piece(file, tensor, new))

    def _add_partitions(self, file: str, saved: dict[str, Any], base: dict[str, Any]) -> None:
        """One rank's weights and state."""
        partitions = saved.get("single_partition_of_fp32_groups", saved.get("fp32_flat_groups"))
        for index, (flat, matrices) in enumerate(zip(partitions, base[KEY]["records"], strict=True)):
            state = base["state"].get(index, {})
            for record in matrices:
                self._trained.add(record["parameter"])
                start, run = record["weight"]
                if run is not None:
                    key = Key("weights", base[KEY]["names"].get(record["parameter"], record["parameter"]))
                    run = Run(*run)
                    self._add(key, record["shape"], run, flat.view(-1)[start : start + run.size], file, str(key))
                for part, (shape, kept) in record["state"].items():
                    if kept is None or (run is None and not shape):  # counts of a rank without entries say nothing
                        continue
                    key = Key("state", record["name"], part)
                    self._add(key, shape, Run(*kept), state[record["prefix"] + part].view(-1), file, str(key))

    def _add_model(self, world: int) -> dict[str, Any]:
        """Buffers and what is not trained. Answers rank 0's model file."""
        names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world)]
        partitioned = (self._folder / names[0]).is_file()
        names = names if partitioned else ["mp_rank_00_model_states.pt"]
        first: dict[str, Any] = {}
        for number, name in enumerate(names):
            model = self._load(world + number, name)
            if model["dp_world_size"] != world:
                raise CheckpointError(f"{self._folder}: {model['dp_world_size']} ranks saved, {world} files are there")
            first = first or model
            for key, shape in (model["frozen_param_shapes"] or {}).items() if partitioned else ():
                entries = model["frozen_param_fragments"][key].view(-1)
                start, numel = number * entries.numel(), math.prod(shape)
                run = Run.interval(min(start, numel), min(start + entries.numel(), numel))
                self._add(Key("weights", key), shape, run, entries[: run.size], name, key)
        buffers = set(first["buffer_names"])
        for key, tensor in first["module"].items():
            known = Key("weights", key) in self._entries or key in first["shared_params"]
            if not known and (key in buffers or not partitioned):
                found = Key("buffers" if key in buffers else "weights", key)
                run = Run.interval(0, tensor.numel())
                self._add(found, tensor.shape, run, tensor.contiguous().view(-1), names[0], key)
        return first


def _state_dict(where: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """What `optimizer.state_dict()` answered."""
    base = saved.get("base_optimizer_state", saved.get("optimizer_state_dict"))
    if not isinstance(base, dict) or KEY not in base:
        raise CheckpointError(
            f"{where} does not say where its state lies: it was saved by another optimizer, or by an older lowrank_ds. "
            "Load it with engine.load_checkpoint at the number of ranks that saved it, and save it again."
        )
    if base[KEY]["format"] != format.FORMAT:
        raise CheckpointError(f"{where} is of lowrank_ds {base[KEY]['version']}; install that version, or a newer one.")
    return base


def _plain(value: Any) -> Any:
    """What JSON makes of it."""
    return json.loads(json.dumps(value, default=lambda x: x.item() if isinstance(x, Tensor) else str(x)))


def _client_state(model: dict[str, Any]) -> dict[str, Any]:
    """engine.save_checkpoint's client_state, as far as it is JSON-able."""
    kept = {}
    for key, value in model.items():
        if key not in _ITS_OWN:
            try:
                kept[key] = json.loads(json.dumps(value))
            except (TypeError, ValueError):
                logger.warning("client_state %r is not JSON-able: it is left out.", key)
    return kept


def _counters(model: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """As `deepspeed_checkpoint.counters`; micro_steps, which DeepSpeed does not save, as if each step had one."""
    scaler = vars(saved["loss_scaler"]) if "loss_scaler" in saved else {}
    scaler = scaler if scaler.get("dynamic") else {}  # another one is what the ds_config says
    return {
        "global_steps": model["global_steps"],
        "global_samples": model["global_samples"],
        "skipped_steps": model["skipped_steps"],
        "micro_steps": model["global_steps"],
        "gradient_accumulation_steps": 1,
        "lr_scheduler": _plain(model["lr_scheduler"]),
        "loss_scale": {n: scaler[n] for n in deepspeed_checkpoint.SCALE if n in scaler},
    }
