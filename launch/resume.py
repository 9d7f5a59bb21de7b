"""How a run goes on: which checkpoint, whether it belongs to this run, and everything put back. See docs/resume.md."""

import json
import math
import time
from pathlib import Path

import torch

import lowrank_ds
from launch.engines import Trainer
from launch.identity import compare
from launch.processes import Processes
from launch.progress import Progress
from launch.randomness import restore_random_state, seed_all
from launch.saving import FOLDER, Position
from lowrank_ds.checkpoint.agree import CheckpointError, place, together
from lowrank_ds.checkpoint.format import Manifest, check_file
from lowrank_ds.checkpoint.rotation import Rotation
from lowrank_ds.optimizer import LowRankOptimizer


def candidates(args) -> list[Path]:
    """Checkpoints that --resume may mean, the best first; none: start from the beginning.

    Raises:
        SystemExit: --resume PATH names no checkpoint, or OUTPUT holds what does not belong to it.
    """
    if args.resume == "none":
        return []
    found = Rotation(Path(args.output) / FOLDER).newest_first()
    if args.resume == "auto":
        return found
    path, own = Path(args.resume).resolve(), [p.resolve() for p in found]
    if not path.is_dir():
        raise SystemExit(f"--resume {args.resume}: no such folder; give one such as OUTPUT/{FOLDER}/step-00000100")
    if (Path(args.output) / "metrics.jsonl").exists() and path not in own:
        raise SystemExit(f"--resume {args.resume}: --output {args.output} holds another run; choose another directory")
    newer = own[: own.index(path)] if path in own else own
    if newer:
        raise SystemExit(
            f"--resume {args.resume}: {newer[0]} is newer and would be mixed up with what comes now; move the newer "
            f"checkpoints away, choose another --output, or give --resume auto"
        )
    return [Path(args.resume)]


def check_run(args, run: dict) -> None:
    """Compare the flags with those of what is in OUTPUT, or of --resume PATH, before anything is written.

    Raises:
        SystemExit: a flag that changes the run has another value; --resume PATH is damaged; or the optimizer is not
            one whose state can be saved.
    """
    name = run["--optimizer"]
    if (args.save_every or args.resume != "none") and not issubclass(getattr(lowrank_ds, name, int), LowRankOptimizer):
        raise SystemExit(
            f"--save-every and --resume need an optimizer of lowrank_ds, whose state they know; {name} "
            "is none. Leave them out, or choose another --optimizer"
        )
    for path in candidates(args):
        try:
            saved = Manifest.read(path).extra["run"]
        except CheckpointError as error:
            if args.resume != "auto":
                raise SystemExit(f"--resume {path}: {error}") from None
            continue  # told when it is set aside
        except (KeyError, TypeError):
            raise SystemExit(f"--resume {path}: neither pretrain.py nor finetune.py wrote this checkpoint") from None
        return compare(str(path), saved, run)
    arguments = Path(args.output) / "arguments.json"
    if args.resume == "auto" and arguments.exists():  # a run that has saved nothing yet, or is finished
        compare(str(arguments), json.loads(arguments.read_text()).get("run", run), run)
    return None


def restore(args, trainer: Trainer, batches, progress: Progress, processes: Processes) -> Position:
    """Load the newest complete checkpoint that --resume means, and clear away what was done after it.

    Damaged ones are told, and under `auto` set aside. Every process must call it.

    Raises:
        SystemExit: --resume PATH is damaged, or a checkpoint is to some processes only.
        CheckpointError: the checkpoint does not fit the model or the optimizer.
    """
    seed_all(args.seed, 0, processes.rank)
    position = Position(0, torch.zeros((), device=processes.device))
    rotation = Rotation(Path(args.output) / FOLDER, args.keep_last)
    for path in processes.same([str(p) for p in candidates(args)]):
        if not _complete(args, Path(path), rotation, processes):
            continue
        extra, local = lowrank_ds.load_checkpoint(path, trainer.wrapped, trainer.optimizer, verify=False)
        position = _unpack(args, extra, local, trainer, batches, processes)
        progress.restore(position.step, extra["progress"])
        _say(processes, f"resumed from {path}: {position.step} of {args.steps} steps are done")
        break
    else:
        if args.resume != "none":
            _say(processes, f"--resume {args.resume}: no complete checkpoint in {rotation.root}; starting at step 0")
            progress.restore(0, {})
    if processes.is_main and args.resume != "none":
        left = rotation.clean()
        if left:
            print(f"removed what killed saves left in {rotation.root}: {', '.join(left)}", flush=True)
    processes.barrier()
    return position


def _complete(args, path: Path, rotation: Rotation, processes: Processes) -> bool:
    """Whether every file of a checkpoint is what was saved; each process reads its share of them."""
    start = time.perf_counter()
    try:
        verify(path)
    except CheckpointError as error:
        if args.resume != "auto":
            raise SystemExit(f"--resume {path}: {error}") from None
        if not processes.same(processes.is_main and _is_damaged(path)):
            raise SystemExit(
                f"--resume auto: {error} The first process sees no damage in {path}: is OUTPUT on a file system that "
                "all hosts have mounted? Nothing was changed"
            ) from None
        if processes.is_main:
            print(f"WARNING: {error} It is set aside as {rotation.set_aside(path)}.", flush=True)
        processes.barrier()
        return False
    _say(processes, f"{path}: complete (checked in {time.perf_counter() - start:.1f} s)")
    return True


def _is_damaged(path: Path) -> bool:
    """Whether this process, too, finds a file missing or other than it was saved: not if it just cannot be read."""
    try:
        for name, about in Manifest.read(path).files.items():
            check_file(path, name, *about)
    except CheckpointError:
        return True
    except OSError:
        pass
    return False


def verify(path: Path) -> None:
    """Raise CheckpointError on all processes unless every file is what was saved."""

    def mine() -> None:
        manifest, (rank, world) = Manifest.read(path), place()
        for name in sorted(manifest.files)[rank::world]:
            check_file(path, name, *manifest.files[name])

    together(f"checking {path}", mine)


def _unpack(args, extra: dict, local: dict | None, trainer: Trainer, batches, processes: Processes) -> Position:
    """Put back what is neither weight nor optimizer state; the random numbers last."""
    mean, since = extra["loss"]
    perplexity = math.nan if extra["perplexity"] is None else extra["perplexity"]
    best = math.inf if extra.get("best") is None else extra["best"]  # not in checkpoints of before fine-tuning was
    position = Position(extra["step"], torch.tensor(mean, device=processes.device), since, perplexity, best)
    restore_schedule(trainer, extra["schedule"])
    trainer.watch.before = extra["watch"]
    if local is None:  # of another number of processes
        batches.restore(None)
        seed_all(args.seed, position.step, processes.rank)
        return position
    batches.restore(json.loads(local["data"].numpy().tobytes()))
    position.loss = local["loss"].to(processes.device)
    restore_random_state(local)
    return position


def restore_schedule(trainer: Trainer, saved: dict) -> None:
    """Learning rates from here on; those of this step are in the optimizer's groups already."""
    schedule = trainer.schedule
    if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        # Ours: its place is one number. The rest is a list with an entry a group, and engines make one group or two.
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        place = {key: saved[key] for key in ("last_epoch", "_step_count")}
        saved = {**schedule.state_dict(), **place, "_last_lr": rates}
    schedule.load_state_dict(saved)


def _say(processes: Processes, text: str) -> None:
    if processes.is_main:
        print(text, flush=True)
