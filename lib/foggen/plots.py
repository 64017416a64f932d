"""The figures that several notebooks draw: one style, one palette, from tables or from outcomes.

Knows nothing of files except in `save`, and computes no metric that `stats` does not hold. Every
figure takes its `title`: what it shows, said by who has read the numbers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, MaxNLocator
from numpy.typing import ArrayLike
from statsmodels.stats.proportion import proportion_confint

from foggen import stats
from foggen.prompts import BUCKET_TEXTS, BUCKETS
from foggen.resampling import MEAN, Array, draw_counts, fact_codes
from foggen.stats import router_score

# Okabe & Ito (2008): told apart with any colour vision; yellow, too light for lines, is left out.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "#8C8C8C"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, "#666666")
SIZE = (6.4, 4.2)
SHARES = "share of {:,} questions sent to the cloud (%)"
PANELS = {
    "local_accuracy": "answers right (%)",
    "mean_confidence": "mean confidence (%)",
    "auroc": "AUROC of confidence",
    "ece_bucket_debiased": "calibration error (ECE)",
}


def style() -> None:
    """Set the style of every figure here: call it once in a notebook that draws figures."""
    plt.style.use(Path(__file__).with_suffix(".mplstyle"))


def save(figure: Figure, folder: Path | str, name: str) -> Figure:
    """Write `<name>.png` (150 dpi) and `<name>.svg`; close the figure: a notebook shows it once."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    return figure


# ------------------------------------------------------------------------------------------------
# What figures are made of


def label(axes: Axes, **labels: Any) -> None:
    """Set labels, title and limits; an axis that says (%) gets percent ticks."""
    axes.set(**labels)
    for axis in (axes.xaxis, axes.yaxis):
        if "(%)" in axis.get_label_text():
            percent_ticks(axis)


def percent_ticks(axis: Any) -> None:
    """Ticks at whole percents, or with their decimals where the axis is a few percent long."""
    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda share, _: Formatter.fix_minus(f"{round(100 * share, 2) + 0:g}"))


def errors(rows: pd.DataFrame, name: str) -> Array:
    """The interval of a column as lengths (2, rows) for an error bar; 0 where there is none."""
    ends = [rows[name] - rows[f"{name}_low"], rows[f"{name}_high"] - rows[name]]
    return np.asarray(np.clip(np.nan_to_num(ends), 0, None))


def band(axes: Axes, x: ArrayLike, table: pd.DataFrame, name: str, **look: Any) -> None:
    """A column of a table as a line against `x`, with its 95% band (`_low`, `_high`)."""
    (line,) = axes.plot(x, table[name], **look)
    ends = (table[f"{name}_low"], table[f"{name}_high"])
    axes.fill_between(x, *ends, color=line.get_color(), alpha=0.17, lw=0)


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """The legend of `axes` below the whole figure."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


# ------------------------------------------------------------------------------------------------
# Routing: curves from `stats.share_curve`, tables from `routing.routing_table`


def accuracy_curve(
    curve: pd.DataFrame, points: Mapping[str, tuple[float, float]], title: str
) -> Figure:
    """System accuracy against cloud share, with its 95% band, random routing and the oracle.

    `points` marks operating points: name to (cloud share, system accuracy), 0 to 1.
    """
    figure, axes = plt.subplots()
    axes.plot(curve["share"], curve["oracle"], color=GREEN, ls=":", label="oracle, same share")
    band(axes, curve["share"], curve, "sysacc", color=BLUE, label="by confidence (95% band)")
    axes.plot(curve["share"], curve["random"], color=GREY, ls="--", label="random, same share")
    for (name, point), colour in zip(points.items(), COLOURS[1:], strict=False):
        axes.plot(*point, "o", color=colour, ms=8, mec="white", label=name)
    xlabel = SHARES.format(curve["n"][0])
    label(axes, xlabel=xlabel, ylabel="answers of the system right (%)", title=title)
    axes.legend(loc="best")
    return figure


def matched_curves(curves: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Several routers at the same cloud share: the lift of their curves, with 95% bands."""
    figure, axes = plt.subplots()
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        band(axes, curve["share"], curve, "lift", color=colour, label=name)
    axes.axhline(0, color=GREY, ls="--", lw=1.2, label="random")
    xlabel = SHARES.format(curve["n"][0])
    label(axes, xlabel=xlabel, ylabel="lift over random routing (%)", title=title)
    legend(figure, axes, 3)
    return figure


# ------------------------------------------------------------------------------------------------
# Confidence: figures of outcomes; `columns` maps columns of scores to names


