"""Every way to launch x every engine x one or two processes a host: are the weights those of one process?

    python -m tests.multinode.matrix                                  # all 24 cells
    python -m tests.multinode.matrix --ways pdsh mpirun --engines zero3 --ranks 1 --pdsh stand-in

Outputs of cells that fail are kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.multinode import jobs
from tests.multinode.hosts import Hosts

COUNT = 2


def cell(hosts: Hosts, folder: Path, alone: Path, way: str, engine: str, ranks: int) -> tuple[float, float, str]:
    """(largest difference of a weight, seconds, what went wrong) of one launch on two hosts."""
    output = folder / f"{way}-{engine}-{ranks}"
    arguments = jobs.arguments_of(folder / "data", output, engine, "--steps", jobs.STEPS, "--save-every", 0)
    began = time.monotonic()
    try:
        seconds = jobs.train(hosts, hosts.names, way, ranks, arguments, output).wait()
    except AssertionError as error:
        for name in hosts.names:
            hosts.kill(name)
        return float("nan"), time.monotonic() - began, str(error)
    found = jobs.processes_of(output)
    wrong = "" if found == COUNT * ranks else f"{found} processes trained together, not {COUNT * ranks}"
    return jobs.difference(alone, output), seconds, wrong


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Launchers x engines on two simulated hosts.")
    parser.add_argument("--ways", nargs="+", choices=(*jobs.WAYS, "mpich"), default=jobs.WAYS)
    parser.add_argument("--engines", nargs="+", choices=jobs.ENGINES, default=jobs.ENGINES)
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=(1, 2), help="processes on each host")
    parser.add_argument("--pdsh", choices=("real", "stand-in"))
    args = parser.parse_args()
    folder, failed, began = Path(tempfile.mkdtemp(prefix="multinode-")), [], time.monotonic()
    data = jobs.data_for(folder)
    alone = jobs.one_process(folder, data, "--steps", jobs.STEPS, "--save-every", 0)
    try:
        hosts = Hosts(COUNT, args.pdsh)
    except OSError as error:
        sys.exit(str(error))
    with hosts:
        print(f"pdsh: {hosts.pdsh}\n{'way':<10} {'hosts x ranks':<14} {'engine':<7} {'difference':>10} {'wall s':>7}")
        for ranks in args.ranks:
            for way in args.ways:
                for engine in args.engines:
                    largest, seconds, wrong = cell(hosts, folder, alone, way, engine, ranks)
                    row = f"{way:<10} {f'{COUNT} x {ranks}':<14} {engine:<7} {largest:>10.1e} {seconds:>7.0f}"
                    print(row, "FAILED" if wrong else "", flush=True)
                    if wrong or not largest <= jobs.LIMIT:
                        failed.append(f"{row}\n{wrong}")
    print(f"{time.monotonic() - began:.0f} s in all")
    if failed:
        sys.exit("\n\n".join([f"{len(failed)} cells failed (outputs are kept in {folder}):", *failed]))
    print(f"all weights are those of one process within {jobs.LIMIT}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
