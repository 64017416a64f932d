"""Open-ended scorers against their named standards, evaluation, and the rows of R15."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foggen import open_ended
from foggen.config import Settings, load_profile
from foggen.engines import Completion, Sampling
from foggen.open_ended import exact_match, final_number, same_number, score_answer
from foggen.prompts import Messages
from foggen.questions import TASKS, OpenQuestion, load_open_questions

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="real rows of the three tasks are not there")
LIMITS = {"squad": 8, "truthfulqa": 16, "gsm8k": 32}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[OpenQuestion]]:
    questions = load_open_questions(DATA)
    return {task: [one for one in questions if one.task == task] for task in TASKS}


# --- SQuAD ----------------------------------------------------------------------------------------


def test_squad_agrees_with_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.functional.text", reason="needs torchmetrics")
    rng = random.Random(0)
    words = "the A an Theatre Paris paris, U.S. 23–16 23-16 1,000 don't ҚАЗАҚ ! x".split()

    def text() -> str:
        return rng.choice(["", " ", "  "]).join(rng.choices(words, k=rng.randint(0, 6)))

    for _ in range(500):
        answer, references = text(), [text() for _ in range(rng.randint(1, 4))]
        target = {"answers": {"answer_start": [0] * len(references), "text": references}, "id": "0"}
        score = metrics.squad([{"prediction_text": answer, "id": "0"}], [target])
        assert exact_match(answer, references) == float(score["exact_match"]) / 100


@pytest.mark.parametrize(
    ("answer", "references", "match"),
    [
        ("the Pittsburgh Steelers!", ["Steelers", "Pittsburgh Steelers"], 1),
        ("in Paris", ["Paris"], 0),
        ("23-16", ["23–16"], 0),
        ("Paris", ["", "the"], 0),
        ("the", ["A"], 1),  # two texts without a word
    ],
)
def test_squad_by_hand(answer: str, references: list[str], match: int) -> None:
    assert exact_match(answer, references) == match


# --- GSM8K ----------------------------------------------------------------------------------------

MINUSES = "-\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"
GAPS = [",", "{,}", r"\,", r",\!", r"\ ", "'", "\u2019", *"\u00a0\u2007\u2009\u200a\u202f"]
NUMBERS = {
    "5": [
        "It is 5.",
        "US$5",
        "A\u20ac5",
        "5km",
        "$5.00",
        r"\$5",
        "Rs.5",
        r"\boxed{5}",
        "5 m2",
        "5 ft2",
        "**5**",
    ],
    "05": ["3+2=5.", "x^2 = 5", r"5 cm^{2}"],
    "60": ["60%", "a lot #### 60 of 30", "#### 3 #### 60", "２０ and ６０", "<<2*30=60>>60 eggs"],
    ".5": [".5", "0.50", "$.5"],
    "42": ["So it is...42", "Total....42", "\u2026 42"],
    "-5": ["-$5", "$-5", "- $5", "-\u20b85", "it is -5", "x = - 5", "(- 5)", "#### - 5"],
    "-3": [f"{minus}{gap}3" for minus in MINUSES for gap in ("", " ", "\u00a0", "\u2009")],
    "-2.5": ["- 2.5", "\u22122.5"],
    "3": [f"10{minus}3" for minus in MINUSES]
    + ["10 - 3", "10 \u2013 3", "(10) - 3", "5% - 3", "x - 3", "apples \u2013 3", "mid-3"],
    "9500": [f"9{gap}500" for gap in GAPS] + ["$9{,}500$", "9,500.00", "#### 9\u202f500"],
    "-9500": [f"{minus}9{gap}500" for minus in MINUSES for gap in GAPS[:2]],
    "1234567": ["1,234,567", "12,34,567", "1\u2009234\u2009567", "1{,}234{,}567", "0012,34,567"],
    "123456": ["1,23,456", "1{,}23{,}456", "$1,23,456.00", "\u20b91,23,456"],
    "234": ["1, 234", "12 of 234", "1;234"],
    "2345": ["1,2345", "1,23,2345"],
    "0.5": ["1/2", "1 / 2", r"\frac{1}{2}", "half, .5", "10/20"],
    "20": ["10 20", "5,100,20", "10,20"],
}
# What stays wrong, as the docstring says
WRONG = "3,5=5; 1 234=234; 1.234,50=50; 5k=5; 1e3=1; 5:30=30; 2+3=3; 12 of 30=30; 1\u00bd=1"
WRONG += "; 10^3=10; 10^{3}=10; 2 1/2=0.5; it is - 5=5; 3 for Rs5=3"


@pytest.mark.parametrize(("value", "texts"), NUMBERS.items())
def test_final_number(value: str, texts: list[str]) -> None:
    assert {text: final_number(text) for text in texts} == dict.fromkeys(texts, Decimal(value))
    assert all(same_number(text, ["987", value]) == 1.0 for text in texts)
    assert not any(same_number(text, ["987"]) for text in texts)


@pytest.mark.parametrize("case", WRONG.split("; "))
def test_what_stays_wrong(case: str) -> None:
    text, _, value = case.partition("=")
    assert final_number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "none", "####", "#### none", "five", "-", "½", ",,,", "_5_"])
def test_no_final_number(text: str) -> None:
    assert final_number(text) is None
    assert same_number(text, ["5", "none"]) == 0.0


def test_numbers_are_compared_exactly() -> None:
    assert same_number("0.33", ["0.333"]) == 0.0 and same_number("2", ["1", "2.0"]) == 1.0
    digits = "7" * 5000
    assert same_number(digits, [digits]) == 1.0 and same_number(digits, [f"{digits}7"]) == 0.0


PARTS = ["9", "1,", ",23", "- ", " ", "1 ", "1/", "(-", "is ", r"\frac{", "<<", "#", "=", "9^"]


@pytest.mark.parametrize("part", PARTS)
def test_no_text_is_a_trap(part: str) -> None:
    for text in (part * 5000, f"1{part * 5000}1/2", f"{part * 5000}7"):
        assert same_number(text, ["123"]) == 0.0


@real
def test_gsm8k_on_real_solutions(rows: dict[str, list[OpenQuestion]]) -> None:
    right = [same_number(f"{q.solution}\n#### {q.answers[0]}", q.answers) for q in rows["gsm8k"]]
    assert right == [1.0] * 200
    # Without the mark, five solutions go on with another number after the answer.
    assert sum(same_number(q.solution, q.answers) for q in rows["gsm8k"]) == 195
    assert all(same_number(f"${q.answers[0]}.00 in all.", q.answers) for q in rows["gsm8k"])


# --- TruthfulQA -----------------------------------------------------------------------------------


@real
def test_truthfulqa_knows_its_references(rows: dict[str, list[OpenQuestion]]) -> None:
    for question in rows["truthfulqa"]:
        assert score_answer(question, question.answers[0]) == 1.0
        assert score_answer(question, question.incorrect[0]) == 0.0


@pytest.mark.parametrize(
    ("answer", "right", "wrong", "margin"),
    [
        ("Nothing happens!", "nothing happens to you", "you would die", 2 / 3),
        ("you die", "nothing happens to you", "you would die", 2 / 6 - 4 / 5),
        ("", "nothing happens to you", "you would die", 0),
        # Both 2/3 (4 words against 2 with 2 in common, 5 with 3), and a last bit apart
        ("one two three four", "one two", "one two three x x", 0),
        ("Қазақстан астанасы Астана", "Қазақстан астанасы Астана", "Алматы", 1),
    ],
)
def test_truth_margin_by_hand(answer: str, right: str, wrong: str, margin: float) -> None:
    assert open_ended.truth_margin(answer, [right], [wrong]) == pytest.approx(margin, abs=1e-9)
    assert open_ended.truth_margin(answer, [wrong], [right]) == pytest.approx(-margin, abs=1e-9)
    assert margin or open_ended.truth_margin(answer, [right], [wrong]) == 0.0, "to the last bit"
    assert open_ended.truth_margin(answer, [right], []) >= margin


@given(st.text(), st.lists(st.text(), min_size=1, max_size=3))
def test_no_text_raises_and_every_score_is_in_range(answer: str, references: list[str]) -> None:
    for score in (exact_match, same_number):
        assert 0.0 <= score(answer, references) <= 1.0
    assert -1.0 <= open_ended.truth_margin(answer, references, references[:1]) <= 1.0
    open_ended.trace(answer)


# --- evaluation -----------------------------------------------------------------------------------


class Scripted:
    """An engine that says a question's texts; one that ends with ~ is cut off there."""

    name = "scripted"

    def __init__(self, script: dict[str, list[str]]) -> None:
        self.script = script
        self.calls: list[tuple[int, Sampling]] = []

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        self.calls.append((len(prompts), sampling))
        return [self._say(prompt[-1]["content"], sampling.n) for prompt in prompts]

    def _say(self, prompt: str, n: int) -> list[Completion]:
        texts = next(texts for question, texts in self.script.items() if question in prompt)
        said = (texts * n)[:n]
        return [Completion(text.removesuffix("~"), len(text), text[-1:] != "~") for text in said]