def reliability(outcomes: pd.DataFrame, columns: Mapping[str, str], title: str) -> Figure:
    """Share right against confidence: a dot per bin, its area the bin's share of the questions.

    Bins are the five buckets. Bars are 95% Jeffreys intervals, which take questions as independent.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.8))
    axes.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1.2, label="perfectly calibrated")
    for (column, name), colour in zip(columns.items(), COLOURS, strict=False):
        stated = outcomes[outcomes[column].notna()]
        groups = stated.groupby(stats.buckets(stated[column].to_numpy(float)))
        n, x, rate = groups.size(), groups[column].mean(), groups["local_correct"].mean()
        low, high = proportion_confint(rate * n, n, method="jeffreys")
        lengths = np.clip([rate - low, high - rate], 0, None)
        axes.errorbar(x, rate, lengths, fmt="none", color=colour, capsize=3, lw=1.2)
        axes.scatter(x, rate, 600 * n / len(outcomes), color=colour, alpha=0.75, label=name)
    xlabel = f"confidence (%), {outcomes['id'].nunique():,} questions"
    label(axes, xlabel=xlabel, ylabel="answers right (%)", title=title)
    axes.set(xlim=(-0.05, 1.1), ylim=(-0.02, 1.02))
    axes.legend(loc="upper left")
    return figure


def confidence_histogram(
    outcomes: pd.DataFrame, title: str, column: str = "confidence", name: str = "stated confidence"
) -> Figure:
    """Questions at each confidence, right and wrong apart; unparsed answers have their own bar."""
    figure, axes = plt.subplots()
    score, right = router_score(outcomes, column), outcomes["local_correct"].to_numpy(float)
    in_buckets = len(np.unique(score[score >= 0])) <= len(BUCKETS)
    edges = np.linspace(-0.125, 1.125, 6) if in_buckets else np.linspace(0, 1, 21)
    width, centres = np.diff(edges)[0], (edges[:-1] + edges[1:]) / 2
    kinds = ((-1, right, "right", BLUE), (1, 1 - right, "wrong", ORANGE))
    for side, weights, kind, colour in kinds:
        counts = [weights[score < 0].sum(), *np.histogram(score, edges, weights=weights)[0]]
        x = np.array([-0.25, *centres]) + side * 0.21 * width
        axes.bar(x, counts, 0.4 * width, color=colour, label=f"{kind} ({weights.sum():,.0f})")
    axes.set_xticks([-0.25, *BUCKETS], ["unreadable", *BUCKET_TEXTS])
    axes.set(xlabel=name, ylabel="questions", title=title)
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


def risk_coverage(
    outcomes: pd.DataFrame, columns: Mapping[str, str], title: str, tau: float = 0.5
) -> Figure:
    """Error rate of the answers kept against the share kept, surest first, from 1% coverage.

    Ties are kept in random order, in expectation; the dot marks confidence >= `tau`. Bands are 95%
    percentile intervals of 200 resamples of facts.
    """
    figure, axes = plt.subplots()
    right = outcomes["local_correct"].to_numpy(float)
    counts = draw_counts(fact_codes(outcomes), 201, np.random.default_rng(0))
    counts[0] = 1  # the outcomes themselves first
    coverage = np.linspace(0.01, 1, 100)
    for (column, name), colour in zip(columns.items(), COLOURS, strict=False):
        # Answers kept, and wrong ones among them, from the surest score down: (resamples, levels)
        sums = stats.tie_sums(router_score(outcomes, column), counts, 1 - right)
        shares = [np.cumsum(part[:, ::-1], axis=1) / counts.sum(axis=1)[:, None] for part in sums]
        pairs = zip(*shares, strict=True)
        wrong = np.array([np.interp(coverage, [0, *x], [0, *y]) for x, y in pairs])
        risk = wrong / coverage
        low, high = np.quantile(risk[1:], [0.025, 0.975], axis=0)
        table = pd.DataFrame({"risk": risk[0], "risk_low": low, "risk_high": high})
        band(axes, coverage, table, "risk", color=colour, label=name)
    sure = outcomes["confidence"] >= tau
    if sure.any():
        point = (sure.mean(), 1 - right[sure].mean())
        axes.plot(*point, "o", color=BLUE, ms=8, mec="white", label=f"confidence at least {tau:g}")
    axes.axhline(1 - right.mean(), color=GREY, ls="--", lw=1.2, label="random")
    xlabel = f"answers kept of {len(right):,} (%)"
    label(axes, xlabel=xlabel, ylabel="wrong among those kept (%)", title=title)
    axes.set(xlim=(0, 1.01), ylim=(0, None))
    legend(figure, axes, 3)
    return figure


# ------------------------------------------------------------------------------------------------
# Rounds: tables from `stats.round_table`, by the name of a confidence


def round_curves(tables: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """How the edge model changes over the chain: the mean over domains with its 95% band.

    The first of `tables` is the stated word: single domains are its thin grey lines, and the last
    panel is what it says.
    """
    figure, grid = plt.subplots(2, 3, figsize=(9.6, 5.6), sharex=True)
    word = next(iter(tables.values()))
    for axes, (column, text) in zip(grid.flat, PANELS.items(), strict=False):
        for _, domain in word[word["domain"] != MEAN].groupby("domain", sort=False):
            axes.plot(domain["round"], domain[column], color=GREY, lw=0.7, alpha=0.6)
        for (name, table), colour in zip(tables.items(), COLOURS, strict=False):
            mean = table[table["domain"] == MEAN]
            if column != "local_accuracy" or table is word:  # it does not depend on the confidence
                band(axes, mean["round"], mean, column, color=colour, lw=2.4, label=name)
        axes.plot([], [], color=GREY, lw=0.7, label=f"a domain, {next(iter(tables))}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label(axes, ylabel=text)
    # The last two panels: how often each word is said, and the legends
    mean = word[word["domain"] == MEAN]
    shares = mean.filter(regex=r"^bucket [\d.]+$")
    shades = mpl.colormaps["cividis"](np.linspace(0.05, 0.95, shares.shape[1]))
    areas = grid[1, 1].stackplot(mean["round"], shares.T.to_numpy(), colors=shades)
    label(grid[1, 1], ylabel="words stated (%)", ylim=(0, 1))
    grid[1, 2].axis("off")
    words = grid[1, 2].legend(areas[::-1], [*BUCKET_TEXTS[::-1]], title="word", loc="lower left")
    grid[1, 2].add_artist(words)
    grid[1, 2].legend(*grid[0, 1].get_legend_handles_labels(), loc="upper left")
    figure.supxlabel("round")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure
