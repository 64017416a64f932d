"""The figures that several notebooks draw: one style, one palette, from tables or from outcomes.

Knows nothing of files except in `save`, and computes no metric that `stats` does not hold. Every
figure takes its `title`: what it shows, said by who has read the numbers.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, MaxNLocator
from numpy.typing import ArrayLike
from statsmodels.stats.proportion import proportion_confint

from foggen import stats
from foggen.resampling import Array

# Okabe & Ito (2008): told apart with any colour vision; yellow, too light for lines, is left out.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "#8C8C8C"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, "#666666")
SIZE = (6.4, 4.2)
SHARES = "share of {:,} questions sent to the cloud (%)"


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
    """Set labels, title and limits; an axis that says (%) or (points) gets percent ticks."""
    axes.set(**labels)
    for axis in (axes.xaxis, axes.yaxis):
        if re.search(r"\((%|points)\)", axis.get_label_text()):
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
    label(axes, xlabel=xlabel, ylabel="lift over random routing (points)", title=title)
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
