"""The programs in launch/ and the files in ds_configs/: data, configs, training runs, and the quickstart itself."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lowrank_ds  # noqa: F401  the ds_configs name its optimizers
from ds_configs import generate
from launch import prepare_corpus
from launch.data import BlockOrder, LocalBatches, cut_blocks, read_documents
from launch.options import BatchPlan, parse
from tests.cluster import launch, quiet_deepspeed, tiny_llama

ROOT = Path(__file__).parents[1]
DS_CONFIGS = sorted(path.name for path in (ROOT / "ds_configs").glob("zero*.json"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vendored corpus, split and tokenised."""
    directory = tmp_path_factory.mktemp("corpus") / "austen"
    prepare_corpus.prepare(directory, 4096)
    return directory


def shell(*command: object, **variables: str) -> str:
    """Output of a command that must succeed, run from the repository's root."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables}
    done = subprocess.run(
        [str(c) for c in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def pretrain(corpus: Path, output: Path, *arguments: object, processes: int = 1) -> dict:
    """summary.json of a short pretrain.py run."""
    shell(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes,
        "launch/pretrain.py", "--model", "ds_configs/models/llama_tiny.json", "--tokenizer", corpus / "tokenizer",
        "--train-data", corpus / "train.jsonl", "--valid-data", corpus / "valid.jsonl", "--cache-dir", corpus / "cache",
        "--seq-len", 64, "--batch-size", 4, "--steps", 3, "--eval-tokens", 2048, "--log-every", 1, "--dtype", "fp32",
        "--output", output, *arguments,
    )  # fmt: skip
    return json.loads((output / "summary.json").read_text())


# --- data ------------------------------------------------------------
@pytest.mark.parametrize("blocks", [1, 2, 7, 100, 1000])
def test_block_order_is_a_new_permutation_in_each_epoch(blocks: int) -> None:
    """Every block once an epoch, another order in the next one and with another seed."""
    first, second = (BlockOrder(blocks, 3)(np.arange(e * blocks, (e + 1) * blocks)) for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(blocks))
    if blocks >= 100:
        assert list(first) != list(second) != list(range(blocks))
        assert list(first) != list(BlockOrder(blocks, 4)(np.arange(blocks)))


def test_batches_do_not_depend_on_the_number_of_processes() -> None:
    """The samples of a step are the same for 1, 2 and 4 processes with any accumulation."""
    blocks = np.arange(500).reshape(-1, 5)

    def samples(world: int, micro: int, step: int) -> list:
        plan = BatchPlan.make(8, micro, None, world)
        rows = [
            row
            for rank in range(world)
            for part in LocalBatches(blocks, plan, rank, 0).at(step)
            for row in part.tolist()
        ]
        return sorted(rows)

    for step in (0, 5):
        assert samples(1, 8, step) == samples(2, 2, step) == samples(4, 1, step)


def test_the_corpus_is_split_by_work_and_prepared_once(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    """The last 5 % of each novel is held out; a second call does nothing; the tokenizer round-trips."""
    train, valid = ((corpus / f"{name}.jsonl").read_text() for name in ("train", "valid"))
    assert 0.04 < len(valid) / (len(train) + len(valid)) < 0.06
    assert not {json.loads(line)["text"] for line in valid.splitlines()} & {
        json.loads(x)["text"] for x in train.splitlines()
    }
    prepare_corpus.prepare(corpus, 4096)
    assert "already prepared" in capsys.readouterr().out


def test_text_formats_give_the_same_documents(tmp_path: Path) -> None:
    """jsonl, jsonl.gz and parquet."""
    from pyarrow import Table, parquet

    documents = ["one\ntwo", "trois: été"]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in documents)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(Table.from_pydict({"text": documents}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json.gz", "a.parquet"):
        assert list(read_documents(tmp_path / name, "text")) == documents
    with pytest.raises(SystemExit, match="has no field 'body'; set --text-key"):
        list(read_documents(tmp_path / "a.jsonl", "body"))
    with pytest.raises(SystemExit, match="3 tokens do not fill one sequence of --seq-len 8"):
        cut_blocks(np.arange(3), 8, "--train-data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --deepspeed_config FILE"),
        (["--optimizer", "X"], "give either --train-data FILES or --dataset NAME"),
        (["--optimizer", "X", "--train-data", "a"], "--train-data needs --valid-data"),
        (["--optimizer", "X", "--dataset", "c4", "--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_pretrain_flags_are_checked(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    """A message names the flag and what to do."""
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--tokenizer", "t", "--steps", "1", "--output", "o", *arguments])
    assert message in capsys.readouterr().err


# --- configs ------------------------------------------------------------
def test_generated_files_are_up_to_date() -> None:
    """ds_configs/*.json are what generate.py writes."""
    assert generate.stale_files() == []


def accepted(rank: int, world: int) -> dict[str, str]:
    """{ds_config: optimizer built from it}; every file of ds_configs on a small bf16 LLaMA, one step each."""
    deepspeed, found = quiet_deepspeed(), {}
    sizes = {"hidden_size": 144, "intermediate_size": 160, "num_attention_heads": 1}
    for name in DS_CONFIGS:
        config = json.loads((ROOT / "ds_configs" / name).read_text())
        config["train_micro_batch_size_per_gpu"] = 2
        for section in ("offload_optimizer", "offload_param"):
            config["zero_optimization"].get(section, {})["pin_memory"] = False  # pinning needs an accelerator
        engine = deepspeed.initialize(model=tiny_llama(**sizes), config=config)[0]
        batch = tiny_batch()
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()
        state = [key for s in engine.basic_optimizer.state.values() for key in s]
        projects = any(key.endswith(("projector", "::refreshes")) for key in state)
        found[name] = type(engine.basic_optimizer).__name__ + (" projecting" if projects else "")
        engine.destroy()
    return found


def tiny_batch():
    """Two sequences."""
    import torch

    return torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))


def test_every_ds_config_is_accepted_and_projects() -> None:
    """Plain DeepSpeed takes each file as it is (pinned memory apart, on CPU) and trains projected."""
    names = {"fira": "FiraAdamW", "galore": "GaLoreAdamW", "apollo": "ApolloAdamW", "flora": "Flora"}
    found = launch(2, accepted)[0]
    assert len(DS_CONFIGS) == 17
    for name in DS_CONFIGS:
        kind = name.removesuffix(".json").split("_")[-1]
        assert found[name] == ("AdamW" if kind == "adamw" else f"{names[kind]} projecting"), name


# --- whole runs ------------------------------------------------------------
def test_engines_reach_the_same_perplexity(corpus: Path, tmp_path: Path) -> None:
    """pretrain.py: one process, DDP, ZeRO-2 and ZeRO-3 with accumulation and checkpointing end in the same place."""
    plain = ["--optimizer", "FiraAdamW", "--lr", 0.01, "--rank", 32, "--optimizer-args", '{"update_proj_gap": 2}']
    zero = ["--lr", 0.01, "--rank", 32, "--optimizer-args", '{"update_proj_gap": 2}', "--deepspeed_config"]
    runs = {
        "one": pretrain(corpus, tmp_path / "one", *plain),
        "ddp": pretrain(corpus, tmp_path / "ddp", *plain, "--activation-checkpointing", processes=2),
        "zero2": pretrain(
            corpus, tmp_path / "z2", *zero, "ds_configs/zero2_fira.json", "--micro-batch", 1, processes=2
        ),
        "zero3": pretrain(
            corpus, tmp_path / "z3", *zero, "ds_configs/zero3_fira.json", "--micro-batch", 2, processes=2
        ),
    }
    for name, run in runs.items():
        assert run["perplexity"] == pytest.approx(runs["one"]["perplexity"], rel=1e-5), name
    assert runs["zero2"]["world_size"] == 2 and len(runs["zero3"]["optimizer_state_bytes_per_rank"]) == 2
    text = shell(sys.executable, "launch/generate.py", tmp_path / "z3" / "model", "--tokens", 5)
    assert text.startswith("It is a truth")


def test_the_quickstart_runs_end_to_end(tmp_path: Path) -> None:
    """`bash launch/quickstart.sh` in this environment, few steps: table, plot, checkpoints and models."""
    output = shell(
        "bash", "launch/quickstart.sh", QUICKSTART_SKIP_INSTALL="1", QUICKSTART_PYTHON=sys.executable,
        QUICKSTART_STEPS="4", QUICKSTART_OUTPUT=str(tmp_path / "quick"),
    )  # fmt: skip
    assert "FiraAdamW: 28 parameters projected (rank [32])" in output
    assert "held-out ppl" in output and "FiraAdamW" in output and "AdamW" in output and "ETA" in output
    assert (tmp_path / "quick" / "loss.png").stat().st_size > 5000
    for run in ("fira", "adamw"):
        assert (tmp_path / "quick" / run / "model" / "model.safetensors").exists()
        assert any((tmp_path / "quick" / run / "checkpoint").rglob("*optim_states.pt"))
