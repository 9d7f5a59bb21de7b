"""Train the tiny LLaMA through Hugging Face's Trainer and accelerate; what test_huggingface.py runs on each rank."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import lowrank_ds
from tests.cluster import batches, quiet_deepspeed, tiny_llama
from tests.training import GAP, STEPS

HALF = 6  # where the checkpoint is; refreshes (gap 4) fall at steps 0 and 4 before it, 8 after it
FIRA = {"rank": 8, "update_proj_gap": GAP}


class Rows(torch.utils.data.Dataset):
    """The rows of `batches(steps)`, in order: every world size sees the same global batches."""

    def __init__(self, steps: int = STEPS) -> None:
        self.rows = torch.cat(batches(steps))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def forget_engine() -> None:
    """Undo what Trainer and accelerate keep for the whole process, so that another engine can follow."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def fsdp2_on_cpu() -> None:
    """Let accelerate use FSDP2 on CPU: it leaves MULTI_CPU out of the types that may, and trains DDP without a word."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__
    if getattr(original, "is_shim", False):
        return

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    patched.is_shim = True
    AcceleratorState.__init__ = patched


def arguments(folder: Path, world: int = 1, **more: Any) -> Any:
    """TrainingArguments of STEPS steps with a schedule, clipping, decay and logs."""
    from transformers import TrainingArguments

    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 12 // world, "max_steps": STEPS,
        "learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2,
        "max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "train_sampling_strategy": "sequential", "use_cpu": True, "dataloader_pin_memory": False, "log_level": "error",
    }  # fmt: skip
    return TrainingArguments(**{**settings, **more})


def trainer(args: Any, model: Any = None, steps: int = STEPS, **more: Any) -> Any:
    """A Trainer over `Rows`, by default with Fira from `for_trainer`."""
    from transformers import Trainer

    if "optimizers" not in more and not (args.deepspeed and "optimizer" in args.deepspeed):
        more.setdefault("optimizer_cls_and_kwargs", lowrank_ds.for_trainer("FiraAdamW", args, **FIRA))
    return Trainer(model=model or tiny_llama(), args=args, train_dataset=Rows(steps), **more)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """{name: a copy of the whole weight}, gathered under ZeRO-3 and FSDP2."""
    from tests.training import weights_of

    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        return {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}
    return weights_of(model)


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """Our optimizer inside the wrappers of accelerate and DeepSpeed."""
    while not isinstance(optimizer, lowrank_ds.optimizer.LowRankOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def engine_arguments(engine: str, folder: Path, world: int, **more: Any) -> Any:
    """TrainingArguments for "plain" (one process or DDP), "zero1" to "zero3", or "fsdp2"."""
    forget_engine()
    if engine == "fsdp2":
        fsdp2_on_cpu()
        more = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}, **more}
    if engine.startswith("zero"):
        quiet_deepspeed()
        more["deepspeed"] = {**auto_config(int(engine[-1])), **more.pop("deepspeed", {})}
    return arguments(folder, world, **more)


def auto_config(stage: int) -> dict[str, Any]:
    """A ds_config that leaves to Trainer all it may."""
    zero = {"stage": stage, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": 200,
            "stage3_gather_16bit_weights_on_model_save": True}  # fmt: skip
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**dict.fromkeys(keys, "auto"), "zero_optimization": zero}


def check_engine(engine: str, run: Any, world: int) -> None:
    """The model really is in the hands of `engine`: accelerate on CPU falls back to DDP without a word."""
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    wrapped = run.model_wrapped
    if engine == "fsdp2":
        assert all(isinstance(p, DTensor) for p in wrapped.parameters())
        assert all(isinstance(p, DTensor) for g in inner(run.optimizer).param_groups for p in g["params"])
    elif engine == "plain":
        assert isinstance(wrapped, DistributedDataParallel) == (world > 1)
    else:
        assert wrapped.zero_optimization_stage() == int(engine[-1])


def straight_and_resumed(
    rank: int, world: int, folder: str, engine: str, build: Callable[..., Any] = trainer, **more: Any
) -> tuple[dict, dict, list[dict]]:
    """(weights after STEPS steps, the same after HALF steps, a checkpoint and a new process' resume, the log).

    build: makes the Trainer from arguments and, the second time, another model. more: TrainingArguments.
    """
    place = Path(folder) / engine
    more |= {"save_strategy": "steps", "save_steps": HALF}
    straight = build(engine_arguments(engine, place, world, **more))
    straight.train()
    check_engine(engine, straight, world)
    expected, log = weights(straight.model), straight.state.log_history
    del straight
    resumed = build(engine_arguments(engine, place, world, **more), tiny_llama(seed=9))
    resumed.train(resume_from_checkpoint=str(place / f"checkpoint-{HALF}"))
    check_engine(engine, resumed, world)
    return expected, weights(resumed.model), log


# --- accelerate without Trainer -------------------------------------------------------------------------------------
def accelerator(engine: str, world: int, optimizer: dict | None = None, **more: Any) -> Any:
    """An Accelerator for "plain", "zero<stage>" or "fsdp2"; `optimizer` and `more` go into the ds_config."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    forget_engine()
    if engine == "fsdp2":
        fsdp2_on_cpu()
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        return Accelerator(cpu=True, fsdp_plugin=plugin)
    if engine == "plain":
        return Accelerator(cpu=True)
    quiet_deepspeed()
    PartialState(cpu=True)  # else it counts one process; Accelerator(cpu=True) would not use DeepSpeed
    config = {**auto_config(int(engine[-1])), "gradient_clipping": 0.0, "gradient_accumulation_steps": 1, **more}
    if optimizer is not None:
        config["optimizer"] = {"type": "FiraAdamW", "params": {**FIRA, **optimizer}}
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))


