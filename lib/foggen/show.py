"""How a number is printed, and tables for reading: one rule for all notebooks. Holds no metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame as Frame

from foggen.store import Run, write_text

PERCENT = (100, "{:z.1f}")
FORMS: dict[str, tuple[float, str]] = {  # by the first word of a metric's name; others are percent
    **dict.fromkeys(("auroc", "ece", "brier", "aurc"), (1, "{:.2f}")),
    **dict.fromkeys(("lift", "difference", "change", "gain", "area"), (100, "{:+z.1f}")),
    **dict.fromkeys(("dibc", "signed"), (1, "{:+z.2f}")),
    "tau": (1, "{:g}"),
    "p": (1, "{:.3f}"),
    "tokens": (1, "{:.1f}"),
}


def form(name: str) -> tuple[float, str]:
    """Scale and format of a metric: of its whole name, or of its first word (`lift 20%`)."""
    first = name.replace("_", " ").split()[0]
    return FORMS.get(name, FORMS.get(first, PERCENT))


def cell(row: pd.Series | Mapping[str, Any], name: str, like: str = "") -> str:
    """`58.4 [55.4, 61.5]` of the metric `name` in a row of a `Bootstrap.table`, - for NaN.

    Printed as the metric `like`, if given. Ends that print as the value itself are left out.
    """
    scale, text = form(like or name)
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
    rows = [row for _, row in frame.iterrows()]
    shown = Frame(index=pd.Index(frame[first], name=columns[first]))
    for name in others:
        pairs = zip(rows, frame[name], strict=True)
        texts = [cell(row, name) if isinstance(value, float) else value for row, value in pairs]
        shown[columns[name]] = texts
    return shown


def keep(run: Run, name: str, frame: Frame) -> Frame:
    """Write the whole table to `<run>/tables/<name>.csv`; returns it."""
    write_text(run.folder / "tables" / f"{name}.csv", frame.to_csv(index=False))
    return frame
