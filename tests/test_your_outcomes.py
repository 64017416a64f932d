"""Notebook 07: its recipes for public files, and the report that it makes of a file."""

from __future__ import annotations

import ast
import io
import math
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
from outcomes_factory import make_outcomes

from foggen.inputs import TableError
from foggen.routing import check_outcomes, read_outcomes
from foggen.stats import bootstrap, calibration
from foggen.store import ROOT

NOTEBOOK = ROOT / "notebooks" / "07_your_outcomes.ipynb"
SHARED = ROOT.parent / "shared" / "outcomes"
RECIPES = ("routerarena_outcomes", "rlcr_outcomes", "routerbench_outcomes")
MEASURES = ("promises", "shuffled", "units", "second_half", "in_time", "aligned")


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """The functions that the notebook shows, by name, without what runs around them."""
    names: dict[str, Any] = {}
    imports = "import numpy as np, pandas as pd\nfrom sklearn.isotonic import IsotonicRegression"
    ours = "from foggen.inputs import TableError\nfrom foggen.stats import fact_codes"
    exec(f"{imports}\n{ours}\nsource = 'mine.csv'", names)
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
        with pytest.raises(TableError, match=r"row 1: field `local_correct`: -0\.1"):
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


def test_questions_without_a_fact_are_dealt_by_themselves(shown: dict[str, Any]) -> None:
    """As one kind, they would all be confidently wrong by luck, or none."""
    table = believers().assign(fact=None)
    table.loc[:99, "fact"] = "only one"
    dealt = shown["shuffled"](table, "kind", np.random.default_rng(0))
    assert dealt["kind"][:100].nunique() == 1 and dealt["kind"][100:].nunique() > 30
    assert len(shown["promises"](table, "kind", "score")) == 35  # five kinds hold but one fact


def test_facts_with_one_name_are_two_in_two_domains(shown: dict[str, Any]) -> None:
    table = believers().assign(fact=lambda frame: [str(number % 400) for number in frame["id"]])
    table["domain"] = np.where(table["id"] < 400, "law", "art")
    dealt = shown["shuffled"](table, "kind", np.random.default_rng(0))
    for part in (slice(0, 399), slice(400, None)):  # the kinds of a domain stay there
        assert sorted(dealt.loc[part, "kind"]) == sorted(table.loc[part, "kind"])
    assert shown["units"](table).tolist() == list(range(800))


def test_halves_are_taken_within_domains(shown: dict[str, Any]) -> None:
    table = make_outcomes(10, 2)
    late = shown["second_half"](table)
    assert late.groupby(table["domain"]).sum().tolist() == [5, 5]
    assert late[:10].tolist() == [False] * 5 + [True] * 5
    back = table.assign(when=np.arange(len(table))[::-1])
    assert (shown["second_half"](back) == ~late).all()
    both = pd.concat([table.assign(seed=0), table.assign(seed=1)], ignore_index=True)
    assert (shown["second_half"](both) == pd.concat([late, late], ignore_index=True)).all()


class TestTime:
    @pytest.mark.parametrize(
        "when",
        [
            ["1", "2", "10"],
            [0.5, 2, 1e3],
            ["2023-12-31", "2024-01-01", "2024-01-01T10:00"],
            ["2023", "2023-05", "2023-05-02"],
            [pd.Timestamp("2023-12-31"), pd.Timestamp("2024-01-01"), pd.Timestamp("2024-01-02")],
        ],
        ids=str,
    )
    def test_numbers_and_dates_are_in_order(self, shown: dict[str, Any], when: list[Any]) -> None:
        assert shown["in_time"](pd.Series(when), "mine.csv").rank().tolist() == [1, 2, 3]

    @pytest.mark.parametrize(
        ("when", "row", "cell"),
        [
            (["1", "2", None], 3, "empty"),
            ([None, None], 1, "empty"),
            (["1", " ", "2"], 2, "' '"),
            (["2024-01-01", "31.12.2023"], 2, "'31.12.2023'"),
            (["2024-01-01", "5", "2024-01-02"], 2, "'5'"),
            (["2024-01-01", "now"], 2, "'now'"),
            (["1", "inf"], 2, "'inf'"),
            (["1", "2023-01-01"], 2, "'2023-01-01'"),
        ],
    )
    def test_anything_else_is_refused(
        self, shown: dict[str, Any], when: list[Any], row: int, cell: str
    ) -> None:
        place = re.escape(f"mine.csv, row {row}, column `when`: {cell}; expected a number, or")
        with pytest.raises(TableError, match=place):
            shown["in_time"](pd.Series(when), "mine.csv")


class TestAligned:
    """Rows of two files are paired by id and seed, or not at all."""

    A = make_outcomes(3, 2).assign(fact=lambda frame: frame["id"])

    def refusal(self, shown: dict[str, Any], b: pd.DataFrame, a: pd.DataFrame = A) -> str:
        with pytest.raises(TableError) as caught:
            shown["aligned"](b, a, "confidence", "theirs.csv")
        return str(caught.value)

    def test_order_is_nothing(self, shown: dict[str, Any]) -> None:
        a = pd.concat([self.A.assign(seed=0), self.A.assign(seed=1)], ignore_index=True)
        b = shown["aligned"](a[::-1], a, "confidence", "theirs.csv")
        pd.testing.assert_frame_equal(b[[*a]], a, check_dtype=False)

    def test_other_questions_and_seeds(self, shown: dict[str, Any]) -> None:
        row = r"theirs.csv: id 'd0-0' (seed {}; {} in all) is in {} alone; expected the questions"
        assert row.format(0, 1, "mine.csv") in self.refusal(shown, self.A[1:])
        assert row.format(0, 1, "theirs.csv") in self.refusal(shown, self.A, self.A[1:])
        assert row.format(0, 6, "mine.csv") in self.refusal(shown, self.A.assign(seed=1))

    @pytest.mark.parametrize("column", ["domain", "fact"])
    @pytest.mark.parametrize("value", ["other", None])
    def test_another_domain_or_fact(
        self, shown: dict[str, Any], column: str, value: str | None
    ) -> None:
        b = self.A.assign(**{column: self.A[column].where(self.A["id"] != "d1-1", value)})
        text = self.refusal(shown, b)
        assert f"theirs.csv, id 'd1-1', column `{column}`" in text and "as in mine.csv" in text

    def test_a_missing_column(self, shown: dict[str, Any]) -> None:
        bare = self.A.drop(columns="fact")
        assert self.refusal(shown, bare).startswith("theirs.csv: no column `fact`")
        assert self.refusal(shown, self.A, bare).startswith("mine.csv: no column `fact`")
        empty = self.refusal(shown, self.A.assign(confidence=math.nan))
        assert empty.startswith("theirs.csv: column `confidence` is empty")


# ---- its cells, on files of all kinds

ALWAYS = ("Set-up", "The file", "Does the cloud help at all?", "At the threshold")


