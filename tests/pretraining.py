"""A tiny job of launch/pretrain.py (or another program there) whose processes are forked, and may be killed."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.cluster import _context

ROOT = Path(__file__).parents[1]
# vocabulary, width and the rest divide neither by 2 nor by 3; dropout needs the state of the random numbers
MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 307, "hidden_size": 36,
    "intermediate_size": 52, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "attention_dropout": 0.1,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPTIONS = {"update_proj_gap": 3, "weight_decay": 0.01}
ENGINES: dict[str, list[str]] = {  # flags beside those of `flags`
    "ddp": [], "fsdp1": ["--engine", "fsdp1"], "fsdp2": ["--engine", "fsdp2"],
    "hsdp": ["--engine", "hsdp", "--hsdp-shard", "1"], "layerwise": ["--engine", "fsdp2", "--layerwise"],
    **{f"zero{stage}": ["--deepspeed_config", f"zero{stage}.json"] for stage in (1, 2, 3)},
    "zero3-layerwise": ["--deepspeed_config", "zero3.json", "--layerwise"],
}  # fmt: skip


def prepare(folder: Path) -> Path:
    """Text, tokenizer, model config and ds_configs in `folder`."""
    from launch.prepare_corpus import train_tokenizer, write_documents

    folder.mkdir(parents=True, exist_ok=True)
    words = ["".join(chr(97 + int(c)) for c in np.random.default_rng(i).integers(0, 26, 2 + i % 7)) for i in range(300)]
    random = np.random.default_rng(0)
    documents = [" ".join(random.choice(words, 60)) for _ in range(80)]
    train_tokenizer(documents, 300, folder / "tokenizer")
    write_documents(folder / "train.jsonl", documents[:70])
    write_documents(folder / "valid.jsonl", documents[70:])
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "without_dropout.json").write_text(json.dumps({**MODEL, "attention_dropout": 0.0}))
    for stage in (1, 2, 3):
        config = json.loads((ROOT / "ds_configs" / f"zero{stage}_fira.json").read_text())
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        config["optimizer"]["params"] = {}
        (folder / f"zero{stage}.json").write_text(json.dumps(config))
    return folder


def flags(data: Path, output: Path, engine: str, *more: object) -> list[str]:
    """pretrain.py's arguments; the same for every engine as far as they decide the result."""
    own = [str(data / part) if part.endswith(".json") else part for part in ENGINES[engine]]
    optimizer = [] if "--deepspeed_config" in own else ["--optimizer", "FiraAdamW"]
    given = [
        "--model", data / "model.json", "--tokenizer", data / "tokenizer", "--train-data", data / "train.jsonl",
        "--valid-data", data / "valid.jsonl", "--cache-dir", data / "cache", "--seq-len", 16, "--batch-size", 12,
        "--micro-batch", 3, "--dtype", "fp32", "--lr", 0.01, "--rank", 8, "--optimizer-args", json.dumps(OPTIONS),
        "--eval-tokens", 512, "--eval-every", 6, "--log-every", 1, "--save-every", 4, "--steps", 10, "--output", output,
    ]  # fmt: skip
    return [str(part) for part in [*own, *optimizer, *given, *more]]


class Job:
    """Processes that run `main` of a program in launch/, their output in `log`."""

    def __init__(
        self,
        world: int,
        arguments: list[str],
        log: Path,
        limits: dict[int, int] | None = None,
        program: str = "pretrain",
    ) -> None:
        """limits: {resource.RLIMIT_...: value} set in every process."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log, self.start = log, time.monotonic()
        given = (world, port, arguments, str(log), limits or {}, program)
        context = _context()
        self.processes = [context.Process(target=_run, args=(rank, *given), daemon=True) for rank in range(world)]
        for process in self.processes:
            process.start()

    def alive(self) -> bool:
        """Whether any process still runs."""
        return any(process.is_alive() for process in self.processes)

    def kill(self, ranks: list[int], number: int = signal.SIGKILL) -> None:
        """Send a signal to these ranks."""
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def end(self, grace: float) -> list[int]:
        """Wait for all to end; what still runs after `grace` seconds is killed, as a launcher would, and answered."""
        deadline = time.monotonic() + grace
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill(late)
        for process in self.processes:
            process.join()
        return late

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes (negative: of a signal), once all have ended by themselves."""
        late = self.end(timeout)
        assert not late, f"ranks {late} still ran after {timeout} s:\n{self.printed()[-3000:]}"
        return [process.exitcode for process in self.processes]

    def printed(self) -> str:
        """What all processes have printed."""
        return self.log.read_text() if self.log.exists() else ""


