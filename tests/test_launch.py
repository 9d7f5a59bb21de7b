"""The programs in launch/ and the files in ds_configs/: data, configs, training runs, and the quickstart itself."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

import lowrank_ds  # noqa: F401  the ds_configs name its optimizers
from ds_configs import generate
from launch import prepare_corpus
from launch.data import BlockOrder, LocalBatches, cut_blocks, read_documents
from launch.engines import DdpTrainer, Fsdp1Trainer, Fsdp2Trainer, TorchTrainer, hybrid_mesh
from launch.model import read_config
from launch.optimizers import torch_optimizer
from launch.options import BatchPlan, load_ds_config, parse
from launch.processes import Processes
from tests import pretraining
from tests.cluster import launch, quiet_deepspeed, tiny_llama
from tests.training import largest_difference

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


def pretrain(corpus: Path, output: Path, *arguments: object, processes: int = 1, torchrun: bool = False) -> dict:
    """summary.json of a short pretrain.py run; what it printed is in output/printed.

    torchrun: start it by that; else its processes are forked from one that has imported everything, ten times as fast.
    """
    flags = [
        "--model", "ds_configs/models/llama_tiny.json", "--tokenizer", corpus / "tokenizer",
        "--train-data", corpus / "train.jsonl", "--valid-data", corpus / "valid.jsonl", "--cache-dir", corpus / "cache",
        "--seq-len", 64, "--batch-size", 4, "--steps", 3, "--eval-tokens", 2048, "--log-every", 1, "--dtype", "fp32",
        "--output", output, *arguments,
    ]  # fmt: skip
    start = pretraining.TorchrunJob if torchrun else pretraining.Job
    job = start(processes, [str(flag) for flag in flags], output.with_suffix(".log"))
    assert not any(job.wait(300)), job.printed()[-3000:]
    printed = job.printed()
    (output / "printed").write_text(printed)
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


LAYERWISE = ["--optimizer", "X", "--layerwise"]
DATA = ["--optimizer", "X", "--dataset", "c4"]
REDUCE = ["--optimizer", "X", "--reduce-in-subspace"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --deepspeed_config FILE"),
        (["--optimizer", "X"], "give either --train-data FILES or --dataset NAME"),
        (["--optimizer", "X", "--train-data", "a"], "--train-data needs --valid-data"),
        (["--optimizer", "X", "--dataset", "c4", "--steps", "0"], "--steps must be at least 1"),
        (["--engine", "fsdp2", "--deepspeed_config", "z"], "--engine fsdp2 and --deepspeed_config contradict each"),
        (["--engine", "deepspeed", "--optimizer", "X"], "--engine deepspeed needs --deepspeed_config FILE"),
        (
            ["--engine", "fsdp2", "--optimizer", "X", "--hsdp-shard", "2"],
            "--hsdp-shard is for --engine hsdp, not fsdp2",
        ),
        (["--engine", "fsdp3", "--optimizer", "X"], "invalid choice: 'fsdp3'"),
        (["--optimizer", "X", "--clip", "previous"], "--clip previous is for --layerwise"),
        (["--optimizer", "X", "--compress-accumulation"], "compress_accumulation (micro-batches are summed in the"),
        ([*LAYERWISE, "--gradient-clipping", "1"], "--gradient-clipping 1.0 with --layerwise needs --clip, one of two"),
        ([*LAYERWISE, "--clip", "two_pass"], "--clip two_pass needs --gradient-clipping, the largest norm"),
        ([*LAYERWISE, "--engine", "fsdp1"], "FSDP1 fires no hook with the reduced gradient; use --engine fsdp2"),
        (["--layerwise", "--deepspeed_config", "z", "--gradient-clipping", "1"], "DeepSpeed clips before gradients"),
        (["--optimizer", "X", "--wire-dtype", "bf16"], "--wire-dtype bf16 is for --reduce-in-subspace"),
        ([*REDUCE, "--engine", "fsdp2"], "--reduce-in-subspace: --engine fsdp2 has no replicas that all-reduce"),
        ([*REDUCE, "--layerwise"], "--reduce-in-subspace and --layerwise exclude each other"),
        ([*REDUCE, "--gradient-clipping", "1"], "--gradient-clipping 1.0 needs the norm of whole gradients"),
        ([*DATA, "--timeout", "0"], "--timeout must be a number of seconds > 0"),
        ([*DATA, "--timeout", "inf"], "--timeout must be a number of seconds > 0"),
        ([*DATA, "--diagnostics-every", "-1"], "--diagnostics-every must be a number of steps, or 0 for never"),
    ],
)
def test_pretrain_flags_are_checked(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    """A message names the flag and what to do."""
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--tokenizer", "t", "--steps", "1", "--output", "o", *arguments])
    assert message in capsys.readouterr().err


REQUIRED = {"model": "m", "tokenizer": "t", "steps": 9, "output": "o", "dataset": "c4"}


def test_a_yaml_file_holds_the_same_flags(tmp_path: Path) -> None:
    """Types and lists as on the command line, which wins; the engine follows from the rest."""
    file, ds_config = tmp_path / "run.yaml", {**REQUIRED, "deepspeed-config": "z.json"}
    settings = {**REQUIRED, "optimizer": "FiraAdamW", "lr": "1e-3", "optimizer_args": {"alpha": 0.5}, "engine": "fsdp2"}
    more = {"activation-checkpointing": True, "rank": None, "valid_data": ["a", "b"]}
    file.write_text(json.dumps({**settings, **more}))  # JSON is YAML
    args = parse(["--config", str(file), "--steps", "5"])
    assert (args.steps, args.lr, args.rank, args.seed) == (5, 1e-3, None, 0)
    assert args.optimizer_args == {"alpha": 0.5} and args.valid_data == ["a", "b"] and args.activation_checkpointing
    assert args.engine == "fsdp2" and parse([f"--config={file}", "--engine", "ddp"]).engine == "ddp"
    file.write_text(json.dumps(ds_config))
    assert parse(["--config", str(file)]).engine == "deepspeed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\nlr: 1", "there is no flag 'learning_rate'; did you mean 'min_lr_ratio'?"),
        ("step: 1", "there is no flag 'step'; did you mean 'steps'?"),
        ("steps: many", "argument --steps: invalid int value: 'many'"),
        ("activation_checkpointing: 3", "--activation-checkpointing is true or false, not 3"),
        ("- steps", "needs lines such as 'lr: 0.01'"),
        ("steps: [1", "not valid YAML"),
        (None, "no such file"),
    ],
)
def test_yaml_mistakes_are_named(text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """An unknown key with the nearest flag, a bad value as on the command line."""
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse(["--config", str(tmp_path / "run.yaml")])
    assert message in capsys.readouterr().err


def test_hsdp_copies_must_divide_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the flag; without a launcher's variables the flag is asked for."""
    four = Processes(0, 4, 0, torch.device("cpu"))
    with pytest.raises(SystemExit, match="--hsdp-shard 3 does not divide the 4 processes"):
        hybrid_mesh(four, 3)
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SystemExit, match="give --hsdp-shard N"):
        hybrid_mesh(four, None)


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
        projects = any(key.endswith(("projector", "refreshes")) for key in state)
        found[name] = type(engine.basic_optimizer).__name__ + (" projecting" if projects else "")
        engine.destroy()
    return found