def told(
    folder: Path, outcomes: pd.DataFrame, *sections: str, **more: str
) -> tuple[dict[str, Any], str]:
    """The names that the cells of some sections leave (default: of all), and what they show.

    They run in this process and with few resamples; `more` are other parameters. Some sections go
    without the figure of all shares, which takes longest.
    """
    folder.mkdir(exist_ok=True)
    outcomes.to_csv(folder / "mine.csv", index=False)
    names: dict[str, Any] = {}
    given = {"run": str(folder / "run"), "outcomes": str(folder / "mine.csv"), **more}
    texts, section, used = [], "", {*ALWAYS, *sections}
    names["display"] = lambda value: texts.append(getattr(value, "data", None) or str(value))
    wide = ("display.width", 1000, "display.max_columns", 20, "display.html.use_mathjax", True)
    with matplotlib.rc_context(), pd.option_context(*wide):
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
            if cell.cell_type == "markdown":
                section = (re.findall(r"^## (.+)$", cell.source, re.MULTILINE) or [section])[-1]
            elif not sections or (section in used and "share_curve" not in cell.source):
                body = ast.parse(cell.source).body
                last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
                with redirect_stdout(io.StringIO()) as printed:
                    exec(compile(ast.Module(body, []), "a cell", "exec"), names)
                    value = last and eval(ast.unparse(last), names)
                texts.append(printed.getvalue())
                if value is not None:
                    names["display"](value)
                if "parameters" in cell.metadata.get("tags", []):
                    names |= given
                names.get("INTERVALS", {})["resamples"] = 400
    return names, "\n".join(texts)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """All cells on three facts, asked 40 times each, with one oddly named score and few groups.

    The cloud is always worse, and the score knows where.
    """
    table = make_outcomes(40, per_fact=40).assign(local_correct=1.0, confidence=math.nan)
    late = np.arange(len(table)) % 40 >= 20
    table["cloud_correct"] = np.where(late, 0.5, 0)
    table["score_$x_{$"] = np.where(late, 0.25, 1)
    table["stratum"] = np.where(np.arange(len(table)) < 30, "$a_{$", None)
    folder = tmp_path_factory.mktemp("odd")
    return *told(folder, table), folder / "run"


class TestAnOddFile:
    def test_one_score_of_any_name_is_enough(self, odd: tuple[dict[str, Any], str, Path]) -> None:
        names, text, run = odd
        assert names["score"] == "score_$x_{$" and names["calibration"]["domain"].tolist() == [
            "$x_{$"
        ]
        assert "There is no second score in this file" in text
        assert (run / "done" / "07_your_outcomes.json").is_file()

    def test_a_dollar_is_a_dollar(self, odd: tuple[dict[str, Any], str, Path]) -> None:
        _, text, run = odd
        for name in ("07_share", "07_reliability"):
            assert "$x_{$" in (run / "figures" / f"{name}.svg").read_text()  # in its comments
        assert r"scores to rank by: \$x\_{\$" in text and r"The \$x\_{\$ is" in text

    def test_rows_without_a_group_are_a_group(self, odd: tuple[dict[str, Any], str, Path]) -> None:
        strata = odd[0]["strata"].set_index("domain")
        assert strata["n"].to_dict() == {"$a_{$": 30, "(none)": 90}

    def test_three_facts_tell_nothing(self, odd: tuple[dict[str, Any], str, Path]) -> None:
        names, text, _ = odd
        assert "- 120 questions in 3 domains, 40 in the smallest, on 3 facts in all" in text
        assert "half of the domains have fewer than 20 facts" in text
        assert names["main"] == "all questions"
        for verdict in ("points: the confidence picks", "The cloud is", "Changed beyond", "nan"):
            assert verdict not in text, verdict
        few = "3 facts are too few to tell whether"
        for what in ("that is more", "the confidence picks better", "anything changed beyond"):
            assert f"{few} {what}" in text
        assert "No `stratum` has 8 facts" in text and "not to be judged on so few facts" in text


def test_a_free_score_alone_is_enough(tmp_path: Path) -> None:
    table = make_outcomes(40).rename(columns={"confidence": "option_probability"})
    sections = (
        "Does the confidence mean what it says?",
        "Is it better than a score that costs nothing?",
    )
    names, text = told(tmp_path, table.assign(confidence=math.nan), *sections)
    assert names["comparison"].startswith("There is no second score")
    assert (
        names["calibration"]["domain"].tolist() == ["max-prob"]
        and "scores to rank by: max-prob" in text
    )


