"""Hugging Face: Trainer with `for_trainer`, accelerate, a ds_config, and an unmodified script under launchers."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank_ds
from lowrank_ds import for_trainer
from tests import huggingface as hf
from tests import training
from tests.cluster import launch, tiny_llama
from tests.training import largest_difference

LIMIT = 1e-5
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_engine() -> None:
    """No engine left over from another test."""
    hf.forget_engine()


@pytest.fixture(scope="module")
def by_hand() -> dict[str, torch.Tensor]:
    """The weights Trainer has to arrive at."""
    return hf.by_hand()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found; see `two_processes`."""
    found = launch(2, two_processes, str(tmp_path_factory.mktemp("two")))
    return found[0]


def two_processes(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Every engine but FSDP2, in one launch."""
    found: dict[str, Any] = {}
    for engine in ("plain", "zero2", "zero3"):
        found[f"trainer {engine}"] = hf.straight_and_resumed(rank, world, folder, engine)
    for engine, by_name in (("plain", False), ("zero2", False), ("zero2", True)):
        found[f"accelerate {engine} {by_name}"] = hf.accelerated(rank, world, folder, engine, by_name)
    found["client"] = hf.client_optimizer(rank, world, folder)
    found["filled"] = hf.filled_config(rank, world, folder)
    found["offloaded"] = hf.offloaded(rank, world, folder)
    found["unfilled"] = hf.unfilled(rank, world, folder)
    return found


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found under FSDP2."""
    return launch(2, two_processes_fsdp2, str(tmp_path_factory.mktemp("fsdp2")))[0]


def two_processes_fsdp2(rank: int, world: int, folder: str) -> dict[str, Any]:
    """FSDP2 through Trainer and accelerate."""
    return {
        "trainer": hf.straight_and_resumed(rank, world, folder, "fsdp2"),
        "accelerate": hf.accelerated(rank, world, folder, "fsdp2"),
    }


# --- Trainer --------------------------------------------------------------------------------------------------------
def check_run(run: tuple[dict, dict, list], by_hand: dict[str, torch.Tensor]) -> None:
    """The straight run equals the one written out, the resumed one equals the straight one bit for bit."""
    straight, resumed, log = run
    assert largest_difference(straight, by_hand) < LIMIT
    assert largest_difference(straight, resumed) == 0.0
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, hf.STEPS + 1))
    assert all(entry["grad_norm"] > 0 for entry in steps)
    assert steps[0]["learning_rate"] == 0.0 and max(entry["learning_rate"] for entry in steps) == 1e-2


@pytest.mark.parametrize("engine", ["plain", "zero2", "zero3"])
def test_trainer_on_two_processes(engine: str, two: dict[str, Any], by_hand: dict[str, torch.Tensor]) -> None:
    """Schedule, clipping and decay groups under every engine; a checkpoint resumes bit for bit."""
    check_run(two[f"trainer {engine}"], by_hand)


def test_trainer_on_one_process(tmp_path: Path, by_hand: dict[str, torch.Tensor]) -> None:
    """The same on one process; and the test can fail: AdamW's weights are far away."""
    check_run(hf.straight_and_resumed(0, 1, str(tmp_path), "plain"), by_hand)
    adamw = hf.trained(hf.arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-2}))
    assert largest_difference(adamw, by_hand) > 1e-3


def test_trainer_under_fsdp2(fsdp2: dict[str, Any], by_hand: dict[str, torch.Tensor]) -> None:
    """The parameters are DTensors (checked where they are trained), the weights those of one process."""
    check_run(fsdp2["trainer"], by_hand)


def test_accumulation_and_checkpointing_change_nothing(tmp_path: Path, by_hand: dict[str, torch.Tensor]) -> None:
    """gradient_accumulation_steps and gradient_checkpointing: the same weights."""
    accumulated = hf.arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert largest_difference(hf.trained(accumulated), by_hand) < LIMIT
    checkpointed = hf.trained(hf.arguments(tmp_path, gradient_checkpointing=True))
    assert largest_difference(checkpointed, by_hand) < LIMIT