def tiny_batch() -> torch.Tensor:
    """Two sequences."""
    return torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))


def test_every_ds_config_is_accepted_and_projects() -> None:
    """Plain DeepSpeed takes each file as it is (pinned memory apart, on CPU) and trains projected."""
    names = {"fira": "FiraAdamW", "galore": "GaLoreAdamW", "apollo": "ApolloAdamW", "flora": "Flora"}
    found = launch(2, accepted)[0]
    assert len(DS_CONFIGS) == 21
    for name in DS_CONFIGS:
        kind = name.removesuffix(".json").split("_")[-1]
        assert found[name] == ("AdamW" if kind == "adamw" else f"{names[kind]} projecting"), name


# --- whole runs ------------------------------------------------------------
FIRA = {"lr": 0.002, "rank": 32, "optimizer-args": {"update_proj_gap": 2}, "gradient-clipping": 0.5}
RUNS = {  # name: (processes, flags beside FIRA's); where --micro-batch is smaller than a process's share: accumulation
    "plain": (1, {}),
    "ddp": (2, {"activation-checkpointing": True, "micro-batch": 1}),
    "zero2": (2, {"deepspeed_config": "ds_configs/zero2_fira.json", "micro-batch": 1}),
    "zero3": (2, {"deepspeed_config": "zero3.json", "micro-batch": 2}),  # with DeepSpeed's activation checkpointing
    "fsdp2": (2, {"engine": "fsdp2", "activation-checkpointing": True, "micro-batch": 1}),
    "fsdp1": (2, {"engine": "fsdp1", "micro-batch": 1}),
    "hsdp": (4, {"engine": "hsdp", "hsdp-shard": 2}),
}
DCP_RUNS = ("plain", "ddp", "fsdp2", "hsdp")


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of one short run a row of RUNS, each from a YAML file."""
    folder = tmp_path_factory.mktemp("runs")
    config = json.loads((ROOT / "ds_configs" / "zero3_fira.json").read_text())
    (folder / "zero3.json").write_text(json.dumps({**config, "activation_checkpointing": {"profile": True}}))
    for name, (processes, flags) in RUNS.items():
        if flags.get("deepspeed_config") == "zero3.json":
            flags = {**flags, "deepspeed_config": str(folder / "zero3.json")}
        optimizer = {} if "deepspeed_config" in flags else {"optimizer": "FiraAdamW"}
        watched = {"diagnostics_every": 2, "timeout": 300}
        (folder / f"{name}.yaml").write_text(json.dumps({**FIRA, **watched, **optimizer, **flags}))
        by_torchrun = name == "fsdp2"
        pretrain(corpus, folder / name, "--config", folder / f"{name}.yaml", processes=processes, torchrun=by_torchrun)
    return folder


def summary(run: Path) -> dict:
    """summary.json."""
    return json.loads((run / "summary.json").read_text())


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights in model/, as transformers loads them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run / "model").state_dict()


def test_engines_end_in_the_same_place(runs: Path, capsys: pytest.CaptureFixture) -> None:
    """Held-out perplexity and weights of every engine, accumulating, clipping and checkpointing, are those of one."""
    expected, differences = saved_weights(runs / "plain"), {}
    for name, (processes, _) in RUNS.items():
        run = summary(runs / name)
        assert run["engine"] == name and len(run["optimizer_state_bytes_per_rank"]) == processes
        assert run["perplexity"] == pytest.approx(summary(runs / "plain")["perplexity"], rel=1e-5), name
        differences[name] = largest_difference(saved_weights(runs / name), expected)
    with capsys.disabled():
        print("\npretrain.py, weights against one process:", {n: f"{d:.1e}" for n, d in differences.items()})
    assert all(difference <= 1e-5 for difference in differences.values()), differences


def test_diagnostics_are_those_of_one_process(runs: Path) -> None:
    """diagnostics.jsonl after 2 steps and at the end, on every engine."""
    for name in RUNS:
        found, expected = (
            [json.loads(line) for line in (runs / run / "diagnostics.jsonl").read_text().splitlines()]
            for run in (name, "plain")
        )
        assert [line["step"] for line in found] == [2, 3], name
        for ours, one in zip(found, expected, strict=True):
            assert ours["summary"] == pytest.approx(one["summary"], rel=1e-3), name
            assert ours["matrices"].keys() == one["matrices"].keys(), name


def test_the_activation_checkpointing_section_is_applied(runs: Path) -> None:
    """Its `profile` has DeepSpeed print the time of every recomputed layer (the weights are compared above)."""
    assert "| fwd: " in (runs / "zero3" / "printed").read_text()
    assert "| fwd: " not in (runs / "zero2" / "printed").read_text()


def builds_late(rank: int, world: int) -> None:
    """Rank 1 has built its model two seconds after the time that --timeout gives."""
    time.sleep(3 * rank)
    Processes(rank, world, rank, torch.device("cpu")).meet(1.0)


def test_a_timeout_begins_when_all_have_built() -> None:
    """Hosts that build at different speeds wait for each other once more."""
    launch(2, builds_late)


def layerwise_and_not(rank: int, world: int) -> list[float]:
    """Largest difference of weights after three steps with and without `layerwise`, under FSDP2 and in (world, 1).

    And with and without `reduce_in_subspace`, in (world, 1).
    """
    processes, found = Processes(rank, world, rank, torch.device("cpu")), []
    batches = [[tiny_batch()[rank : rank + 1], tiny_batch()[1 - rank : 2 - rank, :9]] for _ in range(3)]

    def weights(mesh: object, algorithm: str, options: dict, clip: float, layerwise: dict | None, *more: dict) -> dict:
        build = lambda model, ends: torch_optimizer(algorithm, model, {"lr": 1e-2, "rank": 8, **options}, None, ends)
        parts = tiny_llama(), build, lambda step: 1.0, clip, processes, layerwise, *more
        trainer = Fsdp2Trainer(*parts, mesh=mesh, bf16=False)
        for micro_batches in batches:
            trainer.train_step(micro_batches)
        whole = {name: p.full_tensor().clone() for name, p in trainer.module.named_parameters()}
        if layerwise and "clip" not in layerwise:  # all is done in the backward: each micro-batch is reduced in it
            trainer.backward(batches[0])
            assert all(p.grad is None for p in trainer.module.parameters())
        return whole

    shared, copies = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (world, 1), mesh_dim_names=("r", "s"))
    clipped = {"accumulation_steps": 2, "clip": "two_pass", "max_grad_norm": 0.1}
    compressed = {"accumulation_steps": 2}
    sums = {"compress_accumulation": True, "update_proj_gap": 2}
    for mesh in (shared, copies):
        pair = weights(mesh, "FiraAdamW", {}, 0.1, None), weights(mesh, "FiraAdamW", {}, 0.0, clipped)
        found.append(largest_difference(*pair))
    usual = weights(shared, "GaLoreAdamW", {"update_proj_gap": 2}, 0.0, None)
    found.append(largest_difference(usual, weights(shared, "GaLoreAdamW", sums, 0.0, compressed)))
    found.append(largest_difference(usual, weights(copies, "GaLoreAdamW", {"update_proj_gap": 2}, 0.0, None, {})))
    return found


def test_layerwise_changes_nothing(runs: Path, corpus: Path) -> None:
    """--layerwise with accumulation and the exact norm: the weights of the ordinary run, from the command line too."""
    flags = {**FIRA, "optimizer": "FiraAdamW", "layerwise": True, "clip": "two_pass", "micro-batch": 1}
    (runs / "layerwise.yaml").write_text(json.dumps(flags))
    found = pretrain(corpus, runs / "layerwise", "--config", runs / "layerwise.yaml")
    assert found["layerwise"] and found["engine"] == "plain" and not summary(runs / "plain")["layerwise"]
    assert largest_difference(saved_weights(runs / "layerwise"), saved_weights(runs / "plain")) <= 1e-5
    differences = launch(2, layerwise_and_not)[0]
    assert all(difference <= 1e-5 for difference in differences), differences


def test_layerwise_reaches_the_ds_config(tmp_path: Path) -> None:
    """--layerwise is an option of the optimizer there."""
    given = [f"--{key}={value}" for key, value in REQUIRED.items()]
    args = parse([*given, "--layerwise", "--deepspeed_config", str(ROOT / "ds_configs/zero3_fira.json")])
    assert load_ds_config(args)["optimizer"]["params"]["layerwise"] is True
    file, clip = tmp_path / "clip.json", {"clip": "per_tensor", "max_grad_norm": 1.0}
    file.write_text(json.dumps({"optimizer": {"type": "FiraAdamW", "params": {"layerwise": clip}}}))
    for flag in ([], ["--layerwise"]):  # the flag does not take the file's clipping away; summary.json says what is on
        args = parse([*given, *flag, "--deepspeed_config", str(file)])
        assert load_ds_config(args)["optimizer"]["params"]["layerwise"] == clip
        assert args.layerwise is True


def test_sharded_engines_share_the_state(runs: Path) -> None:
    """Bytes of optimizer state: all of it on each process under DDP, half of it where two share a copy."""
    whole, *_ = summary(runs / "plain")["optimizer_state_bytes_per_rank"]
    for name, parts in {"ddp": 1, "fsdp2": 2, "fsdp1": 2, "hsdp": 2}.items():
        assert max(summary(runs / name)["optimizer_state_bytes_per_rank"]) == pytest.approx(whole / parts, rel=0.03)


def test_models_are_ordinary_hugging_face_directories(runs: Path) -> None:
    """Class and precision in config.json are not the engine's, and the model writes text."""
    for name in RUNS:
        config = json.loads((runs / name / "model" / "config.json").read_text())
        assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32"), name
    text = shell(sys.executable, "launch/generate.py", runs / "zero3" / "model", "--tokens", 5)
    assert text.startswith("It is a truth")


