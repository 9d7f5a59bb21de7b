"""Training on simulated hosts, started as launch/*.sh start it, and what became of it."""

from __future__ import annotations

import itertools
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

from tests.multinode.hosts import ROOT, Hosts
from tests.pretraining import flags, prepare, run

WAYS = ("torchrun", "pdsh", "openmpi", "mpirun")
ENGINES = ("zero2", "zero3", "fsdp2")
STEPS = 3
LIMIT = 1e-5  # of a weight's difference from one process on one host
_ports = itertools.count(29500)


@dataclass
class Launch:
    """A job on some hosts. processes: of the launcher, one on each host (torchrun) or on the first."""

    hosts: Hosts
    names: list[str]
    output: Path
    logs: list[Path]
    processes: list[Popen] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def printed(self) -> str:
        """What all hosts have printed."""
        return "\n".join(log.read_text() for log in self.logs if log.exists())

    def alive(self) -> bool:
        """Whether a launcher still runs."""
        return any(process.poll() is None for process in self.processes)

    def ranks(self, name: str) -> list[int]:
        """Process ids of a host's training processes that were started with this output."""
        here = self.hosts.running(name, str(self.output))
        return [pid for pid in here if _is_rank(pid)]

    def wait(self, timeout: float = 600) -> float:
        """Seconds it took, once it has ended well.

        Raises:
            AssertionError: an exit code is not 0, or it still ran after `timeout` seconds; with what was printed.
        """
        deadline = self.began + timeout
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        codes = [process.poll() for process in self.processes]
        assert codes == [0] * len(codes), f"exit codes {codes} (None: still runs):\n{self.printed()[-6000:]}"
        return time.monotonic() - self.began


def _is_rank(pid: int) -> bool:
    """Whether a process is pretrain.py itself, not a launcher that has its name among the arguments."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    launchers = ("torch.distributed.run", "deepspeed.launcher.launch")
    return "python" in words[0] and not any(w in launchers or w.endswith("/bin/deepspeed") for w in words)


def train(
    hosts: Hosts, names: list[str], way: str, ranks: int, arguments: list[str], output: Path, **variables: object
) -> Launch:
    """Start launch/pretrain.py on `ranks` processes of each named host, by one of WAYS; a Launch.

    Args:
        arguments: pretrain.py's, with --output `output`.
        variables: more of the launch script's, such as NNODES="1:2".
    """
    port, folder = next(_ports), output.parent
    started_on = names if way == "torchrun" else names[:1]
    logs = [folder / f"{output.name}-{name}.log" for name in started_on]
    job = Launch(hosts, names, output, logs)
    common = {"OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ROOT}
    if way == "torchrun":
        given = {"NNODES": len(names), "RDZV_ENDPOINT": f"{names[0]}:{port}", "RANKS_PER_HOST": ranks, "JOB_ID": port}
        for name, log in zip(names, logs, strict=True):
            settings = common | given | variables
            job.processes.append(hosts.start(name, [ROOT / "launch" / "torchrun.sh", *arguments], log, **settings))
        return job
    hostfile = folder / f"{output.name}.hosts"
    hostfile.write_text("".join(f"{name} slots={ranks}\n" for name in names))
    given = {"HOSTFILE": hostfile, "MASTER_PORT": port, "LAUNCHER": way}
    if way == "mpirun":
        given = {"HOSTFILE": hostfile}
    script = ROOT / "launch" / ("mpirun.sh" if way == "mpirun" else "deepspeed.sh")
    job.processes.append(hosts.start(names[0], [script, *arguments], logs[0], **(common | given | variables)))
    return job


def arguments_of(data: Path, output: Path, engine: str, *more: object) -> list[str]:
    """Flags of a run without dropout, whose random numbers depend on the number of processes."""
    # no space in the JSON: DeepSpeed's pdsh launcher then leaves its quotes to a shell
    options = json.dumps({"update_proj_gap": 2, "weight_decay": 0.01}, separators=(",", ":"))
    own = ("--model", data / "without_dropout.json", "--optimizer-args", options, "--eval-every", 0)
    return flags(data, output, engine, *own, *more)


def data_for(folder: Path) -> Path:
    """Text, tokenizer and configs that all hosts see."""
    return prepare(folder / "data")


def one_process(folder: Path, data: Path, *more: object) -> Path:
    """Output of the run they are compared with: one process without an engine."""
    output = folder / "alone"
    codes, printed = run(1, arguments_of(data, output, "ddp", *more), folder / "alone.log")
    assert codes == [0], printed[-3000:]
    return output


def difference(first: Path, second: Path) -> float:
    """Largest difference of a weight between the saved models of two runs."""
    from safetensors.torch import load_file

    one, other = (load_file(output / "model" / "model.safetensors") for output in (first, second))
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def processes_of(output: Path) -> int:
    """How many processes finished a run."""
    return json.loads((output / "summary.json").read_text())["world_size"]


def resumed_at(printed: str) -> list[int]:
    """Steps that were done already when a job went on, one a restart."""
    return [int(step) for step in re.findall(r"resumed from \S+: (\d+) of", printed)]
