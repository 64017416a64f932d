"""Every figure is drawn, saved twice alike and closed, on usual and on degenerate outcomes."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from outcomes_factory import make_outcomes

from foggen import plots, stats
from foggen.store import ROOT

WORDS = {"confidence": "stated word", "expected_confidence": "E[c]"}


def curve(outcomes: pd.DataFrame, score: str = "confidence") -> pd.DataFrame:
    return stats.share_curve(outcomes, score, resamples=20)


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "accuracy_curve": lambda o: plots.accuracy_curve(curve(o), {"tau = 0.5": (0.2, 0.7)}, "SysAcc"),
    "matched_curves": lambda o: plots.matched_curves(
        {name: curve(o, score) for score, name in WORDS.items()}, "Lift"
    ),
    "reliability": lambda o: plots.reliability(o, WORDS, "Reliability"),
}
CASES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "one level": lambda o: o.assign(confidence=1.0, expected_confidence=1.0),
    "unparsed": lambda o: o.assign(
        confidence=np.where(np.arange(len(o)) % 3, o["confidence"], math.nan)
    ),
    "never parsed": lambda o: o.assign(confidence=math.nan),
    "one question": lambda o: o.iloc[:1],
}


@pytest.fixture(autouse=True)
def in_style() -> None:
    plots.style()


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_saved_twice_alike_and_closed(tmp_path: Path, name: str) -> None:
    outcomes = make_outcomes(40, rich=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for folder in ("first", "second"):
            plots.save(FIGURES[name](outcomes), tmp_path / folder, "figure")
    for ending in ("png", "svg"):
        first, second = (
            (tmp_path / folder / f"figure.{ending}").read_bytes() for folder in ("first", "second")
        )
        assert first == second and len(first) > 2000
    assert not plt.get_fignums()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FIGURES)
def test_degenerate_outcomes_are_drawn_without_a_warning(name: str, case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FIGURES[name](CASES[case](make_outcomes(40, rich=True))).canvas.draw()
    plt.close("all")


@pytest.mark.parametrize("name", FIGURES)
def test_axes_say_their_units_and_how_many_questions(name: str) -> None:
    axes = FIGURES[name](make_outcomes(40, rich=True)).axes[0]
    assert "(%)" in axes.get_xlabel() and re.search(r"\((%|points)\)", axes.get_ylabel())
    assert "120" in axes.get_xlabel()
    assert axes.get_title(loc="left")
    plt.close("all")


def test_a_dollar_in_a_name_begins_no_formula() -> None:
    """Names come from files of others, and half a formula would stop the whole notebook."""
    figure = plots.reliability(make_outcomes(40), {"confidence": "$x_{$"}, "cost in $, in $")
    figure.canvas.draw()
    plt.close(figure)


def test_reliability_shows_the_size_of_every_bin() -> None:
    outcomes = make_outcomes(40)
    figure = plots.reliability(outcomes, {"confidence": "stated word"}, "Reliability")
    areas = figure.axes[0].collections[-1].get_sizes()
    counts = outcomes["confidence"].value_counts().sort_index()
    assert areas / areas.sum() == pytest.approx(counts / counts.sum())
    plt.close(figure)


@pytest.mark.parametrize(
    ("low", "high"), [(0.4, 0.65), (0.5, 0.575), (0.99, 1.0), (0, 1), (-0.04, 0.02)]
)
def test_ticks_say_where_they_stand(low: float, high: float) -> None:
    figure, axes = plt.subplots(figsize=(2.4, 2.9))
    axes.set_ylim(low, high)
    plots.percent_ticks(axes.yaxis)
    figure.canvas.draw()
    texts = [float(label.get_text().replace("−", "-")) for label in axes.get_yticklabels()]
    assert texts == pytest.approx([100 * place for place in axes.get_yticks()])
    assert high - low < 0.05 or all(value == round(value) for value in texts)
    plt.close(figure)


def test_the_overview_is_what_its_script_draws(tmp_path: Path) -> None:
    script = ROOT / "figures" / "make_overview.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    committed = (ROOT / "figures" / "overview.svg").read_text()
    assert (tmp_path / "overview.svg").read_text() == committed
