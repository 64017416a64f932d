"""Every figure is drawn, saved twice alike and closed, on usual and on degenerate outcomes."""

from __future__ import annotations

import math
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

from foggen import plots, routing, stats


def tasks() -> pd.DataFrame:
    rows = [
        ("squad", "R14", 0.8, 0.81),
        ("squad", "R15", 0.9, math.nan),
        ("gsm8k", "R14", 0.5, 0.52),
        ("gsm8k", "R15", 0.6, 0.58),
    ]
    table = pd.DataFrame(rows, columns=["task", "checkpoint", "accuracy", "published"])
    return table.assign(low=table["accuracy"] - 0.05, high=table["accuracy"] + 0.05, n=200)


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "accuracy_curve": lambda o: plots.accuracy_curve(routing.share_curve(o, resamples=20), (0.2, 0.7), (0.219, 0.678)),
    "matched_curves": lambda o: plots.matched_curves({"confidence": routing.share_curve(o, resamples=20)}, 0.2),
    "cost_curves": lambda o: plots.cost_curves({"confidence": routing.share_curve(o, resamples=20)}, {"confidence": 1}),
    "reliability": plots.reliability,
    "reliability graded": lambda o: plots.reliability(o, "graded_confidence", "graded"),
    "histogram": plots.confidence_histogram,
    "histogram graded": lambda o: plots.confidence_histogram(o, "graded_confidence"),
    "risk_coverage": lambda o: plots.risk_coverage(o, {"confidence": "stated", "p_true": "P(True)"}),
    "dumbbells": lambda o: plots.domain_dumbbells(routing.routing_table(o, resamples=20)),
    "rounds": lambda o: plots.round_curves(stats.round_table({0: o, 1: o.assign(confidence=1.0)}, resamples=20)),
    "open_ended": lambda o: plots.open_ended_bars(tasks()),
}


CASES = {
    "one level": lambda o: o.assign(confidence=1.0, graded_confidence=1.0),
    "unparsed": lambda o: o.assign(confidence=np.where(np.arange(len(o)) % 3, o["confidence"], math.nan)),
    "never parsed": lambda o: o.assign(confidence=math.nan),
    "one question": lambda o: o.iloc[:1],
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_saved_and_closed(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.save(FIGURES[name](make_outcomes(40, rich=True)), tmp_path / "new", "figure")
    assert all((tmp_path / "new" / f"figure.{ending}").stat().st_size > 2000 for ending in ("png", "svg"))
    assert not plt.get_fignums()


@pytest.mark.parametrize("case", CASES)
def test_degenerate_outcomes_are_drawn_without_a_warning(case: str) -> None:
    outcomes = CASES[case](make_outcomes(40, rich=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in list(FIGURES)[:-1]:  # the last knows no outcomes
            FIGURES[name](outcomes).canvas.draw()
            plt.close("all")


def test_a_figure_is_the_same_file_twice(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        plots.save(plots.confidence_histogram(make_outcomes(40)), tmp_path / folder, "figure")
    for ending in ("png", "svg"):
        first, second = ((tmp_path / f / f"figure.{ending}").read_bytes() for f in ("first", "second"))
        assert first == second


def test_axes_say_their_units() -> None:
    figure = plots.accuracy_curve(routing.share_curve(make_outcomes(40), resamples=20), (0.2, 0.7))
    axes = figure.axes[0]
    assert "%" in axes.get_xlabel() and "%" in axes.get_ylabel() and "n = 120" in axes.get_title(loc="left")
    plt.close(figure)


@pytest.mark.parametrize(("low", "high"), [(0.4, 0.65), (0.5, 0.575), (0.99, 1.0), (0, 1), (-0.04, 0.02)])
def test_ticks_say_where_they_stand(low: float, high: float) -> None:
    figure, axes = plt.subplots(figsize=(2.4, 2.9))
    axes.set_ylim(low, high)
    plots._percent(axes.yaxis)
    figure.canvas.draw()
    told = [float(label.get_text().removesuffix("%").replace("−", "-")) for label in axes.get_yticklabels()]
    assert told == pytest.approx([100 * place for place in axes.get_yticks()])
    assert high - low < 0.05 or all(value == round(value) for value in told)
    plt.close(figure)
