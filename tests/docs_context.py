"""What the pages' Python blocks presuppose: a tiny model, text for it, an optimizer. Run in a process of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.docs_blocks import ROOT, Block

WIDTH = 128  # the pages ask for rank 128, so no matrix may be narrower


def context() -> dict[str, Any]:
    """Names that blocks may use without saying where they come from.

    `model` (LLaMA, 2 layers, all matrices at least 128 wide), `optimizer` (of that model), `dataset` (8 samples, each
    a dict of token tensors (16,)), `loader` and `batches` (2 batches of 4), `batch` (one of them), `folder` (a path
    that does not exist yet), `torch`.
    """
    import torch
    from torch.utils.data import DataLoader

    import lowrank_ds
    from tests.cluster import tiny_llama

    model = tiny_llama(
        vocab_size=WIDTH, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=4, num_key_value_heads=4
    )
    tokens = torch.randint(0, WIDTH, (8, 16), generator=torch.Generator().manual_seed(0))
    dataset = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    loader = DataLoader(dataset, batch_size=4)
    batches = list(loader)
    optimizer = lowrank_ds.FiraAdamW(lowrank_ds.param_groups(model, rank=16), lr=0.01)
    return {
        "torch": torch, "model": model, "optimizer": optimizer, "dataset": dataset, "loader": loader,
        "batches": batches, "batch": batches[0], "folder": "saved",
    }  # fmt: skip


def run_page(rank: int, world: int, blocks: list[Block], folder: str) -> int:
    """Run a page's Python blocks in one namespace; answers how many. For tests.cluster.launch(1, ...).

    A failure's traceback names the page and the line in it. Blocks that are "not run" are compiled all the same.
    """
    import torch.distributed as dist

    from tests.cluster import quiet_deepspeed

    quiet_deepspeed()
    prepare_folder(Path(folder))
    own = any("init_process_group(" in block.text for block in blocks)
    if own:
        dist.destroy_process_group()
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    names: dict[str, Any] = {"__name__": "docs", **context()}
    done = 0
    for block in blocks:
        if block.fresh:
            names.update(context())
        parts = [compiled(block.page, line, text) for line, text in block.before]
        parts.append(compiled(block.page, block.line, block.text))
        if block.reason is None:
            for part in parts:
                exec(part, names)
            done += 1
    if own and not dist.is_initialized():
        dist.init_process_group("gloo")  # tests.cluster ends it
    return done


def compiled(page: str, line: int, text: str) -> Any:
    """Code whose tracebacks name the page and its line."""
    return compile("\n" * (line - 1) + text, page, "exec", dont_inherit=True)  # not this file's annotations


def prepare_folder(folder: Path) -> None:
    """Go to an empty folder that has what relative paths in the pages mean: ds_configs/, launch/, LICENSE."""
    for name in ("ds_configs", "launch", "LICENSE"):
        (folder / name).symlink_to(ROOT / name)
    os.chdir(folder)


def check_settings(rank: int, world: int, blocks: list[Block], folder: str) -> list[str]:
    """What is wrong with JSON and YAML blocks, a message each. For tests.cluster.launch(1, ...).

    A part of a JSON file (`"optimizer": {...}`) counts as an object of its own. What has an "optimizer" or a
    "zero_optimization" section is a ds_config, and an engine is built with it.
    """
    from tests.cluster import quiet_deepspeed

    quiet_deepspeed()
    prepare_folder(Path(folder))
    wrong = []
    for block in blocks:
        if block.reason is not None:
            continue
        try:
            _check_json(block) if block.language == "json" else _check_yaml(block)
        except Exception as error:
            wrong.append(f"{block.where}: {type(error).__name__}: {error}")
    return wrong


def _check_json(block: Block) -> None:
    text = block.text.strip()
    found = json.loads(text if text[0] in "{[" else "{" + text + "}")
    if isinstance(found, dict) and {"optimizer", "zero_optimization"} & set(found):
        _build(found)


def _build(ds_config: dict[str, Any]) -> None:
    """An engine from a ds_config or a part of one; what Trainer fills in ("auto") is left out."""
    import deepspeed

    import lowrank_ds

    config = {"gradient_clipping": 0.0} | _settled(ds_config) | {"train_micro_batch_size_per_gpu": 1}
    config.pop("train_batch_size", None)
    names = context()
    own = {} if "optimizer" in config else {"optimizer": names["optimizer"]}
    engine, optimizer, *_ = deepspeed.initialize(model=names["model"], config=config, **own)
    asked = config.get("optimizer", {}).get("type")
    if asked in lowrank_ds.__all__:
        assert type(engine.basic_optimizer).__name__ == asked, f"{type(engine.basic_optimizer)} is not {asked}"


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _settled(v) for k, v in value.items() if v != "auto"}
    return value


def _check_yaml(block: Block) -> None:
    import yaml

    yaml.safe_load(block.text)
    if block.flags is not None:
        from tests import docs_commands

        file = Path(f"flags_{block.line}.yaml")
        file.write_text(block.text)
        docs_commands.check_flags(block.flags, file)
