"""The `lowrank-ds` command, the documentation's code, and an unmodified script under the deepspeed launcher."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_ds
from lowrank_ds import cli

ROOT = Path(__file__).parents[1]

UNMODIFIED = """
import argparse, json, sys
import deepspeed, deepspeed.ops
import neighbour

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--out")
args = parser.parse_args()
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
model = neighbour.model()
config = {
    "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0, "zero_optimization": {"stage": 2},
    "optimizer": {"type": "FiraAdamW", "params": {"lr": 0.01, "rank": 2}},
}
engine = deepspeed.initialize(model=model, config=config)[0]
for _ in range(2):
    engine.backward(engine(neighbour.data()).square().mean())
    engine.step()
keys = sorted(k for s in engine.basic_optimizer.state.values() for k in s if k.endswith("projector"))
open(f"{args.out}.{deepspeed.comm.get_rank()}", "w").write(json.dumps([type(engine.basic_optimizer).__name__, keys]))
assert "lowrank_ds" not in open(__file__).read().split("assert")[0]
"""

NEIGHBOUR = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 5))

def data():
    return torch.ones(4, 8)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A training script that does not mention lowrank_ds, with a neighbour it imports."""
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    (tmp_path / "script.py").write_text(UNMODIFIED)
    return tmp_path / "script.py"


def test_an_unmodified_script_trains_with_our_optimizer(script: Path) -> None:
    """`deepspeed --module lowrank_ds run script.py`: two processes, ZeRO-2, projecting."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = script.with_name("out")
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(port),
        "--module", "lowrank_ds", "run", str(script), "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = [out.with_name(f"out.{rank}").read_text() for rank in (0, 1)]
    assert all('"FiraAdamW"' in text for text in found)
    assert any("0.weight::projector" in text for text in found)


def test_run_passes_arguments_and_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` behaves as `python script.py`: argv, sys.path[0], __main__; the launcher's --local_rank comes first."""
    (tmp_path / "beside.py").write_text("value = 7\n")
    (tmp_path / "script.py").write_text(
        "import beside, sys, pathlib, torch\n"
        "assert __name__ == '__main__' and torch.optim.FiraAdamW\n"
        "pathlib.Path(sys.argv[-1]).write_text(repr((beside.value, sys.argv[1:-1])))\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    assert cli.main(["--local_rank=1", "run", str(tmp_path / "script.py"), "--a", "b", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_text() == "(7, ['--local_rank=1', '--a', 'b'])"


def test_info_lists_every_optimizer_and_option(capsys: pytest.CaptureFixture) -> None:
    """`lowrank-ds info` names versions, classes and defaults."""
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"lowrank_ds {lowrank_ds.__version__}" in printed
    for cls in lowrank_ds.algorithms.ALGORITHMS:
        assert f"{cls.__name__}: lr=" in printed


def test_importing_needs_only_torch() -> None:
    """`import lowrank_ds` pulls in neither DeepSpeed nor transformers."""
    code = "import sys, lowrank_ds; assert not {'deepspeed', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_documented_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python blocks of README.md run (those of docs/: test_docs.py; DeepSpeed's: test_deepspeed.py)."""
    import torch

    monkeypatch.chdir(tmp_path)  # the README saves a checkpoint
    model = torch.nn.ModuleDict({"attn": torch.nn.Linear(256, 192), "mlp": torch.nn.Linear(192, 256)})
    ran = 0
    for name in ("README.md",):
        page = {"model": model}
        for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S):
            if "deepspeed" not in block:
                exec(compile(block, name, "exec"), page)
                ran += 1
    assert ran >= 2