def test_bf16(tmp_path: Path) -> None:
    """bf16=True autocasts over fp32 weights; a bf16 model trains with stochastic rounding; both stay near fp32."""
    exact = hf.trained(hf.arguments(tmp_path))
    autocast = hf.trained(hf.arguments(tmp_path, bf16=True))
    halved = tiny_llama().to(torch.bfloat16)
    pure = hf.trained(hf.arguments(tmp_path), halved)
    assert halved.lm_head.weight.dtype == torch.bfloat16
    assert 0 < largest_difference(autocast, exact) < 0.1
    assert 0 < largest_difference(pure, exact) < 0.1


def test_a_client_optimizer(two: dict[str, Any], tmp_path: Path) -> None:
    """Trainer(optimizers=(optimizer, None)): one process and DDP agree."""
    model = tiny_llama()
    optimizer = lowrank_ds.FiraAdamW(lowrank_ds.param_groups(model, **hf.FIRA), lr=1e-2, weight_decay=0.1)
    alone = hf.trained(hf.arguments(tmp_path), model, optimizers=(optimizer, None))
    assert largest_difference(two["client"], alone) < LIMIT
    assert largest_difference(alone, hf.by_hand(named=False)) < LIMIT


# --- the ds_config --------------------------------------------------------------------------------------------------
def test_auto_is_filled(two: dict[str, Any]) -> None:
    """optimizer.params and scheduler.params "auto" take what the TrainingArguments say."""
    filled = two["filled"]
    assert filled["class"] == "FiraAdamW"
    options = {"betas": [0.9, 0.99], "eps": 1e-7, "weight_decay": 0.1, "rank": 8, "update_proj_gap": 4}
    assert [{**g, "betas": list(g["betas"])} for g in filled["options"]] == [options]
    assert filled["rates"] == pytest.approx([1e-2 * hf.linear(step) for step in range(hf.STEPS)])
    behind = lambda step: hf.linear(max(step - 1, 0))  # DeepSpeed moves its schedules after the step
    expected = hf.by_hand(named=False, rate=behind, betas=(0.9, 0.99), eps=1e-7)
    assert largest_difference(filled["weights"], expected) < LIMIT


def test_what_nobody_fills_is_refused(two: dict[str, Any]) -> None:
    """`rank: "auto"`, and betas without Trainer: accelerate names the key before we are asked."""
    assert "`optimizer.params.rank` without `auto`" in two["unfilled"]["trainer"]
    assert "`optimizer.params.betas` without `auto`" in two["unfilled"]["accelerate"]


# --- accelerate -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fira() -> dict[str, torch.Tensor]:
    """One process, decay on everything, no schedule."""
    return training.one_process("fira", weight_decay=0.1, subspace="power")  # the default


def check_accelerated(run: tuple[dict, dict], fira: dict[str, torch.Tensor]) -> None:
    """Equal to one process, and `load_state` continues bit for bit."""
    straight, resumed = run
    assert largest_difference(straight, fira) < LIMIT
    assert largest_difference(straight, resumed) == 0.0


@pytest.mark.parametrize("case", ["plain False", "zero2 False", "zero2 True"])
def test_accelerate(case: str, two: dict[str, Any], fira: dict[str, torch.Tensor]) -> None:
    """`Accelerator().prepare`: DDP, a client optimizer under ZeRO, a ds_config's through DummyOptim (True)."""
    check_accelerated(two[f"accelerate {case}"], fira)


def test_accelerate_may_not_replace_the_optimizer(two: dict[str, Any]) -> None:
    """offload_optimizer with a client optimizer: accelerate would train DeepSpeedCPUAdam instead; refused."""
    assert re.search("replaces.*DeepSpeedCPUAdam.*zero_force_ds_cpu_optimizer", two["offloaded"])


