"""Train the tiny LLaMA through Hugging Face's Trainer and accelerate; what test_huggingface.py runs on each rank."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowrank_ds
from tests.cluster import batches, share, tiny_llama

STEPS = 12
HALF = 6  # where the checkpoint is; refreshes (gap 5) fall at steps 0 and 5 before it, 10 after it
FIRA = {"rank": 8, "update_proj_gap": 5}


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
    gc.collect()


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
