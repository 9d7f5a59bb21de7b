"""Runs that go on: `--resume` under every engine, kills, signals, full disks, damaged files, flags that do not fit."""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lowrank_ds
from launch import resume
from launch.data import fingerprint_blocks
from launch.identity import compare, describe_run
from launch.options import BatchPlan, parse
from launch.processes import Processes
from launch.progress import Progress
from launch.randomness import random_state, restore_random_state, seed_all
from launch.resume import candidates, check_run, verify
from launch.saving import Position, Saver
from launch.streaming import StreamBatches
from lowrank_ds.checkpoint import CheckpointError
from lowrank_ds.checkpoint.rotation import Rotation
from tests import faults
from tests.pretraining import Job, flags, prepare, result, run, same
from tests.training import largest_difference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, tokenizer, models and ds_configs in data/."""
    folder = tmp_path_factory.mktemp("resume")
    prepare(folder / "data")
    return folder


def plain(folder: Path, output: Path, *more: object) -> list[str]:
    """Arguments of a run in one process, without dropout, so that it may be compared with other numbers of them."""
    return flags(folder / "data", output, "ddp", "--model", folder / "data" / "without_dropout.json", *more)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An undisturbed run in one process: checkpoints of steps 4, 8 and 10, and the run's identity in arguments.json."""
    output = folder / "whole"
    codes, printed = run(1, plain(folder, output, "--keep-last", 3), folder / "whole.log")
    assert codes == [0], printed[-3000:]
    return output


def begun(whole: Path, output: Path, *steps: int) -> Path:
    """A run that was killed after the last of these saves."""
    for step in steps:
        path = Rotation(whole / "checkpoints").path(step)
        shutil.copytree(path, output / "checkpoints" / path.name)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # steps not saved, half a line
    return output


# --- rotation --------------------------------------------------------
def checkpoint(rotation: Rotation, step: int) -> None:
    """A stand-in for a complete checkpoint."""
    rotation.path(step).mkdir(parents=True)
    (rotation.path(step) / "manifest.json").write_text("{}")


def names(rotation: Rotation) -> list[str]:
    """Everything in the folder."""
    return sorted(path.name for path in rotation.root.iterdir())


def test_rotation_keeps_the_newest_and_moves_latest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`keep_last` checkpoints; nothing goes before `latest` names the new one; half a removal has another name."""
    rotation = Rotation(tmp_path, keep_last=2)
    assert rotation.newest_first() == [] and rotation.latest() is None and rotation.clean() == []
    for step in (8, 16, 100):
        checkpoint(rotation, step)
        rotation.commit(step)
        assert rotation.latest() == rotation.path(step) == rotation.newest_first()[0]
    assert names(rotation) == ["latest", "step-00000016", "step-00000100"]

    def killed(path: Path, *rest: Any, **more: Any) -> None:
        assert rotation.latest() == rotation.path(200) and not rotation.path(16).exists()
        raise KeyboardInterrupt

    checkpoint(rotation, 200)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        rotation.commit(200)
    assert rotation.newest_first() == [rotation.path(200), rotation.path(100)]
    checkpoint(rotation, 300)  # and a save killed between its rename and the move of `latest`
    (tmp_path / "step-00000400.partial-ab12").mkdir()
    (tmp_path / "notes.txt").touch()
    assert rotation.clean() == ["step-00000016.removed", "step-00000400.partial-ab12"]
    assert rotation.latest() == rotation.path(300) and (tmp_path / "notes.txt").exists()
    rotation.set_aside(rotation.path(300))
    assert rotation.newest_first()[0] == rotation.path(200) and rotation.latest() is None
    checkpoint(rotation, 300)
    rotation.commit(300)
    assert names(rotation) == ["latest", "notes.txt", "step-00000200", "step-00000300"]
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        Rotation(tmp_path, 0)
    with pytest.raises(FileNotFoundError, match="step-00000999 is not there"):
        rotation.commit(999)


# --- what a run keeps beside its state --------------------------------------------------------
def test_random_numbers_go_on(tmp_path: Path) -> None:
    """Python's, NumPy's and torch's, also between the two halves of a pair of normal numbers; seeds differ by rank."""

    def draw() -> list[float]:
        normal = torch.randn(3).tolist()
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), *normal]

    seed_all(3, 0, 0)
    first = draw()
    state, expected = random_state(), draw()
    seed_all(3, 0, 1)
    assert first[0] != random.random()
    restore_random_state({name: value.clone() for name, value in state.items()})
    assert draw() == expected
    assert all(isinstance(value, torch.Tensor) for value in state.values())