def prepared(engine: str, world: int, by_name: bool, model: Any) -> tuple[Any, Any, Any, Any]:
    """(accelerator, model, optimizer, data loader) after `prepare`; `by_name`: the ds_config names the optimizer."""
    from accelerate.utils import DummyOptim

    loader = torch.utils.data.DataLoader(Rows(), batch_size=12 // world)
    if by_name:
        accelerate = accelerator(engine, world, {"lr": "auto", "weight_decay": "auto"})
        optimizer = DummyOptim(model.parameters(), lr=1e-2, weight_decay=0.1)
    else:
        accelerate = accelerator(engine, world)
        groups = lowrank_ds.param_groups(model, rank=8)
        optimizer = lowrank_ds.FiraAdamW(groups, lr=1e-2, update_proj_gap=GAP, weight_decay=0.1)
    return (accelerate, *accelerate.prepare(model, optimizer, loader))


def accelerated(rank: int, world: int, folder: str, engine: str, by_name: bool = False) -> tuple[dict, dict]:
    """(weights after STEPS steps, the same after `save_state`, a new model and `load_state` at HALF)."""
    place = str(Path(folder) / f"accelerate-{engine}-{by_name}")
    accelerate, model, optimizer, loader = prepared(engine, world, by_name, tiny_llama())
    if engine == "fsdp2":
        assert all(hasattr(p, "placements") for p in model.parameters())
    for step, batch in enumerate(loader):
        if step == HALF:
            accelerate.save_state(place)
        _accelerated_step(accelerate, model, optimizer, batch)
    expected = weights(accelerate.unwrap_model(model))
    accelerate, model, optimizer, loader = prepared(engine, world, by_name, tiny_llama(seed=9))
    accelerate.load_state(place)
    for batch in accelerate.skip_first_batches(loader, HALF):
        _accelerated_step(accelerate, model, optimizer, batch)
    return expected, weights(accelerate.unwrap_model(model))


def _accelerated_step(accelerate: Any, model: Any, optimizer: Any, batch: dict[str, Tensor]) -> None:
    accelerate.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()


# --- one process, by hand -------------------------------------------------------------------------------------------
def cosine(step: int) -> float:
    """The schedule of `arguments()`: two steps of warm-up, then half a cosine."""
    return step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / (STEPS - 2))) / 2


def linear(step: int) -> float:
    """WarmupDecayLR with two steps of warm-up."""
    return step / 2 if step < 2 else (STEPS - step) / (STEPS - 2)


