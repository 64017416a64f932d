"""Questions: loaders that tell every mistake at once, sampling, splits, leakage."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny import make_questions

from foggen.questions import (
    DOMAINS,
    QuestionError,
    by_domain,
    describe,
    draw,
    draw_balanced,
    load_open_questions,
    load_questions,
    near_duplicates,
    split_by_fact,
    subset,
)
from foggen.store import ROOT

SHARED = ROOT.parent / "shared" / "data"
GOOD = {"id": "q1", "domain": "law", "question": "Why?", "options": ["a", "b"], "answer": "B"}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no external question sets beside this checkout ({SHARED.name})")
def test_external_question_sets_load():
    questions = load_questions(SHARED)
    assert len(questions) == 1317 and {question.domain for question in questions} == set(DOMAINS)
    assert set(map(len, (question.options for question in questions))) == {2, 3, 4, 5}
    assert Counter(question.task for question in load_open_questions(SHARED)) == dict.fromkeys(
        ("gsm8k", "squad", "truthfulqa"), 200
    )


def test_unknown_fields_are_ignored_and_known_ones_kept(tmp_path):
    (question,) = load_questions(jsonl(tmp_path / "q.jsonl", {**GOOD, "source": "x", "fact": "f", "lang": "kk"}, ""))
    assert (question.fact, question.lang, question.unit, question.options) == ("f", "kk", "f", ("a", "b"))


def test_all_bad_rows_are_told_together(tmp_path):
    jsonl(
        tmp_path / "one.jsonl",
        GOOD,
        "{not json",
        {**GOOD, "id": "q2", "answer": "C"},
        {**GOOD, "id": "q3", "options": ["a"]},
        {**GOOD, "id": "q4", "options": ["a", "a"]},
        {**GOOD, "id": "q5", "options": ["a", " "]},
        {key: value for key, value in GOOD.items() if key != "question"} | {"id": "q6"},
        {**GOOD, "id": "q7", "options": ["1", ["2"]]},
        {**GOOD, "id": "q8", "answer": "both"},
        {**GOOD, "id": "q9", "domain": ""},
        '"a text"',
        {**GOOD, "id": ["q12"]},
    )
    jsonl(tmp_path / "two.jsonl", GOOD)
    (tmp_path / "wrong.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(QuestionError) as error:
        load_questions(tmp_path)
    lines = str(error.value).splitlines()
    for number, field in [(3, "answer"), (4, "options"), (5, "options"), (6, "options"), (7, "question"),
                          (8, "options"), (9, "answer"), (10, "domain"), (12, "id")]:  # fmt: skip
        assert any(f"one.jsonl, line {number}: field `{field}`" in line and "expected:" in line for line in lines)
    assert any("one.jsonl, line 2: not JSON" in line for line in lines)
    assert any("one.jsonl, line 11: field `row`" in line for line in lines)
    assert any("two.jsonl, line 1: field `id`: 'q1' stands in one.jsonl, line 1 already" in line for line in lines)
    assert any("wrong.jsonl: not UTF-8" in line for line in lines)
    assert len(lines) == 14, str(error.value)
    assert lines[0].startswith("13 problem(s), nothing was loaded")


def test_no_questions_at_all(tmp_path):
    with pytest.raises(QuestionError, match="no such file"):
        load_questions(tmp_path / "nowhere")
    with pytest.raises(QuestionError, match="no rows"):
        load_questions(jsonl(tmp_path / "empty.jsonl"))
    jsonl(tmp_path / "squad.jsonl", {"id": "s"})
    (tmp_path / "empty.jsonl").unlink()
    with pytest.raises(QuestionError, match="of this kind"):
        load_questions(tmp_path)


def test_26_options_and_a_byte_order_mark(tmp_path):
    many = {**GOOD, "options": [str(number) for number in range(26)], "answer": "Z"}
    (tmp_path / "q.jsonl").write_text("\ufeff" + json.dumps(many), encoding="utf-8")
    assert load_questions(tmp_path / "q.jsonl")[0].answer == "Z"
    with pytest.raises(QuestionError, match="at most 26"):
        load_questions(jsonl(tmp_path / "r.jsonl", {**many, "options": [*many["options"], "more"]}))


def test_open_questions_take_the_data_sets_own_names(tmp_path):
    jsonl(tmp_path / "squad.jsonl", {"id": "s", "question": "Who?", "context": "Ann.", "answers": ["Ann"]})
    jsonl(
        tmp_path / "truthfulqa.jsonl",
        {
            "id": "t",
            "question": "?",
            "best_answer": "b",
            "correct_answers": ["a", "b"],
            "incorrect_answers": ["c"],
        },
    )
    jsonl(tmp_path / "gsm8k.jsonl", {"id": "g", "question": "1+1?", "answer": "2", "solution": "1+1=2"})
    gsm, squad, truth = load_open_questions(tmp_path)
    assert (gsm.task, gsm.answers, gsm.solution) == ("gsm8k", ("2",), "1+1=2")
    assert (squad.task, squad.answers, squad.context) == ("squad", ("Ann",), "Ann.")
    assert (truth.task, truth.answers, truth.incorrect) == ("truthfulqa", ("b", "a"), ("c",))
    with pytest.raises(QuestionError, match="line 1: field `answers`"):
        load_open_questions(jsonl(tmp_path / "squad.jsonl", {"id": "s", "question": "Who?", "answers": []}))


def test_draw_repeats_and_takes_used_questions_last(questions):
    pool = by_domain(questions)["law"]
    assert draw(pool, 4, seed=1) == draw(pool, 4, seed=1) != draw(pool, 4, seed=2)
    used = {question.id for question in draw(pool, 4, seed=1)}
    later = [question.id for question in draw(pool, 4, 2, used)]
    assert not used & set(later[:2]) and set(later[2:]) <= used and len(set(later)) == 4
    assert len(draw(pool, 99, seed=1)) == len(pool)


def test_balanced_draws(questions):
    counts = Counter(question.domain for question in draw_balanced(questions, 10, DOMAINS, seed=0))
    assert [counts[domain] for domain in DOMAINS] == [2, 2, 2, 1, 1, 1, 1]
    assert subset(questions, None, 0) == questions and len(subset(questions, 14, 0)) == 14


def test_splits_keep_facts_together_and_shares_by_domain():
    questions = make_questions(40)
    parts = split_by_fact(questions, {"train": 0.6, "dev": 0.1, "test": 0.3}, seed=0)
    units = {name: {question.unit for question in part} for name, part in parts.items()}
    assert not units["train"] & units["test"] and not units["train"] & units["dev"]
    assert sum(map(len, parts.values())) == len(questions)
    for part, size in (("train", 24), ("dev", 4), ("test", 12)):
        assert set(Counter(question.domain for question in parts[part]).values()) == {size}
    assert parts == split_by_fact(questions, {"train": 0.6, "dev": 0.1, "test": 0.3}, seed=0)
    assert parts != split_by_fact(questions, {"train": 0.6, "dev": 0.1, "test": 0.3}, seed=1)


def test_describe_states_chance_and_gold_letters(questions):
    rows = {row["domain"]: row for row in describe(questions)}
    law = by_domain(questions)["law"]
    assert rows["law"]["n"] == 6 and rows["law"]["facts"] == 3
    assert rows["law"]["chance"] == pytest.approx(sum(1 / len(q.options) for q in law) / 6)
    assert sum(value for key, value in rows["law"].items() if key.startswith("gold")) == pytest.approx(1)


def test_near_duplicates_see_through_shuffled_options():
    one, *rest = make_questions(3, ("law",))
    twin = one.model_copy(update={"id": "twin", "options": one.options[::-1], "question": one.question.upper()})
    assert [(pair.first, pair.second, pair.similarity) for pair in near_duplicates([one], [*rest, twin], 0.99)] == [
        (one.id, "twin", 1.0)
    ]
    assert near_duplicates([one], [], 0.5) == [] and len(near_duplicates([one], rest, 0.1)) == 2
