"""Simulated hosts, the launch scripts on them, and an elastic job that loses a host."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multinode import faults, jobs
from tests.multinode.hosts import BOX, INTERFACE, PREFIX, ROOT, Hosts, bits_per_second, missing

# (way, engine): run at the same time on host1 and host2, one process each; torchrun with FSDP2 is the elastic job's
CELLS = (("pdsh", "zero3"), ("mpirun", "zero2"))
LAUNCH = ROOT / "launch"
SERVE = "import socket; s = socket.create_server(('', 5000)); c = s.accept()[0]\nwhile c.recv(1 << 16): pass"
SEND = (  # until the other one has read it all
    "import socket, sys; s = socket.create_connection((sys.argv[1], 5000), 1); s.sendall(bytes(int(sys.argv[2])))\n"
    "s.shutdown(socket.SHUT_WR); s.settimeout(30); s.recv(1)"
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Four hosts; host3 and host4 are for what kills."""
    if missing():
        pytest.skip(missing())
    with Hosts(4) as found:
        print(f"pdsh: {found.pdsh}")
        yield found


def send(hosts: Hosts, sender: str, receiver: str, count: int, log: Path) -> float:
    """Seconds it took to send `count` bytes from one host to another; inf if it could not."""
    hosts.start(receiver, [sys.executable, "-S", "-c", SERVE], log)
    deadline = time.monotonic() + 60
    while "LISTEN" not in hosts.run(receiver, ["ss", "-tln"])[1]:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    began = time.monotonic()
    code, _ = hosts.run(sender, [sys.executable, "-S", "-c", SEND, hosts.address(receiver), count])
    seconds = time.monotonic() - began
    hosts.kill(receiver)
    return seconds if code == 0 else float("inf")


# -- the hosts --------------------------------------------------------------------------------------------------------
def test_hosts_have_their_own_name_address_and_memory(hosts: Hosts) -> None:
    """And a bare environment behind ssh, as sshd gives it."""
    shared = f"/dev/shm/{hosts.folder.name}"
    there = "ssh -o X=y host2 'hostname; pwd; echo \"$A\"'"
    code, said = hosts.run("host1", ["sh", "-c", f"hostname; hostname -I; touch {shared}; {there}; echo $A; pwd"], A=1)
    assert code == 0
    assert said.split("\n")[:-1] == ["host1", "10.77.0.1 ", "host2", os.environ["HOME"], "", "1", str(ROOT)]
    assert hosts.run("host2", ["test", "-e", shared])[0] == 1 and not Path(shared).exists()
    code, said = hosts.run("host1", ["ssh", "host9", "true"])
    assert code == 255 and "Could not resolve hostname host9" in said


def test_links(hosts: Hosts, tmp_path: Path) -> None:
    """Traffic is counted, limited, lost when the cable is out, and back afterwards."""
    log, before = tmp_path / "log", (hosts.bytes_sent("host3"), hosts.bytes_received("host4"))
    assert send(hosts, "host3", "host4", 2_000_000, log) < 5
    moved = hosts.bytes_sent("host3") - before[0], hosts.bytes_received("host4") - before[1]
    assert all(2_000_000 <= count < 2_200_000 for count in moved), moved
    hosts.shape("host3", "20mbit")
    for pair in (("host3", "host4"), ("host4", "host3")):  # a burst of 256 KiB is free
        assert (2_000_000 - 256 * 1024) * 8 / bits_per_second("20mbit") <= send(hosts, *pair, 2_000_000, log) < 5
    hosts.unshape("host3")
    hosts.cut("host4")
    assert send(hosts, "host3", "host4", 1, log) == float("inf")
    hosts.heal("host4")
    assert send(hosts, "host3", "host4", 1, log) < 5


def test_errors(hosts: Hosts) -> None:
    """What is wrong is named."""
    with pytest.raises(ValueError, match="there is no host9; there are host1, "):
        hosts.run("host9", ["true"])
    with pytest.raises(ValueError, match="rate '100mb': give a whole number of kbit, mbit or gbit"):
        hosts.shape("host1", "100mb")
    with pytest.raises(TimeoutError, match="ran for 0.2 s"):
        hosts.run("host3", ["sleep", "100"], timeout=0.2)
    assert not hosts.running("host3")


