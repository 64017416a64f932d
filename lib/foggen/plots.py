"""The figures: one style, one palette, each drawn from a table of `routing` or `stats` or from outcomes.

Knows nothing of files except in `save`, and computes no metric that a table does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.stats import beta

from foggen import stats
from foggen.prompts import BUCKETS
from foggen.stats import MEAN, Array, router_score

# Okabe & Ito (2008): told apart with any colour vision; yellow is left out, it is too light for lines.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "#8C8C8C"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SIZE = (6.4, 4.2)
PANELS = {
    "local_accuracy": "local accuracy",
    "mean_confidence": "mean confidence",
    "ece": "expected calibration error",
    "auroc": "AUROC of confidence",
    "parse_rate": "share parsed",
}


def style() -> None:
    """Set the style of every figure here: call it once in a notebook that draws its own."""
    mpl.rcParams.update(
        {
            "figure.figsize": SIZE,
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "savefig.dpi": 150,
            "svg.hashsalt": "foggen",  # the same ids in every run
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E5E5E5",
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.8,
        }
    )


def save(figure: Figure, folder: Path | str, name: str) -> Figure:
    """Write `<name>.png` (150 dpi) and `<name>.svg`, and close the figure, so that a notebook shows it once."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    return figure


def _axes(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = SIZE, **options: Any
) -> tuple[Figure, Any]:
    style()
    return plt.subplots(rows, columns, figsize=size, **options)


def _percent(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_formatter(PercentFormatter(1))


def _n(outcomes: pd.DataFrame) -> str:
    return f"n = {outcomes['id'].nunique():,} questions"


# ---- accuracy against cloud share


def accuracy_curve(
    curve: pd.DataFrame,
    point: tuple[float, float] | None = None,
    published: tuple[float, float] | None = None,
    tau: float = 0.5,
) -> Figure:
    """System accuracy against cloud share from `routing.share_curve`, with 95% band, random line and oracle.

    `point` and `published` are (cloud share, system accuracy), 0..1: ours at `tau`, and the model card's.
    """
    figure, axes = _axes()
    share = curve["share"]
    axes.plot(share, curve["oracle"], color=GREEN, ls=":", label="oracle, same share")
    axes.fill_between(share, curve["sysacc_low"], curve["sysacc_high"], color=BLUE, alpha=0.2, lw=0)
    axes.plot(share, curve["sysacc"], color=BLUE, label="confidence (95% band)")
    axes.plot(share, curve["random"], color=GREY, ls="--", label="random, same share")
    if point:
        axes.plot(*point, "o", color=VERMILION, ms=8, mec="white", label=f"tau = {tau:g}", zorder=5)
    if published:
        axes.plot(
            *published, "*", color=BLACK, ms=12, mec="white", label="published (its own questions)", zorder=5
        )
    axes.set(
        xlabel="share of questions sent to the cloud (%)", ylabel="system accuracy (%)", xlim=(-0.01, 1.01)
    )
    axes.set_title(f"Mean over domains, n = {curve['n'].iloc[0]:,} questions")
    _percent(axes.xaxis, axes.yaxis)
    axes.legend(loc="best")
    return figure


def matched_curves(curves: Mapping[str, pd.DataFrame], mark: float | None = None) -> Figure:
    """Lift over random at the same cloud share for several routers, each a `routing.share_curve`, with 95% bands."""
    figure, axes = _axes()
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        axes.fill_between(
            curve["share"], 100 * curve["lift_low"], 100 * curve["lift_high"], color=colour, alpha=0.15, lw=0
        )
        axes.plot(curve["share"], 100 * curve["lift"], color=colour, label=name)
    axes.axhline(0, color=GREY, ls="--", lw=1.2, label="random")
    if mark is not None:
        axes.axvline(mark, color=GREY, lw=1, ls=":")
        axes.annotate("FogGen's share", (mark, 0.98), xycoords=("data", "axes fraction"), xytext=(4, 0),
                      textcoords="offset points", va="top", fontsize=9, color="#555555")  # fmt: skip
    n = next(iter(curves.values()))["n"].iloc[0]
    axes.set(xlabel="share of questions sent to the cloud (%)", ylabel="lift over random (percentage points)")
    axes.set_title(f"Mean over domains, n = {n:,} questions, 95% bands")
    axes.set_xlim(0, 1)
    _percent(axes.xaxis)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


# ---- confidence


def reliability(
    outcomes: pd.DataFrame, column: str = "confidence", label: str = "stated confidence"
) -> Figure:
    """Share right against confidence, one point a bin with its 95% interval (Jeffreys), and the count of each bin.

    Bins are the buckets for verbal confidence and ten of equal mass for a graded one.
    """
    figure, (top, bottom) = _axes(2, size=(6.4, 5.4), sharex=True, height_ratios=(3, 1))
    known = outcomes[outcomes[column].notna()]
    confidence = known[column].to_numpy(float)
    few = len(np.unique(confidence)) <= len(BUCKETS)
    bins = stats.buckets(confidence) if few else stats.equal_mass(confidence)
    groups = (
        known.assign(bin=bins)
        .groupby("bin")
        .agg(x=(column, "mean"), right=("local_correct", "sum"), n=("id", "size"))
    )
    rate = groups["right"] / groups["n"]
    low, high = (
        beta.ppf(q, groups["right"] + 0.5, groups["n"] - groups["right"] + 0.5) for q in (0.025, 0.975)
    )
    spread = [np.clip(rate - low, 0, 1), np.clip(high - rate, 0, 1)]
    top.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1.2, label="perfectly calibrated")
    top.vlines(groups["x"], rate, groups["x"], color=ORANGE, lw=5, alpha=0.45, label="gap")
    top.errorbar(groups["x"], rate, yerr=spread, color=BLUE, marker="o", capsize=3, label="share right (95%)")
    top.set(ylabel="local answers right (%)", ylim=(0, 1), xlim=(-0.1, 1.1))
    top.set_title(f"Reliability, n = {len(known):,} parsed of {len(outcomes):,}")
    top.legend(loc="upper left")
    _counts(bottom, groups, label, 0.12 if few else 0.02)
    _percent(top.yaxis)
    return figure