# --- checkpoints ------------------------------------------------------------
def fresh(
    runs: Path, kind: type, processes: Processes, optimizer: str = "FiraAdamW", **options: object
) -> TorchTrainer:
    """A trainer as pretrain.py builds it, with other initial weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(read_config(str(runs / "plain" / "model")))
    settings = {"lr": 1e-3, **({"rank": 32, "update_proj_gap": 2} if optimizer == "FiraAdamW" else {})}

    def optimizer_of(wrapped: torch.nn.Module, ends: set[str]) -> torch.optim.Optimizer:
        return torch_optimizer(optimizer, wrapped, settings, 1e-2, ends)

    return kind(model, optimizer_of, lambda step: 1.0, 0.0, processes, **options)


def load_distributed(trainer: TorchTrainer, folder: Path) -> dict:
    """dcp.load as a reader of docs/engines.md would; returns the rest of the checkpoint."""
    model, optimizer = trainer.module, trainer.optimizer
    found = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "schedule": trainer.schedule.state_dict(),
        "progress": {"step": 0, "samples": 0, "seed": 0},
    }
    dcp.load(found, checkpoint_id=folder, no_dist=not torch.distributed.is_initialized())
    set_model_state_dict(model, found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"])
    return found


def whole_state(trainer: TorchTrainer) -> dict[str, torch.Tensor]:
    """{"parameter.key": whole tensor} of the optimizer's state."""
    options = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(trainer.module, trainer.optimizer, options=options)["state"]
    return {f"{name}.{key}": value.clone() for name, own in state.items() for key, value in own.items()}