def test_a_platform_that_cannot_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence, which skips the tests of this file."""
    monkeypatch.setattr("tests.multinode.hosts.BOX", ("setpriv", "--reuid", "65534", "--clear-groups", *BOX))
    assert missing.__wrapped__().startswith("simulated hosts need the right to make namespaces and bridges (root with ")
    monkeypatch.setenv("PATH", "/nowhere")
    assert missing.__wrapped__().startswith("simulated hosts need ip, tc, nsenter, unshare, mount on PATH (Debian pack")


@pytest.mark.parametrize("end", ["exception", "SIGKILL"])
def test_nothing_is_left_behind(hosts: Hosts, tmp_path: Path, end: str) -> None:
    """Neither after an error, nor when their owner is killed. Two sets of hosts do not meet."""
    mark = f"98765{os.getpid()}"
    program = (
        "import pathlib, time\nfrom tests.multinode.hosts import Hosts\n"
        f"with Hosts(1) as hosts:\n    hosts.start('host1', ['sleep', '{mark}'], pathlib.Path('{tmp_path}/log'))\n"
        f"    while not hosts.running('host1', '{mark}'): pass\n    print(hosts.folder, flush=True)\n"
        + ("    raise SystemExit('enough')" if end == "exception" else "    time.sleep(60)")
    )
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    folder = Path(owner.stdout.readline().strip())
    assert folder.name.startswith(f"{PREFIX}{owner.pid}-")
    if end == "SIGKILL":
        owner.kill()
    owner.wait()
    deadline = time.monotonic() + 5
    while (left := _with(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
    assert end == "SIGKILL" or not folder.exists()
    assert hosts.run("host1", ["hostname"]) == (0, "host1\n")


def _with(word: str) -> list[str]:
    """Processes of this machine whose command line has a word."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [file.parent.name] if word.encode() in file.read_bytes().split(b"\0") else []
        except OSError:
            continue
    return found


# -- training on them -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | jobs.Launch]:
    """Outputs of the cells, of one process, and the elastic job that has lost its second host."""
    folder = tmp_path_factory.mktemp("multinode")
    data = jobs.data_for(folder)
    found: dict[str, Path | jobs.Launch] = {}
    elastic = faults.arguments(data, folder / "elastic", "fsdp2")
    found["elastic"] = job = jobs.train(
        hosts, ["host3", "host4"], "torchrun", 1, elastic, folder / "elastic", **faults.ELASTIC
    )
    running = {}
    for way, engine in CELLS:
        arguments = jobs.arguments_of(data, folder / way, engine, "--steps", jobs.STEPS, "--save-every", 0)
        running[way] = jobs.train(hosts, ["host1", "host2"], way, 1, arguments, folder / way)
    faults.until(job, faults.AT)
    faults.fault(hosts, job, "elastic-host")
    found["alone"] = jobs.one_process(folder, data, "--steps", jobs.STEPS, "--save-every", 0)
    whole = folder / "whole"
    whole.mkdir()
    found["whole"] = jobs.one_process(whole, data, "--steps", faults.STEPS)
    for way, launch in running.items():
        launch.wait()
        found[way] = launch
    del job.processes[1:]  # host4's
    job.wait()
    return found


@pytest.mark.parametrize(("way", "engine"), CELLS)
def test_two_hosts_train_as_one(trained: dict, way: str, engine: str) -> None:
    """Weights of one process, and what the script has found."""
    launch = trained[way]
    assert jobs.processes_of(launch.output) == 2
    assert jobs.difference(trained["alone"], launch.output) <= jobs.LIMIT
    said = launch.printed()
    assert ": 2 hosts (host1 host2), ranks on each: 1 1, 2 in all" in said
    assert f"interface {INTERFACE}" in said and "devices here: no GPU (CPU)" in said


def test_an_elastic_job_goes_on_without_a_lost_host(trained: dict) -> None:
    """From its last checkpoint, by itself, with one process, to the weights of a run that nothing happened to."""
    job = trained["elastic"]
    assert jobs.processes_of(job.output) == 1
    resumed = jobs.resumed_at(job.printed())
    assert resumed and resumed[-1] >= faults.AT - faults.AT % faults.SAVE_EVERY
    assert jobs.difference(trained["whole"], job.output) <= jobs.LIMIT
    said = job.printed()
    assert "RankError" in said and "2 x cpu" in said and "1 x cpu" in said
    for name in job.names:
        assert f"torchrun.sh: host {name} of 1:2, 1 ranks here, meeting at host3:" in said
    assert "torchrun.sh: elastic: yes, restarts: 3; devices here: no GPU (CPU)" in said