def _counts(axes: Axes, groups: pd.DataFrame, label: str, width: float) -> None:
    axes.bar(groups["x"], groups["n"], width=width, color=SKY)
    for x, n in zip(groups["x"], groups["n"], strict=True):
        axes.annotate(f"{n:,}", (x, n), ha="center", va="bottom", fontsize=8 if width > 0.1 else 6.5)
    axes.set(xlabel=label, ylabel="questions")
    axes.margins(y=0.25)
    axes.grid(axis="x", visible=False)


def confidence_histogram(
    outcomes: pd.DataFrame, column: str = "confidence", label: str = "stated confidence"
) -> Figure:
    """Questions at each confidence, right and wrong apart; unparsed answers have a bar of their own."""
    figure, axes = _axes()
    score = router_score(outcomes, column)
    few = len(np.unique(score[score >= 0])) <= len(BUCKETS)
    edges = np.linspace(-0.125, 1.125, 6) if few else np.linspace(0, 1, 21)
    width, centres = np.diff(edges)[0], (edges[:-1] + edges[1:]) / 2
    right = outcomes["local_correct"].to_numpy(float)
    for offset, weights, name, colour in ((-1, right, "right", BLUE), (1, 1 - right, "wrong", VERMILION)):
        counts = np.histogram(score, edges, weights=weights)[0]
        x = centres + offset * 0.21 * width
        axes.bar(x, counts, 0.4 * width, color=colour, label=f"answer {name} ({weights.sum():,.0f})")
        axes.bar(-0.25 + offset * 0.21 * width, weights[score < 0].sum(), 0.4 * width, color=colour)
    axes.set_xticks([-0.25, *BUCKETS], ["unparsed", *(f"{bucket:g}" for bucket in BUCKETS)])
    axes.set(xlabel=label, ylabel="questions", title=f"Confidence of right and wrong answers, {_n(outcomes)}")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left")
    return figure


def risk_coverage(outcomes: pd.DataFrame, columns: Mapping[str, str], tau: float = 0.5) -> Figure:
    """Error rate of the answers kept against the share kept, best first; `columns` maps score columns to labels.

    Ties are kept in random order, in expectation; the dot marks confidence >= `tau`.
    """
    figure, axes = _axes()
    wrong = 1 - outcomes["local_correct"].to_numpy(float)
    for (column, label), colour in zip(columns.items(), COLOURS, strict=False):
        coverage, risk, area = _risk_line(outcomes, column)
        axes.plot(coverage, risk, color=colour, label=f"{label} (AURC {100 * area:.1f})")
    keep = (outcomes["confidence"] >= tau).to_numpy()
    if keep.any():
        axes.plot(
            keep.mean(),
            wrong[keep].mean(),
            "o",
            color=BLUE,
            ms=8,
            mec="white",
            label=f"tau = {tau:g}",
            zorder=5,
        )
    axes.axhline(wrong.mean(), color=GREY, ls="--", lw=1.2, label="random")
    axes.set(
        xlabel="coverage: share answered locally (%)", ylabel="risk: wrong among those (%)", xlim=(0, 1.01)
    )
    axes.set_title(f"Risk and coverage, {_n(outcomes)}")
    axes.set_ylim(bottom=0)
    _percent(axes.xaxis, axes.yaxis)
    axes.legend()
    return figure