def load_sharded(rank: int, world: int, runs: Path) -> dict:
    """What two processes find in the checkpoints of fsdp2 and fsdp1, and what `in_bf16` finds."""
    processes, mesh = Processes(rank, world, rank, torch.device("cpu")), init_device_mesh("cpu", (world,))
    two = fresh(runs, Fsdp2Trainer, processes, mesh=mesh, bf16=False)
    load_distributed(two, runs / "fsdp2" / "checkpoint")
    one, folder = fresh(runs, Fsdp1Trainer, processes, bf16=False), runs / "fsdp1" / "checkpoint"
    whole = StateDictOptions(full_state_dict=True)
    set_model_state_dict(one.model, torch.load(folder / "model.pt")["model"], options=whole)
    saved = torch.load(folder / f"optimizer_rank{rank}.pt")
    one.optimizer.load_state_dict(saved)
    return {
        "fsdp2": (two.weights(), whole_state(two)),
        "fsdp1": (one.weights(), flat(one.optimizer.state_dict()), flat(saved)),
        "bf16": [
            in_bf16(fresh(runs, Fsdp2Trainer, processes, "AdamW", mesh=mesh, bf16=True)),
            in_bf16(fresh(runs, Fsdp1Trainer, processes, "AdamW", bf16=True)),
        ],
    }


