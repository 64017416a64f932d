"""Evaluation: from a checkpoint to its outcomes table, with a scripted engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scripted import OPEN, Scripted, slot

from foggen import evaluation, routing
from foggen.config import Settings, override
from foggen.engines import EngineSlot
from foggen.evaluation import (
    answers,
    cloud_engine,
    evaluated_questions,
    open_outcomes,
    outcomes,
    scores,
)
from foggen.store import Run, read_jsonl

MODEL = Path(__file__)  # a file stands for weights


@pytest.fixture
def engine() -> Scripted:
    return Scripted()


@pytest.fixture
def edge(engine: Scripted) -> EngineSlot:
    return slot(engine)


def set_cloud(monkeypatch: pytest.MonkeyPatch, edge: Scripted, *answers: Any) -> None:
    """A scripted cloud, whose making is an event of the edge engine."""

    def make(settings: Settings) -> Scripted:
        edge.events.append("cloud made")
        return Scripted("0.5", *answers)

    monkeypatch.setattr(evaluation, "cloud_engine", make)


@pytest.fixture(autouse=True)
def cloud(monkeypatch: pytest.MonkeyPatch, engine: Scripted) -> None:
    set_cloud(monkeypatch, engine, "B")


# ---- multiple choice


def test_an_outcomes_table_has_all_columns_and_is_asked_for_once(
    small, tmp_path, questions, engine, edge
):
    run = Run(tmp_path, small)
    table = routing.check_outcomes(outcomes(run, edge, questions, MODEL, "test-r14"))
    assert set(routing.Outcome.model_fields) <= set(table)
    assert table["id"].tolist() == [question.id for question in questions]
    assert table["question"].tolist() == [question.question for question in questions]
    for side, letter in (("local", "A"), ("cloud", "B")):
        right = [float(question.answer == letter) for question in questions]
        assert table[f"{side}_correct"].tolist() == right
        assert set(table[f"{side}_answer"]) == {letter}
    assert set(table["verification"]) == {1.0} and set(table["votes"]) == {"A" * small.samples}
    assert np.allclose(table["p_true"], 0.75) and np.allclose(table["expected_confidence"], 0.5)
    assert np.allclose(table["option_probability"], 1 / table["n_options"])
    # The edge engine makes room for the cloud, and nothing is asked twice
    assert engine.events[-2:] == ["close", "cloud made"]
    asked = engine.asked
    again = routing.check_outcomes(outcomes(run, edge, questions, MODEL, "test-r14"))
    pd.testing.assert_frame_equal(again, table)
    assert engine.asked == asked and "texts" not in again
    stages = [row["stage"].rsplit("-", 1)[0] for row in read_jsonl(tmp_path / "manifest.jsonl")]
    parts = [f"test-r14-{part}" for part in ("answers", "scores", "votes", "verification")]
    assert sorted(stages) == sorted([*parts, "test-cloud-answers"])


def test_an_unreadable_answer_has_nothing_to_judge_or_to_keep(
    small, tmp_path, questions, engine, edge
):
    engine.texts = {1: "Confidence: 1.0\nFinal answer: perhaps", 3: ""}
    table = outcomes(Run(tmp_path, small), edge, questions, MODEL, "test-r14")
    unread = table["local_answer"].isna()
    assert np.flatnonzero(unread).tolist() == [1, 3]
    assert table["confidence"].isna().equals(unread), "no confidence without an answer"
    assert table["p_true"].isna().equals(unread) and np.allclose(table["p_true"].dropna(), 0.75)
    assert table["verification"].tolist() == (1.0 - unread).tolist()
    assert table["expected_confidence"].notna().all()
    engine.texts = {n: "" for n in range(len(questions))}  # of every question
    none = scores(Run(tmp_path / "none", small), edge, questions, MODEL, "test-r14")
    assert none["p_true"].isna().all() and none["option_probability"].notna().all()


def test_scores_and_verifications_are_those_of_the_greedy_answers(
    small, tmp_path, questions, engine, edge
):
    """Other answers are scored anew; the same answers, asked for anew, are not."""
    n, k = len(questions), small.automix.k
    parts, expected = ("scores", "verification"), n + 2 * n + k * n
    for tokens, answer, asked in ((6, "A", expected), (7, "A", n), (8, "B", expected)):
        engine.answer, before = answer, engine.asked
        run = Run(tmp_path, override(small, {"max_new_tokens": tokens}))
        outcomes(run, edge, questions, MODEL, "test-r14", parts)
        assert engine.asked - before == asked, tokens


def test_the_cloud_that_fails_is_shown_and_asked_again(
    small, tmp_path, questions, engine, edge, monkeypatch, capfd
):
    """The local answer stands in; an empty answer is the cloud's, and wrong."""
    run = Run(tmp_path, small)
    set_cloud(monkeypatch, engine, "B", {0: None, 2: None, 1: ""})
    tables = {
        (0, 2): outcomes(run, edge, questions, MODEL, "test-r14"),
        (0, 2, 4, 6): open_outcomes(run, edge, OPEN, MODEL, "open-r14"),  # two tasks, two calls
    }
    assert capfd.readouterr().err.count("asks again") == 2
    for failed, table in tables.items():
        checked, rows = routing.check_outcomes(table), list(failed)
        assert np.flatnonzero(checked["cloud_failed"]).tolist() == rows
        for part in ("answer", "correct"):
            assert checked[f"cloud_{part}"][rows].equals(
                checked[f"local_{part}"][rows].rename(f"cloud_{part}")
            )
        assert checked["cloud_correct"][1] == 0
    set_cloud(monkeypatch, engine, "B")
    table = outcomes(run, edge, questions, MODEL, "test-r14", ())
    assert not table["cloud_failed"].any() and set(table["cloud_answer"]) == {"B"}
    set_cloud(monkeypatch, engine, "C")
    again = outcomes(run, edge, questions, MODEL, "test-r14", ())
    assert again.equals(table), "whole answers are kept"