def _risk_line(outcomes: pd.DataFrame, column: str) -> tuple[Array, Array, float]:
    """Coverage, expected risk at each, and their area, for 200 coverages."""
    right = outcomes["local_correct"].to_numpy(float)
    count, hits = stats.tie_sums(router_score(outcomes, column), np.ones((1, len(outcomes))), right)
    kept = np.append(0.0, np.cumsum(count[0, ::-1]))
    errors = np.append(0.0, np.cumsum((count - hits)[0, ::-1]))
    at = np.linspace(1, kept[-1], min(200, len(outcomes)))
    return at / kept[-1], np.interp(at, kept, errors) / at, float(stats.aurc(count, hits)[0])


# ---- domains, rounds, open-ended


def domain_dumbbells(table: pd.DataFrame) -> Figure:
    """From the edge model alone to the cloud for each row of `routing.routing_table`, FogGen and random between."""
    figure, axes = _axes(size=(6.4, 0.5 * len(table) + 1.5))
    rows = table[table["n"] > 0].reset_index(drop=True)
    y = np.arange(len(rows))[::-1]
    axes.hlines(y, rows["raw"], rows["cloud"], color="#CCCCCC", lw=4, zorder=1)
    axes.plot(rows["raw"], y, "o", color=BLACK, mfc="white", ms=7, label="edge alone")
    axes.plot(rows["cloud"], y, "s", color=GREEN, ms=7, label="cloud alone")
    axes.plot(rows["random"], y, "|", color=GREY, ms=14, mew=2.5, label="random, same share")
    ends = [rows["sysacc"] - rows["sysacc_low"], rows["sysacc_high"] - rows["sysacc"]]
    axes.errorbar(
        rows["sysacc"],
        y,
        xerr=np.clip(ends, 0, 1),
        fmt="o",
        color=BLUE,
        ms=7,
        capsize=3,
        label="FogGen (95%)",
    )
    axes.set_yticks(
        y, [f"{d.replace('_', ' ')} ({r:.0%})" for d, r in zip(rows["domain"], rows["routed"], strict=True)]
    )
    if rows["domain"].iloc[-1] == MEAN:
        axes.axhline(0.5, color=GREY, lw=0.8)
    axes.set(xlabel="accuracy (%)", ylabel="domain (share routed)", ylim=(-0.6, len(rows) - 0.4))
    _percent(axes.xaxis)
    axes.grid(axis="y", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def round_curves(rounds: pd.DataFrame, panels: Mapping[str, str] = PANELS) -> Figure:
    """How the edge model changes over the chain: one panel a measure, and one of the shares of the buckets.

    Columns: round, domain (rows called mean are drawn bold, with a band where `_low` and `_high` are there), the
    keys of `panels` that are there, and shares in columns that start with `bucket`, lowest first (mean rows).
    """
    shown = [name for name in panels if name in rounds]
    ends = ("_low", "_high")
    buckets = [name for name in rounds if str(name).startswith("bucket") and not str(name).endswith(ends)]
    total = len(shown) + bool(buckets)
    figure, grid = _axes(
        -(-total // 3), min(total, 3), (9.6, 3.0 * -(-total // 3) + 0.5), squeeze=False, sharex=True
    )
    for axes, name in zip(grid.flat, shown, strict=False):
        _lines(axes, rounds, name)
        axes.set_title(panels[name])
        _percent(axes.yaxis)
    if buckets:
        _bucket_areas(grid.flat[len(shown)], rounds, buckets)
    for axes in grid.flat[total:]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("round")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _lines(axes: Axes, rounds: pd.DataFrame, name: str) -> None:
    for i, (domain, part) in enumerate(rounds.groupby("domain", sort=False)):
        look: dict[str, Any] = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "ms": 3.5, "lw": 1.1}
        if domain == MEAN:
            look = {"color": BLACK, "lw": 2.6, "zorder": 4}
            if f"{name}_low" in part:
                band = (part["round"], part[f"{name}_low"], part[f"{name}_high"])
                axes.fill_between(*band, color=GREY, alpha=0.35, lw=0, zorder=3, label="95% of the mean")
        axes.plot(part["round"], part[name], label=str(domain).replace("_", " "), **look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.02), min(high, 1.02))


