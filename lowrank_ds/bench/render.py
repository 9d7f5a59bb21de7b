"""JSON of the benchmarks to Markdown: what a run prints, and the tables of docs/benchmarks.md."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lowrank_ds.bench import facts

_BLOCK = re.compile(r"(<!-- bench: (?P<file>\S+) -->\n).*?(<!-- end of bench -->)", re.DOTALL)


def document(found: dict[str, Any]) -> str:
    """All tables of one run.

    Raises:
        ValueError: not the JSON of a benchmark.
    """
    kinds = {"micro": micro, "model": model, "sharded": sharded, "gpu": gpu}
    if not isinstance(found, dict) or found.get("benchmark") not in kinds:
        raise ValueError(f'not the result of a benchmark: its "benchmark" must be one of {", ".join(kinds)}')
    parts = [facts.line(found["facts"]), kinds[found["benchmark"]](found)]
    parts += ["\n".join(f"- {text}" for text in found["missing"])] if found.get("missing") else []
    return "\n\n".join(part for part in parts if part)


def load(path: pathlib.Path) -> dict[str, Any]:
    """The JSON of a run. Raises ValueError, naming the file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def fill(page: pathlib.Path) -> str:
    """The page with every block between "<!-- bench: FILE -->" and "<!-- end of bench -->" made anew from FILE.

    FILE is relative to the page.

    Raises:
        ValueError: the page has no such block, or a file is not the result of a benchmark.
    """
    text = page.read_text()
    if not _BLOCK.search(text):
        raise ValueError(f"{page}: no block between <!-- bench: FILE --> and <!-- end of bench -->")

    def block(match: re.Match) -> str:
        return f"{match[1]}\n{document(load(page.parent / match['file']))}\n\n{match[3]}"

    return _BLOCK.sub(block, text)


# -- tables -----------------------------------------------------------------------------------------------------------
def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def micro(found: dict[str, Any]) -> str:
    """A summary of all cells, then of each cell steps, memory and refreshes."""
    parts = ["### Step / floor of its own GEMMs, and x faster than its package", _summary(found["results"])]
    for cell in found["results"]:
        parts.append(f"### {_cell(cell)}")
        parts.append(_steps(cell))
        parts.append(_memory(cell))
        if "refresh" in cell:
            parts.append(_refreshes(cell["refresh"]))
    return "\n\n".join(parts)


def _cell(cell: dict[str, Any]) -> str:
    products = f", products in fp32 {cell['matmul_precision']}" if "matmul_precision" in cell else ""
    return f"{cell['shape'][0]}x{cell['shape'][1]}, rank {cell['rank']}, {cell['dtype']}{products}"


def _summary(cells: list[dict[str, Any]]) -> str:
    """Medians only: "step / floor; x package" of each of ours in each cell."""
    names = list(dict.fromkeys(row["name"] for cell in cells for row in cell["rows"] if row["kind"] == "ours"))

    def entry(row: dict[str, Any] | None) -> str:
        found = [row[key] for key in ("to_floor", "times_faster")] if row else []
        return "; ".join(f"{ratio['median']:.2f}" if ratio else "-" for ratio in found)

    rows = []
    for cell in cells:
        by_name = {row["name"]: row for row in cell["rows"]}
        rows.append([_cell(cell), *(entry(by_name.get(name)) for name in names)])
    return table(["matrix", *names], rows)


def _steps(cell: dict[str, Any]) -> str:
    kind = _main(cell["rows"][0]["times"])
    head = (f"optimizer | {kind} ms: median (min) | quartiles | wall ms | x fused AdamW | its own GEMMs ms | step / "
            "those | step / best layout | x faster than its package").split(" | ")  # fmt: skip
    rows = []
    for row in cell["rows"]:
        times, floor = row["times"][kind], row["floor"]
        rows.append([
            row["name"], _both(times), f"{times['q1']:.2f}-{times['q3']:.2f}", f"{row['times']['wall']['median']:.2f}",
            _both(row["to_fused"]), _both(floor[kind] if floor else None), _both(row["to_floor"]),
            _both(row["to_best_floor"]), _both(row["times_faster"]),
        ])  # fmt: skip
    best = cell["best_floor"][kind]
    return table(head, rows) + f"\n\nBest layout of two GEMMs ({cell['best_layout']}): {_both(best)} ms."