def test_accelerate_under_fsdp2(fsdp2: dict[str, Any], fira: dict[str, torch.Tensor]) -> None:
    """accelerate swaps the parameters for DTensors after the optimizer was built."""
    check_accelerated(fsdp2["accelerate"], fira)


# --- what the factory decides ---------------------------------------------------------------------------------------
def built(model: Any, name: str = "FiraAdamW", args: Any = None, **options: Any) -> Any:
    """What Trainer would build."""
    factory, kwargs = for_trainer(name, args, **options)
    return factory()(model, **kwargs)


def names_of(optimizer: Any, projected: bool, decayed: bool) -> set[str]:
    """The parameters of the groups that (do not) project and decay."""
    groups = [
        g for g in optimizer.param_groups if (g["rank"] is not None, g["weight_decay"] > 0) == (projected, decayed)
    ]
    return {name for g in groups for name in g["param_names"]}


def test_groups_follow_trainers_rule() -> None:
    """Projected, plain with decay, plain without: biases and norms do not decay; frozen parameters are left out."""
    from transformers import Trainer

    model = tiny_llama(attention_bias=True)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    optimizer = built(model, rank=8, weight_decay=0.1, lr=1e-2)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    decay = set(Trainer.get_decay_parameter_names(None, model)) & trained
    matrices = {n for n in decay if re.search("_proj.weight", n)}
    assert len(matrices) == 13
    assert names_of(optimizer, True, True) == matrices
    assert names_of(optimizer, False, True) == decay - matrices == {"model.embed_tokens.weight", "lm_head.weight"}
    assert names_of(optimizer, False, False) == trained - decay
    assert not names_of(optimizer, True, False)


def test_arguments_fill_what_the_options_leave_open(tmp_path: Path) -> None:
    """lr, weight_decay, betas; eps only where it was changed; an option always wins."""
    args = hf.arguments(tmp_path, learning_rate=3e-4, adam_beta1=0.8)
    group = built(tiny_llama(), args=args, rank=8).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (3e-4, 0.1, (0.8, 0.999), 1e-6)
    changed = hf.arguments(tmp_path, adam_epsilon=1e-5)
    assert built(tiny_llama(), args=changed, rank=8).param_groups[0]["eps"] == 1e-5
    own = built(tiny_llama(), args=changed, rank=8, lr=0.5, weight_decay=0.2, eps=1e-4, betas=(0.5, 0.6)).param_groups[
        0
    ]
    assert (own["lr"], own["weight_decay"], own["betas"], own["eps"]) == (0.5, 0.2, (0.5, 0.6), 1e-4)
    flora = built(tiny_llama(), "Flora", changed, rank=8).param_groups[0]
    assert (flora["lr"], flora["weight_decay"], flora["eps"], flora["beta1"]) == (1e-2, 0.1, (1e-30, 1e-3), 0.9)
    args.learning_rate = 7e-4  # a hyper-parameter search sets it after the factory was made
    assert built(tiny_llama(), args=args, rank=8).param_groups[0]["lr"] == 7e-4


@pytest.mark.parametrize("name", [cls.__name__ for cls in lowrank_ds.algorithms.ALGORITHMS])
def test_every_algorithm_trains(name: str, tmp_path: Path) -> None:
    """Trainer with each algorithm: projected, finite, changed."""
    args = hf.arguments(tmp_path, learning_rate=1e-3, max_steps=3)
    rank = {"ApolloMini": 1, "Lomo": None, "AdaLomo": None}.get(name, 8)
    run = hf.trainer(args, optimizer_cls_and_kwargs=for_trainer(name, args, rank=rank))
    run.train()
    optimizer = hf.inner(run.optimizer)
    assert type(optimizer).__name__ == name and len(names_of(optimizer, True, True)) == (14 if rank else 0)
    moved = largest_difference(hf.weights(run.model), hf.weights(tiny_llama()))
    assert 0 < moved < 0.1


