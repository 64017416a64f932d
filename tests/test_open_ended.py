"""Open-ended scorers against their named standards, evaluation, and the rows of R15."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foggen import open_ended
from foggen.config import Settings, load_profile
from foggen.engines import Completion, Sampling
from foggen.open_ended import contains, exact_match, f1, final_number, rouge_l, same_number
from foggen.prompts import Messages
from foggen.questions import TASKS, OpenQuestion, load_open_questions

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"real rows are not at {DATA}")
LIMITS = {"squad": 8, "truthfulqa": 16, "gsm8k": 32}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[OpenQuestion]]:
    questions = load_open_questions(DATA)
    return {task: [one for one in questions if one.task == task] for task in LIMITS}


def generated_pairs(n: int, seed: int) -> list[tuple[str, list[str]]]:
    """Answers and references with articles, punctuation, case, numbers, other scripts, and empty texts among them."""
    dice = random.Random(seed)
    words = [
        "the",
        "A",
        "an",
        "Theatre",
        "Paris",
        "paris,",
        "U.S.",
        "23–16",
        "23-16",
        "1,000",
        "don't",
        "ҚАЗАҚ",
        "!",
        "x",
    ]

    def text() -> str:
        return (
            dice.choice(["", " ", "  "]).join(dice.choices(words, k=dice.randint(0, 5)))
            if dice.random() < 0.2
            else (" ".join(dice.choices(words, k=dice.randint(0, 6))))
        )

    return [(text(), [text() for _ in range(dice.randint(1, 4))]) for _ in range(n)]


# --- SQuAD -------------------------------------------------------------------------------------------------------


def torchmetrics_squad(answer: str, references: Sequence[str]) -> tuple[float, float]:
    text = pytest.importorskip("torchmetrics.functional.text", reason="needs torchmetrics (tests only)")
    score = text.squad(
        [{"prediction_text": answer, "id": "0"}],
        [{"answers": {"answer_start": [0] * len(references), "text": list(references)}, "id": "0"}],
    )
    return float(score["exact_match"]) / 100, float(score["f1"]) / 100


def assert_as_torchmetrics(answer: str, references: Sequence[str]) -> None:
    match, overlap = torchmetrics_squad(answer, references)
    assert exact_match(answer, references) == match
    empty = not open_ended.normalised(answer) and any(not open_ended.normalised(one) for one in references)
    assert f1(answer, references) == pytest.approx(0.0 if empty else overlap, abs=1e-6)


def test_squad_agrees_with_torchmetrics_on_1000_generated_pairs() -> None:
    for answer, references in generated_pairs(1000, seed=0):
        assert_as_torchmetrics(answer, references)


@real
def test_squad_agrees_with_torchmetrics_on_all_real_rows(rows: dict[str, list[OpenQuestion]]) -> None:
    for question, other in zip(rows["squad"], rows["squad"][1:] + rows["squad"][:1], strict=True):
        for answer in (
            question.answers[-1],
            other.answers[0],
            question.context,
            f"The {question.answers[0]}!",
        ):
            assert_as_torchmetrics(answer, question.answers)
        assert exact_match(question.answers[0], question.answers) == 1.0
        assert contains(question.context, question.answers) == 1.0


def test_squad_empty_texts_follow_v1_and_not_v2() -> None:
    """Two texts without a word: version 1.1 gives F1 0 and exact match 1; torchmetrics gives F1 1, as version 2.0."""
    assert (exact_match("the", ["A"]), f1("the", ["A"])) == (1.0, 0.0)
    assert torchmetrics_squad("the", ["A"]) == (1.0, 1.0)
    assert (exact_match("", ["Paris"]), f1("", ["Paris"]), contains("", ["Paris"])) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "references", "match", "overlap", "inside"),
    [
        ("the Pittsburgh Steelers!", ["Steelers", "Pittsburgh Steelers"], 1.0, 1.0, 1.0),
        ("in Paris", ["Paris"], 0.0, 2 / 3, 1.0),
        ("category", ["cat"], 0.0, 0.0, 0.0),
        ("Elway", ["John Elway"], 0.0, 2 / 3, 0.0),
        ("23-16", ["23–16"], 0.0, 0.0, 0.0),
        ("not Paris", ["Paris"], 0.0, 2 / 3, 1.0),
        ("Paris", ["", "the"], 0.0, 0.0, 0.0),
    ],
)
def test_squad_by_hand(answer: str, references: list[str], match: float, overlap: float, inside: float) -> None:
    assert exact_match(answer, references) == match
    assert f1(answer, references) == pytest.approx(overlap)
    assert contains(answer, references) == inside


# --- GSM8K -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", "1234"), ("$1,234,567.50", "2469135/2"), ("$5.00", "5"), ("-3", "-3"), ("\u22124", "-4"),
        ("-$5", "-5"), (".5", "1/2"), ("60%", "60"), ("1/2", "1/2"), ("2 1/2 cups", "5/2"), ("It is 5.", "5"),
        (r"\frac{3}{4}", "3/4"), (r"\boxed{7}", "7"), ("so 20-5=15.", "15"), ("10-20", "20"), ("5km", "5"),
        ("12 m2", "12"), ("Rs.500", "500"), ("2+2 = <<2+2=4>>4 eggs", "4"), ("a lot #### 12 of 30", "12"),
        ("#### 3 #### 1,000", "1000"), ("8 x 2/4", "1/2"),
    ],
)  # fmt: skip
def test_final_number(text: str, value: str) -> None:
    assert final_number(text) == Fraction(value)


@pytest.mark.parametrize("text", ["", "none", "1/0", "####", "#### none", "٣", "five"])
def test_no_final_number(text: str) -> None:
    assert final_number(text) is None
    assert same_number(text, ["5"]) == 0.0


def test_numbers_are_compared_exactly() -> None:
    assert same_number("0.50", ["1/2"]) == 1.0
    assert same_number("33.33", ["100/3"]) == 0.0
    assert same_number("9" * 10_000, ["5"]) == 0.0


@real
def test_gsm8k_on_all_real_solutions(rows: dict[str, list[OpenQuestion]]) -> None:
    solved = [same_number(f"{one.solution}\n#### {one.answers[0]}", one.answers) for one in rows["gsm8k"]]
    assert solved == [1.0] * 200
    # Without the mark, five solutions go on with another number after the answer: a failure mode that is documented.
    assert sum(same_number(one.solution, one.answers) for one in rows["gsm8k"]) == 195
    assert all(same_number(f"${one.answers[0]}.00 in all.", one.answers) for one in rows["gsm8k"])


# --- TruthfulQA --------------------------------------------------------------------------------------------------


def rouge_package(first: str, second: str) -> float:
    package = pytest.importorskip("rouge_score.rouge_scorer", reason="needs rouge-score (tests only)")
    return float(package.RougeScorer(["rougeL"]).score(first, second)["rougeL"].fmeasure)


def test_rouge_l_agrees_with_rouge_score_on_1000_generated_pairs() -> None:
    for answer, references in generated_pairs(1000, seed=1):
        assert rouge_l(answer, references[0]) == pytest.approx(rouge_package(references[0], answer), abs=1e-9)


@real
def test_rouge_l_agrees_with_rouge_score_on_all_real_rows(rows: dict[str, list[OpenQuestion]]) -> None:
    for question in rows["truthfulqa"]:
        for wrong in question.incorrect:
            assert rouge_l(wrong, question.answers[0]) == pytest.approx(rouge_package(question.answers[0], wrong))


@real
def test_truthfulqa_knows_its_own_references(rows: dict[str, list[OpenQuestion]]) -> None:
    right = [open_ended.score_answer(one, one.answers[0]) for one in rows["truthfulqa"]]
    wrong = [open_ended.score_answer(one, one.incorrect[0]) for one in rows["truthfulqa"]]
    assert np.mean(right) == 1.0 and np.mean(wrong) == 0.0


def test_truth_margin_by_hand() -> None:
    right, wrong = ["nothing happens to you"], ["you would die"]
    assert open_ended.truth_margin("nothing happens", right, wrong) == pytest.approx(2 / 3)
    assert open_ended.truth_margin("you die", right, wrong) == pytest.approx(2 / 6 - 4 / 5)
    assert open_ended.truth_margin("", right, wrong) == open_ended.truth_margin("hm", right, []) == 0.0


@given(st.text(), st.lists(st.text(), min_size=1, max_size=3))
def test_no_text_raises_and_every_score_is_in_range(answer: str, references: list[str]) -> None:
    for score in (exact_match, contains, f1, same_number):
        assert 0.0 <= score(answer, references) <= 1.0
    assert -1.0 <= open_ended.truth_margin(answer, references, references[:1]) <= 1.0
    open_ended.trace(answer)


# --- hub rows ----------------------------------------------------------------------------------------------------


def test_hub_rows_become_questions() -> None:
    squad = {"id": "5", "title": "T", "context": "C", "question": "Q", "answers": {"text": ["x", "x", "y"]}}
    assert open_ended.hub_question("squad", squad, "n", "train").answers == ("x", "y")
    assert open_ended.hub_question("squad", squad, "n", "train").fact == "T"
    truth = {"question": "Q", "best_answer": "b", "correct_answers": ["a", "b"], "incorrect_answers": ["c"]}
    question = open_ended.hub_question("truthfulqa", truth, "truthfulqa-validation-3", "validation")
    assert (question.id, question.answers, question.incorrect) == (
        "truthfulqa-validation-3",
        ("b", "a"),
        ("c",),
    )
    gsm8k = open_ended.hub_question("gsm8k", {"question": "Q", "answer": "1+1=2\n#### 2"}, "n", "test")
    assert (gsm8k.answers, gsm8k.solution) == (("2",), "1+1=2")


def test_hub_splits_in_two_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    frame = datasets.Dataset.from_list([{"question": f"{n}?", "answer": f"#### {n}"} for n in range(50)])

    def load(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return frame

    monkeypatch.setattr(datasets, "load_dataset", load)
    first, rest = (
        open_ended.load_hub("gsm8k", "test", 20),
        open_ended.load_hub("gsm8k", "test", None, skip=20),
    )
    assert (len(first), len(rest)) == (20, 30)
    assert not {one.id for one in first} & {one.id for one in rest}
    assert [one.id for one in first] != sorted(one.id for one in first)
    assert asked[0] == (
        ("openai/gsm8k", "main"),
        {"split": "test", "revision": open_ended.HUB["gsm8k"].revision, "token": False},
    )


# --- evaluation --------------------------------------------------------------------------------------------------


class Scripted:
    """An engine that says the scripted texts of a question; a text that ends with ~ is cut off there."""

    name = "scripted"

    def __init__(self, script: dict[str, list[str]]) -> None:
        self.script = script
        self.calls: list[tuple[int, Sampling]] = []

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        self.calls.append((len(prompts), sampling))
        return [self._say(prompt[-1]["content"], sampling.n) for prompt in prompts]

    def _say(self, prompt: str, n: int) -> list[Completion]:
        texts = next(texts for asked, texts in self.script.items() if asked in prompt)
        return [Completion(text.removesuffix("~"), len(text), not text.endswith("~")) for text in (texts * n)[:n]]

    def score(self, *_: Any, **__: Any) -> list[list[float]]:
        raise AssertionError("open-ended questions are never scored by likelihood")

    def reload(self, path: Path) -> None:
        raise AssertionError("an evaluation does not change weights")

    def sleep(self) -> None: ...

    def close(self) -> None: ...


QUESTIONS = [
    OpenQuestion(id="g", task="gsm8k", question="2+3?", answers=("5",)),
    OpenQuestion(id="s", task="squad", question="Who?", context="John Elway won.", answers=("John Elway", "Elway")),
    OpenQuestion(
        id="t", task="truthfulqa", question="Red?", answers=("Red is a habit",), incorrect=("Bulls hate red",)
    ),
]


def one_of_each() -> Scripted:
    return Scripted(
        {
            "2+3?": ["Confidence: 1.0\n2+3 is 5.\nFinal answer: $5.00"],
            "Who?": ["Confidence: 0.25\nFinal answer: the Elway"],
            "Red?": ["Confidence: maybe\nFinal answer: bulls hate red"],
        }
    )


def test_evaluate_open_keeps_order_and_limits() -> None:
    engine = one_of_each()
    result = open_ended.evaluate_open(engine, QUESTIONS, LIMITS).set_index("id")
    assert result.index.tolist() == ["g", "s", "t"]
    assert result["correct"].tolist() == [1.0, 1.0, 0.0]
    assert result["confidence"].fillna(-1).tolist() == [1.0, 0.25, -1.0]
    assert result["parsed"].all() and not result["truncated"].any()
    assert {sampling.max_tokens for _, sampling in engine.calls} == set(LIMITS.values())
    assert all(sampling.temperature == 0 and sampling.stop == open_ended.STOP for _, sampling in engine.calls)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Confidence: 1.0\n2+3 is~", None),
        ("Confidence: 1.0\nFinal answer: 5~", None),
        ("Confidence: 1.0\nFinal answer: 5\nand then~", "5"),
        ("Confidence: 1.0\nFinal answer:", None),
        ("Confidence: 1.0\nThe answer is 5.", None),
        ("", None),
    ],
)
def test_an_answer_that_is_never_closed_scores_zero_and_is_counted(text: str, answer: str | None) -> None:
    row = open_ended.evaluate_open(Scripted({"2+3?": [text]}), QUESTIONS[:1], LIMITS).iloc[0]
    assert row["answer"] == answer and row["parsed"] == (answer is not None)
    assert row["correct"] == float(answer is not None) and row["truncated"] == text.endswith("~")


def test_open_outcomes_has_the_columns_of_an_outcomes_table() -> None:
    local = open_ended.evaluate_open(one_of_each(), QUESTIONS, LIMITS)
    cloud = open_ended.evaluate_open(one_of_each(), QUESTIONS[::-1], LIMITS)
    outcomes = open_ended.open_outcomes(local, cloud)
    assert {"id", "domain", "local_correct", "cloud_correct", "confidence", "fact", "task", "parsed"} <= set(outcomes)
    assert outcomes["id"].tolist() == ["g", "s", "t"]
    assert outcomes["local_correct"].tolist() == outcomes["cloud_correct"].tolist()
    assert (outcomes["local_tokens"] > 0).all() and (outcomes["domain"] == outcomes["task"]).all()


def test_questions_on_one_passage_are_one_unit() -> None:
    same = OpenQuestion(id="other", task="squad", question="What?", context=QUESTIONS[1].context, answers=("x",))
    assert open_ended.unit(same) == open_ended.unit(QUESTIONS[1]) != open_ended.unit(QUESTIONS[0]) == "g"


def test_the_containment_rule_is_a_choice() -> None:
    assert open_ended.score_answer(QUESTIONS[1], "It was Elway, they say") == 0.0
    assert open_ended.score_answer(QUESTIONS[1], "It was Elway, they say", contains) == 1.0


def test_judge_grades_once_an_answer_and_gives_its_name() -> None:
    engine = Scripted({"Answer: habit": ["Correct."], "Answer: hate": ["Not correct"], "Answer: hm": ["Perhaps"]})
    grades = open_ended.judge(engine, [QUESTIONS[2]] * 4, ["habit", "hate", "hm", None])
    assert grades["correct"].fillna(-1).tolist() == [1.0, 0.0, -1.0, 0.0]
    assert set(grades["judge"]) == {"scripted"} and engine.calls[0][0] == 3
    assert open_ended.judge(engine, [QUESTIONS[2]], [None])["correct"].tolist() == [0.0]


# --- R15 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pocket() -> Settings:
    return load_profile("pocket", {"samples": 8})


def test_r15_rows_teach_own_traces_and_gold_answers(pocket: Settings) -> None:
    good, bad = (
        "Confidence: 0.5\n2+3 makes 5.\nFinal answer: 5",
        "Confidence: 0.5\n2+3 makes 6.\nFinal answer: 6",
    )
    engine = Scripted(
        {
            "2+3?": [bad, good, bad, good, "Confidence: 0.5\n2+3~", bad, bad, good],
            "Who?": ["Confidence: 1.0\nFinal answer: Elway"],
            "Red?": ["Confidence: 1.0\nFinal answer: Bulls hate red"],
        }
    )
    rows, counts = open_ended.r15_rows(engine, QUESTIONS, pocket, seed=3)
    by_id = {row["id"]: row for row in rows}
    assert by_id["g"]["target"] == "Confidence: 0.5\n2+3 makes 5.\nFinal answer: 5"
    assert (by_id["g"]["k"], by_id["g"]["votes"], by_id["g"]["confidence"]) == (3, "0101-001", 0.5)
    assert by_id["s"]["target"] == "Confidence: 1.0\nFinal answer: John Elway"
    assert by_id["t"]["target"] == "Confidence: 0.0\nFinal answer: Red is a habit"
    assert [row["domain"] for row in rows] == ["gsm8k", "squad", "truthfulqa"]
    assert counts[TASKS.index("gsm8k")] == {
        "task": "gsm8k", "questions": 1, "no_trace": 0, "surplus": 0, "rows": 1, "unparsed": 1, "truncated": 1,
    }  # fmt: skip
    assert all(sampling.n == 8 and sampling.temperature == pocket.temperature for _, sampling in engine.calls)


def test_r15_drops_and_counts_word_problems_without_a_right_sample(pocket: Settings) -> None:
    engine = Scripted({"2+3?": ["Confidence: 1.0\nFinal answer: 6"]})
    rows, counts = open_ended.r15_rows(engine, QUESTIONS[:1], pocket, seed=0)
    assert rows == [] and counts[TASKS.index("gsm8k")]["no_trace"] == 1


def test_r15_stops_at_the_settings_rows(pocket: Settings) -> None:
    many = [QUESTIONS[1].model_copy(update={"id": str(n)}) for n in range(30)]
    rows, counts = open_ended.r15_rows(one_of_each(), many, pocket, seed=0)
    assert [row["id"] for row in rows] == [str(n) for n in range(pocket.open_ended.r15.squad)]
    assert counts[TASKS.index("squad")]["surplus"] == 30 - pocket.open_ended.r15.squad
    assert json.dumps(rows)
