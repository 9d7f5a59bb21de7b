"""Tables of docs/results.md out of the runs of launch/evidence.py."""

import json
import math
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path

from launch.evidence_protocol import METHODS, Method, Protocol, Run, perplexities

BEGIN, END = "<!-- evidence: begin -->", "<!-- evidence: end -->"

# Validation perplexity of a LLaMA-60M on C4 as published: GaLore's and Fira's Table 2, APOLLO's Table 1.
PUBLISHED_60M = {"adamw": 34.06, "galore": 34.88, "fira": 31.06, "apollo": 31.55, "apollo-mini": 31.93}
BASELINES = {"galore": "galore-svd", "fira": "fira-svd"}  # exact SVDs, moments kept: what the papers do


def write_tables(page: Path, protocol: Protocol, results: dict[Run, dict]) -> None:
    """Replace what lies between the markers of `page`; keep every run's numbers in <page without .md>/evidence.json.

    Raises SystemExit when the page has no markers, or there are no runs.
    """
    if not results:
        raise SystemExit(f"{page}: there is no run to write of; leave --table-only out, or give the --output of runs")
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page} needs one line {BEGIN} and one line {END}, between which the tables go")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{render(protocol, results)}{END}{after}")
    kept = page.with_suffix("") / "evidence.json"
    kept.parent.mkdir(exist_ok=True)
    runs = [results[run] for run in sorted(results)]
    kept.write_text(json.dumps({"protocol": protocol.facts(), "runs": runs}, indent=1) + "\n")


def render(protocol: Protocol, results: dict[Run, dict]) -> str:
    """All tables as Markdown."""
    perplexity = perplexities(results)
    parts = [_facts(protocol, results), _main(protocol, results, perplexity), _refreshes(protocol, perplexity)]
    return "\n".join([*parts, _grids(protocol, perplexity)])


def seeds_of(protocol: Protocol, method: Method, found: dict[Run, float]) -> dict[int, float]:
    """Perplexity by seed at a method's tuned settings; empty while they are not known."""
    run = protocol.chosen(method, found)
    each = {} if run is None else {seed: found.get(run._replace(seed=seed)) for seed in range(protocol.seeds)}
    return {seed: value for seed, value in each.items() if value is not None}


def paired(values: dict[int, float], others: dict[int, float]) -> tuple[float, float, int]:
    """Mean and standard error of log(value / other) over the seeds both have, and how many those are."""
    gaps = [math.log(values[seed] / others[seed]) for seed in sorted(values.keys() & others.keys())]
    known = len(gaps) > 1 and all(map(math.isfinite, gaps))  # a seed that diverged leaves no spread
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if known else math.nan
    return (statistics.fmean(gaps) if gaps else math.nan), error, len(gaps)


def _facts(protocol: Protocol, results: dict[Run, dict]) -> str:
    one = next(record for record in results.values() if "versions" in record)
    commits = sorted({record["commit"] for record in results.values() if "commit" in record})
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    hours = sum(record["wall_s"] for record in results.values()) / 3600
    return (
        f"{len(results)} runs of {protocol.steps} steps, {one['tokens']:,} tokens each, {one['parameters']:,} "
        f"parameters; {hours:.1f} hours of one-thread runs. Device: {one['device']}, {_processor()}. {versions}. "
        f"Commit {', '.join(commits)}.\n"
    )


def _processor() -> str:
    """Name of this machine's processor; the tables are written where the runs were made."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def reported(protocol: Protocol, found: dict[Run, float]) -> list[Method]:
    """Methods of the first table whose settings are known; the second compares refreshes."""
    return [method for method in protocol.methods() if not method.is_refresh and seeds_of(protocol, method, found)]


def mean(values: dict[int, float]) -> float:
    """Mean over seeds."""
    return statistics.fmean(values.values())


def _main(protocol: Protocol, results: dict[Run, dict], found: dict[Run, float]) -> str:
    adamw = seeds_of(protocol, METHODS[0], found)
    shares = state_shares(protocol)
    lines = [
        "| method | lr | held-out perplexity | seeds | against AdamW | optimizer state | of the projected matrices | "
        "published, 60M on C4 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in reported(protocol, found):
        values = seeds_of(protocol, method, found)
        run = protocol.chosen(method, found)
        gap, error, pairs = paired(values, adamw)
        state = results[run]["state_bytes"] / 2**20
        lines.append(
            f"| {method.label} | {run.lr:g} | {_spread(values)} | {len(values)} | "
            f"{'' if method.name == 'adamw' else _percent(gap, error)} | {state:.2f} MiB | "
            f"{shares[method.name]:.3f} | {_published(method.name)} |"
        )
    embed = protocol.embed_lr(found)
    note = f"\nEmbeddings, head and norms: lr {embed:g} in every run.\n" if embed else ""
    return "\n".join(lines) + "\n" + note


def _spread(values: dict[int, float]) -> str:
    known = len(values) > 1 and all(map(math.isfinite, values.values()))
    spread = f" ± {statistics.stdev(values.values()):.2f}" if known else ""
    return f"{mean(values):.2f}{spread}"


def _percent(gap: float, error: float) -> str:
    return f"{100 * math.expm1(gap):+.1f} %{_error(100 * error, 1)}"


def _error(error: float, digits: int) -> str:
    """Standard error after a number; one seed has none."""
    return f" ± {error:.{digits}f}" if math.isfinite(error) else ""


def _published(name: str) -> str:
    if name not in PUBLISHED_60M:
        return ""
    against = PUBLISHED_60M[name] / PUBLISHED_60M["adamw"] - 1
    return f"{PUBLISHED_60M[name]:.2f}" + ("" if name == "adamw" else f" ({100 * against:+.1f} %)")


def _refreshes(protocol: Protocol, found: dict[Run, float]) -> str:
    known = {method.name: method for method in METHODS}
    lines = [
        "| method | subspace | moments at a new basis | held-out perplexity | loss against exact SVD, kept |",
        "|---|---|---|---|---|",
    ]
    for name, baseline in BASELINES.items():
        exact = seeds_of(protocol, known[baseline], found)
        for method in [known[name], *(each for each in METHODS if each.like == name and each.is_refresh)]:
            values = seeds_of(protocol, method, found)
            if not values:
                continue
            gap, error, pairs = paired(values, exact)
            how = method.options.get("subspace", "power"), method.options.get("on_refresh", "keep")
            against = "" if method.name == baseline else f"{gap:+.4f}{_error(error, 4)} ({pairs} pairs)"
            lines.append(f"| {known[name].label} | `{how[0]}` | {how[1]} | {_spread(values)} | {against} |")
    return "\n".join(lines) + "\n"


def _grids(protocol: Protocol, found: dict[Run, float]) -> str:
    """Every run of the tuning, so that a reader sees whether a method was tuned."""
    lines = ["| method | lr: perplexity at seed 0 |", "|---|---|"]
    for method in protocol.methods():
        cells = list(_grid(method, found))
        if not method.like and cells:
            lines.append(f"| {method.label} | {', '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _grid(method: Method, found: dict[Run, float]) -> Iterator[str]:
    embeds = {run.embed_lr for run in found if run.method == method.name}
    for run in sorted(run for run in found if run.method == method.name and run.seed == 0):
        which = f" (embed {run.embed_lr:g})" if len(embeds) > 1 else ""
        yield f"{run.lr:g}{which}: {found[run]:.2f}"


def state_shares(protocol: Protocol) -> dict[str, float]:
    """State of the projected matrices over AdamW's of the same, by method: the others are most of so small a model."""
    import torch
    from transformers import AutoModelForCausalLM

    import lowrank_ds
    from launch.model import read_config

    model = AutoModelForCausalLM.from_config(read_config(protocol.model))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    shares = {"adamw": 1.0}
    for method in protocol.methods()[1:]:
        options = dict(method.options)
        groups = lowrank_ds.param_groups(model, options.pop("rank"), options.pop("target_modules", None))
        projected = [group for group in groups if "rank" in group]
        optimizer = getattr(lowrank_ds, method.optimizer)(projected, **options)
        optimizer.step()  # state is there from the first step on
        whole = sum(2 * p.numel() * p.element_size() for group in projected for p in group["params"])
        shares[method.name] = lowrank_ds.state_bytes(optimizer) / whole
    return shares
