"""Notebook 07: its recipes for public files, and the report that it makes of a file."""

from __future__ import annotations

import ast
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from outcomes_factory import make_outcomes

from foggen.routing import OutcomesError, check_outcomes, read_outcomes
from foggen.stats import calibration_table
from foggen.store import ROOT

NOTEBOOK = ROOT / "notebooks" / "07_your_outcomes.ipynb"
SHARED = ROOT.parent / "shared" / "outcomes"
RECIPES = ("routerarena_outcomes", "rlcr_outcomes", "routerbench_outcomes")
MEASURES = ("promises", "shuffled", "second_half")


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """The functions that the notebook shows, by name, without what runs around them."""
    names: dict[str, Any] = {}
    imports = "import numpy as np, pandas as pd\nfrom sklearn.isotonic import IsotonicRegression"
    exec(imports, names)
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.FunctionDef) and node.name in (*RECIPES, *MEASURES):
                exec(ast.unparse(node), names)
    assert {*RECIPES, *MEASURES} <= set(names)
    return names


def arena(index: str, score: float) -> dict[str, Any]:
    row = {"global_index": index, "token_usage": {"output_tokens": 5}}
    return {**row, "evaluation_result": {"score": score}}


class TestRouterArena:
    def test_joins_what_both_answered(self, shown: dict[str, Any]) -> None:
        local = [arena("A_b_2", 1.0), arena("A_b_1", 0.0), arena("C_1", 0.5)]
        cloud = [arena("C_1", 1.0), arena("A_b_2", 0.0), arena("D_9", 1.0)]
        table = check_outcomes(shown["routerarena_outcomes"](local, cloud))
        assert table["id"].tolist() == ["A_b_2", "C_1"] and table["domain"].tolist() == ["A_b", "C"]
        assert table["local_correct"].tolist() == [1, 0.5]
        assert table["cloud_correct"].tolist() == [0, 1]
        assert table["confidence"].isna().all()

    def test_a_negative_score_is_refused(self, shown: dict[str, Any]) -> None:
        table = shown["routerarena_outcomes"]([arena("A_1", -0.1)], [arena("A_1", 1.0)])
        with pytest.raises(OutcomesError, match=r"row 1, column `local_correct`: -0\.1"):
            check_outcomes(table)

    def test_a_question_twice_is_refused(self, shown: dict[str, Any]) -> None:
        with pytest.raises(pd.errors.MergeError):
            shown["routerarena_outcomes"]([arena("A_1", 1.0)] * 2, [arena("A_1", 1.0)])


class TestRlcr:
    ROWS = pd.DataFrame(
        {
            **{"Base-evals": [[1], [0]], "Base-confidence_levels": [[0.5], [1.0]]},
            **{"Twin-evals": [[1], [0]], "Twin-confidence_levels": [[0.9], [0.1]]},
            **{"Other-evals": [[0], [1]], "Other-confidence_levels": [[0.2], [0.3]]},
        },
        index=[7, 3],
    )

    def test_only_methods_with_the_same_answers_are_scores(self, shown: dict[str, Any]) -> None:
        table = shown["rlcr_outcomes"](self.ROWS, "d", "Base", "Other")
        assert [name for name in table if name.startswith("score_")] == ["score_Twin"]
        table = check_outcomes(table, scores=["score_Twin"])
        assert table["local_correct"].tolist() == [1, 0]
        assert table["cloud_correct"].tolist() == [0, 1]
        assert table["score_Twin"].tolist() == [0.9, 0.1]


class TestRouterBench:
    @staticmethod
    def file(name: str, scores: dict[int, float | None]) -> dict[str, Any]:
        rows = [{"index": i, "score": s, "completion_tokens": 3} for i, s in scores.items()]
        return {"dataset_name": name, "split": "test", "records": rows}

    def test_ungraded_and_single_answers_are_left_out(self, shown: dict[str, Any]) -> None:
        local, cloud = self.file("d", {1: 1.0, 2: None, 3: 0.0}), self.file("d", {3: 1.0, 2: 1.0})
        table = check_outcomes(shown["routerbench_outcomes"](local, cloud))
        assert table["id"].tolist() == ["d-3"] and table["cloud_correct"].tolist() == [1]

    def test_two_data_sets_are_refused(self, shown: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="dataset_name: d and e"):
            shown["routerbench_outcomes"](self.file("d", {1: 1.0}), self.file("e", {1: 1.0}))


# ---- the measures that it shows


def believers(seed: int = 0) -> pd.DataFrame:
    """Forty kinds of twenty questions with a calibrated score; four kinds are all wrong."""
    rng = np.random.default_rng(seed)
    score = rng.random(800)
    right = (rng.random(800) < score).astype(float)
    kind = np.repeat(np.arange(40), 20)
    right[kind < 4] = 0
    table = pd.DataFrame({"id": range(800), "domain": "d", "kind": [f"k{k}" for k in kind]})
    return table.assign(score=score, local_correct=right)


def test_kinds_that_are_confidently_wrong_are_found(shown: dict[str, Any]) -> None:
    table = believers()
    kinds = shown["promises"](table, "kind", "score")
    assert set(kinds["kind"][:4]) == {"k0", "k1", "k2", "k3"}
    assert (kinds["short"][:4] > 0.3).all() and (kinds["short"][4:] < 0.3).all()
    # A score on another scale promises the same
    again = shown["promises"](table.assign(score=table["score"] ** 4), "kind", "score")
    assert again["short"].to_numpy() == pytest.approx(kinds["short"].to_numpy())
    rng = np.random.default_rng(1)
    dealt = shown["shuffled"](table, "kind", rng)
    assert sorted(dealt["kind"]) == sorted(table["kind"])
    assert (shown["promises"](dealt, "kind", "score")["short"] > 0.3).sum() <= 1