def by_hand(named: bool = True, rate: Callable[[int], float] = cosine, **options: Any) -> dict[str, Tensor]:
    """Weights after what `arguments()` ask for, written out: groups, schedule, clipping.

    named: decay on everything but norms, as Trainer groups; else on everything, as DeepSpeed's bare list does.
    """
    model = tiny_llama()
    plain = lambda n: "norm" in n or "embed" in n or "lm_head" in n
    parts: dict[tuple[bool, bool], list] = {}
    for name, p in model.named_parameters():
        parts.setdefault((plain(name), named and "norm" in name), []).append((name, p))
    groups = [
        {"params": pairs, "rank": None if simple else 8, "weight_decay": 0.0 if free else 0.1}
        for (simple, free), pairs in parts.items()
    ]
    optimizer = lowrank_ds.FiraAdamW(groups, lr=1e-2, update_proj_gap=GAP, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for batch in batches(STEPS):
        model(input_ids=batch, labels=batch).loss.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return weights(model)


def trained(args: Any, model: Any = None, **more: Any) -> dict[str, Tensor]:
    """Weights after Trainer has trained."""
    run = trainer(args, model, **more)
    run.train()
    return weights(run.model)


# --- the rest of what two processes run -----------------------------------------------------------------------------
AUTO = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", **FIRA}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        **dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
        "warmup_type": "linear",
    },
}


def client_optimizer(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    """Trainer(optimizers=(optimizer, None)) under DDP."""
    args = engine_arguments("plain", Path(folder) / "client", world)
    model = tiny_llama()
    optimizer = lowrank_ds.FiraAdamW(lowrank_ds.param_groups(model, **FIRA), lr=1e-2, weight_decay=0.1)
    return trained(args, model, optimizers=(optimizer, None))


def filled_config(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Trainer with everything "auto" in the ds_config: what our optimizer received, the logged rates, the weights."""
    config = {"optimizer": {"type": "FiraAdamW", "params": dict(AUTO)}, "scheduler": SCHEDULER}
    more = {"adam_beta2": 0.99, "adam_epsilon": 1e-7}
    run = trainer(engine_arguments("zero2", Path(folder) / "auto", world, deepspeed=config, **more))
    run.train()
    optimizer = run.model_wrapped.basic_optimizer
    keys = ("betas", "eps", "weight_decay", "rank", "update_proj_gap")
    return {
        "class": type(optimizer).__name__,
        "options": [{k: g[k] for k in keys} for g in optimizer.param_groups],
        "rates": [x["learning_rate"] for x in run.state.log_history if "learning_rate" in x],
        "weights": weights(run.model),
    }


def unfilled(rank: int, world: int, folder: str) -> dict[str, str]:
    """What is said about an "auto" that nobody fills: through Trainer, and through accelerate alone."""
    said = {}
    config = {"optimizer": {"type": "FiraAdamW", "params": {**AUTO, "rank": "auto"}}}
    run = trainer(engine_arguments("zero2", Path(folder) / "unfilled", world, deepspeed=config))
    try:
        run.train()
    except ValueError as error:
        said["trainer"] = str(error)
    try:
        from accelerate.utils import DummyOptim

        model = tiny_llama()
        loader = torch.utils.data.DataLoader(Rows(), batch_size=6)
        accelerator("zero2", world, {"betas": "auto"}).prepare(model, DummyOptim(model.parameters(), lr=1e-2), loader)
    except ValueError as error:
        said["accelerate"] = str(error)
    return said


def offloaded(rank: int, world: int, folder: str) -> str:
    """What is said where accelerate would replace a client optimizer; nothing where it would not."""
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    build = lambda: lowrank_ds.FiraAdamW(tiny_llama().named_parameters(), lr=1e-2, rank=8)
    accelerator("zero2", world, zero_optimization=zero, zero_force_ds_cpu_optimizer=False)
    build()
    accelerator("zero2", world, {"lr": 1e-2}, zero_optimization=zero)
    build()
    accelerator("zero2", world, zero_optimization=zero)
    try:
        build()
    except RuntimeError as error:
        return str(error)
    return "nothing"
