"""Hugging Face: Trainer with `for_trainer(..., layerwise=...)`: the weights of the ordinary run, gradients freed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import lowrank_ds
from lowrank_ds import for_trainer
from tests import huggingface as hf
from tests.cluster import batches, launch, tiny_llama
from tests.training import largest_difference

LIMIT = 1e-6
ROWS = 5  # times 12 rows: 15 micro-batches of 4 rows, in steps of 4, 4, 4 and, at the epoch's end, 3
ACCUMULATE = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.0}


@pytest.fixture(autouse=True)
def no_engine() -> None:
    """No engine left over from another test."""
    hf.forget_engine()


class Watch(TrainerCallback):
    """How many parameters have a gradient when Trainer steps; between micro-batches those of norms must be there."""

    def __init__(self) -> None:
        self.alive: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Before `optimizer.step()`."""
        self.alive.append(sum(p.grad is not None for p in model.parameters()))

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """After a micro-batch that is not the last: FSDP2 must have reduced it into sharded gradients."""
        assert all(p.grad is not None for p in model.parameters() if p.ndim == 1)


def watch_of(run: Any) -> Watch:
    """The Trainer's `Watch`."""
    return next(c for c in run.callback_handler.callbacks if isinstance(c, Watch))


def builder(algorithm: str = "FiraAdamW", steps: int = hf.STEPS, **options: Any) -> Callable[..., Any]:
    """What makes a Trainer from arguments (and a model), with a `Watch`."""

    def build(args: Any, model: Any = None) -> Any:
        factory = for_trainer(algorithm, args, **hf.FIRA, **options)
        return hf.trainer(args, model, steps, optimizer_cls_and_kwargs=factory, callbacks=[Watch()])

    return build


def trained(build: Callable[..., Any], args: Any) -> dict[str, torch.Tensor]:
    """Weights after training."""
    run = build(args)
    run.train()
    return hf.weights(run.model)


