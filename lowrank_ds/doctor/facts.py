"""What a rank can say of itself without asking another."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re
import shutil
import socket
import subprocess
import time
from typing import Any

import torch

import lowrank_ds
from lowrank_ds.bench.facts import commit, processor, version_of
from lowrank_ds.doctor import numbers
from lowrank_ds.launching import Place

PACKAGES = ("deepspeed", "transformers", "datasets", "sentencepiece", "accelerate", "mpi4py", "numpy")
VARIABLES = re.compile(
    r"(NCCL|GLOO|TORCH|PYTORCH|MKL|ACCELERATE|CUBLAS|NVIDIA)_.*|OMP_NUM_THREADS|DS_ACCELERATOR|PYTHONHASHSEED|"
    r"CUDA_VISIBLE_DEVICES|CUDA_DEVICE_MAX_CONNECTIONS|LD_PRELOAD|MASTER_ADDR|MASTER_PORT|WORLD_SIZE"
)


def collect(place: Place) -> dict[str, Any]:
    """Everything, as JSON can hold it. Computes for about a second, and nothing on another rank."""
    found, dirty = commit()
    device = device_of(place)
    return {
        **whereabouts(place),
        "source": place.source,
        "versions": versions(),
        "commit": found + (" with changes" if dirty else ""),
        "code": str(pathlib.Path(lowrank_ds.__file__).parent),
        "device": describe_device(device),
        "cpu": processor(),
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)],
        "threads": torch.get_num_threads(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if VARIABLES.fullmatch(k)},
        "addresses": {name: resolve(name) for name in {place.address or "127.0.0.1", socket.gethostname()}},
        "interfaces": [name for _, name in socket.if_nameindex()],
        "locks": locks(),
        "ninjas": ninjas(),
        "numbers": numbers.draw(device or torch.device("cpu")),
    }


def whereabouts(place: Place) -> dict[str, Any]:
    """Who this is; told before anything that can take long or fail.

    "machine" tells hosts of the same name apart, and is the same for all processes of one.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    where = {"rank": place.rank, "local_rank": place.local_rank, "local_world": place.local_world}
    return where | {"host": socket.gethostname(), "pid": os.getpid(), "machine": f"{socket.gethostname()} {boot[:8]}"}


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, "source" being a checksum of this package's files."""
    found = {"Python": platform.python_version(), "lowrank_ds": lowrank_ds.__version__, "source": source()}
    found |= {"torch": torch.__version__} | {name: version_of(name) or "not installed" for name in PACKAGES}
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def source() -> str:
    """A checksum of the package's Python files: a commit does not tell of edits, and an installed copy has none."""
    root, digest = pathlib.Path(lowrank_ds.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def device_of(place: Place) -> torch.device | None:
    """The device of this rank, made its current one; None: it has no GPU though there are some."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        return None
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def describe_device(device: torch.device | None) -> dict[str, Any]:
    """{"kind", "name", "id", "total", "free", "visible"}: memory in bytes; id: of a GPU, "" for a CPU."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return {"kind": "none", "name": "none", "id": "", "total": 0, "free": 0, "visible": visible}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        name, number = facts.name, str(getattr(facts, "uuid", "")) or str(device)
        return {"kind": "cuda", "name": name, "id": number, "total": total, "free": free, "visible": visible}
    total, free = _host_memory()
    return {"kind": "cpu", "name": "CPU", "id": "", "total": total, "free": free, "visible": 0}


def _host_memory() -> tuple[int, int]:
    """(total, free) bytes of this host's memory; zeros where that cannot be told."""
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
    except OSError:
        return 0, 0
    sizes = {name: int(size) * 1024 for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)}
    return sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)


def resolve(name: str) -> list[str]:
    """The addresses of a host name here; empty where it has none."""
    try:
        return sorted({info[4][0] for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError:
        return []


def locks() -> list[dict[str, Any]]:
    """Locks of extensions that are being compiled, or that a killed compilation left: each later run waits for them.

    {"path", "age": seconds, "open": whether a process of this host (that we may look at) is still at it}.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    root = pathlib.Path(given) if given else pathlib.Path(cache) / "torch_extensions"
    paths = [path for depth in ("*/lock", "*/*/lock") for path in sorted(root.glob(depth))]
    used = _open_files() if paths else set()
    found = []
    for path in paths:
        try:
            known = path.stat()
        except OSError:
            continue  # it was just finished
        busy = (known.st_dev, known.st_ino) in used
        found.append({"path": str(path), "age": round(time.time() - known.st_mtime), "open": busy})
    return found


def _open_files() -> set[tuple[int, int]]:
    """(device, inode) of all files that processes of this host hold open."""
    found = set()
    for link in pathlib.Path("/proc").glob("[0-9]*/fd/*"):
        try:
            known = link.stat()
        except OSError:
            continue  # it has ended, or is another user's
        found.add((known.st_dev, known.st_ino))
    return found


def ninjas() -> list[list[str]]:
    """[path, version] of each ninja on PATH, the one that is used first; versions only where there are several."""
    folders = dict.fromkeys(os.environ.get("PATH", "").split(os.pathsep))
    paths = {os.path.realpath(p): p for p in reversed([shutil.which("ninja", path=f) for f in folders if f]) if p}
    found = list(reversed(paths.values()))
    return [[path, _ninja_version(path) if len(found) > 1 else ""] for path in found]


def _ninja_version(path: str) -> str:
    try:
        return subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unusable: {error}"