def _memory(cell: dict[str, Any]) -> str:
    head = [
        "optimizer",
        "state MiB held (formula)",
        "temporaries at the peak of a step, matrices",
        "GEMMs of m x n by r",
    ]
    rows = []
    for row in cell["rows"]:
        large = f"{row['products']['large']:.2f} in {row['products']['calls']} calls" if row["products"] else ""
        rows.append([row["name"], _state(row["state"]), f"{row['peak_step']:.2f}", large])
    return table(head, rows)


def _refreshes(found: dict[str, Any]) -> str:
    kind = _main(found["rows"][0]["times"])
    head = ["refresh", f"{kind} ms more than a step: median (min)", "x faster than galore-torch", "captured / best",
            "peak matrices"]  # fmt: skip
    rows = []
    for row in found["rows"]:
        name = row["name"] + (" (default method)" if row["name"].split()[0] == found["default"] else "")
        peak = "" if row["peak"] is None else f"{row['peak']:.2f}"
        rows.append([name, _both(row["times"][kind], 1), _both(row["times_faster"], 1), f"{row['captured']:.4f}", peak])
    return table(head, rows)


def _main(times: dict[str, Any]) -> str:
    return "device" if "device" in times else "cpu"


def _both(found: dict[str, float] | None, digits: int = 2) -> str:
    """ "median (min)"."""
    return "" if found is None else f"{found['median']:.{digits}f} ({found['min']:.{digits}f})"


def _mib(size: float) -> str:
    return f"{size / 2**20:.2f}"


def _state(state: dict[str, Any]) -> str:
    """Held bytes; what is logically there if that is less; the formula's, if there is one."""
    text = _mib(state["held"])
    text += f", {_mib(state['logical'])} used" if state["logical"] < state["held"] else ""
    return text + (f" ({_mib(state['formula'])})" if state.get("formula") else "")


def model(found: dict[str, Any]) -> str:
    """Steps of all parameters, with the refresh spread over the steps between two."""
    given, kind = found["settings"], _main(found["rows"][0]["times"])
    name = pathlib.Path(given["model"]).stem
    title = (f"### {name}: {given['parameters']:,} parameters, {given['matrices']} matrices projected, rank "
             f"{given['rank']}, float32")  # fmt: skip
    head = ["optimizer", f"step, {kind} ms: median (min)", "wall ms", "x fused AdamW", "refresh of all, ms (cold)",
            f"with refreshes every {given['gap']} steps, ms", "x fused AdamW", "x faster than its package",
            "state MiB"]  # fmt: skip
    whole = {row["name"]: row["amortised_ms"] for row in found["rows"] if row["kind"] == "package"}
    rows = []
    for row in found["rows"]:
        more, rival = row["refresh_ms"], whole.get(row["rival"])
        rows.append([
            row["name"] + (f", {row['method']}" if row["method"] else ""), _both(row["times"][kind], 1),
            f"{row['times']['wall']['median']:.1f}", _both(row["to_fused"]),
            f"{more['warm']:.0f} ({more['cold']:.0f})" if more else "", f"{row['amortised_ms']:.1f}",
            f"{row['amortised_to_fused']:.2f}", f"{rival / row['amortised_ms']:.2f}" if rival else "",
            _mib(row["state_bytes"]),
        ])  # fmt: skip
    return "\n\n".join([title, table(head, rows), *_model_floor(found.get("floor"), kind)])


def _model_floor(floor: dict[str, Any] | None, kind: str) -> list[str]:
    if not floor:
        return []
    parts = " + ".join(f"{name} {_both(times[kind], 1)} ms" for name, times in floor.items())
    return [f"What a GaLore step cannot be quicker than: {parts}."]


