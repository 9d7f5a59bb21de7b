#!/usr/bin/env python3
"""The paper table at a size two CPU cores can train: every method tuned alike, several seeds, one command.

    python launch/evidence.py --output runs/evidence --write docs/results.md

Runs `launch/pretrain.py` once for each (method, learning rate, seed) that the protocol of `launch/evidence_protocol.py`
asks for, `--parallel` at a time with one thread each. Finished runs are kept: the same command goes on where it was
stopped. `--write` puts the tables into that file (launch/evidence_table.py), the numbers of every run into
results/evidence.json beside it, and a figure into images/evidence.svg (matplotlib).
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.evidence_figure import draw
from launch.evidence_protocol import Protocol, Run, perplexities
from launch.evidence_table import write_tables

ROOT = Path(__file__).resolve().parents[1]


class Bench:
    """Where runs are made and their results are kept: OUTPUT/runs/<run>/summary.json and OUTPUT/results.json."""

    def __init__(self, output: Path, protocol: Protocol):
        self.output, self.protocol = output, protocol
        self.results: dict[Run, dict] = {}
        self.file = output / "results.json"
        for record in self._kept():
            self.results[Run(**record["run"])] = record

    def _kept(self) -> list[dict]:
        if not self.file.exists():
            return []
        kept = json.loads(self.file.read_text())
        if kept["protocol"] != self.protocol.facts():
            raise SystemExit(
                f"{self.file} was made with other settings than these ({kept['protocol']}); give another --output"
            )
        return kept["runs"]

    def record(self, run: Run, result: dict) -> None:
        """Keep one result on disk."""
        self.results[run] = {"run": run._asdict(), **result}
        ordered = [self.results[key] for key in sorted(self.results)]
        text = json.dumps({"protocol": self.protocol.facts(), "runs": ordered}, indent=1) + "\n"
        beside = self.file.with_suffix(".new")
        beside.write_text(text)
        beside.replace(self.file)

    def train(self, run: Run) -> dict:
        """Make one run and return what is kept of it."""
        place, log = self.output / "runs" / run.name, self.output / "runs" / f"{run.name}.log"
        shutil.rmtree(place, ignore_errors=True)  # half of one, when an earlier command was stopped
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "launch/pretrain.py", *self.protocol.flags(run, self.output / "corpus")]
        began = time.perf_counter()
        with log.open("w") as out:
            job = subprocess.run(
                [*command, "--output", str(place)], cwd=ROOT, env=one_thread(), stdout=out, stderr=subprocess.STDOUT
            )
        wall = time.perf_counter() - began
        if job.returncode:
            if "the loss is nan" in log.read_text() or "the loss is inf" in log.read_text():
                return {"perplexity": None, "wall_s": round(wall)}
            raise SystemExit(f"{' '.join(command)} failed with exit code {job.returncode}; see {log}")
        summary = json.loads((place / "summary.json").read_text())
        shutil.rmtree(place / "checkpoint")  # 60 of them would fill the disk
        kept = ("perplexity", "tokens", "parameters", "optimizer_ms_mean", "step_ms_median", "device", "versions")
        state = sum(summary["optimizer_state_bytes_per_rank"])
        return {key: summary[key] for key in kept} | {"state_bytes": state, "wall_s": round(wall), "commit": commit()}


def one_thread() -> dict[str, str]:
    """Environment of a run: one thread, no network. Side by side such runs are quicker than one with two threads."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }


def commit() -> str:
    """Commit of this checkout, with a star when files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "no git checkout"
    return head.strip() + ("*" if changed.strip() else "")


def prepare(bench: Bench) -> None:
    """The vendored corpus, its tokenizer and the token cache, made once before several runs want them."""
    corpus = bench.output / "corpus"
    if not (corpus / "tokenizer").is_dir():
        subprocess.run([sys.executable, "launch/prepare_corpus.py", "--output", str(corpus)], cwd=ROOT, check=True)


def run_all(bench: Bench, parallel: int) -> None:
    """Make every run that the protocol asks for, in its order; which those are depends on earlier results."""
    at_work: dict[Future, Run] = {}
    with ThreadPoolExecutor(parallel) as pool:
        while True:
            wanted = bench.protocol.wanted(perplexities(bench.results))
            waiting = [run for run in wanted if run not in at_work.values()]
            while waiting and len(at_work) < parallel:
                run = waiting.pop(0)
                at_work[pool.submit(bench.train, run)] = run
                if not bench.results:
                    break  # the first run alone tokenises the corpus
            if not at_work:
                return
            done, _ = wait(at_work, return_when=FIRST_COMPLETED)
            if any(future.exception() for future in done):
                done, _ = wait(at_work)  # what is at work beside a failed run is not lost
            for future in done:
                run = at_work.pop(future)
                if not future.exception():
                    found = future.result()
                    bench.record(run, found)
                    print(f"{run.name:60} {found['perplexity'] or math.inf:9.3f}  {found['wall_s']:5d} s", flush=True)
            for future in done:
                future.result()  # raises what went wrong


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the table of docs/results.md, and write it.")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"), help="corpus, runs and results.json")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file whose tables are replaced")
    parser.add_argument("--parallel", type=int, default=2, help="one-thread runs side by side (default 2)")
    parser.add_argument("--steps", type=int, default=300, help="of 2048 tokens (default 300)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every reported row (default 3)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods alone")
    parser.add_argument("--table-only", action="store_true", help="train nothing, write what is there")
    args = parser.parse_args()
    if args.parallel < 1 or args.steps < 10 or args.seeds < 1:
        parser.error("--parallel and --seeds must be at least 1, --steps at least 10")
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.output, Protocol(args.steps, args.seeds, args.only))
    if not args.table_only:
        prepare(bench)
        run_all(bench, args.parallel)
    if args.write:
        write_tables(args.write, bench.protocol, bench.results)
        figure = args.write.parent / "images" / "evidence.svg"
        draw(figure, bench.protocol, bench.results)
        print(f"tables: {args.write}, figure: {figure}")


if __name__ == "__main__":
    main()