def test_the_question_set_is_the_same_for_every_seed(small, questions):
    chosen = [
        evaluated_questions(questions, override(small, {"seed": seed, "test_questions": 6}))
        for seed in (0, 1)
    ]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 6
    assert evaluated_questions(questions, small) == questions


# ---- the cloud


def test_the_cloud_engine_is_that_of_the_profile(small, tmp_path, monkeypatch):
    monkeypatch.undo()
    made: list[Any] = []
    monkeypatch.setattr(evaluation, "make_engine", lambda *args, **more: made.append((args, more)))
    cloud_engine(override(small, {"cloud.model": str(tmp_path), "cloud.options": {"x": 1}}))
    server = {"engine": "openai", "model": "m", "base_url": "http://h/v1", "key_variable": "KEY"}
    values = {f"cloud.{name}": value for name, value in server.items()}
    cloud_engine(override(small, {**values, "cloud.on_failure": "keep_local"}))
    keyed = {"base_url": "http://h/v1", "key_variable": "KEY", "on_failure": "keep_local"}
    assert made == [
        (("transformers", tmp_path), {"dtype": "float32", "x": 1}),
        (("openai", "m"), keyed),
    ]


def test_a_server_needs_no_room(small, tmp_path, questions, engine, edge):
    run = Run(tmp_path, override(small, {"cloud.engine": "openai"}))
    answers(run, edge, questions, MODEL, "test-r14")
    answers(run, edge, questions, None, "test-cloud")
    assert engine.events == [f"made with {MODEL.name}", "cloud made"]


# ---- open-ended


def test_open_ended_outcomes_are_a_table_for_routing(small, tmp_path, edge, engine):
    run = Run(tmp_path, small)
    engine.texts = {0: "Confidence: 1.0\nI do not know."}
    table = routing.check_outcomes(open_outcomes(run, edge, OPEN, MODEL, "open-r14"))
    assert table["local_correct"].tolist() == [0, 1, 1, 1, 0, 1, 0, 0]
    assert table["confidence"].isna().tolist() == [True] + [False] * 3 + [True] + [False] * 3
    domains = routing.routing_table(table, resamples=10)["domain"]
    assert domains.tolist() == ["squad", "gsm8k", "mean"]