def _bucket_areas(axes: Axes, rounds: pd.DataFrame, buckets: Sequence[str]) -> None:
    mean = rounds[rounds["domain"] == MEAN] if (rounds["domain"] == MEAN).any() else rounds
    shares = mean.groupby("round")[list(buckets)].mean()
    shades = mpl.colormaps["cividis"](np.linspace(0.05, 0.95, len(buckets)))
    names = [str(name).removeprefix("bucket").strip(" _") for name in buckets]
    areas = axes.stackplot(shares.index, shares.T.to_numpy(), colors=shades, labels=names)
    axes.set_title("confidence stated")
    axes.set(ylim=(0, 1), xlim=(shares.index.min(), shares.index.max()))
    axes.legend(areas[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5))
    _percent(axes.yaxis)


STUDY_PANELS = {
    "lift": "lift at tau = 0.5",
    "auroc": "AUROC of confidence",
    "ece": "debiased ECE",
    "raw": "local accuracy",
}


def variant_points(summary: pd.DataFrame, panels: Mapping[str, str] = STUDY_PANELS) -> Figure:
    """The reference study: one panel a metric, a point with its 95% interval a variant (means over domains).

    Columns of `summary`: variant, metric, domain, value, low, high, n, seeds.
    """
    means = summary[summary["domain"] == MEAN]
    figure, grid = _axes(1, len(panels), (9.6, 2.9), sharey=True)
    for axes, (metric, title) in zip(grid, panels.items(), strict=True):
        rows = means[means["metric"] == metric].iloc[::-1]
        for place, row in enumerate(rows.itertuples()):
            colour = BLUE if row.variant == "foggen" else GREY
            axes.plot([row.low, row.high], [place, place], color=colour, lw=3, solid_capstyle="butt")
            axes.plot(row.value, place, "o", color=colour, ms=6)
        axes.set_yticks(range(len(rows)), rows["variant"])
        axes.set_title(title)
        if metric in ("lift", "auroc"):
            axes.axvline({"lift": 0.0, "auroc": 0.5}[metric], color=BLACK, lw=0.8, ls="--")
        if metric != "auroc":
            _percent(axes.xaxis)
    figure.supxlabel(f"n = {means['n'].iloc[0]:,} questions, {means['seeds'].iloc[0]} seeds", fontsize=9)
    return figure


def open_ended_bars(table: pd.DataFrame) -> Figure:
    """Accuracy on the open-ended tasks, a bar for each checkpoint with its interval and the published value beside.

    Columns: task, checkpoint, accuracy, low, high, n, and optionally published (all 0..1, NaN = none).
    """
    figure, axes = _axes()
    tasks, checkpoints = list(table["task"].unique()), list(table["checkpoint"].unique())
    width = 0.8 / len(checkpoints)
    for i, (checkpoint, part) in enumerate(table.groupby("checkpoint", sort=False)):
        x = part["task"].map(tasks.index) + (i - (len(checkpoints) - 1) / 2) * width
        ends = np.clip([part["accuracy"] - part["low"], part["high"] - part["accuracy"]], 0, 1)
        axes.bar(
            x,
            part["accuracy"],
            0.9 * width,
            color=(SKY, BLUE, ORANGE)[i % 3],
            yerr=ends,
            capsize=4,
            label=checkpoint,
        )
        if "published" in part:
            name = "published" if i == 0 else None
            axes.hlines(
                part["published"], x - 0.4 * width, x + 0.4 * width, color=BLACK, lw=2.5, zorder=4, label=name
            )
    counts = table.groupby("task", sort=False)["n"].first()
    axes.set_xticks(range(len(tasks)), [f"{task}\nn = {counts[task]:,}" for task in tasks])
    axes.set(ylabel="accuracy (%), 95% intervals", ylim=(0, 1), title="Open-ended tasks")
    axes.grid(axis="x", visible=False)
    _percent(axes.yaxis)
    axes.legend(ncols=3)
    return figure


# ---- the method at a glance


def _box(
    axes: Axes, x: float, y: float, text: str, colour: str, width: float = 2.0, height: float = 1.0
) -> None:
    """A rounded box with its centre at (x, y), in the units of the axes."""
    corner = (x - width / 2, y - height / 2)
    look: dict[str, Any] = {
        "boxstyle": "round,pad=0,rounding_size=0.12",
        "fc": mpl.colors.to_rgba(colour, 0.12),
        "ec": colour,
    }
    axes.add_patch(FancyBboxPatch(corner, width, height, lw=1.6, **look))
    axes.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.35)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#444444") -> None:
    look = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=look)


