"""Figure of docs/results.md: perplexity of every method and seed, beside what its state takes."""

from pathlib import Path

from launch.evidence_protocol import Protocol, Run, perplexities
from launch.evidence_table import mean, reported, seeds_of, state_shares

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"  # told apart by colour-blind readers, too


def draw(target: Path, protocol: Protocol, results: dict[Run, dict]) -> None:
    """One row a method, best first: a point for each seed, a bar at their mean, AdamW's mean as a line through all.

    target: .svg or .png file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, shares = perplexities(results), state_shares(protocol)
    rows = sorted(((seeds_of(protocol, method, found), method) for method in reported(protocol, found)), key=_rank)
    figure, axes = pyplot.subplots(figsize=(7.5, 0.9 + 0.36 * len(rows)))
    for place, (values, method) in enumerate(rows):
        colour = ORANGE if method.name == "adamw" else BLUE
        axes.plot(list(values.values()), [place] * len(values), "o", color=colour, alpha=0.55, markersize=5)
        axes.plot([mean(values)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
        if method.name == "adamw":
            axes.axvline(mean(values), color=ORANGE, linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{100 * shares[method.name]:.3g} %",
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            color=GREY,
        )
    axes.annotate(
        "state", (1.02, -1), xycoords=("axes fraction", "data"), va="center", color=GREY, annotation_clip=False
    )
    axes.set(yticks=range(len(rows)), yticklabels=[method.label for _, method in rows], xlabel="held-out perplexity")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    pyplot.close(figure)


def _rank(row: tuple) -> float:
    return mean(row[0])
