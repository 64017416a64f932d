"""How results are shown: numbers and tables by one rule, and the figures that notebooks share.

One style, one palette, from tables or from outcomes. Computes no metric that `stats` does not hold.
Every figure takes its `title`: what it shows, said by who has read the numbers.
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
from pandas import DataFrame as Frame
from statsmodels.stats.proportion import proportion_confint

from foggen.stats import Array, buckets
from foggen.store import Run, write_text

# ---- numbers and tables

FORMS: dict[str, tuple[float, str]] = {  # by the first word of a metric's name; others are percent
    **dict.fromkeys(("auroc", "ece", "brier", "aurc"), (1, "{:.2f}")),
    **dict.fromkeys(("lift", "difference", "change", "gain", "area"), (100, "{:+z.1f}")),
    **dict.fromkeys(("dibc", "signed"), (1, "{:+z.2f}")),
    "tau": (1, "{:g}"),
    "p": (1, "{:.3f}"),
    "tokens": (1, "{:.1f}"),
}


def cell(row: pd.Series | Mapping[str, Any], name: str, like: str = "") -> str:
    """`58.4 [55.4, 61.5]` of the metric `name` in a row of a `Bootstrap.table`, - for NaN.

    Printed as the metric `like`, if given. Ends that print as the value itself are left out.
    """
    metric = like or name
    first_word = re.split("[ _]", metric)[0]  # `lift 20%` is printed as a lift
    scale, text = FORMS.get(metric, FORMS.get(first_word, (100, "{:z.1f}")))
    if pd.isna(row[name]):
        return "-"
    values = [row[name], *(row.get(f"{name}_{end}", np.nan) for end in ("low", "high"))]
    value, low, high = (text.format(scale * number) for number in values)
    return value if pd.isna(values).any() or value == low == high else f"{value} [{low}, {high}]"


def points(row: pd.Series | Mapping[str, Any], name: str = "difference") -> str:
    """`+2.0 points [+0.4, +3.4]` of a difference of two shares, for a sentence."""
    value, *interval = cell(row, name, "difference").split(" ", 1)
    return value if value == "-" else " ".join([value, "points", *interval])


def table(frame: Frame, columns: Mapping[str, str]) -> Frame:
    """The `columns` {metric: header} of a table, as text with intervals; the first is the index.

    Columns of text stay as they are.
    """
    first, *others = columns
    rows = [row for _, row in frame.astype(object).iterrows()]
    shown = Frame(index=pd.Index(frame[first], name=columns[first]))
    for name in others:
        texts = [cell(row, name) if isinstance(row[name], float) else row[name] for row in rows]
        shown[columns[name]] = texts
    return shown


def keep(run: Run, name: str, frame: Frame) -> Frame:
    """Write the whole table to `<run>/tables/<name>.csv`; returns it."""
    write_text(run.folder / "tables" / f"{name}.csv", frame.to_csv(index=False))
    return frame


# ---- figures

# Okabe & Ito (2008): told apart with any colour vision; yellow, too light for lines, is left out.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "#8C8C8C"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, "#666666")
SHARES = "share of {:,} questions sent to the cloud (%)"


def style() -> None:
    """Set the style of every figure here: call it once in a notebook that draws figures."""
    plt.style.use(Path(__file__).with_suffix(".mplstyle"))


def save(figure: Figure, folder: Path, name: str) -> Figure:
    """Write `<name>.png` (150 dpi) and `<name>.svg`; close the figure: a notebook shows it once."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    return figure


def label(axes: Axes, **labels: Any) -> None:
    """Set labels, title and limits; an axis that says (%) or (points) gets ticks in percent."""
    axes.set(**labels)
    for axis in (axes.xaxis, axes.yaxis):
        if re.search(r"\((%|points)\)", axis.get_label_text()):
            # At whole percents, or with their decimals where the axis is a few percent long
            axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
            axis.set_major_formatter(lambda x, _: Formatter.fix_minus(f"{round(100 * x, 2) + 0:g}"))


def errors(rows: Frame, name: str) -> Array:
    """The interval of a column as lengths (2, rows) for an error bar; 0 where there is none."""
    ends = [rows[name] - rows[f"{name}_low"], rows[f"{name}_high"] - rows[name]]
    return np.asarray(np.clip(np.nan_to_num(ends), 0, None))


def band(axes: Axes, x: ArrayLike, table: Frame, name: str, **look: Any) -> None:
    """A column of a table as a line against `x`, with its 95% band (`_low`, `_high`)."""
    (line,) = axes.plot(x, table[name], **look)
    ends = (table[f"{name}_low"], table[f"{name}_high"])
    axes.fill_between(x, *ends, color=line.get_color(), alpha=0.17, lw=0)


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """The legend of `axes` below the whole figure."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def accuracy_curve(curve: Frame, points: Mapping[str, tuple[float, float]], title: str) -> Figure:
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


def matched_curves(curves: Mapping[str, Frame], title: str) -> Figure:
    """Several routers at the same cloud share: the lift of their curves, with 95% bands."""
    figure, axes = plt.subplots()
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        band(axes, curve["share"], curve, "lift", color=colour, label=name)
    axes.axhline(0, color=GREY, ls="--", lw=1.2, label="random")
    xlabel = SHARES.format(curve["n"][0])
    label(axes, xlabel=xlabel, ylabel="lift over random routing (points)", title=title)
    legend(figure, axes, 3)
    return figure


def reliability(outcomes: Frame, columns: Mapping[str, str], title: str) -> Figure:
    """Share right against confidence: a dot per bin, its area the bin's share of the questions.

    Bins are the five buckets. Bars are 95% Jeffreys intervals, which take questions as independent.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.8))
    axes.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1.2, label="perfectly calibrated")
    for (column, name), colour in zip(columns.items(), COLOURS, strict=False):
        stated = outcomes[outcomes[column].notna()]
        groups = stated.groupby(buckets(stated[column].to_numpy(float)))
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