# -- what the scripts say ---------------------------------------------------------------------------------------------
MESSAGES = [  # script, settings, part of the message
    ("deepspeed.sh", {}, 'set HOSTFILE to a file with a line "NAME slots=RANKS" for each host'),
    ("deepspeed.sh", {"HOSTFILE": "/nowhere"}, "HOSTFILE=/nowhere: no such file"),
    ("deepspeed.sh", {"HOSTFILE": "a slot=2"}, '"a slot=2" is not of the form NAME slots=RANKS'),
    ("deepspeed.sh", {"HOSTFILE": "# a slots=2\n"}, "names no host"),
    ("deepspeed.sh", {"HOSTFILE": "a slots=2", "LAUNCHER": "rsh"}, "LAUNCHER=rsh is none of pdsh, openmpi, mpich"),
    ("deepspeed.sh", {"HOSTFILE": "a slots=2", "MASTER_PORT": "x"}, "MASTER_PORT=x is not a whole number above 0"),
    ("mpirun.sh", {"HOSTFILE": "x.invalid slots=1"}, "x.invalid does not answer to ssh without a password"),
    ("mpirun.sh", {}, "this host has no GPU, so set RANKS_PER_HOST"),
    ("mpirun.sh", {"PYTHON": "nopython"}, "there is no Python nopython; activate the virtual environment"),
    ("torchrun.sh", {"NNODES": "2:"}, "NNODES=2: is neither a number of hosts nor MIN:MAX"),
    ("torchrun.sh", {"NNODES": "2", "RANKS_PER_HOST": "1"}, "NNODES=2 needs RDZV_ENDPOINT=HOST:PORT"),
    ("torchrun.sh", {"RANKS_PER_HOST": "1", "MAX_RESTARTS": "1"}, "need a checkpoint: add --save-every N"),
    (
        "torchrun.sh",
        {"NNODES": "2", "RANKS_PER_HOST": "1", "RDZV_ENDPOINT": "x.invalid:1"},
        "RDZV_ENDPOINT=x.invalid:1: x.invalid does not resolve here",
    ),
    ("torchrun.sh", {"PROGRAM": "launch/none.py"}, "PROGRAM=launch/none.py: there is no such file; give one such as"),
    ("slurm.sh", {}, "SLURM_JOB_NODELIST is not set: start with sbatch launch/slurm.sh"),
    ("slurm.sh", {"SLURM_SUBMIT_DIR": "/tmp"}, "/tmp has no launch/common.sh; submit from the repository's root"),
]


