"""launch/configs: every file is what its README's table says, builds its optimizer, and trains on files like C4's."""

from __future__ import annotations

import gzip
import json
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.model import read_config
from launch.optimizers import end_names, torch_optimizer
from launch.options import optimizer_overrides, parse
from tests import pretraining

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "launch" / "configs"
FILES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
METHODS = {"galore", "fira", "apollo", "apollo_mini"}
SIZES = {"60m": (58, 128), "130m": (134, 256), "350m": (367, 256), "1b": (1339, 512), "7b": (6738, 1024)}
COLUMNS = ["file", "optimizer", "rank", "lr", "scale", "T", "steps", "10^9 tokens", "clipping", "published perplexity"]


def settings(name: str) -> Namespace:
    """The flags that a file stands for."""
    places = ["--tokenizer", "T", "--train-data", "a", "--valid-data", "b", "--output", "/nowhere"]
    return parse(["--config", str(CONFIGS / f"{name}.yaml"), *places])


def table() -> dict[str, dict[str, str]]:
    """README.md's rows by file."""
    lines = [line.strip("| \n").split(" | ") for line in (CONFIGS / "README.md").read_text().splitlines()]
    at = lines.index(COLUMNS)
    rows = {}
    for cells in lines[at + 2 :]:
        if len(cells) != len(COLUMNS):
            break
        name = cells[0].split("]")[0].removeprefix("[").removesuffix(".yaml")
        assert cells[0] == f"[{name}.yaml]({name}.yaml)"
        rows[name] = dict(zip(COLUMNS, cells, strict=True))
    return rows


@cache
def shapes(model: str) -> nn.Module:
    """The model without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(read_config(str(ROOT / model)))


def test_every_method_and_size_once() -> None:
    """Files and table are the same set."""
    assert set(FILES) == set(table()) == {f"{method}_{size}" for method in METHODS for size in SIZES}


@pytest.mark.parametrize("name", FILES)
def test_file_is_its_row(name: str) -> None:
    """pretrain.py reads from the file what the table says, and what all published runs share."""
    args, row = settings(name), table()[name]
    options = args.optimizer_args
    tokens = args.steps * args.batch_size * args.seq_len / 1e9
    found = {
        "file": row["file"], "optimizer": args.optimizer, "rank": str(args.rank), "lr": f"{args.lr:g}",
        "scale": f"{options.get('scale', options.get('alpha')):g}", "T": str(options["update_proj_gap"]),
        "steps": f"{args.steps:,}", "10^9 tokens": f"{tokens:.1f}", "clipping": f"{args.gradient_clipping:g}",
        "published perplexity": row["published perplexity"],
    }  # fmt: skip
    assert found == row
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    told = row["published perplexity"]
    assert (f"published perplexity {told}." if told != "-" else "no published perplexity.") in first
    assert args.model == f"ds_configs/models/llama_{name.rsplit('_', 1)[1]}.json"
    assert (args.seq_len, args.batch_size, args.min_lr_ratio, args.dtype) == (256, 512, 0.1, "bf16")
    assert args.warmup_steps == args.steps // 10
    assert args.embed_lr is None and "weight_decay" not in options


@pytest.mark.parametrize("name", FILES)
def test_optimizer_of_the_file(name: str) -> None:
    """It takes every option, and projects attention and MLP matrices, all of them and nothing else, to that rank."""
    args = settings(name)
    model = shapes(args.model)
    millions, full = SIZES[name.rsplit("_", 1)[1]]
    assert sum(p.numel() for p in model.parameters()) // 10**6 == millions
    optimizer = torch_optimizer(args.optimizer, model, optimizer_overrides(args), args.embed_lr, end_names(model))
    projected, plain = optimizer.param_groups
    assert projected["rank"] == args.rank and plain["rank"] is None
    wanted = [n for n, p in model.named_parameters() if p.dim() == 2 and ("attn" in n or "mlp" in n)]
    assert projected["param_names"] == wanted and len(wanted) == 7 * model.config.num_hidden_layers
    for key, value in args.optimizer_args.items():
        assert projected[key] == value
    assert projected["weight_decay"] == 0
    expected = {"apollo_mini": 1, "apollo_7b": 256, "fira_7b": 64}
    assert args.rank == expected.get(name, expected.get(name.rsplit("_", 1)[0], full))


def test_trains_files_like_c4s(tmp_path: Path) -> None:
    """Two steps, everything but method, lr, scale and T made small on the command line."""
    data = pretraining.prepare(tmp_path / "data")
    for part, name in (("train", "c4-train.00000-of-01024"), ("valid", "c4-validation.00000-of-00008")):
        texts = [json.loads(line)["text"] for line in (data / f"{part}.jsonl").read_text().splitlines()]
        with gzip.open(data / f"{name}.json.gz", "wt") as file:
            for text in texts:  # C4's three fields
                file.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://a.b/"}) + "\n")
    flags = [
        "--config", CONFIGS / "fira_60m.yaml", "--model", data / "without_dropout.json", "--rank", 8, "--steps", 2,
        "--batch-size", 4, "--seq-len", 16, "--dtype", "fp32", "--tokenizer", data / "tokenizer",
        "--train-data", data / "c4-train.*.json.gz", "--valid-data", data / "c4-validation.*.json.gz",
        "--cache-dir", data / "cache", "--eval-tokens", 256, "--output", tmp_path / "run",
    ]  # fmt: skip
    job = pretraining.Job(1, [str(flag) for flag in flags], tmp_path / "log")
    assert not any(job.wait(300)), job.printed()[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["optimizer"] == "FiraAdamW" and summary["steps"] == 2
    params = {"lr": 0.01, "rank": 8, "update_proj_gap": 200, "alpha": 0.25, "subspace": "svd"}
    assert summary["optimizer_params"] == params