class Words:
    """A tokenizer of numbers."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def test_a_stream_goes_on_from_any_place(tmp_path: Path) -> None:
    """Two epochs and more, of three groups of documents: as in one go after a resume, and after a resume of that."""
    import datasets

    draw = np.random.default_rng(0)
    for number in range(2):
        lines = [{"text": " ".join(map(str, draw.integers(3, 999, draw.integers(1, 40))))} for _ in range(150)]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def batches() -> StreamBatches:
        stream = datasets.load_dataset("json", data_files=str(tmp_path / "*.jsonl"), split="train", streaming=True)
        return StreamBatches(stream, Words(), "text", 16, BatchPlan.make(8, 2, None, 2), 1, {"dataset": "numbers"})

    def read(part: StreamBatches, first: int, last: int) -> list:
        return [torch.cat(part.at(step)).tolist() for step in range(first, last)]

    expected = read(batches(), 0, 120)
    for first, second in ((0, 10), (1, 30), (26, 33), (48, 60)):
        part = batches()
        read(part, 0, first)
        for start, stop in ((first, second), (second, 120)):
            state = json.loads(json.dumps(part.state()))
            part = batches()
            part.restore(state)
            assert read(part, start, stop) == expected[start:stop], (first, second)
    with pytest.raises(SystemExit, match="only with the number of processes that saved it"):
        batches().restore(None)


def test_metrics_wait_for_room(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that finds a full disk is written with a later one, whole; half of it does not stay."""
    progress, whole_open = Progress(tmp_path, 9, 1, True), Path.open

    def full(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        with whole_open(path, mode) as file:
            file.write('{"kind": "va')
        raise OSError(28, "No space left on device")

    progress.record(kind="train", step=1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        progress.record(kind="valid", step=1)
    assert "No space left on device; 1 records wait for room" in capsys.readouterr().out
    progress.record(kind="train", step=2)
    lines = [json.loads(line) for line in progress.file.read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("valid", 1), ("train", 2)]
    progress.restore(1, {"training_seconds": 5.0})
    assert len(progress.file.read_text().splitlines()) == 2 and progress.training_seconds == 5.0


def test_diagnostics_of_steps_done_again_are_dropped(tmp_path: Path) -> None:
    """A record of a step after the checkpoint would be there twice; half a line goes, too."""
    file = tmp_path / "diagnostics.jsonl"
    file.write_text("".join(json.dumps({"step": step, "summary": {}}) + "\n" for step in (2, 4, 6)) + '{"step": 4')
    Progress(tmp_path, 9, 1, False).restore(4, {})
    assert len(file.read_text().splitlines()) == 4  # another process's to write
    Progress(tmp_path, 9, 1, True).restore(4, {})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [2, 4]


def test_what_one_host_cannot_see_is_not_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without the shared disk finds every checkpoint damaged: the good ones must not be thrown away for it."""
    args = argparse.Namespace(output=str(tmp_path), resume="auto", keep_last=1, seed=0, steps=9)
    path = Rotation(tmp_path / "checkpoints").path(4)
    lowrank_ds.save_checkpoint(path, torch.nn.Linear(2, 2))
    processes = Processes(0, 1, 0, torch.device("cpu"))

    def other_rank(path: Path) -> None:
        raise CheckpointError(f"checking {path} failed on rank 1: it has no manifest.json.")

    monkeypatch.setattr(resume, "verify", other_rank)
    with pytest.raises(
        SystemExit, match="failed on rank 1.* The first process sees no damage .* all hosts have mounted"
    ):
        resume.restore(args, None, None, Progress(tmp_path, 9, 1, True), processes)
    assert path.is_dir()
    (path / "rank-00000.safetensors").write_bytes(b"torn")
    resume.restore(args, None, None, Progress(tmp_path, 9, 1, True), processes)
    assert not path.exists() and path.with_name("step-00000004.torn").is_dir()


def test_a_run_that_diverged_replaces_no_checkpoint(tmp_path: Path) -> None:
    """Its loss may be reported long after: the good checkpoints would be gone by then."""
    processes = Processes(0, 1, 0, torch.device("cpu"))
    args = argparse.Namespace(output=str(tmp_path), keep_last=1, save_every=2, seed=0, steps=9)
    saver = Saver(args, {}, None, None, Progress(tmp_path, 9, 1, True), processes)
    checkpoint(saver.rotation, 2)
    with pytest.raises(SystemExit, match="the loss is nan by step 4: lower --lr"):
        saver.save(Position(4, torch.tensor(float("nan")), since=2))
    assert names(saver.rotation) == ["step-00000002"]


# --- flags --------------------------------------------------------
def described(arguments: list[str]) -> tuple[argparse.Namespace, dict]:
    """(flags, identity of the run) without a tokenizer or text of its own."""
    args = parse(arguments)
    config, plan = None, BatchPlan.make(args.batch_size, args.micro_batch, None, 1)
    if args.deepspeed_config:
        from launch.options import load_ds_config

        config = load_ds_config(args)
    from launch.tokenizer import load_tokenizer

    text = fingerprint_blocks(np.arange(64).reshape(8, 8))
    return args, describe_run(
        args, config, plan, load_tokenizer(args.tokenizer), {"--train-data": text, "--valid-data": text}
    )


CHANGES = {
    "--seq-len": (["--seq-len", "32"], "--seq-len is 32 here and 16 there"),
    "--batch-size": (["--batch-size", "6"], "--batch-size is 6 here and 12 there"),
    "--steps": (["--steps", "11"], "--steps is 11 here and 10 there"),
    "--seed": (["--seed", "1"], "--seed is 1 here and 0 there"),
    "--lr": (["--lr", "0.1"], "--lr is 0.1 here and 0.01 there"),
    "--rank": (["--rank", "4"], "--rank is 4 here and 8 there"),
    "--model": (
        ["--model", "model.json"],
        '--model is {"attention_dropout": 0.1} here and {"attention_dropout": 0.0} there',
    ),
    "--optimizer": (["--optimizer", "GaLoreAdamW"], '--optimizer is "GaLoreAdamW" here and "FiraAdamW" there'),
    "--optimizer-args": (["--optimizer-args", '{"alpha": 1}'], '--optimizer-args is {"alpha": 1} here and {"update_pr'),
    "--gradient-clipping": (["--gradient-clipping", "1"], "--gradient-clipping is 1.0 here and 0.0 there"),
    "--schedule": (["--schedule", "linear"], '--schedule is "linear" here and "cosine" there'),
    "--min-lr-ratio": (["--min-lr-ratio", "0"], "--min-lr-ratio is 0.0 here and 0.1 there"),
}


def listing(output: Path) -> dict[str, int]:
    """Every file and when it was written."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(output.rglob("*"))}


def test_flags_that_make_another_run_are_named(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Before anything is written; another engine, micro-batch or place of the files is no other run."""
    before = listing(whole)
    data = folder / "data"
    args, same_run = described(plain(folder, whole, "--resume", "auto"))
    text = {
        key: json.loads((whole / "arguments.json").read_text())["run"][key] for key in ("--train-data", "--valid-data")
    }
    for flag, (change, message) in CHANGES.items():
        change = [str(data / part) if part.endswith(".json") else part for part in change]
        args, other = described(plain(folder, whole, "--resume", "auto", *change))
        with pytest.raises(SystemExit) as caught:
            check_run(args, {**other, **text})
        assert message in str(caught.value) and "step-00000010 is of another run" in str(caught.value), flag
    with pytest.raises(SystemExit, match="--train-data is"):
        check_run(args, {**same_run, "--valid-data": text["--valid-data"]})
    moved = shutil.copytree(data, tmp_path / "elsewhere")
    zero = ["--model", str(moved / "without_dropout.json"), "--micro-batch", "6", "--resume", "auto"]
    for arguments in (flags(moved, whole, "zero2", *zero), flags(moved, whole, "fsdp2", *zero)):
        args, run_now = described(arguments)
        check_run(args, {**run_now, **text})
    assert listing(whole) == before


def test_resume_says_what_it_cannot_do(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Torch's optimizers, a PATH that is none, a PATH beside newer checkpoints, an OUTPUT that holds another run."""
    args, run_now = described(
        flags(folder / "data", tmp_path / "new", "ddp", "--resume", "auto", "--optimizer", "AdamW")
    )
    with pytest.raises(SystemExit, match="need an optimizer of lowrank_ds, whose state they know; AdamW is none"):
        check_run(args, run_now)
    for output, path, message in (
        (whole, whole / "checkpoints" / "step-00000007", "no such folder; give one such as OUTPUT/checkpoints/step-"),
        (whole, whole / "checkpoints" / "step-00000004", "step-00000010 is newer and would be mixed up"),
        (whole, folder / "data", "holds another run; choose another directory"),
    ):
        with pytest.raises(SystemExit, match=message):
            candidates(parse(plain(folder, output, "--resume", path)))
    args, run_now = described(plain(folder, tmp_path / "new", "--resume", folder / "data"))
    with pytest.raises(SystemExit, match="is no checkpoint of lowrank_ds"):
        check_run(args, run_now)
    assert candidates(parse(plain(folder, whole, "--resume", "auto")))[0].name == "step-00000010"
    for wrong, message in ((["--keep-last", 0], "--keep-last at least 1"), ([], "go on with it: --resume auto")):
        with pytest.raises(SystemExit):
            parse(plain(folder, whole, *wrong))
        assert message in capsys.readouterr().err
    compare("here", {"--steps": 3}, {"--steps": 3})


# --- whole runs --------------------------------------------------------
@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "hsdp", "zero3-layerwise"])
def test_a_resumed_run_is_the_run_that_never_stopped(engine: str, folder: Path) -> None:
    """From a checkpoint in the middle, in another OUTPUT: the last checkpoint and the records, bit for bit.

    With dropout, whose masks come from the random numbers; ordinary FSDP2 and ZeRO-2 are in the fault run.
    """
    first, second, short = folder / f"{engine}-1", folder / f"{engine}-2", ("--steps", 5, "--save-every", 3)
    codes, printed = run(2, flags(folder / "data", first, engine, *short), folder / f"{engine}-1.log")
    assert codes == [0, 0], printed[-3000:]
    path = first / "checkpoints" / "step-00000003"
    given = flags(folder / "data", second, engine, *short, "--resume", path)
    codes, printed = run(2, given, folder / f"{engine}-2.log")
    assert codes == [0, 0] and f"resumed from {path}: 3 of 5 steps are done" in printed, printed[-3000:]
    (second / "metrics.jsonl").write_text(
        "".join((first / "metrics.jsonl").read_text().splitlines(True)[:3]) + (second / "metrics.jsonl").read_text()
    )
    assert same(first, second) == []


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_a_killed_run_ends_where_the_undisturbed_one_does(
    engine: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    """SIGKILL to one rank or all at random moments, some provably during a save. `python -m tests.faults` has more."""
    kills = faults.plans(5, 12, 3, 2, seed=3)
    more = "--steps", 12, "--save-every", 3
    lives, different = faults.fault_run(folder, engine, kills, 2, Job, *more)
    with capsys.disabled():
        print(f"\n{engine}, killed at random:\n{faults.table(lives)}")
    assert different == []
    assert len(lives) > 4 and any(life.resumed for life in lives)


def test_a_signal_saves_and_other_processes_go_on(folder: Path, whole: Path, capsys: pytest.CaptureFixture) -> None:
    """SIGTERM to one of three ZeRO-2 ranks: all end with code 75 after a save; one process goes on, within rounding."""
    output, log = folder / "moved", folder / "moved.log"
    plain_model = "--model", folder / "data" / "without_dropout.json"
    job = Job(3, flags(folder / "data", output, "zero2", *plain_model, "--micro-batch", 2, "--save-every", 100), log)
    faults.wait_for(job, lambda: faults.last_step(output) >= 2)
    job.kill([1], signal.SIGTERM)
    assert job.wait() == [75, 75, 75], job.printed()[-3000:]
    step = int((output / "preempted").read_text())
    assert 2 <= step < 10 and f"signal 15: saved after step {step}" in job.printed()
    codes, printed = run(1, plain(folder, output, "--resume", "auto"), log)
    assert codes == [0] and f"{step} of 10 steps are done" in printed, printed[-3000:]
    assert not (output / "preempted").exists()
    (weights, records), (expected, other) = result(output), result(whole)
    difference = largest_difference(weights, expected)
    with capsys.disabled():
        print(f"\nZeRO-2 on 3 processes to step {step}, then one process: {difference:.1e} from one process throughout")
    assert difference <= 1e-5
    assert [(r["kind"], r["step"]) for r in records] == [(r["kind"], r["step"]) for r in other]
    before = listing(output)
    codes, printed = run(1, plain(folder, output, "--resume", "auto"), log)
    assert codes == [0] and "this run is finished; nothing to do" in printed and listing(output) == before


def test_a_damaged_checkpoint_is_told_and_passed_over(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Torn newest, no room: `auto` goes on from the one before; saves that fail leave it; room again, and it ends well.

    No space is played by RLIMIT_FSIZE, which needs no privileges: no file may grow beyond 100 KiB.
    """
    output, log = begun(whole, tmp_path / "torn", 4, 8), tmp_path / "log"
    newest, older = (output / "checkpoints" / name for name in ("step-00000008", "step-00000004"))
    file = newest / "rank-00000.safetensors"
    bytes_before = file.read_bytes()
    flipped = bytearray(bytes_before)
    flipped[len(flipped) // 2] ^= 1
    file.write_bytes(bytes(flipped))
    with pytest.raises(CheckpointError, match="rank-00000.safetensors is damaged: its SHA-256"):
        verify(newest)
    file.write_bytes(bytes_before[:-100])
    args, run_now = described(plain(folder, output, "--resume", newest))
    codes, printed = run(1, plain(folder, output, "--resume", newest), log)
    assert codes == [1] and f"--resume {newest}: checking {newest} failed" in printed and "is torn" in printed
    assert newest.exists() and older.exists()

    codes, printed = run(1, plain(folder, output, "--resume", "auto"), log, limits={resource.RLIMIT_FSIZE: 100 << 10})
    assert codes == [1]
    assert f"WARNING: checking {newest} failed" in printed and f"set aside as {newest}.torn" in printed
    assert f"resumed from {older}: 4 of 10 steps" in printed
    assert (
        f"the checkpoint of step 8 could not be saved in {output}/checkpoints (" in printed and "MiB free)" in printed
    )
    assert "File too large" in printed and f"{older} is intact" in printed and "step     10/10" in printed
    verify(older)
    codes, printed = run(1, plain(folder, output, "--resume", "auto"), tmp_path / "log2")
    assert codes == [0] and same(whole, output) == [], printed[-3000:]
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["latest", "step-00000008", "step-00000010"]


def test_a_full_disk_is_survived(folder: Path, whole: Path, tmp_path: Path) -> None:
    """A tmpfs with room for one checkpoint: the second save fails, the run goes on, exits with 1; then it grows."""
    output, log = tmp_path / "full", tmp_path / "log"
    disk = output / "checkpoints"
    disk.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted ({mounted.stderr.decode().strip()}); RLIMIT_FSIZE is tested above")
    try:
        codes, printed = run(1, plain(folder, output, "--resume", "auto"), log)
        assert codes == [1] and "step 8 could not be saved" in printed and "No space left on device" in printed
        assert "The run is finished, but its last checkpoint is missing" in printed
        assert [path.name for path in Rotation(disk).newest_first()] == ["step-00000004"]
        verify(disk / "step-00000004")
        assert result(output)[1] == result(whole)[1]
        (output / "summary.json").unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        codes, printed = run(1, plain(folder, output, "--resume", "auto"), log)
        assert codes == [0] and "4 of 10 steps are done" in printed and same(whole, output) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