def overview(tau: float = 0.5, samples: int = 8, rounds: int = 14, domains: int = 7) -> Figure:
    """The method in two pictures: (a) routing at inference, (b) the loop that teaches the model to know itself."""
    figure, (left, right) = _axes(1, 2, (11.2, 4.0), width_ratios=(1, 1.12))
    for axes, width in ((left, 8.6), (right, 10.0)):
        axes.set(xlim=(0, width), ylim=(0.5, 6.3))
        axes.axis("off")
    _draw_routing(left, tau)
    _draw_loop(right, samples, rounds, domains)
    return figure


def _draw_routing(axes: Axes, tau: float) -> None:
    axes.set_title("(a) Inference: one forward pass decides", fontweight="bold")
    _box(axes, 1.2, 5.6, "question\nA. ...  B. ...", BLACK)
    _box(axes, 4.3, 5.6, "edge model\nsmall, local", BLUE)
    _box(axes, 4.3, 3.6, "Confidence: 0.75\nFinal answer: B", BLUE, 2.7)
    axes.add_patch(Polygon([(4.3, 2.6), (5.9, 1.8), (4.3, 1.0), (2.7, 1.8)], fc="white", ec=BLACK, lw=1.6))
    axes.text(4.3, 1.8, rf"confidence $\geq \tau$ ?" f"\n({tau:g})", ha="center", va="center", fontsize=9)
    _box(axes, 1.1, 1.8, "keep the\nlocal answer", GREEN, 1.7)
    _box(axes, 7.5, 3.6, "cloud model\nlarge, remote", VERMILION, 1.9)
    _box(axes, 7.5, 5.6, "cloud answer", VERMILION, 1.9)
    _arrow(axes, (2.2, 5.6), (3.3, 5.6))
    _arrow(axes, (4.3, 5.1), (4.3, 4.1))
    _arrow(axes, (4.3, 3.1), (4.3, 2.6))
    _arrow(axes, (2.7, 1.8), (1.95, 1.8), GREEN)
    axes.plot([5.9, 7.5], [1.8, 1.8], color=VERMILION, lw=1.6)
    _arrow(axes, (7.5, 1.8), (7.5, 3.1), VERMILION)
    _arrow(axes, (7.5, 4.1), (7.5, 5.1), VERMILION)
    axes.text(2.32, 1.95, "yes", ha="center", va="bottom", fontsize=9, color=GREEN)
    axes.text(6.7, 1.68, "no, or no\nreadable confidence", ha="center", va="top", fontsize=9, color=VERMILION)


def _draw_loop(axes: Axes, samples: int, rounds: int, domains: int) -> None:
    axes.set_title("(b) Training: the model labels itself, round by round", fontweight="bold")
    _box(axes, 1.5, 5.6, "checkpoint\n$R_t$", BLUE)
    _box(axes, 5.0, 5.6, f"{samples} answers to each\nquestion of one domain", BLUE, 3.0)
    _box(axes, 8.5, 5.6, f"$k$ of {samples} right", ORANGE, 2.2)
    _box(axes, 8.5, 3.4, f"confidence =\n$k/{samples}$ to the nearest\n0, ¼, ½, ¾, 1", ORANGE, 2.5, 1.4)
    _box(axes, 8.5, 1.2, "new rows: question,\nconfidence, answer", PURPLE, 2.7)
    _box(axes, 5.0, 3.4, "buffer\nof earlier rows", GREY, 2.0)
    _box(axes, 5.0, 1.2, "LoRA fine-tuning\non new + replayed rows", GREEN, 3.0)
    _box(axes, 1.5, 1.2, "merge:\n$R_{t+1}$", GREEN)
    _arrow(axes, (2.5, 5.6), (3.5, 5.6))
    _arrow(axes, (6.5, 5.6), (7.4, 5.6))
    _arrow(axes, (8.5, 5.1), (8.5, 4.1))
    _arrow(axes, (8.5, 2.7), (8.5, 1.7))
    _arrow(axes, (7.15, 1.2), (6.5, 1.2))
    _arrow(axes, (7.5, 1.7), (6.0, 2.9), GREY)
    _arrow(axes, (5.0, 2.9), (5.0, 1.7), GREY)
    axes.text(4.9, 2.3, "replay", ha="right", va="center", fontsize=9, color="#555555")
    _arrow(axes, (3.5, 1.2), (2.5, 1.2))
    _arrow(axes, (1.5, 1.7), (1.5, 5.1), BLUE)
    turns = f"{rounds} rounds,\n{domains} domains\nin turn"
    axes.text(1.7, 3.4, turns, ha="left", va="center", fontsize=9, color=BLUE, linespacing=1.35)
