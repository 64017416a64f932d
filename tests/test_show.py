"""How numbers are printed for reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from foggen import show
from foggen.config import load_profile
from foggen.store import Run

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