def in_bf16(trainer: TorchTrainer) -> tuple:
    """After one step: (dtypes of weights and state, dtype of the logits, {learning rate: how many parameters})."""
    ids = torch.arange(64).reshape(2, 32)
    trainer.train_step([ids])
    state = [value for own in trainer.optimizer.state.values() for value in own.values()]
    dtypes = {tensor.dtype for tensor in [*trainer.module.parameters(), *state]}
    rates = {group["lr"]: len(group["params"]) for group in trainer.optimizer.param_groups}
    with torch.no_grad():
        return dtypes, trainer.logits(ids).dtype, rates


def flat(state: dict) -> dict[str, torch.Tensor]:
    """{"index.key": tensor} of an optimizer's state_dict()."""
    return {f"{i}.{key}": value for i, own in state["state"].items() for key, value in own.items()}


@pytest.fixture(scope="module")
def unwrapped(runs: Path) -> dict[str, tuple[dict, dict, dict]]:
    """{run: (weights, state, the rest)} of DCP checkpoints, loaded into a model that no engine has wrapped."""
    found = {}
    for name in DCP_RUNS:
        trainer = fresh(runs, DdpTrainer, Processes(0, 1, 0, torch.device("cpu")))
        rest = load_distributed(trainer, runs / name / "checkpoint")
        found[name] = trainer.module.state_dict(), whole_state(trainer), rest
    return found