def test_rank_none_is_plain_adam(tmp_path: Path) -> None:
    """rank=None trains without projection, with the same decay groups."""
    optimizer = built(tiny_llama(), args=hf.arguments(tmp_path), rank=None)
    assert not names_of(optimizer, True, True) and len(names_of(optimizer, False, True)) == 16


ERRORS = [
    (lambda a: for_trainer("FiraAdam", a), ValueError, "unknown algorithm 'FiraAdam'; did you mean 'FiraAdamW'"),
    (lambda a: for_trainer("FiraAdamW", a, rnak=8), ValueError, "unknown option 'rnak'; did you mean 'rank'"),
    (lambda a: for_trainer("FiraAdamW", a, rank="auto"), ValueError, 'rank is "auto"'),
    (lambda a: for_trainer("FiraAdamW", {"lr": 1.0}), TypeError, "args must be a TrainingArguments or None, got dict"),
    (lambda a: for_trainer("Flora"), ValueError, "no learning rate, which Trainer's scheduler needs"),
    (lambda a: for_trainer("Flora", a, relative_step=True), ValueError, "relative_step=True sets the learning rate"),
    (lambda a: built(tiny_llama(), args=a, rank=64), ValueError, r"rank 64 is larger than min\(m, n\)"),
    (lambda a: built(tiny_llama(), args=a, rank=8, target_modules=["attnetion"]), ValueError, "matches no parameter"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message[:20] for *_, message in ERRORS])
def test_errors_name_the_way_out(call: Any, error: type, message: str, tmp_path: Path) -> None:
    """Misuse is refused when the factory is made, or when Trainer hands over the model."""
    with pytest.raises(error, match=message):
        call(hf.arguments(tmp_path))


def test_trainers_own_galore_options_are_refused(tmp_path: Path) -> None:
    """optim_args and optim_target_modules would be ignored without a word."""
    for option, value in (("optim_args", "rank=8"), ("optim_target_modules", ["attn"])):
        with pytest.raises(ValueError, match=f"{option}=.*Give the options to for_trainer"):
            for_trainer("FiraAdamW", hf.arguments(tmp_path, **{option: value}))


def adapted(**config: Any) -> Any:
    """The tiny LLaMA with LoRA adapters of rank 4 on the attention."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **config))


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_adapters_alone_are_refused(targets: list[str] | None, tmp_path: Path) -> None:
    """LoRA only: nothing to project, said in words; rank=None is the way to train them."""
    with pytest.raises(ValueError, match="8 adapter parameters .*low-rank already.*modules_to_save.*rank=None"):
        built(adapted(), args=hf.arguments(tmp_path), rank=2, target_modules=targets)
    assert len(built(adapted(), args=hf.arguments(tmp_path), rank=None)._originals) == 8


def test_whole_layers_beside_adapters_are_projected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """modules_to_save is projected, adapters are trained plainly with a warning, the rest is frozen; it trains."""
    model, args = adapted(modules_to_save=["up_proj"]), hf.arguments(tmp_path)
    with caplog.at_level(logging.WARNING, "lowrank_ds"):
        run = hf.trainer(args, model)
        run.train()
    optimizer = hf.inner(run.optimizer)
    assert all("modules_to_save" in name for name in names_of(optimizer, True, True))
    assert len(names_of(optimizer, True, True)) == 2
    assert all("lora_" in name for name in names_of(optimizer, False, True))
    assert "8 adapter parameters" in caplog.text and "without projection" in caplog.text
    changed = model.base_model.model.model.layers[0].mlp.up_proj.modules_to_save.default.weight
    assert (changed - tiny_llama().model.layers[0].mlp.up_proj.weight).abs().max() > 1e-4


# --- an unmodified script -------------------------------------------------------------------------------------------
def launcher(kind: str) -> list[str]:
    """The command that starts two processes of `lowrank_ds run`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = str(Path(sys.executable).with_name(kind))
    if kind == "torchrun":
        return [command, "--nproc_per_node", "2", "--master_port", port, "-m", "lowrank_ds", "run"]
    return [command, "--num_gpus", "2", "--master_port", port, "--module", "lowrank_ds", "run"]