class TorchrunJob(Job):
    """The same, started by torchrun: `processes` are its workers once they exist."""

    def __init__(self, world: int, arguments: list[str], log: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.log, self.start = log, time.monotonic()
        self.processes = [None] * world
        with log.open("a") as file:
            whole = [*command, str(ROOT / "launch" / "pretrain.py"), *arguments]
            self.agent = subprocess.Popen(whole, stdout=file, stderr=file, env=environment, cwd=ROOT)

    def alive(self) -> bool:
        """Whether the agent still runs; it ends after its workers."""
        return self.agent.poll() is None

    def kill(self, ranks: list[int], number: int = signal.SIGKILL) -> None:
        """Send a signal to these workers; to the agent, too, if it is all of them."""
        workers = _children(self.agent.pid)
        if len(ranks) == len(self.processes):
            self.agent.send_signal(number)
        for worker in workers if len(ranks) == len(self.processes) else [workers[r] for r in ranks if r < len(workers)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, number)

    def end(self, grace: float) -> list[int]:
        """Wait for the agent, which ends the workers."""
        self.agent.wait(120)
        return []

    def wait(self, timeout: float = 120) -> list[int]:
        """The agent's exit code."""
        return [self.agent.wait(timeout)]


def _children(parent: int) -> list[int]:
    """Processes that a process has started, in order."""
    return sorted(int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split())


def run(world: int, arguments: list[str], log: Path, **options: Any) -> tuple[list[int], str]:
    """(exit codes, what was printed) of a job that nobody disturbs."""
    job = Job(world, arguments, log, **options)
    return job.wait(), job.printed()


def _run(
    rank: int, world: int, port: int, arguments: list[str], log: str, limits: dict[int, int], program: str
) -> None:
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    import resource

    import torch

    main = importlib.import_module(f"launch.{program}").main
    for kind, value in limits.items():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit raises
        resource.setrlimit(kind, (value, value))
    torch.set_num_threads(1)
    sys.argv = [f"{program}.py", *arguments]
    main()


def result(output: Path) -> tuple[dict[str, Any], list[dict]]:
    """(weights of model/, records of metrics.jsonl without speeds) of a finished run."""
    from safetensors.torch import load_file

    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("tokens_per_s", None)
    return load_file(output / "model" / "model.safetensors"), records


def same(first: Path, second: Path) -> list[str]:
    """What differs between two finished runs, bit for bit; nothing if they are equal."""
    import torch

    (weights, records), (others, other_records) = result(first), result(second)
    names = [n for n in {**weights, **others} if n not in weights or n not in others]
    names += [n for n in weights if n in others and not torch.equal(weights[n], others[n])]
    steps = [str(r) for r in records + other_records if r not in records or r not in other_records]
    if records != other_records and not steps:
        steps = ["metrics.jsonl: a step twice, or another order"]
    return names + steps + _checkpoints(first, second)


def _checkpoints(first: Path, second: Path) -> list[str]:
    """Files of the last checkpoints (weights, optimizer state, random numbers) that are not the same bytes."""
    left, right = (max((run / "checkpoints").glob("step-????????")) for run in (first, second))
    if left.name != right.name:
        return [f"{left} and {right} are of different steps"]
    files = sorted({path.name for folder in (left, right) for path in folder.glob("*.safetensors")})
    return [f"{right}/{file}" for file in files if (left / file).read_bytes() != (right / file).read_bytes()]