def test_dcp_checkpoints_load_into_an_unwrapped_model(runs: Path, unwrapped: dict) -> None:
    """Weights are model/'s, bit for bit; the optimizer's state is that of one process; step and schedule are there."""
    state = unwrapped["plain"][1]
    for name, (weights, other, rest) in unwrapped.items():
        assert largest_difference(weights, saved_weights(runs / name)) == 0.0, name
        assert rest["progress"] == {"step": 3, "samples": 12, "seed": 0} and rest["schedule"]["last_epoch"] == 3
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert (other[key] - value).abs().max() <= 1e-3 * value.abs().max(), (name, key)


@pytest.fixture(scope="module")
def sharded(runs: Path) -> list[dict]:
    """`load_sharded` by two processes."""
    return launch(2, load_sharded, runs)


def test_sharded_checkpoints_load_into_sharded_models(runs: Path, unwrapped: dict, sharded: list[dict]) -> None:
    """FSDP2's by two processes as by one, and FSDP1's file for each process, bit for bit."""
    for found, expected in zip(sharded[0]["fsdp2"], unwrapped["fsdp2"], strict=False):
        assert largest_difference(found, expected) == 0.0
    assert largest_difference(sharded[0]["fsdp1"][0], saved_weights(runs / "fsdp1")) == 0.0
    for rank in sharded:
        _, loaded, saved = rank["fsdp1"]
        assert saved and largest_difference(loaded, saved) == 0.0


def test_bf16_keeps_fp32_weights_and_the_rates_of_each_group(sharded: list[dict]) -> None:
    """FSDP computes in bf16 on fp32 weights; FSDP1's flattened matrices are not taken for vectors by --embed-lr."""
    for found in (found for rank in sharded for found in rank["bf16"]):
        assert found == ({torch.float32}, torch.bfloat16, {1e-3: 28, 1e-2: 11})


# --- the quickstart ------------------------------------------------------------
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