def script_arguments(folder: Path, stage: int) -> dict[str, Any]:
    """The script's arguments, without engine and optimizer; writes the model and the text.

    From scratch at stage 2, from a checkpoint at stage 3: there transformers draws other initial weights.
    """
    tiny_llama(vocab_size=256).save_pretrained(folder / "model")
    start = "config_name" if stage == 2 else "model_name_or_path"
    (folder / "text.txt").write_text(
        "".join((ROOT / "README.md").read_text().encode("ascii", "ignore").decode())[:4000]
    )
    return {
        start: folder / "model", "train_file": folder / "text.txt", "output_dir": folder / "out",
        "max_steps": hf.STEPS, "learning_rate": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 2,
        "max_grad_norm": 0.5, "save_steps": hf.HALF, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "seed": 7,
    }  # fmt: skip


def started(kind: str, stage: int, folder: Path) -> Path:
    """The output folder of tests/clm_script.py, run unmodified by a launcher with a ds_config that names us."""
    given = script_arguments(folder, stage)
    params = {**hf.AUTO, "alpha": 0.5}
    config = {**hf.auto_config(stage), "optimizer": {"type": "FiraAdamW", "params": params}}
    (folder / "ds.json").write_text(json.dumps(config))
    given |= {"deepspeed": folder / "ds.json", "per_device_train_batch_size": 6}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"),
    }  # fmt: skip
    command = [*launcher(kind), str(ROOT / "tests/clm_script.py"), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "out"


def script_on_one_process(folder: Path, stage: int, **more: Any) -> Any:
    """The script's model after the same training in this process."""
    from tests import clm_script

    given = script_arguments(folder, stage)
    start = {key: given.pop(key) for key in ("config_name", "model_name_or_path") if key in given}
    model = clm_script.ModelArguments(**start)
    data = clm_script.DataArguments(train_file=str(given.pop("train_file")))
    args = hf.arguments(folder, **{**given, "per_device_train_batch_size": 12, "train_sampling_strategy": "random"})
    args.weight_decay, args.save_strategy = 0.0, "no"
    if not more:
        more["optimizer_cls_and_kwargs"] = for_trainer("FiraAdamW", args, **hf.FIRA, alpha=0.5, eps=1e-8)
    run = clm_script.build_trainer(model, data, args, **more)
    run.train()
    return run.model


@pytest.mark.parametrize(("kind", "stage"), [("torchrun", 2), ("deepspeed", 3)])
def test_an_unmodified_script(kind: str, stage: int, tmp_path: Path) -> None:
    """Projection seen from outside: the checkpoint's state, and weights equal to one process of ours, not AdamW's."""
    from safetensors.torch import load_file

    assert "lowrank" not in (ROOT / "tests/clm_script.py").read_text()
    out = started(kind, stage, tmp_path)
    check_checkpoint(out / f"checkpoint-{hf.STEPS}", stage)
    found = load_file(out / "model.safetensors")
    ours = hf.weights(script_on_one_process(tmp_path, stage))
    adamw = hf.weights(script_on_one_process(tmp_path, stage, optimizers=(None, None)))
    assert largest_difference(found, ours) < LIMIT
    assert largest_difference(found, adamw) > 1e-3


def check_checkpoint(folder: Path, stage: int) -> None:
    """The optimizer's state in the files of both ranks: a projector and rank-8 moments for each of 14 matrices."""
    files = sorted(folder.glob("global_step*/*optim_states.pt"))
    assert len(files) == 2
    names: set[str] = set()
    for file in files:
        saved = torch.load(file, weights_only=False)["optimizer_state_dict"]
        state = saved["base_optimizer_state"] if stage == 2 else saved["optimizer_state_dict"]
        for tensors in state["state"].values():
            names |= {key.split("::")[0] for key in tensors if key.endswith("::projector")}
    assert len(names) == 14 and not any("embed" in name or "norm" in name for name in names)