@pytest.mark.parametrize(("script", "settings", "message"), MESSAGES)
def test_what_is_missing_is_named(tmp_path: Path, script: str, settings: dict[str, str], message: str) -> None:
    """With exit code 2, before anything starts."""
    if " " in settings.get("HOSTFILE", ""):
        (tmp_path / "hosts").write_text(settings["HOSTFILE"])
        settings = settings | {"HOSTFILE": str(tmp_path / "hosts")}
    done = subprocess.run(
        [LAUNCH / script, "--steps", "1"], cwd=ROOT, env=clean() | settings, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert f"{script}: " in done.stderr and message in done.stderr


def clean() -> dict[str, str]:
    """This environment without what the scripts read."""
    names = ("HOSTFILE", "LAUNCHER", "NNODES", "PYTHON", "PROGRAM", "INTERFACE", "RANKS_PER_HOST", "MAX_RESTARTS")
    kinds = ("SLURM_", "RDZV_", "MASTER_", "JOB_ID")
    return {k: v for k, v in os.environ.items() if k not in names and not k.startswith(kinds)}


def test_scripts_without_arguments() -> None:
    """They say whose arguments they need."""
    for script in ("deepspeed.sh", "mpirun.sh", "torchrun.sh"):
        for name in ("pretrain.py", "finetune.py"):
            done = subprocess.run(
                [LAUNCH / script], capture_output=True, text=True, env=clean() | {"PROGRAM": f"{LAUNCH}/{name}"}
            )
            assert done.returncode == 2 and f"give {name}'s arguments" in done.stderr


FUNCTIONS = "set -euo pipefail; source launch/common.sh; "


def common(script: str, **settings: str) -> subprocess.CompletedProcess:
    """Run a piece of bash that uses the functions of common.sh."""
    command = ["bash", "-c", FUNCTIONS + script, "way.sh"]
    return subprocess.run(command, cwd=ROOT, env=clean() | settings, capture_output=True, text=True)


def test_the_interface_is_the_one_to_other_hosts(hosts: Hosts) -> None:
    """From whichever host a script is started; this host itself is reached by lo."""
    loop = FUNCTIONS + 'for names in "host1 host2" "host2 host1"; do hosts=($names); INTERFACE=; find_interface; '
    for name in ("host1", "host2"):
        said = hosts.run(name, ["bash", "-c", loop + "echo $INTERFACE; done", "way.sh"])
        assert said == (0, f"{INTERFACE}\n{INTERFACE}\n")


def test_an_interface_that_is_not_found_is_told() -> None:
    """Also where a name is known to ssh only."""
    done = common("hosts=(x.invalid y.invalid); find_interface")
    assert done.returncode == 2 and "way.sh: no route to another of the hosts (x.invalid y.invalid)" in done.stderr
    assert common("hosts=(x.invalid); find_interface; echo $INTERFACE", INTERFACE="e7").stdout == "e7\n"


def test_what_every_rank_gets(tmp_path: Path) -> None:
    """Variables that decide what is computed or allocated; PYTHON as a full path; a GPU that is shown."""
    given = {"PYTORCH_CUDA_ALLOC_CONF": "x", "CUBLAS_WORKSPACE_CONFIG": "x", "NCCL_DEBUG": "x", "SOMETHING": "x"}
    names = common("variables", **given).stdout.split()
    assert set(given) - set(names) == {"SOMETHING"} and "PATH" in names and "HOME" not in names
    folder = Path(sys.executable).parent
    said = common(f"cd {folder}; need_python; echo $python", PYTHON=f"./{Path(sys.executable).name}")
    assert said.stdout.strip() == f"{folder}/./{Path(sys.executable).name}", said.stderr
    nvidia = tmp_path / "nvidia-smi"
    nvidia.write_text('#!/bin/sh\nprintf "GPU 0: H100\\nGPU 1: H100\\nGPU 2: H100\\n"\n')
    nvidia.chmod(0o755)
    for shown, count in {"0,2": 2, "": 0, "-1": 0, "0,1,2,3": 3}.items():
        path = f"{tmp_path}:{os.environ['PATH']}"
        assert common("gpus", PATH=path, CUDA_VISIBLE_DEVICES=shown).stdout == f"{count}\n"


def test_torchrun_meets_at_an_address(tmp_path: Path) -> None:
    """One without a name, too; and restarts are refused where nothing is ever saved."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "python $*"\n')
    python.chmod(0o755)
    given = {"PYTHON": str(python), "RANKS_PER_HOST": "1", "NNODES": "1:2", "RDZV_ENDPOINT": "198.51.100.7:29400"}
    start = lambda *arguments, **more: subprocess.run(
        [LAUNCH / "torchrun.sh", *arguments], cwd=ROOT, env=clean() | given | more, capture_output=True, text=True
    )
    done = start("--save-every", "10")
    assert done.returncode == 0 and "--rdzv-endpoint 198.51.100.7:29400" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("pretrain.py --save-every 10 --resume auto")
    never = start("--save-every", "0")
    assert never.returncode == 2 and "need a checkpoint: add --save-every N" in never.stderr
    unseen = start("--config", "run.yaml", PROGRAM="launch/finetune.py")
    assert "WARNING: torchrun.sh does not read the FILE of --config; give --save-every on the command" in unseen.stdout
    assert unseen.stdout.strip().endswith(f"{LAUNCH}/finetune.py --config run.yaml --resume auto")
    assert "WARNING" not in start("--config", "run.yaml", "--save-every", "10").stdout + done.stdout


def test_slurm_script_is_queued_again_after_a_signal(tmp_path: Path) -> None:
    """With stand-ins for srun (whose ranks save and end) and scontrol: what they are given."""
    for name, text in {
        "srun": 'echo "srun $*; $NNODES $RANKS_PER_HOST $RDZV_ENDPOINT $JOB_ID"; echo 7 > "$OUT/preempted"; exit 1',
        "scontrol": '[ "$1" = show ] && printf "n1\\nn2\\n" || echo "scontrol $*"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "41", "SLURM_GPUS_ON_NODE": "8", "OUT": str(tmp_path)}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    command = [LAUNCH / "slurm.sh", "--output", str(tmp_path), "--save-every", "5"]
    done = subprocess.run(command, env=clean() | job | path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    given = f"--output {tmp_path} --save-every 5 --resume auto; 2 8 n1:20041 41"
    assert f"srun --nodes 2 --ntasks-per-node 1 --kill-on-bad-exit=0 bash {LAUNCH}/torchrun.sh {given}" in done.stdout
    assert "slurm.sh: 2 hosts (n1 n2), 8 ranks on each, meeting at n1:20041" in done.stdout
    assert "saved after step 7; queued again\nscontrol requeue 41" in done.stdout and "WARNING" not in done.stdout
    unseen = subprocess.run(
        [LAUNCH / "slurm.sh", "--config", "run.yaml"], env=clean() | job | path, capture_output=True, text=True
    )
    assert "give --output --save-every on the command line" in unseen.stdout and "requeue" not in unseen.stdout
    assert "so this job is NOT queued again when SLURM ends it" in unseen.stdout
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 1\n")  # queued again, it ends before it trains
    done = subprocess.run(command, env=clean() | job | path, capture_output=True, text=True)
    assert done.returncode == 1 and "requeue" not in done.stdout, done.stderr