def sharded(found: dict[str, Any]) -> str:
    """Tokens per second and traffic of each engine."""
    given, parts = found["settings"], []
    for result in found["results"]:
        name, tokens = pathlib.Path(given["model"]).stem, f"{given['batch']} x {given['length']} tokens a step"
        engine = f"{result['engine']}, {result['world']} ranks"
        parts.append(f"### {engine}, {name}, {tokens}, rank {given['rank']}, {given['dtype']}")
        parts.append(_speeds(result, given["gap"]))
        parts.append(_traffic(result))
    return "\n\n".join(parts)


def _speeds(result: dict[str, Any], gap: int) -> str:
    head = ["optimizer", "tokens/s", "ms a step: median (min)", "optimizer's ms", "refresh of all, ms",
            "tokens/s to AdamW's: median (min)", f"with refreshes every {gap} steps", "the same, CPU time"]  # fmt: skip
    rows = []
    for row in result["rows"]:
        refresh = "" if row["refresh_ms"] is None else f"{row['refresh_ms']:.0f}"
        speeds = [row["to_adamw"]["wall"]["steady"], row["to_adamw"]["wall"]["all"], row["to_adamw"]["cpu"]["all"]]
        times, own = row["times"]["wall"], f"{row['times']['optimizer']['median']:.1f}"
        speeds = [_both(speed, 3) for speed in speeds]
        rows.append([row["name"], f"{row['tokens_per_s']:.0f}", _both(times, 1), own, refresh, *speeds])
    return table(head, rows)


def _traffic(result: dict[str, Any]) -> str:
    head = ["optimizer", "collectives added a step", "bytes to a rank", "by kind", "budget", "with a refresh"]
    rows = []
    for row in (r for r in result["rows"] if "budget_bytes" in r):
        seen, more = row["traffic"], row["refresh_traffic"]
        rows.append([
            row["name"], str(sum(seen["calls"].values())), str(sum(seen["bytes"].values())), _kinds(seen),
            str(row["budget_bytes"]),
            f"{sum(more['calls'].values())} collectives, {sum(more['bytes'].values())} bytes" if more else "",
        ])  # fmt: skip
    return table(head, rows)


def _kinds(seen: dict[str, dict[str, int]]) -> str:
    return ", ".join(f"{count} {kind} {seen['bytes'][kind]}" for kind, count in seen["calls"].items()) or "none"


def gpu(found: dict[str, Any]) -> str:
    """Layer shapes, then whole training steps."""
    if not found["measured"]:
        return "Not measured: there is no CUDA device on this machine."
    parts = [micro({"results": found["layers"]})] if found["layers"] else []
    return "\n\n".join(parts + ([_training(found)] if found["training"] else []))


def _training(found: dict[str, Any]) -> str:
    given = found["settings"]
    config = given["config"]
    size = f"{config['num_hidden_layers']} layers of width {config['hidden_size']}"
    title = (f"### Training step, LLaMA of {size}, bf16, {given['batch']} x {given['length']} tokens, rank "
             f"{given['rank']}, {given['subspace']}, products in fp32 {given['matmul_precision']}, activation "
             "checkpointing; ours layer-wise")  # fmt: skip
    head = ["optimizer", "ms a step: median (min)", "tokens/s", "first step (refresh), ms", "peak GiB", "weights GiB",
            "state GiB"]  # fmt: skip
    rows = []
    for row in found["training"]:
        if "failed" in row:
            rows.append([row["name"], row["failed"], *[""] * (len(head) - 2)])
            continue
        sizes = (row[f"{kind}_bytes"] for kind in ("peak", "weight", "state"))
        sizes = ("not measured" if size is None else f"{size / 2**30:.2f}" for size in sizes)
        times = _both(row["times"][_main(row["times"])], 1)
        rows.append([row["name"], times, f"{row['tokens_per_s']:.0f}", f"{row['first_ms']:.0f}", *sizes])
    return title + "\n\n" + table(head, rows)
