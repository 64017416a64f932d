"""How numbers are printed; and every figure is drawn, saved twice alike and closed."""

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

from foggen import show
from foggen.config import load_profile
from foggen.routing import share_curve
from foggen.store import ROOT, Run

# ---- numbers and tables

ROW = {
    "sysacc": 0.7771,
    "sysacc_low": 0.7479,
    "sysacc_high": 0.8041,
    "auroc": 0.7659,
    "lift": -0.0004,
    "raw": -1e-9,
    "lift 20%": 0.0219,
    "lift 20%_low": 0.018,
    "lift 20%_high": 0.027,
    "difference": 0.0204,
    "difference_low": -0.0004,
    "difference_high": 0.034,
    "routed": 1.0,
    "routed_low": 1.0,
    "routed_high": 1.0,
    "dibc": np.nan,
    "p_holm": 0.0442,
    "tau": 0.345,
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sysacc", "77.7 [74.8, 80.4]"),  # a share in percent, with its interval
        ("auroc", "0.77"),  # from 0 to 1; no interval known
        ("lift", "+0.0"),  # no minus before a zero
        ("raw", "0.0"),
        ("lift 20%", "+2.2 [+1.8, +2.7]"),  # the first word decides
        ("difference", "+2.0 [+0.0, +3.4]"),
        ("routed", "100.0"),  # an interval that prints as the value says nothing
        ("dibc", "-"),
        ("p_holm", "0.044"),
        ("tau", "0.345"),
    ],
)
def test_a_cell(name: str, text: str) -> None:
    assert show.cell(ROW, name) == text
    assert show.cell(pd.Series(ROW), name) == text


def test_a_cell_can_be_printed_as_another_metric() -> None:
    assert show.cell(ROW, "difference", "signed") == "+0.02 [+0.00, +0.03]"
    assert show.points(ROW) == "+2.0 points [+0.0, +3.4]"
    assert show.points(ROW, "sysacc") == "+77.7 points [+74.8, +80.4]"
    assert show.points({"difference": 0.02}) == "+2.0 points"  # too few facts for an interval
    assert show.points({"difference": np.nan}) == "-"


def test_a_table_has_headers_and_keeps_texts() -> None:
    frame = pd.DataFrame([ROW, ROW]).assign(who=["a", "b"], n=[3, 4])
    shown = show.table(frame, {"who": "router", "sysacc": "SysAcc", "n": "questions"})
    assert shown.index.name == "router" and [*shown.index] == ["a", "b"]
    assert [*shown["SysAcc"]] == ["77.7 [74.8, 80.4]"] * 2 and [*shown["questions"]] == [3, 4]
    numbers = pd.DataFrame({"tau": [0.5, 1.0], "n": [3, 4], "sysacc": [0.7, np.nan]})
    shown = show.table(numbers, {"tau": "tau", "n": "n", "sysacc": "SysAcc"})
    assert [*shown["n"]] == [3, 4] and [*shown["SysAcc"]] == ["70.0", "-"]
    with pytest.raises(KeyError, match="absent"):
        show.table(frame, {"who": "router", "absent": "x"})


def test_a_kept_table_is_whole(tmp_path: Path) -> None:
    frame = pd.DataFrame([ROW])
    run = Run(tmp_path / "run", load_profile("pocket"))
    assert show.keep(run, "03_x", frame) is frame
    again = pd.read_csv(run.folder / "tables" / "03_x.csv")
    assert np.isclose(again["sysacc_low"][0], ROW["sysacc_low"]) and [*again] == [*frame]


# ---- figures

WORDS = {"confidence": "stated word", "expected_confidence": "E[c]"}


def curve(outcomes: pd.DataFrame, score: str = "confidence") -> pd.DataFrame:
    return share_curve(outcomes, score, resamples=20)


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "accuracy_curve": lambda o: show.accuracy_curve(curve(o), {"tau = 0.5": (0.2, 0.7)}, "SysAcc"),
    "matched_curves": lambda o: show.matched_curves(
        {name: curve(o, score) for score, name in WORDS.items()}, "Lift"
    ),
    "reliability": lambda o: show.reliability(o, WORDS, "Reliability"),
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
    show.style()


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_saved_twice_alike_and_closed(tmp_path: Path, name: str) -> None:
    outcomes = make_outcomes(40, rich=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for folder in ("first", "second"):
            show.save(FIGURES[name](outcomes), tmp_path / folder, "figure")
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
    show.reliability(make_outcomes(40), {"confidence": "$x_{$"}, "cost in $, in $").canvas.draw()


def test_reliability_shows_the_size_of_every_bin() -> None:
    outcomes = make_outcomes(40)
    figure = show.reliability(outcomes, {"confidence": "stated word"}, "Reliability")
    areas = figure.axes[0].collections[-1].get_sizes()
    counts = outcomes["confidence"].value_counts().sort_index()
    assert areas / areas.sum() == pytest.approx(counts / counts.sum())
    plt.close(figure)


@pytest.mark.parametrize(
    ("low", "high"), [(0.4, 0.65), (0.5, 0.575), (0.99, 1.0), (0, 1), (-0.04, 0.02)]
)
def test_ticks_say_where_they_stand(low: float, high: float) -> None:
    figure, axes = plt.subplots(figsize=(2.4, 2.9))
    show.label(axes, ylabel="answers right (%)", ylim=(low, high))
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
