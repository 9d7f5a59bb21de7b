"""Simulated hosts: network namespaces of this machine on one bridge, with their own addresses, names and /dev/shm.

    python -m tests.multinode.hosts up 2                 # stays in the foreground; Ctrl-C takes them down
    python -m tests.multinode.hosts run host1 hostname -I
    python -m tests.multinode.hosts shape host1 100mbit  # both directions; also: unshape, cut, heal, kill

Hosts share the file system, as a cluster does that trains from one. They live in one process-id namespace, the box,
whose first process reads from a pipe of ours: when this process ends, in whatever way, the kernel kills all that runs
on them. Nothing has a name that two runs could share. `bin/` stands in front of PATH: its `ssh` enters a host by
nsenter, with the bare environment that sshd gives. It is no connection over the simulated network: a cut link does not
cut it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(__file__).with_name("bin")
NETWORK = "10.77.0"
INTERFACE = "ve0"
PREFIX = "lowrank-hosts-"
# tc, and elsewhere ip, are where PATH of an ordinary user does not look
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
TOOLS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "mount": "mount"}
BOX = ("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc")
SWITCH = "ip link set lo up && ip link add name switch type bridge && ip link set switch up"
# its children are other hosts' orphans: an ignored SIGCHLD has the kernel reap them
FIRST = f"{SWITCH} && trap '' CHLD && echo ready && exec cat >/dev/null"
HOLDER = """hostname $1 && mount --bind $2 /etc/hosts && mount -t tmpfs -o size=1g tmpfs /dev/shm \
&& ip link set lo up && echo $$ && exec sleep infinity"""


@functools.cache
def missing() -> str:
    """Why this platform cannot simulate hosts, in one sentence; "" if it can."""
    absent = [tool for tool in TOOLS if not shutil.which(tool)]
    if absent:
        packages = ", ".join(sorted({TOOLS[tool] for tool in absent}))
        return f"simulated hosts need {', '.join(absent)} on PATH (Debian packages: {packages})"
    tried = subprocess.run([*BOX, "sh", "-c", SWITCH], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if tried.returncode:
        said = " ".join(tried.stderr.split()) or f"exit code {tried.returncode}"
        rights = "root with CAP_SYS_ADMIN and CAP_NET_ADMIN"
        return f"simulated hosts need the right to make namespaces and bridges ({rights}): {said}"
    return ""


class Hosts:
    """`count` hosts, host1, host2, ... at 10.77.0.1, 10.77.0.2, ...; a context manager that takes them down.

    Args:
        count: 1 to 250.
        pdsh: "real": the installed pdsh; "stand-in": bin/pdsh; None: the real one if there is one on PATH.

    Raises:
        OSError: this platform cannot (see `missing`), or pdsh="real" and there is none.
    """

    def __init__(self, count: int, pdsh: str | None = None):
        if missing():
            raise OSError(missing())
        if pdsh == "real" and not shutil.which("pdsh"):
            raise OSError('Hosts(pdsh="real"): there is no pdsh on PATH; install it, or leave pdsh out')
        self.names = [f"host{number}" for number in range(1, count + 1)]
        self.pdsh = pdsh or ("real" if shutil.which("pdsh") else "stand-in")
        self.pids: dict[str, int] = {}  # of each host's holder, as this process sees it
        self.first, self.box = 0, None
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        try:
            self._up()
        except BaseException:
            self.down()
            raise

    @classmethod
    def attached(cls, folder: Path) -> Hosts:
        """The hosts that another process has brought up and keeps."""
        hosts = cls.__new__(cls)
        state = json.loads((folder / "hosts.json").read_text())
        hosts.folder, hosts.box, hosts.first, hosts.pids = folder, None, state["first"], state["pids"]
        hosts.names, hosts.pdsh = [*hosts.pids], state["pdsh"]
        return hosts

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def _up(self) -> None:
        for left in self.folder.parent.glob(f"{PREFIX}*"):  # by owners that were killed
            if not Path(f"/proc/{left.name.removeprefix(PREFIX).split('-')[0]}").exists():
                shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(BIN, self.folder / "bin")
        if self.pdsh == "real":
            (self.folder / "bin" / "pdsh").unlink()
        addresses = [f"{self.address(name)} {name}" for name in self.names]
        (self.folder / "etc_hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses, ""]))
        pipe = subprocess.PIPE
        given = {"stdin": pipe, "stdout": pipe, "text": True, "start_new_session": True}
        self.box = subprocess.Popen([*BOX, "sh", "-c", FIRST], **given)
        if self.box.stdout.readline() != "ready\n":
            raise OSError("simulated hosts: the switch could not be made; see the error above")
        self.first = _child(self.box.pid)
        for name in self.names:
            self._boot(name)
        state = {"first": self.first, "pids": self.pids, "pdsh": self.pdsh}
        (self.folder / "hosts.json").write_text(json.dumps(state))

    def _boot(self, name: str) -> None:
        """One host: a process that holds its namespaces, and a cable to the switch."""
        holder = ["unshare", "--net", "--mount", "--uts", "--", "sh", "-c", HOLDER, "sh", name]
        entered = subprocess.Popen(
            ["nsenter", "-t", str(self.first), "-m", "-p", "--", *holder, str(self.folder / "etc_hosts")],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        inner = entered.stdout.readline().strip()
        if not inner:
            raise OSError(f"simulated hosts: {name} could not be made; see the error above")
        self.pids[name] = _child(entered.pid)
        (self.folder / "bin" / f"{name}.pid").write_text(inner)  # for bin/ssh, which sees the box's process ids
        self._switch(f"ip link add {name} type veth peer name {INTERFACE} netns {inner}")
        self._switch(f"ip link set {name} master switch up")
        self._on(name, f"ip address add {self.address(name)}/24 dev {INTERFACE} && ip link set {INTERFACE} up")

    def down(self) -> None:
        """End everything that runs on the hosts, and the hosts."""
        if self.box is None:
            return
        box, self.box = self.box, None
        box.stdin.close()  # the first process of the namespace ends, and the kernel kills the others
        box.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def address(self, name: str) -> str:
        """Its IPv4 address."""
        return f"{NETWORK}.{name.removeprefix('host')}"

    # -- programs -------------------------------------------------------------------------------------------------
    def start(self, name: str, command: Sequence[object], log: Path, **variables: object) -> subprocess.Popen:
        """Start a program on a host, in the repository's root, its output appended to `log`.

        Its environment is this process's, bin/ first on PATH, and `variables`. `kill` ends it: a signal to what is
        returned does not reach it.
        """
        environment = {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        environment |= {key: str(value) for key, value in variables.items()}
        with log.open("a") as file:
            return subprocess.Popen(
                [*self._enter(name), *map(str, command)],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True,
            )  # fmt: skip

    def run(self, name: str, command: Sequence[object], timeout: float = 60, **variables: object) -> tuple[int, str]:
        """(exit code, output) of a program on a host.

        Raises:
            TimeoutError: it still ran after `timeout` seconds; everything on that host has been killed.
        """
        with tempfile.NamedTemporaryFile(dir=self.folder) as file:
            process = self.start(name, command, Path(file.name), **variables)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill(name)
                raise TimeoutError(f"{name}: {command} ran for {timeout} s\n{Path(file.name).read_text()}") from None
            return code, Path(file.name).read_text()

    def running(self, name: str, word: str = "") -> list[int]:
        """Processes of a host whose command line has `word`, as this process numbers them."""
        here, found = os.readlink(f"/proc/{self.pids[name]}/ns/net"), set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if word in command and os.readlink(folder / "ns" / "net") == here:
                    found.add(int(folder.name))
            except OSError:  # it has ended, or is a zombie
                continue
        return sorted(found - {self.pids[name]})

    def kill(self, name: str) -> None:
        """SIGKILL all processes of a host. The kernel closes their connections; for a power failure `cut` it first."""
        while pids := self.running(name):
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)

    # -- the network ----------------------------------------------------------------------------------------------
    def shape(self, name: str, rate: str) -> None:
        """Limit what a host sends, and what it receives, to `rate` in tc's units, such as 100mbit.

        Latency cannot be added everywhere: it needs the kernel's netem, and many have none.
        """
        # what may go at once: a packet (64 KiB with segmentation offload), and what comes between two timer ticks
        burst = max(256 * 1024, bits_per_second(rate) // 8 // 100)
        tbf = f"root tbf rate {rate} burst {burst} latency 200ms"
        self._switch(f"tc qdisc replace dev {name} {tbf}")
        self._on(name, f"tc qdisc replace dev {INTERFACE} {tbf}")

    def unshape(self, name: str) -> None:
        """Take the limit away."""
        self._switch(f"tc qdisc del dev {name} root")
        self._on(name, f"tc qdisc del dev {INTERFACE} root")

    def cut(self, name: str) -> None:
        """Pull a host's cable: packets are lost, connections stay open."""
        self._switch(f"ip link set {name} down")

    def heal(self, name: str) -> None:
        """Plug it in again."""
        self._switch(f"ip link set {name} up")

    def bytes_sent(self, name: str) -> int:
        """Bytes that a host has sent over its cable."""
        return self._counter(name, "TX")

    def bytes_received(self, name: str) -> int:
        """Bytes that have come to it."""
        return self._counter(name, "RX")

    def _counter(self, name: str, direction: str) -> int:
        said = self._on(name, f"ip -s link show {INTERFACE}")
        return int(re.search(rf"{direction}:.*\n\s*(\d+)", said)[1])

    def _switch(self, script: str) -> str:
        return _shell(["nsenter", "-t", str(self.first), "-m", "-n", "-p", "--"], script)

    def _on(self, name: str, script: str) -> str:
        return _shell(self._enter(name), script)

    def _enter(self, name: str) -> list[str]:
        if name not in self.pids:
            raise ValueError(f"there is no {name}; there are {', '.join(self.pids)}")
        namespaces = ["nsenter", "-t", str(self.pids[name]), "-m", "-n", "-u", "-p", "--"]
        return [*namespaces, "env", "-C", str(ROOT)]  # another mount namespace begins in /