def test_facts_are_dealt_out_whole(shown: dict[str, Any]) -> None:
    table = believers().assign(fact=lambda frame: frame["id"] // 2)
    dealt = shown["shuffled"](table, "kind", np.random.default_rng(0))
    assert (dealt.groupby("fact")["kind"].nunique() == 1).all()
    assert not (dealt["kind"] == table["kind"]).all()


def test_halves_are_taken_within_domains(shown: dict[str, Any]) -> None:
    table = make_outcomes(10, 2)
    late = shown["second_half"](table)
    assert late.groupby(table["domain"]).sum().tolist() == [5, 5]
    assert late[:10].tolist() == [False] * 5 + [True] * 5
    back = table.assign(when=np.arange(len(table))[::-1])
    assert (shown["second_half"](back) == ~late).all()
    both = pd.concat([table.assign(seed=0), table.assign(seed=1)], ignore_index=True)
    assert (shown["second_half"](both) == pd.concat([late, late], ignore_index=True)).all()


# ---- real files


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/outcomes")
class TestPublishedFiles:
    def test_rlcr(self) -> None:
        table = read_outcomes(SHARED / "rlcr.csv")
        rows = calibration_table(table, resamples=20).set_index("domain")
        domains = ["commonsenseqa", "gpqa", "math-500"]
        assert rows["auroc"][domains].round(4).tolist() == [0.7280, 0.5497, 0.7157]
        assert rows["brier"][domains].round(4).tolist() == [0.1673, 0.2667, 0.2514]
        routed = 1 - (table["confidence"] >= 0.5).groupby(table["domain"]).mean()
        assert routed[domains].round(4).tolist() == [0.0827, 0.2455, 0.0820]

    def test_routerarena_stops_at_its_negative_score(self) -> None:
        with pytest.raises(OutcomesError, match=r"row 495, column `local_correct`: '-0\.033"):
            read_outcomes(SHARED / "routerarena_haiku_gemini.csv")


# ---- the report


def report(folder: Path, outcomes: pd.DataFrame, **more: str) -> tuple[int, str, str]:
    """Exit status, stderr, and the texts that the notebook shows for a file of outcomes.

    `more` are other parameters of the notebook.
    """
    (folder / "notebooks").mkdir()
    file, made = folder / "mine.csv", folder / "notebooks" / "out.ipynb"
    outcomes.to_csv(file, index=False)
    values = {"run": str(folder / "run"), "outcomes": str(file), **more}
    given = [word for name, value in values.items() for word in ("-r", name, value)]
    options = [str(NOTEBOOK), str(made), *given, "--no-progress-bar"]
    command = [sys.executable, "-m", "papermill", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    texts = []
    for cell in nbformat.read(made, as_version=4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts.append(data.get("text/markdown") or data.get("text/plain", ""))
            texts.append(output.get("text", ""))
    return done.returncode, done.stderr, "\n".join(texts)


@pytest.mark.slow
class TestReport:
    def test_everything_is_there(self, tmp_path: Path) -> None:
        outcomes = make_outcomes(60, rich=True)
        outcomes["score_b"] = outcomes["p_true"]
        code, error, text = report(tmp_path, outcomes)
        assert code == 0, error
        assert "180 questions in 3 domains" in text and "score_b" not in text
        assert "The cloud is better" in text
        assert (tmp_path / "run" / "done" / "07_your_outcomes.json").is_file()

    def test_a_cloud_that_is_no_better(self, tmp_path: Path) -> None:
        same = make_outcomes(60).assign(cloud_correct=lambda frame: frame["local_correct"])
        code, error, text = report(tmp_path, same)
        assert code == 0, error
        assert "The cloud is no better" in text

    def test_no_confidence_and_tiny_domains(self, tmp_path: Path) -> None:
        outcomes = make_outcomes(2, 30).assign(confidence=math.nan)
        code, error, text = report(tmp_path, outcomes)
        assert code == 0, error
        assert "nothing here says how sure" in text and "read the rows of all questions" in text

    def test_a_second_file_and_a_column_of_groups(self, tmp_path: Path) -> None:
        """And a threshold that keeps everything: the two are compared at half of the questions."""
        outcomes = make_outcomes(60).assign(confidence=lambda frame: 0.5 + frame["confidence"] / 2)
        outcomes["customer"] = np.where(np.arange(len(outcomes)) % 2, "odd", "even")
        other = tmp_path / "other.csv"
        outcomes.assign(local_correct=0).to_csv(other, index=False)
        code, error, text = report(tmp_path, outcomes, other=str(other), stratum="customer")
        assert code == 0, error
        assert "the threshold decides nothing" in text and "50% to the cloud" in text
        assert f"B: {other}" in text and re.search(r"customer.*\neven +90 ", text, flags=re.DOTALL)

    def test_an_unknown_column_of_groups_is_refused(self, tmp_path: Path) -> None:
        code, error, _ = report(tmp_path, make_outcomes(5), stratum="costumer")
        assert code != 0 and "mine.csv has no column `costumer`" in error

    def test_a_bad_file_is_refused(self, tmp_path: Path) -> None:
        code, error, _ = report(tmp_path, make_outcomes(5).assign(confidence=3))
        assert code != 0 and "column `confidence`: '3'; expected" in error