G = OpenQuestion(id="g", task="gsm8k", question="2+3?", answers=("5",))
S = G.model_copy(update={"id": "s", "task": "squad", "question": "Who?"})
S = S.model_copy(update={"context": "John Elway won.", "answers": ("John Elway", "Elway")})
T = G.model_copy(update={"id": "t", "task": "truthfulqa", "question": "Red?"})
T = T.model_copy(update={"answers": ("A habit",), "incorrect": ("Bulls hate red",)})
SCRIPT = {
    "2+3?": ["Confidence: 1.0\n2+3 is 5.\nFinal answer: $5.00"],
    "Who?": ["Confidence: 0.25\nFinal answer: the Elway"],
    "Red?": ["Confidence: maybe\nFinal answer: bulls hate red"],
}


def test_evaluate_open_keeps_order_and_limits() -> None:
    engine: Any = Scripted(SCRIPT)
    result = open_ended.evaluate_open(engine, [G, S, T, G.model_copy(update={"id": "h"})], LIMITS)
    assert [row["id"] for row in result] == ["g", "s", "t", "h"]
    assert [row["local_correct"] for row in result] == [1.0, 1.0, 0.0, 1.0]
    assert [row["confidence"] for row in result] == [1.0, 0.25, None, 1.0]
    assert [row["domain"] for row in result] == ["gsm8k", "squad", "truthfulqa", "gsm8k"]
    assert [row["fact"] for row in result] == [q.fact_key for q in (G, S, T)] + ["h"]
    assert not any(row["failed"] for row in result)
    assert [sampling.max_tokens for _, sampling in engine.calls] == [32, 8, 16, 32]
    assert {(s.temperature, s.stop) for _, s in engine.calls} == {(0.0, open_ended.STOP)}


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
def test_an_answer_that_is_never_closed_scores_zero(text: str, answer: str | None) -> None:
    engine: Any = Scripted({"2+3?": [text]})
    (row,) = open_ended.evaluate_open(engine, [G], LIMITS)
    scored = (row["local_answer"], row["local_correct"], row["confidence"])
    assert scored == ((answer, 1.0, 1.0) if answer else (None, 0.0, None))


