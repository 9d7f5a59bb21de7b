#!/usr/bin/env python3
"""Compare finished runs: a table on the terminal, and a plot of their losses.

Usage:

    python launch/summary.py runs/fira runs/adamw --plot runs/loss.png
"""

import argparse
import json
from pathlib import Path

COLUMNS = ("run", "optimizer", "lr", "embed lr", "held-out ppl", "state/rank", "optimizer ms", "step ms", "tokens/s")


def read_run(directory: Path) -> tuple[dict, list[dict]]:
    """summary.json and metrics.jsonl of a finished run."""
    try:
        summary = json.loads((directory / "summary.json").read_text())
    except FileNotFoundError:
        raise SystemExit(f"{directory} has no summary.json: the run has not finished, or is not a run") from None
    return summary, [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.1f} GiB"


def table(runs: dict[str, dict]) -> str:
    """Aligned text table, one line a run; state is the largest over ranks, times are medians."""
    rows = [COLUMNS] + [
        (
            name,
            run["optimizer"],
            f"{run['lr']:g}",
            f"{run['embed_lr']:g}",
            f"{run['perplexity']:.2f}",
            human_bytes(max(run["optimizer_state_bytes_per_rank"])),
            f"{run['optimizer_ms_median']:.1f}",
            f"{run['step_ms_median']:.1f}",
            f"{run['tokens_per_s']:.0f}",
        )
        for name, run in runs.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(curves: dict[str, list[dict]], target: Path) -> None:
    """Training loss against tokens, one curve a run, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.3))
    for name, records in curves.items():
        points = [record for record in records if record["kind"] == "train"]
        axes.plot([point["tokens"] for point in points], [point["loss"] for point in points], label=name)
    axes.set(xlabel="tokens", ylabel="training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Table and plot of finished runs.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    args = parser.parse_args()
    names = [directory.resolve().name for directory in args.runs]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in args.runs]
    runs = {name: read_run(directory) for name, directory in zip(names, args.runs, strict=True)}
    print(table({name: summary for name, (summary, _) in runs.items()}))
    if args.plot:
        plot({name: records for name, (_, records) in runs.items()}, args.plot)
        print(f"loss curves: {args.plot}")


if __name__ == "__main__":
    main()