def bits_per_second(rate: str) -> int:
    """Of a rate in tc's words: 100mbit, 1gbit, 500kbit."""
    found = re.fullmatch(r"(\d+)([kmg])bit", rate)
    if not found:
        raise ValueError(f"rate {rate!r}: give a whole number of kbit, mbit or gbit, such as 100mbit")
    return int(found[1]) * 1000 ** (1 + "kmg".index(found[2]))


def _shell(enter: list[str], script: str) -> str:
    done = subprocess.run([*enter, "sh", "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise OSError(f"{script}: {' '.join(done.stderr.split())}")
    return done.stdout


def _child(pid: int) -> int:
    """The one process that a process has started."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def _there() -> Hosts:
    """The hosts brought up last, that still are."""
    folders = sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*/hosts.json"), key=os.path.getmtime, reverse=True)
    for file in folders:
        if Path(f"/proc/{json.loads(file.read_text())['first']}").exists():
            return Hosts.attached(file.parent)
    raise SystemExit("no hosts are up; start some in another terminal: python -m tests.multinode.hosts up 2")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Simulated hosts on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="bring hosts up, until Ctrl-C").add_argument("count", type=int, nargs="?", default=2)
    for name, about in {
        "run": "a program on a host", "shape": "limit its link, e.g. to 100mbit", "unshape": "no limit",
        "cut": "pull its cable", "heal": "plug it in", "kill": "kill all its processes",
    }.items():  # fmt: skip
        sub = commands.add_parser(name, help=about)
        sub.add_argument("host")
        if name in ("run", "shape"):
            sub.add_argument("rest", nargs=argparse.REMAINDER if name == "run" else 1)
    args = parser.parse_args()
    if args.command == "up":
        return keep_up(args.count)
    hosts, rest = _there(), getattr(args, "rest", [])
    if args.host not in hosts.names:
        raise SystemExit(f"there is no {args.host}; there are {', '.join(hosts.names)}")
    if args.command == "run":
        path = f"PATH={hosts.folder / 'bin'}:{os.environ['PATH']}"
        os.execvp("nsenter", [*hosts._enter(args.host), path, *(rest or ["bash"])])
    try:
        return getattr(hosts, args.command)(args.host, *rest)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


def keep_up(count: int) -> None:
    """Bring hosts up and wait for Ctrl-C or SIGTERM."""
    try:
        with Hosts(count) as hosts:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            print(f"up: {', '.join(f'{name} {hosts.address(name)}' for name in hosts.names)}; pdsh: {hosts.pdsh}")
            again = "python -m tests.multinode.hosts run host1 bash    # in another terminal; Ctrl-C here ends all"
            print(again, flush=True)
            signal.pause()
    except KeyboardInterrupt:
        return
    except OSError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