def test_what_is_said_where_there_is_little_to_say(tmp_path: Path) -> None:
    same = make_outcomes(60).assign(cloud_correct=lambda frame: frame["local_correct"])
    assert "The cloud is no better" in told(tmp_path, same, *ALWAYS)[1]
    _, text = told(tmp_path, make_outcomes(2, 30).assign(confidence=math.nan), *ALWAYS)
    assert "nothing here says how sure" in text and "read the rows of all questions" in text


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.csv has no column `costumer`"):
        told(tmp_path, make_outcomes(5), *ALWAYS, stratum="costumer")
    with pytest.raises(TableError, match="field `confidence`: '3'; expected"):
        told(tmp_path, make_outcomes(5).assign(confidence=3), *ALWAYS)


DRIFT = "Has anything changed?"


def test_a_change_without_spread_is_a_change(tmp_path: Path) -> None:
    table = make_outcomes(40)
    table["confidence"] = np.where(np.arange(120) % 40 < 20, 1, math.nan)
    names, text = told(tmp_path, table, DRIFT)
    changed = names["changed"].set_index("measure")
    assert changed["change"][["mean score", "to the cloud"]].tolist() == [-1, 1]
    assert re.search("Changed beyond chance: .*mean score, to the cloud", text)
    # And where nothing can change
    same = make_outcomes(40).assign(local_correct=1, cloud_correct=1, confidence=1)
    names, text = told(tmp_path, same, DRIFT)
    assert names["changed"].empty and "Changed beyond chance: nothing" in text


def test_a_file_is_read_in_the_order_of_its_times(tmp_path: Path) -> None:
    table = make_outcomes(40, 1).assign(when=[*range(40, 0, -1)])
    names, _ = told(tmp_path, table, DRIFT)
    assert names["second_half"](names["table"]).tolist() == [True] * 20 + [False] * 20
    with pytest.raises(TableError, match=r"mine\.csv, row 3, column `when`: empty"):
        told(tmp_path, table.assign(when=table["when"].where(table.index != 2)), DRIFT)


def test_two_files_are_paired_whatever_their_order(tmp_path: Path) -> None:
    table = make_outcomes(40).assign(score_b=lambda frame: frame.pop("confidence"), confidence="")
    other, duel = tmp_path / "theirs.csv", "A against B: two files"
    rival = table.assign(local_correct=1 - table["local_correct"])
    rival.to_csv(other, index=False)
    first, _ = told(tmp_path, table, duel, other=str(other))
    rival[::-1].to_csv(other, index=False)
    second, _ = told(tmp_path, table, duel, other=str(other))
    pd.testing.assert_frame_equal(first["duel"], second["duel"])
    _, text = told(tmp_path, table.drop(columns="score_b"), duel, other=str(other))
    assert "mine.csv has no score to rank by" in text
    for bad, text in (
        (rival.drop(columns="score_b"), "no column"),
        (rival.assign(score_b=2), "'2'"),
    ):
        bad.to_csv(other, index=False)
        with pytest.raises(TableError, match=rf"theirs\.csv.*{text}"):
            told(tmp_path, table, duel, other=str(other))


# ---- real files


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/outcomes")
class TestPublishedFiles:
    def test_rlcr(self) -> None:
        table = read_outcomes(SHARED / "rlcr.csv")
        rows = bootstrap(table, calibration, 20).table().set_index("domain")
        domains = ["commonsenseqa", "gpqa", "math-500"]
        assert rows["auroc"][domains].round(4).tolist() == [0.7280, 0.5497, 0.7157]
        assert rows["brier"][domains].round(4).tolist() == [0.1673, 0.2667, 0.2514]
        routed = 1 - (table["confidence"] >= 0.5).groupby(table["domain"]).mean()
        assert routed[domains].round(4).tolist() == [0.0827, 0.2455, 0.0820]

    def test_routerarena_stops_at_its_negative_score(self) -> None:
        with pytest.raises(TableError, match=r"row 495: field `local_correct`: '-0\.033"):
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
