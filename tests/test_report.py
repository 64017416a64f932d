"""The report from a file: what it writes, what it refuses, how long it takes."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from outcomes_factory import make_outcomes

from foggen import report


def write(path: Path, outcomes: pd.DataFrame) -> str:
    outcomes.to_csv(path, index=False)
    return str(path)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = write(tmp_path / "a<b.csv", make_outcomes(40, rich=True))
    train = write(tmp_path / "train.csv", make_outcomes(40, rich=True, seed=5).assign(id=lambda f: "t" + f["id"]))
    out = tmp_path / "report"
    assert report.main([given, "--out", str(out), "--train", train, "--resamples", "50"]) == 0
    page = (out / "index.html").read_text()
    assert capsys.readouterr().out.strip().endswith("index.html")
    assert "a&lt;b.csv" in page and "text-only router" in page and "120 questions in 3 domains" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere
    tables = sorted(path.stem for path in (out / "tables").glob("*.csv"))
    assert tables == sorted(path.stem for path in (out / "tables").glob("*.md")) and len(tables) == 7
    assert len(list((out / "figures").glob("*.png"))) == len(list((out / "figures").glob("*.svg"))) == 8
    routing = pd.read_csv(out / "tables" / "routing.csv")
    assert routing["domain"].tolist() == ["domain0", "domain1", "domain2", "mean"]


def test_the_least_table(tmp_path: Path) -> None:
    plain = make_outcomes(10, 1).assign(confidence="")  # and no confidence was parsed
    assert report.main([write(tmp_path / "a.csv", plain), "--out", str(tmp_path / "a"), "--resamples", "20"]) == 0
    assert "text-only router" not in (tmp_path / "a" / "index.html").read_text()


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write(tmp_path / "bad.csv", make_outcomes(5).assign(confidence=3))
    assert report.main([bad, "--out", str(tmp_path / "no")]) == 2
    assert "column `confidence`: '3'; expected" in capsys.readouterr().err and not (tmp_path / "no").exists()
    with pytest.raises(SystemExit):
        report.main([bad, "--tau", "2"])


def test_markdown_escapes_bars() -> None:
    assert report.markdown(pd.DataFrame({"a": ["x|y"]})) == "| a |\n| --- |\n| x\\|y |\n"