# --- R15 ------------------------------------------------------------------------------------------


@pytest.fixture
def pocket() -> Settings:
    return load_profile("pocket", {"samples": 8, "top_p": 0.8, "top_k": 20})


def test_r15_rows_teach_own_traces_and_gold_answers(pocket: Settings) -> None:
    good, bad = (f"Confidence: 0.5\n2+3 makes {n}.\nFinal answer: {n}" for n in (5, 6))
    samples = [bad, good, bad, good, "Confidence: 0.5\n2+3~", bad, bad, good]
    elway = ["Confidence: 1.0\nFinal answer: Elway"]
    engine: Any = Scripted({**SCRIPT, "2+3?": samples, "Who?": elway})
    rows = open_ended.r15_rows(engine, [G, S, T], pocket, seed=3)
    assert [row["domain"] for row in rows] == ["gsm8k", "squad", "truthfulqa"]
    assert [row["target"] for row in rows] == [
        "Confidence: 0.5\n2+3 makes 5.\nFinal answer: 5",
        "Confidence: 1.0\nFinal answer: John Elway",
        "Confidence: 0.0\nFinal answer: A habit",
    ]
    assert [row["votes"] for row in rows] == ["0101-001", "11111111", "00000000"]
    assert [row["confidence"] for row in rows] == [0.5, 1.0, 0.0]
    assert json.loads(json.dumps(rows)) == rows
    sampling = engine.calls[0][1]
    assert (sampling.n, sampling.temperature) == (8, pocket.temperature)
    assert (sampling.top_p, sampling.top_k, sampling.seed) == (0.8, 20, 3)


def test_a_word_problem_without_a_right_sample_teaches_nothing(pocket: Settings) -> None:
    engine: Any = Scripted({"2+3?": ["Confidence: 1.0\nFinal answer: 6"]})
    (row,) = open_ended.r15_rows(engine, [G], pocket, seed=0)
    assert row["target"] is None and row["votes"] == "00000000"


def test_first_takes_the_number_of_each_task() -> None:
    pool = [G.model_copy(update={"id": f"g{i}"}) for i in range(5)] + [S]
    chosen = open_ended.first(pool, {"squad": 2, "truthfulqa": 2, "gsm8k": 3})
    assert [question.id for question in chosen] == ["s", "g0", "g1", "g2"]


HEADS = ["Confidence: 0.5", "**Confidence**: 1.0", "Confidence\uff1a 0.75", "Confidence: 75%", ""]


@pytest.mark.parametrize("head", [*HEADS, "Confidence: Confidence: 0.25"])
def test_a_trace_states_no_confidence_of_its_own(head: str) -> None:
    for text in (f"{head}\n2+2=4", f"2+2=4\n{head}", f"{head}\n2+2=4\nConfidence: 0.5"):
        assert open_ended.trace(f"{text}\nFinal answer: 4") == "2+2=4"
