"""The figures: one style, one palette, each drawn from a table of `routing` or `stats` or from outcomes.

Knows nothing of files except in `save`, and computes no metric that a table does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, MaxNLocator
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
STUDY_PANELS = {
    "lift": "lift at tau = 0.5",
    "auroc": "AUROC of confidence",
    "ece": "debiased ECE",
    "raw": "local accuracy",
}
STYLE: Any = {
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


def style() -> None:
    """Set the style of every figure here: call it once in a notebook that draws its own."""
    mpl.rcParams.update(STYLE)


def save(figure: Figure, folder: Path | str, name: str) -> Figure:
    """Write `<name>.png` (150 dpi) and `<name>.svg`, and close the figure, so that a notebook shows it once."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    return figure


def _axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = SIZE, **options: Any) -> tuple[Figure, Any]:
    style()
    return plt.subplots(rows, columns, figsize=size, **options)


def _percent(*axes: Any) -> None:
    """Ticks at whole percents, or with their decimals where the axis is shorter than a few percent."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
        axis.set_major_formatter(lambda share, _: Formatter.fix_minus(f"{round(100 * share, 2) + 0:g}%"))


def _label(axes: Axes, **labels: Any) -> None:
    """Sets labels, title and limits; an axis that says (%) gets percent ticks."""
    axes.set(**labels)
    _percent(*(axis for axis in (axes.xaxis, axes.yaxis) if "(%)" in axis.get_label_text()))


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def _errors(rows: pd.DataFrame, name: str) -> Array:
    """The interval of a column as lengths (2, rows) for an error bar; 0 where there is none."""
    ends = [rows[name] - rows[f"{name}_low"], rows[f"{name}_high"] - rows[name]]
    return np.asarray(np.clip(np.nan_to_num(ends), 0, None))


# ---- accuracy against cloud share


def accuracy_curve(
    curve: pd.DataFrame, point: tuple[float, float], published: tuple[float, float] | None = None, tau: float = 0.5
) -> Figure:
    """System accuracy against cloud share from `routing.share_curve`, with 95% band, random line and oracle.

    `point` and `published` are (cloud share, system accuracy), 0..1: ours at `tau`, and the model card's.
    """
    figure, axes = _axes()
    axes.plot(curve["share"], curve["oracle"], color=GREEN, ls=":", label="oracle, same share")
    _band(axes, curve, "sysacc", BLUE, "confidence (95% band)")
    axes.plot(curve["share"], curve["random"], color=GREY, ls="--", label="random, same share")
    axes.plot(*point, "o", color=VERMILION, ms=8, mec="white", label=f"tau = {tau:g}")
    if published:
        axes.plot(*published, "*", color=BLACK, ms=12, mec="white", label="published (its own questions)")
    _label(axes, ylabel="system accuracy (%)", title=f"Mean over domains, n = {curve['n'].iloc[0]:,} questions")
    axes.legend(loc="best")
    return figure


def matched_curves(curves: Mapping[str, pd.DataFrame], mark: float) -> Figure:
    """Lift over random at the same cloud share for several routers, each a `routing.share_curve`, with 95% bands."""
    figure, axes = _axes()
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        _band(axes, curve, "lift", colour, name, 100)
    axes.axhline(0, color=GREY, ls="--", lw=1.2, label="random")
    axes.axvline(mark, color=BLACK, lw=1, ls=":", label="FogGen's share")
    n = next(iter(curves.values()))["n"].iloc[0]
    axes.set(ylabel="lift over random (percentage points)", title=f"Mean over domains, n = {n:,}, 95% bands")
    _legend(figure, axes, 3)
    return figure


def cost_curves(
    curves: Mapping[str, pd.DataFrame], verify: Mapping[str, float], small: float = 1, large: float = 50
) -> Figure:
    """System accuracy against cost a query, small + verify + share x large, for several routers, with 95% bands.

    Each curve is a `routing.share_curve`; `verify` is what its score costs on every query.
    """
    figure, axes = _axes()
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        cost = small + verify[name] + large * curve["share"]
        _band(axes, curve, "sysacc", colour, f"{name} ($c_V$ = {verify[name]:g})", x=cost)
    axes.plot(small + large * curve["share"], curve["random"], color=GREY, ls="--", label="random")
    _label(axes, xlabel=f"cost a query, at edge : cloud = {small:g} : {large:g}", ylabel="system accuracy (%)")
    axes.set_title(f"Mean over domains, n = {curve['n'].iloc[0]:,}, 95% bands")
    axes.legend(loc="best")
    return figure


def _band(axes: Axes, curve: pd.DataFrame, name: str, colour: str, label: str, scale: float = 1, x: Any = None) -> None:
    """A line of `routing.share_curve` with its 95% band, against `x` or else the share."""
    low, high = scale * curve[f"{name}_low"], scale * curve[f"{name}_high"]
    at = curve["share"] if x is None else x
    axes.fill_between(at, low, high, color=colour, alpha=0.17, lw=0)
    axes.plot(at, scale * curve[name], color=colour, label=label)
    if x is None:
        _label(axes, xlabel="share of questions sent to the cloud (%)", xlim=(-0.01, 1.01))


# ---- confidence


def reliability(outcomes: pd.DataFrame, column: str = "confidence", label: str = "stated confidence") -> Figure:
    """Share right against confidence, one point a bin with its 95% interval (Jeffreys), and the count of each bin.

    Bins are the buckets for verbal confidence and ten of equal mass for a graded one.
    """
    figure, (top, bottom) = _axes(2, size=(6.4, 5.4), sharex=True, height_ratios=(3, 1))
    known = outcomes[outcomes[column].notna()]
    confidence = known[column].to_numpy(float)
    few = len(np.unique(confidence)) <= len(BUCKETS)
    bins = stats.buckets(confidence) if few else stats.equal_mass(confidence)
    groups = known.groupby(bins).agg(x=(column, "mean"), rate=("local_correct", "mean"), n=("id", "size"))
    right = groups["rate"] * groups["n"]
    for end, q in (("low", 0.025), ("high", 0.975)):
        groups[f"rate_{end}"] = beta.ppf(q, right + 0.5, groups["n"] - right + 0.5)
    top.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1.2, label="perfectly calibrated")
    top.vlines(groups["x"], groups["rate"], groups["x"], color=ORANGE, lw=5, alpha=0.45, label="gap")
    look = {"color": BLUE, "marker": "o", "capsize": 3, "label": "share right (95%)"}
    top.errorbar(groups["x"], groups["rate"], yerr=_errors(groups, "rate"), **look)
    _label(top, ylabel="local answers right (%)", ylim=(0, 1), xlim=(-0.1, 1.1), xticks=BUCKETS)
    top.set_title(f"Reliability, n = {len(known):,} parsed of {len(outcomes):,}")
    top.legend(loc="upper left")
    bars = bottom.bar(groups["x"], groups["n"], width=0.12 if few else 0.02, color=SKY)
    if few:
        bottom.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    bottom.set(xlabel=label, ylabel="questions")
    bottom.margins(y=0.25)
    bottom.grid(axis="x", visible=False)
    return figure


def confidence_histogram(
    outcomes: pd.DataFrame, column: str = "confidence", label: str = "stated confidence"
) -> Figure:
    """Questions at each confidence, right and wrong apart; unparsed answers have a bar of their own."""
    figure, axes = _axes()
    score, right = router_score(outcomes, column), outcomes["local_correct"].to_numpy(float)
    few = len(np.unique(score[score >= 0])) <= len(BUCKETS)
    edges = np.linspace(-0.125, 1.125, 6) if few else np.linspace(0, 1, 21)
    width, centres = np.diff(edges)[0], (edges[:-1] + edges[1:]) / 2
    for side, weights, name, colour in ((-1, right, "right", BLUE), (1, 1 - right, "wrong", VERMILION)):
        counts = [weights[score < 0].sum(), *np.histogram(score, edges, weights=weights)[0]]
        x = np.array([-0.25, *centres]) + side * 0.21 * width
        axes.bar(x, counts, 0.4 * width, color=colour, label=f"answer {name} ({weights.sum():,.0f})")
    axes.set_xticks([-0.25, *BUCKETS], ["unparsed", *(f"{bucket:g}" for bucket in BUCKETS)])
    axes.set(xlabel=label, ylabel="questions", title=f"Right and wrong answers, n = {len(outcomes):,}")
    axes.grid(axis="x", visible=False)
    _legend(figure, axes, 2)
    return figure


def risk_coverage(outcomes: pd.DataFrame, columns: Mapping[str, str], tau: float = 0.5) -> Figure:
    """Error rate of the answers kept against the share kept, best first; `columns` maps score columns to labels.

    Ties are kept in random order, in expectation; the dot marks confidence >= `tau`. Lines begin at 1% coverage.
    """
    figure, axes = _axes()
    right, kept = outcomes["local_correct"].to_numpy(float), (outcomes["confidence"] >= tau).to_numpy()
    at = np.linspace(0.01, 1, 200)
    for (column, label), colour in zip(columns.items(), COLOURS, strict=False):
        count, hits = stats.tie_sums(router_score(outcomes, column), np.ones((1, len(right))), right)
        covered, errors = (np.append(0, np.cumsum(one[0, ::-1])) / len(right) for one in (count, count - hits))
        axes.plot(at, np.interp(at, covered, errors) / at, color=colour, label=label)
    if kept.any():
        look = {"color": BLUE, "ms": 8, "mec": "white", "label": f"tau = {tau:g}"}
        axes.plot(kept.mean(), 1 - right[kept].mean(), "o", **look)
    axes.axhline(1 - right.mean(), color=GREY, ls="--", lw=1.2, label="random")
    _label(axes, xlabel="coverage: share answered locally (%)", ylabel="risk: wrong among those (%)")
    axes.set(xlim=(0, 1.01), ylim=(0, None), title=f"Risk and coverage, n = {len(right):,}")
    _legend(figure, axes, 3)
    return figure


# ---- domains, rounds, checkpoints, open-ended


def domain_dumbbells(table: pd.DataFrame) -> Figure:
    """From the edge model alone to the cloud for each row of `routing.routing_table`, FogGen and random between."""
    figure, axes = _axes(size=(6.4, 0.5 * len(table) + 1.5))
    rows = table[table["n"] > 0].reset_index(drop=True)
    y = np.arange(len(rows))[::-1]
    axes.hlines(y, rows["raw"], rows["cloud"], color="#CCCCCC", lw=4, zorder=1)
    axes.plot(rows["raw"], y, "o", color=BLACK, mfc="white", ms=7, label="edge alone")
    axes.plot(rows["cloud"], y, "s", color=GREEN, ms=7, label="cloud alone")
    axes.plot(rows["random"], y, "|", color=GREY, ms=14, mew=2.5, label="random, same share")
    look = {"fmt": "o", "color": BLUE, "ms": 7, "capsize": 3, "label": "FogGen (95%)"}
    axes.errorbar(rows["sysacc"], y, xerr=_errors(rows, "sysacc"), **look)
    names = rows["domain"].str.replace("_", " ")
    axes.set_yticks(y, [f"{name} ({routed:.0%})" for name, routed in zip(names, rows["routed"], strict=True)])
    axes.axhline(0.5, color=GREY, lw=0.8)  # the mean stands apart
    _label(axes, xlabel="accuracy (%)", ylabel="domain (share routed)", ylim=(-0.6, len(rows) - 0.4))
    axes.set_title(f"n = {rows['n'].max():,} questions")
    axes.grid(axis="y", visible=False)
    _legend(figure, axes, 4)
    return figure


def round_curves(rounds: pd.DataFrame) -> Figure:
    """How the edge model changes over the chain, from `stats.round_table`: a panel a measure, one for the buckets.

    A line a domain; their mean is drawn bold, with its 95% band.
    """
    figure, grid = _axes(2, 3, (9.6, 6.5), sharex=True)
    mean, inner = rounds[rounds["domain"] == MEAN], rounds[rounds["domain"] != MEAN]
    for axes, (name, title) in zip(grid.flat, PANELS.items(), strict=False):
        for i, (domain, part) in enumerate(inner.groupby("domain", sort=False)):
            look = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "label": str(domain).replace("_", " ")}
            axes.plot(part["round"], part[name], ms=3.5, lw=1.1, **look)
        band = (mean["round"], mean[f"{name}_low"], mean[f"{name}_high"])
        axes.fill_between(*band, color=GREY, alpha=0.35, lw=0, zorder=3, label="95% of the mean")
        axes.plot(mean["round"], mean[name], color=BLACK, lw=2.6, zorder=4, label=MEAN)
        low, high = axes.get_ylim()
        axes.set(title=title, ylim=(max(low, -0.02), min(high, 1.005)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _percent(axes.yaxis)
    _bucket_areas(grid[1, 2], mean.set_index("round"))
    for axes in grid[1]:
        axes.set_xlabel("round")
    _legend(figure, grid[0, 0], 4)
    return figure


def _bucket_areas(axes: Axes, mean: pd.DataFrame) -> None:
    shares = mean.filter(regex=r"^bucket [\d.]+$")
    shades = mpl.colormaps["cividis"](np.linspace(0.05, 0.95, shares.shape[1]))
    areas = axes.stackplot(shares.index, shares.T.to_numpy(), colors=shades)
    names = [name.removeprefix("bucket ") for name in shares]
    axes.set(title="confidence stated", ylim=(0, 1), xlim=(shares.index.min(), shares.index.max()))
    axes.legend(areas[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5))
    _percent(axes.yaxis)


def variant_points(summary: pd.DataFrame) -> Figure:
    """The reference study: one panel a metric, a point with its 95% interval a variant (means over domains).

    Columns of `summary`: variant, metric, domain, value, low, high, n, seeds.
    """
    means = summary[summary["domain"] == MEAN]
    figure, grid = _axes(1, len(STUDY_PANELS), (9.6, 2.9), sharey=True)
    for axes, (metric, title) in zip(grid, STUDY_PANELS.items(), strict=True):
        rows = means[means["metric"] == metric].iloc[::-1].reset_index()
        colours = np.where(rows["variant"] == "foggen", BLUE, GREY)
        axes.hlines(rows.index, rows["low"], rows["high"], color=colours, lw=3)
        axes.scatter(rows["value"], rows.index, color=colours, s=36)
        axes.set_yticks(rows.index, rows["variant"])
        axes.set_title(title)
        if metric in (chance := {"lift": 0.0, "auroc": 0.5}):
            axes.axvline(chance[metric], color=BLACK, lw=0.8, ls="--")
        if metric != "auroc":
            _percent(axes.xaxis)
    figure.supxlabel(f"n = {means['n'].iloc[0]:,} questions, {means['seeds'].iloc[0]} seeds", fontsize=9)
    return figure


def open_ended_bars(table: pd.DataFrame) -> Figure:
    """Accuracy on the open-ended tasks, a bar for each checkpoint with its interval and the published value beside.

    Columns: task, checkpoint, accuracy, low, high, published (0..1, NaN = none) and n.
    """
    figure, axes = _axes()
    counts = table.groupby("task", sort=False)["n"].first()
    width = 0.8 / table["checkpoint"].nunique()
    named = table.rename(columns={"low": "accuracy_low", "high": "accuracy_high"})
    for i, (checkpoint, part) in enumerate(named.groupby("checkpoint", sort=False)):
        x = counts.index.get_indexer(part["task"]) + width * (i + 0.5) - 0.4
        look = {"color": (SKY, BLUE, ORANGE)[i % 3], "capsize": 4, "label": checkpoint}
        axes.bar(x, part["accuracy"], 0.9 * width, yerr=_errors(part, "accuracy"), **look)
        line = {"color": BLACK, "lw": 2.5, "zorder": 4, "label": None if i else "published"}
        axes.hlines(part["published"], x - 0.4 * width, x + 0.4 * width, **line)
    axes.set_xticks(range(len(counts)), [f"{task}\nn = {n:,}" for task, n in counts.items()])
    _label(axes, ylabel="accuracy (%), 95% intervals", ylim=(0, 1), title="Open-ended tasks")
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=3)
    return figure


# ---- the method at a glance

Boxes = dict[str, tuple[float, float, str, str]]  # name: x, y, text, colour
Arrows = list[tuple[str, str, str, str]]  # from, to, colour, text


def overview(tau: float = 0.5, samples: int = 8, rounds: int = 14, domains: int = 7) -> Figure:
    """The method in two pictures: (a) routing at inference, (b) the loop that teaches the model to know itself."""
    figure, (left, right) = _axes(1, 2, (11.2, 4.0), width_ratios=(1, 1.12))
    routing: Boxes = {
        "question": (1.2, 5, "question\nA. ...  B. ...", BLACK),
        "edge": (4.6, 5, "edge model\nsmall, local", BLUE),
        "said": (4.6, 3, "Confidence: 0.75\nFinal answer: B", BLUE),
        "test": (4.6, 1, f"confidence\n$\\geq \\tau$ = {tau:g}?", BLACK),
        "keep": (1.2, 1, "keep the\nlocal answer", GREEN),
        "cloud": (8.2, 3, "cloud model\nlarge, remote", VERMILION),
        "answer": (8.2, 5, "cloud answer", VERMILION),
    }
    steps: Arrows = [("question", "edge", GREY, ""), ("edge", "said", GREY, ""), ("said", "test", GREY, "")]
    steps += [("test", "keep", GREEN, "yes"), ("test", "cloud", VERMILION, "no, or not\nreadable")]
    steps += [("cloud", "answer", VERMILION, "")]
    _diagram(left, "(a) Inference: one forward pass decides", routing, steps)
    loop: Boxes = {
        "model": (1.1, 5, "checkpoint\n$R_t$", BLUE),
        "sample": (4.6, 5, f"{samples} answers to each\nquestion of one domain", BLUE),
        "count": (8.2, 5, f"$k$ of {samples} right", ORANGE),
        "label": (8.2, 3, f"confidence =\n$k/{samples}$ to the nearest\n0, ¼, ½, ¾, 1", ORANGE),
        "rows": (8.2, 1, "new rows: question,\nconfidence, answer", PURPLE),
        "buffer": (4.6, 3, "replay buffer\nof earlier rows", GREY),
        "tune": (4.6, 1, "LoRA fine-tuning\non new + replayed rows", GREEN),
        "merge": (1.1, 1, "merge:\n$R_{t+1}$", GREEN),
    }
    names = ["model", "sample", "count", "label", "rows", "tune", "merge"]
    turns: Arrows = [(one, two, GREY, "") for one, two in pairwise(names)]
    turns += [("rows", "buffer", GREY, ""), ("buffer", "tune", GREY, "")]
    turns += [("merge", "model", BLUE, f"{rounds} rounds,\n{domains} domains\nin turn")]
    _diagram(right, "(b) Training: the model labels itself, round by round", loop, turns)
    return figure


def _diagram(axes: Axes, title: str, boxes: Boxes, arrows: Arrows) -> None:
    """Texts in rounded boxes, with arrows from box to box."""
    axes.set(xlim=(-0.2, 9.6), ylim=(0.3, 5.8))
    axes.axis("off")
    axes.set_title(title, fontweight="bold")
    patches = {}
    for name, (x, y, text, colour) in boxes.items():
        look = {"boxstyle": "round,pad=0.5", "fc": mpl.colors.to_rgba(colour, 0.12), "ec": colour, "lw": 1.6}
        patches[name] = axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=look).get_bbox_patch()
    for one, two, colour, text in arrows:
        start, end = np.array([boxes[one][:2], boxes[two][:2]])
        look = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end, start, arrowprops=look | {"patchA": patches[one], "patchB": patches[two]})
        x, y = (start + end) / 2
        axes.text(x + 0.15, y - 0.1, text, ha="left", va="top", fontsize=9, color=colour)