def micro(world: int) -> dict[str, Any]:
    """Four rows a micro-batch over all processes, several micro-batches a step."""
    return {"per_device_train_batch_size": 4 // world, **ACCUMULATE}


def check(run: tuple[dict, dict, list], expected: dict[str, torch.Tensor]) -> None:
    """The ordinary run's weights; a checkpoint resumes bit for bit."""
    straight, resumed, log = run
    assert largest_difference(straight, expected) < LIMIT
    assert largest_difference(straight, resumed) == 0.0
    assert max(entry["step"] for entry in log if "loss" in entry) == hf.STEPS


# --- one process ----------------------------------------------------------------------------------------------------
def test_one_process(tmp_path: Path) -> None:
    """One option: the same weights, a resume bit for bit, and hardly a gradient is left when Trainer steps."""
    expected = trained(builder(), hf.arguments(tmp_path, max_grad_norm=0.0))
    runs: list[Any] = []

    def build(args: Any, model: Any = None) -> Any:
        runs.append(builder(layerwise=True)(args, model))
        return runs[-1]

    check(hf.straight_and_resumed(0, 1, str(tmp_path), "plain", build, max_grad_norm=0.0), expected)
    watch = watch_of(runs[0])
    assert len(watch.alive) == hf.STEPS and max(watch.alive) < len(expected) / 2
    runs[0].train()  # again, with the same optimizer
    assert len(watch.alive) == 2 * hf.STEPS


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Ordinary training with gradient accumulation and an incomplete last step in each epoch."""
    hf.forget_engine()
    return trained(builder(steps=ROWS), hf.arguments(tmp_path_factory.mktemp("usual"), **micro(1)))


def test_accumulation(tmp_path: Path, accumulated: dict[str, torch.Tensor]) -> None:
    """Micro-batches are summed whole, also 3 instead of 4 at the end of an epoch."""
    check(
        hf.straight_and_resumed(0, 1, str(tmp_path), "plain", builder(layerwise=True, steps=ROWS), **micro(1)),
        accumulated,
    )


def test_accumulation_in_the_subspace(tmp_path: Path) -> None:
    """GaLore with compress_accumulation, and activation checkpointing: what Trainer gets without them."""
    args = lambda **more: hf.arguments(tmp_path, **micro(1), **more)
    usual = trained(builder("GaLoreAdamW", ROWS), args())
    build = builder("GaLoreAdamW", ROWS, layerwise=True, compress_accumulation=True)
    compressed = trained(build, args(gradient_checkpointing=True))
    assert largest_difference(usual, compressed) < 1e-5


def clipped_by_hand(clip: str) -> dict[str, torch.Tensor]:
    """`hf.by_hand` with another kind of clipping to 0.5."""
    before: list[torch.Tensor] = []

    def previous(params: Any, limit: float) -> None:
        params = list(params)
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        for p in params if before else ():
            p.grad.mul_((limit / (before[-1] + 1e-6)).clamp_max(1.0))
        before.append(norm)

    def per_tensor(params: Any, limit: float) -> None:
        for p in params:
            torch.nn.utils.clip_grad_norm_([p], limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "clip_grad_norm_", {"previous": previous, "per_tensor": per_tensor}[clip])
        return hf.by_hand()


@pytest.mark.parametrize("clip", ["previous", "per_tensor"])
def test_clipping_takes_trainers_limit(clip: str, tmp_path: Path) -> None:
    """max_grad_norm is the limit, and Trainer's own clipping is off; a resume knows the norm of the step before."""
    run = hf.straight_and_resumed(0, 1, str(tmp_path), "plain", builder(layerwise={"clip": clip}), max_grad_norm=0.5)
    check(run, clipped_by_hand(clip))
    assert largest_difference(run[0], hf.by_hand()) > 1e-4  # it does differ from clipping by the norm of now
    args = hf.arguments(tmp_path, max_grad_norm=0.5)
    build = builder(layerwise={"clip": clip})
    trained(build, args)
    assert args.max_grad_norm == 0.0
    with pytest.raises(ValueError, match="needs a limit.*It is 0 now"):
        build(args)


# --- FSDP2, and DDP -------------------------------------------------------------------------------------------------
def two_processes(rank: int, world: int, folder: str) -> dict[str, Any]:
    """FSDP2 with accumulation, with clipping; what is said under DDP."""
    found: dict[str, Any] = {}
    run = builder(layerwise=True)(hf.engine_arguments("plain", Path(folder), world, max_grad_norm=0.0))
    try:
        run.train()
    except RuntimeError as error:
        found["ddp"] = str(error)
    del run
    run = builder(layerwise=True, steps=ROWS)(hf.engine_arguments("fsdp2", Path(folder), world, **micro(world)))
    run.train()
    hf.check_engine("fsdp2", run, world)
    found["accumulated"], found["alive"] = hf.weights(run.model), watch_of(run).alive
    del run
    clipped, limit = builder(layerwise={"clip": "previous"}, steps=ROWS), {**micro(world), "max_grad_norm": 0.5}
    found["clipped"] = hf.straight_and_resumed(rank, world, f"{folder}/c", "fsdp2", clipped, **limit)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found."""
    return launch(2, two_processes, str(tmp_path_factory.mktemp("two")))[0]


def test_fsdp2(two: dict[str, Any], accumulated: dict[str, torch.Tensor]) -> None:
    """DTensors (checked there), micro-batches reduced one by one, gradients freed, the weights of ordinary training."""
    assert largest_difference(two["accumulated"], accumulated) < LIMIT
    assert len(two["alive"]) == hf.STEPS and max(two["alive"]) < len(accumulated) / 2


def test_fsdp2_clipping(two: dict[str, Any], tmp_path: Path) -> None:
    """The norm of the step before goes over all ranks, and into checkpoints."""
    args = hf.arguments(tmp_path, **{**micro(1), "max_grad_norm": 0.5})
    check(two["clipped"], trained(builder(layerwise={"clip": "previous"}, steps=ROWS), args))


def test_ddp_is_refused(two: dict[str, Any]) -> None:
    """Before anything is trained, naming the way out."""
    assert "layerwise: 2 processes without FSDP" in two["ddp"] and "fsdp=True" in two["ddp"]


# --- messages -------------------------------------------------------------------------------------------------------
ERRORS = [
    ({"layerwise": True}, {}, ValueError, r"max_grad_norm=0.5 .*max_grad_norm=0\), or .*previous.*per_tensor"),
    ({"layerwise": {"clip": "two_pass"}}, {}, ValueError, "one of .*got 'two_pass': Trainer runs each forward"),
    ({"layerwise": {"clip": "previous"}}, {"max_grad_norm": 0.0}, ValueError, "needs a limit"),
    ({"layerwise": {"clipp": "previous"}}, {}, ValueError, "no option 'clipp'; did you mean 'clip'"),
    ({"layerwise": "previous"}, {}, TypeError, "layerwise must be True, False or a dict"),
    ({"layerwise": True}, {"max_grad_norm": 0.0, "auto_find_batch_size": True}, ValueError, "auto_find_batch_size"),
    ({"compress_accumulation": True}, {}, ValueError, "only sums micro-batches in the subspace with layerwise"),
]


@pytest.mark.parametrize(("options", "given", "error", "message"), ERRORS)
def test_messages(options: dict, given: dict, error: type, message: str, tmp_path: Path) -> None:
    """Refused when the factory is made."""
    with pytest.raises(error, match=message):
        for_trainer("GaLoreAdamW", hf.arguments(tmp_path, **given), rank=8, **options)


def test_the_arguments_are_needed_and_read_again(tmp_path: Path) -> None:
    """No args: nobody knows about clipping; a max_grad_norm set later (a search) is seen when Trainer begins."""
    with pytest.raises(ValueError, match="layerwise needs args"):
        for_trainer("GaLoreAdamW", rank=8, layerwise=True)
    args = hf.arguments(tmp_path, max_grad_norm=0.0)
    run = builder(layerwise=True)(args)
    args.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="max_grad_norm=1.0"):
        run.train()
    args = hf.arguments(tmp_path, max_grad_norm=0.0)
    args.fp16 = True  # TrainingArguments refuses it on CPU
    with pytest.raises(ValueError, match="fp16=True: its loss scaling"):
        for_trainer("GaLoreAdamW", args, rank=8, layerwise=True)


def test_a_loop_that_is_not_trainers_is_told(tmp_path: Path) -> None:
    """The option is never lost without a word: nobody calls optimizer.train(), so step() raises."""
    run = builder(layerwise=True)(hf.arguments(tmp_path, max_grad_norm=0.0))
    optimizer = run.create_optimizer()
    batch = batches(1)[0]
    run.model(input_ids=batch, labels=batch).loss.backward()
    with pytest.raises(RuntimeError, match=r"optimizer.train\(\) was not called before the forward pass"):
        optimizer.step()
    assert isinstance(optimizer, lowrank_ds.FiraAdamW) and not largest_difference(
        hf.weights(run.model), hf.weights(tiny_llama())
    )
