"""Examinations (from checkpoints to outcomes tables), the branch round, and paired changes: with a scripted engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from foggen import outcomes, rounds, routing, stats, training
from foggen.config import Settings, override
from foggen.engines import Completion, Sampling
from foggen.outcomes import Examination, OpenExamination
from foggen.prompts import VERIFY_SYSTEM, Messages
from foggen.questions import OpenQuestion, Question
from foggen.rounds import Loan, run_chain, run_r15
from foggen.store import Store

OPEN = [OpenQuestion(id=f"s{i}", task="squad", question="Who?", context=f"C{i}", answers=("A",)) for i in range(4)]
OPEN += [OpenQuestion(id=f"g{i}", task="gsm8k", question=f"{i}+1?", answers=(str(i + 1),)) for i in range(4)]


class Scripted:
    """Answers A (or 2, to word problems) with confidence `says`, judges every answer correct, scores all alike."""

    name = "scripted"

    def __init__(self, says: str = "1.0") -> None:
        self.says, self.asked = says, 0

    def _text(self, prompt: Messages) -> str:
        if prompt[0]["content"] == VERIFY_SYSTEM:
            return "Verification Decision: The AI generated answer is Correct."
        number = "math assistant" in prompt[0]["content"]
        return f"Confidence: {self.says}\n" + ("So 2.\nFinal answer: 2" if number else "Final answer: A")

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        self.asked += len(prompts)
        return [[Completion(self._text(prompt), 5, True)] * sampling.n for prompt in prompts]

    def score(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[str]], temperature: float = 1.0
    ) -> list[list[float]]:
        return [[-3.0 for _ in texts] for texts in continuations]

    def reload(self, path: Path) -> None: ...

    def sleep(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    monkeypatch.setattr(outcomes, "cloud_engine", lambda settings: Scripted("0.5"))
    monkeypatch.setattr(outcomes, "model_folder", lambda *_: Path(__file__))  # the cloud has no weights here
    return Scripted()


def test_an_outcomes_table_has_all_its_columns_and_is_asked_for_once(
    small: Settings, tmp_path: Path, questions: list[Question], engine: Scripted
) -> None:
    examination = Examination(small, Store(tmp_path / "run"), "test", questions, Loan(lambda _: engine))
    model = Path(__file__)
    table = routing.check_outcomes(examination.outcomes("r14", model))
    named = set(routing.Outcome.model_fields)
    assert named <= {*table.columns, "seed"}
    right = [float(question.answer == "A") for question in questions]
    assert table["local_correct"].tolist() == table["cloud_correct"].tolist() == right
    assert set(table["verification"]) == {1.0} and set(table["votes"]) == {"A" * small.samples}
    assert np.allclose(table["p_true"], 0.5) and np.allclose(table["graded_confidence"], 0.5)
    asked = engine.asked
    pd.testing.assert_frame_equal(routing.check_outcomes(examination.outcomes("r14", model)), table)
    verified = examination.verifications("r14", model)
    assert engine.asked == asked and verified["texts"].str.len().eq(small.automix.k).all()
    assert verified.attrs["seconds"] >= 0 and examination.answers("r14", model).attrs["seconds"] >= 0
    assert "cloud_correct" not in examination.local("r14", model)


def test_open_ended_outcomes_are_a_table_for_routing(small: Settings, tmp_path: Path, engine: Scripted) -> None:
    examination = OpenExamination(small, Store(tmp_path / "run"), "open", OPEN, Loan(lambda _: engine))
    table = routing.check_outcomes(examination.outcomes("r14", Path(__file__)))
    assert table["local_correct"].tolist() == [1, 1, 1, 1, 0, 1, 0, 0]
    assert set(table["confidence"]) == {1.0} and table["parsed"].all() and not table["truncated"].any()
    assert routing.routing_table(table, resamples=10)["domain"].tolist() == ["squad", "gsm8k", "mean"]


def test_where_the_cloud_fails_the_local_answer_is_kept_and_marked(
    small: Settings, tmp_path: Path, questions: list[Question], engine: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Scripted):
        def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
            return [[] for _ in prompts]

    monkeypatch.setattr(outcomes, "cloud_engine", lambda settings: Failing())
    settings = override(small, {"cloud.options": {"on_cloud_failure": "keep_local"}})
    edge, model = Loan(lambda _: engine), Path(__file__)
    for kind, asked in ((Examination, questions), (OpenExamination, OPEN)):
        table = kind(settings, Store(tmp_path / kind.__name__), "test", asked, edge).outcomes("r14", model)
        checked = routing.check_outcomes(table)
        assert checked["cloud_failed"].all() and checked["local_correct"].any()
        assert checked["cloud_answer"].equals(checked["local_answer"])
        assert checked["cloud_correct"].equals(checked["local_correct"]) and not checked["cloud_tokens"].any()


def test_the_branch_round_replays_the_whole_buffer_and_drops_unsolved_problems(
    small: Settings,
    tmp_path: Path,
    questions: list[Question],
    engine: Scripted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: list[list[dict[str, Any]]] = []

    def note(job: training.Job) -> dict[str, Any]:
        trained.append([dict(row) for row in job.rows])
        job.out.mkdir()
        (job.out / "weights").write_text(str(len(trained)))
        return {"rows": len(job.rows)}

    monkeypatch.setattr(training, "train", note)
    settings = override(small, {"r15.squad": 3, "r15.gsm8k": 4, "r15.replay": 99} | {"rounds": 1})
    store, loan = Store(tmp_path / "run"), Loan(lambda _: engine)
    chain = run_chain(settings, store, questions, questions, lambda _: engine)
    branch = run_r15(settings, store, chain, OPEN, loan)
    counts = {row.pop("task"): row for row in branch.counts}
    assert counts["squad"] == dict(questions=4, no_trace=0, surplus=1, rows=3, unparsed=0, truncated=0)
    assert counts["gsm8k"] == dict(questions=4, no_trace=3, surplus=0, rows=1, unparsed=0, truncated=0)
    buffer = rounds.buffer_rows(chain)
    assert len(buffer) == settings.calibration_rows + settings.new_rows
    assert sorted(row["id"] for row in branch.replayed) == sorted(row["id"] for row in buffer)
    assert trained[-1] == [*branch.rows, *branch.replayed] and branch.model.is_dir()
    again = run_r15(settings, store, chain, OPEN, loan)
    assert again.model == branch.model and len(trained) == 2


def test_paired_change_is_that_of_the_same_questions() -> None:
    rng = np.random.default_rng(0)
    ids = [f"q{i}" for i in range(400)]
    before = pd.DataFrame(
        {"id": ids, "domain": np.repeat(["law", "math"], 200), "local_correct": rng.random(400) < 0.5}
    )
    after = before.assign(local_correct=before["local_correct"] | (rng.random(400) < 0.2)).iloc[::-1]
    table = stats.paired_change(before, after, resamples=500).set_index("domain")
    mean = table.loc["mean"]
    assert mean["difference"] == pytest.approx(mean["after"] - mean["before"])
    assert 0 < mean["difference_low"] < mean["difference"] < mean["difference_high"] < 0.2 and mean["p"] < 0.01
    # The interval of the paired change is narrower than that of either accuracy.
    assert mean["difference_high"] - mean["difference_low"] < mean["after_high"] - mean["after_low"]
    same = stats.paired_change(before, before, resamples=50).set_index("domain").loc["mean"]
    assert same["difference"] == same["difference_low"] == 0 and same["p"] == 1
    with pytest.raises(ValueError, match="the same questions"):
        stats.paired_change(before, after.head(10))
