"""Questions: what is read from files and the hub, what is refused, draws, splits without leaks."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from tiny import make_questions

from foggen.config import Columns, Settings, Source, load_profile, override
from foggen.inputs import HubError, TableError
from foggen.prompts import LETTERS
from foggen.questions import (
    DOMAINS,
    OPEN_SETS,
    OpenQuestion,
    Question,
    by_domain,
    draw,
    load_open_questions,
    load_questions,
    load_source,
    normalised,
    open_splits,
    r15_asked,
    split_by_fact,
    splits,
    subset,
)
from foggen.store import ROOT

SHARED = ROOT.parent / "shared" / "data"
GOOD = {"id": "q1", "domain": "law", "question": "Why?", "options": ["a", "b"], "answer": "B"}
SPLITS = ("train", "dev", "test")


def jsonl(path: Path, *rows: object) -> Path:
    """Writes rows as they are, or as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows in the format of the file's ending."""
    if path.suffix == ".jsonl":
        return jsonl(path, *rows)
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def load(path: Path, columns: Columns | None = None, domain: str | None = "x") -> list[Question]:
    """The questions of a file whose rows are all of one domain."""
    return load_source(Source(path=str(path), columns=columns or Columns(), domain=domain))


def problems(load: Callable[[], object]) -> list[str]:
    """The lines of the TableError that is raised."""
    with pytest.raises(TableError) as error:
        load()
    return str(error.value).splitlines()


# ---- types and checks


@pytest.mark.parametrize(
    ("text", "other"),
    [("4", "4 "), ("5", "5\u00a0"), ("é", "e\u0301"), ("x", "x\u200b"), ("x", "\u00adx")],
)
def test_texts_are_compared_normalised(text, other):
    assert normalised(text) == normalised(other) and normalised(text) != normalised("y")
    with pytest.raises(ValidationError, match="two are the same"):
        Question(**{**GOOD, "options": (text, other, "z")})
    genotypes = Question(**{**GOOD, "options": ("RR", "Rr", "rr")})
    assert genotypes.options == ("RR", "Rr", "rr"), "case is no white space"


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_numbers_are_names_in_all_formats(ending, tmp_path):
    facts = {"jsonl": [12, 0, 3.0, "x", "", " ", None], "csv": [12, 0, 3, "x", "", " ", None]}
    rows = [
        {"id": number, "domain": 7, "question": f"Why {number}?", "A": 1.5, "B": 2, "answer": "B",
         "fact": fact if ending != "parquet" or fact is None else str(fact)}
        for number, fact in enumerate(facts.get(ending, facts["csv"]))
    ]  # fmt: skip
    questions = load_questions(table(tmp_path / f"q.{ending}", rows))
    assert [q.fact for q in questions] == ["12", "0", "3", "x", None, None, None]
    assert [q.fact_key for q in questions] == ["12", "0", "3", "x", "4", "5", "6"]
    assert {(q.domain, q.options) for q in questions} == {("7", ("1.5", "2"))}


def test_facts_are_compared_normalised(tmp_path):
    """As numbers in every writing, and as texts whatever their case and white space."""
    pairs = [("12", "12.0"), ("-3.00", -3), ("Café  x", "cafe\u0301 X")]
    for one, other in pairs:
        a, b = (Question(**GOOD, fact=fact) for fact in (one, other))
        assert a.fact_key == b.fact_key
    good = {**GOOD, "options": '["a", "b"]'}
    train = [{**good, "id": n, "fact": n, "question": f"Why {n}?"} for n in range(9)]
    test = [{**good, "id": f"t{n}", "fact": float(n), "question": f"How {n}?"} for n in (2, 5)]
    dev = [{**good, "id": 7, "fact": None, "question": f"Who {n}?"} for n in (1,)]
    for split, rows in {"train": train[:7] + train[8:], "test": test, "dev": dev}.items():
        table(tmp_path / f"{split}.csv", rows)
    rows = [{**good, "id": "x", "fact": 7, "question": "Which?"}]  # the name of dev's question
    table(tmp_path / "train_more.csv", rows)
    parts = splits(with_sources({"path": str(tmp_path)}))
    assert [q.id for q in parts["train"]] == [*"013468", "x"], "an id is no fact"


def test_a_missing_number_is_no_text(tmp_path):
    """Data frames write NaN for what is missing."""
    nan = float("nan")
    good = {**GOOD, "context": nan}
    (question,) = load_questions(jsonl(tmp_path / "q.jsonl", good))
    assert question.context == "" and question.fact_key == "q1"
    bad = ({**GOOD, "options": ["a", nan, "b"]}, {**GOOD, "question": nan})
    for row, field in zip(bad, ("options", "question"), strict=True):
        jsonl(tmp_path / "q.jsonl", row)
        assert f"field `{field}`" in problems(lambda: load_questions(tmp_path / "q.jsonl"))[0]


def test_what_is_sampled_is_the_fact_or_the_passage_or_the_question():
    first, second = (Question(**{**GOOD, "id": name, "context": "Ann  came."}) for name in "ab")
    assert first.fact_key == second.fact_key != Question(**GOOD, context="Bob came.").fact_key
    assert Question(**GOOD, context="Ann came.", fact="f").fact_key == "f"
    assert Question(**GOOD).fact_key == Question(**GOOD, context=" ").fact_key == "q1"
    gsm = OpenQuestion(id="g", task="gsm8k", question="1+1?", answers=("2",))
    assert gsm.fact_key == "g"


def test_all_bad_rows_are_told_together(tmp_path):
    jsonl(
        tmp_path / "one.jsonl",
        GOOD,
        {**GOOD, "id": "q2", "answer": "C"},
        {**GOOD, "id": "q3", "options": ["a"]},
        {**GOOD, "id": "q4", "options": ["a", "a"]},
        {**GOOD, "id": "q5", "options": ["a", " "]},
        {key: value for key, value in GOOD.items() if key != "question"} | {"id": "q6"},
        {**GOOD, "id": "q7", "options": ["1", ["2"]]},
        {**GOOD, "id": "q8", "answer": "both"},
        {**GOOD, "id": "q9", "domain": ""},
        {**GOOD, "id": ["q10"]},
        {**GOOD, "id": "q11", "domain": "Mean"},
        {**GOOD, "id": "q12", "fact": {"a": 1}},
        {**GOOD, "id": "q13", "context": ["a", "b"]},
        {**GOOD, "id": "q14", "question": "\u200b"},
    )
    jsonl(tmp_path / "two.jsonl", GOOD)
    lines = problems(lambda: load_questions(tmp_path))
    fields = ["answer", "options", "options", "options", "question", "options", "answer", "domain"]
    fields += ["id", "domain", "fact", "context", "question"]
    for number, field in enumerate(fields, 2):
        assert f"one.jsonl, line {number}: field `{field}`: " in "\n".join(lines)
    assert all("; expected: " in line for line in lines)
    assert lines[-1].startswith("two.jsonl, line 1: field `id`: 'q1' again")


def test_no_questions_at_all(tmp_path):
    jsonl(tmp_path / "squad.jsonl", {"id": "s"})
    for path in (tmp_path / "nowhere", tmp_path):
        assert "no .jsonl, .csv, .parquet" in problems(lambda path=path: load_questions(path))[0]


def test_26_options_and_a_byte_order_mark(tmp_path):
    many = {**GOOD, "options": [str(number) for number in range(26)], "answer": "Z"}
    file = jsonl(tmp_path / "q.jsonl", "\ufeff" + json.dumps(many))
    assert load_questions(file)[0].answer == "Z"
    jsonl(file, {**many, "options": [*many["options"], "more"]})
    assert "2 to 26 different" in problems(lambda: load_questions(file))[0]


def test_missing_and_the_text_none_are_two_things(tmp_path):
    rows = [
        {"question": "q0?", "options": ["None", "b", "c"], "answer": "b"},
        {"question": "q1?", "options": ["None", "x", "c"], "answer": None},
        {"question": "q2?", "options": ["m", "x", "c"], "answer": "c"},
    ]
    lines = problems(lambda: load(jsonl(tmp_path / "q.jsonl", *rows)))
    assert len(lines) == 1 and lines[0].startswith("q.jsonl, line 2: field `answer`")
    rows[1]["answer"] = "None"
    letters = [q.answer for q in load(jsonl(tmp_path / "q.jsonl", *rows))]
    assert letters == ["B", "A", "C"]


# ---- shapes

COLOURS, NUMBERS = ["red", "green", "blue", "white"], ["two", "three", "four", "five"]
TEXTS = [COLOURS, NUMBERS, ["iron", "lead", "tin", "zinc"], ["Mars", "Venus", "Pluto", "Saturn"]]
WORDS = ["Which colour is grass?", "How many legs has a horse?", "Which metal is Fe?", "Rings of?"]
GOLD = [1, 2, 0, 3]
ROWS = list(zip(WORDS, TEXTS, GOLD, strict=True))
L = "ABCD"


def in_columns(names: str, options: list[str], head: str = "") -> dict[str, str]:
    return {f"{head}{name}": text for name, text in zip(names, options, strict=True)}


def in_every_shape(question: str, o: list[str], gold: int) -> dict[str, dict[str, Any]]:
    asked, letter = {"question": question}, L[gold]
    lines = "\n".join(f"{a}. {text}" for a, text in zip(L, o, strict=True))
    turns = {
        "system": "A. no option",
        "user": f"{question}\n{lines}",
        "assistant": f"Confidence: 0.5\nFinal answer: {letter}",
    }
    chat = [{"role": role, "content": content} for role, content in turns.items()]
    marked = [f"{a}){text}" for a, text in zip(L, o, strict=True)]
    return {
        "letters": {**asked, "options": o, "answer": letter},
        "letter and text": {**asked, "options": o, "answer": f"({letter}) {o[gold]}"},
        "index from 0": {**asked, "choices": o, "answer": gold},
        "index from 1": {**asked, "choices": o, "label": gold + 1},
        "index as text": {"Query": question, "choices": o, "answer_idx": str(gold)},
        "text": {**asked, "options": o, "correct_answer": f" {o[gold]}\u00a0"},
        "mapping": {**asked, "options": in_columns(L, o), "answer": letter},
        "marks": {**asked, "options": marked, "correct": letter},
        "A to D": {**asked, **in_columns(L, o), "answer": letter},
        "a to e": {**asked, **in_columns("abcd", o), "e": None, "Answer Key": letter},
        "opa": {**asked, **in_columns("abcd", o, "op"), "cop": gold},
        "labels": {**asked, "choices": {"text": o, "label": list(L)}, "answerKey": letter},
        "numbers": {**asked, "choices": {"text": o, "label": list("1234")}, "answerKey": gold + 1},
        "chat": {"messages": chat, "confidence": 0.5},
    }


SHAPES = {name: [in_every_shape(*row)[name] for row in ROWS] for name in in_every_shape(*ROWS[0])}


@pytest.mark.parametrize("name", SHAPES)
def test_every_usual_shape_is_the_same_questions(name, tmp_path):
    found = load(jsonl(tmp_path / "set.jsonl", *SHAPES[name]), domain="things")
    assert [(q.question, list(q.options), L.index(q.answer)) for q in found] == ROWS
    assert [q.id for q in found] == [f"set-{number}" for number in range(len(ROWS))]
    assert {q.domain for q in found} == {"things"}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_csv_and_parquet_files(ending, tmp_path):
    rows = [{**row, "Subject": "Kazakh-C++"} for row in SHAPES["A to D"]]
    rows.append({**rows[0], "question": 'A "quoted", broken\nline?', "D": "None"})
    rows.append({**rows[0], "question": "Three?", "D": None})
    found = load_questions(table(tmp_path / f"set.{ending}", rows))
    assert [q.answer for q in found] == [*(L[gold] for gold in GOLD), "B", "B"]
    assert found[-2].question.endswith("broken\nline?") and found[-2].options[-1] == "None"
    assert len(found[-1].options) == 3 and {q.domain for q in found} == {"kazakh_c++"}


@pytest.mark.parametrize("column", ["context", "Passage", "article", "premise"])
def test_a_passage_is_kept(column, tmp_path):
    rows = [{column: f"Story {place}.", **row} for place, row in enumerate(SHAPES["index from 0"])]
    found = load(jsonl(tmp_path / "q.jsonl", *rows))
    assert [q.context for q in found] == [f"Story {place}." for place in range(4)]
    named = [{"text": row.pop(column), **row} for row in rows]
    file = jsonl(tmp_path / "q.jsonl", *named)
    found = load(file, Columns(context="text"))
    assert found[3].context == "Story 3." and not load(file)[3].context


def test_a_question_that_cannot_stand_alone_is_not_guessed(tmp_path):
    copa = {"premise": "The man fell.", "choice1": "He slipped.", "choice2": "He ate."}
    rows = [
        {**copa, "question": word, "label": place} for place, word in enumerate(("cause", "effect"))
    ]
    file = jsonl(tmp_path / "copa.jsonl", *rows)
    assert problems(lambda: load(file))[-1].split() == ["options:", "<column>"]
    given = Columns(options=["choice1", "choice2"])
    assert "questions of one word" in problems(lambda: load(file, given))[0]
    named = load(file, given.model_copy(update={"question": "question"}))
    assert [(q.context, q.question, q.answer) for q in named][1] == ("The man fell.", "effect", "B")


def test_initials_are_no_marks(tmp_path):
    names = ["A. Smith", "B. Jones"]
    rows = [
        {"question": "Who?", "options": names, "answer": "B"},
        {"question": "What?", "options": ["(A) and more", "(B) alone"], "answer": "A"},
        {"question": "Which?", "options": ["(A) only", "none"], "answer": "A"},
    ]
    found = load(jsonl(tmp_path / "q.jsonl", *rows))
    assert [q.options for q in found] == [tuple(names), ("and more", "alone"), ("(A) only", "none")]


def test_named_columns_stand_over_recognised_ones(tmp_path):
    rows = [{"question": "?", "text": q, "opts": o, "answer": 0, "right": g} for q, o, g in ROWS]
    rows = [{**row, "topic": "Law", "no": place, "about": 5} for place, row in enumerate(rows)]
    given = Columns(
        question="text", options="opts", answer="right", domain="topic", id="no", fact="about"
    )
    found = load(jsonl(tmp_path / "q.jsonl", *rows), given, domain=None)
    assert [(q.question, q.answer, q.id) for q in found] == [
        (q, L[g], str(place)) for place, (q, _, g) in enumerate(ROWS)
    ]
    assert {(q.domain, q.fact) for q in found} == {("law", "5")}
    apart = [{"q": q, "w": o[0], "x": o[1], "y": o[2], "z": o[3], "k": g} for q, o, g in ROWS]
    given = Columns(question="q", options=["w", "x", "y", "z"], answer="k")
    found = load(jsonl(tmp_path / "q.jsonl", *apart), given)
    assert [(list(q.options), q.answer) for q in found] == [(o, L[g]) for _, o, g in ROWS]
    for wrong in ({"fact": "topc"}, {"options": ["w", "v"]}, {"answer": "nothing"}):
        given = Columns(**wrong)
        lines = problems(lambda given=given: load(tmp_path / "q.jsonl", given))
        assert f"{next(iter(wrong))}: <column>" in lines[-1]


def test_untold_columns_stop_with_the_lines_to_write(tmp_path):
    rows = [{"frage": q, "wahl": o, "richtig": g} for q, o, g in ROWS]
    file = jsonl(tmp_path / "set.jsonl", *rows)
    lines = problems(lambda: load(file, domain="things"))
    assert "set.jsonl" in lines[0] and "'frage': 'Which colour is grass?'" in lines[0]
    written = yaml.safe_load("\n".join(lines[lines.index("    columns:") :]))["columns"]
    assert list(written) == ["question", "options", "answer"]
    named = {"question": "frage", "options": "wahl", "answer": "richtig", "answer_is": "index0"}
    found = load(file, Columns(**named), domain="things")
    assert [L.index(q.answer) for q in found] == GOLD


@pytest.mark.parametrize(
    ("names", "ok"),
    [
        ([*"ABCDEFGHIJKL"], True),
        (["opa", "opb", "opc"], True),
        ([*"ABC", "i"], False),
        (["A", "B", "D"], False),
        ([*"BCD"], False),
        (["opb", "opc"], False),
        ([f"option_{n}" for n in range(1, 5)], False),
    ],
)
def test_option_columns_stand_in_turn(names, ok, tmp_path):
    row = {name: f"text {place}" for place, name in enumerate(names)}
    last = len(names) - 1
    row |= {"question": "Why?", "answer": f"text {last}", "domain": "law"}
    file = table(tmp_path / "q.csv", [dict(reversed(row.items()))])
    if ok:
        (question,) = load_questions(file)
        assert question.options == tuple(f"text {n}" for n in range(len(names)))
        assert question.answer == LETTERS[last]
    else:
        assert "options: <column>" in problems(lambda: load_questions(file))[-1]


@pytest.mark.parametrize(
    ("options", "answer", "gold"),
    [
        ({"B": "x", "A": "y"}, "(A)", "B"),
        ({"B": "x", "A": "y"}, "a", "B"),
        ({"text": ["p", "q", "r", "s"], "label": ["C", "D", "E", "B"]}, "C.", "A"),
        ({"text": ["p", "q"], "label": ["1", "2"]}, "2", "B"),
    ],
)
def test_a_letter_is_the_label_of_its_row(options, answer, gold, tmp_path):
    file = jsonl(tmp_path / "q.jsonl", {**GOOD, "options": options, "answer": answer})
    assert load_questions(file)[0].answer == gold
    row = {**GOOD, "options": options, "answer": answer}
    jsonl(file, row, {**row, "id": "q2", "answer": "Z"})
    assert "field `answer`: 'Z (read as letter)'" in problems(lambda: load_questions(file))[0]


def test_options_and_answers_as_json_in_a_csv(tmp_path):
    row = {**GOOD, "options": '["a", "b", "[1]"]', "answer": "[1]"}
    assert load_questions(table(tmp_path / "q.csv", [row]))[0].options == ("a", "b", "[1]")
    row = {"question": "Who?", "answers": '["Ann", "Anna"]', "context": "Ann."}
    table(tmp_path / "squad.csv", [row])
    jsonl(tmp_path / "gsm8k.jsonl", {"question": "1-1?", "answer": 0})
    found = {q.task: q.answers for q in load_open_questions(tmp_path)}
    assert found == {"squad": ("Ann", "Anna"), "gsm8k": ("0",)}


def test_what_looks_like_json_in_a_csv_may_be_a_text(tmp_path):
    rows = [{**GOOD, "options": "[\"it's\", 'no']"}]
    assert "unclear answers" in problems(lambda: load_questions(table(tmp_path / "a.csv", rows)))[0]


def test_columns_that_differ_in_case_are_not_told_apart(tmp_path):
    rows = [{**GOOD, "Answer": "A"}]
    stops = problems(lambda: load_questions(table(tmp_path / "a.jsonl", rows)))
    assert "answer: <column>" in "\n".join(stops)


def test_a_chat_does_not_stand_over_a_question(tmp_path):
    shots = [{"role": "user", "content": "Other?\nA. x\nB. y"}, {"content": "no role"}, "no turn"]
    row = {"query": "Why?", "options": ["a", "b"], "answer": "B", "domain": "law"}
    (question,) = load_questions(table(tmp_path / "a.jsonl", [{**row, "messages": shots}]))
    assert (question.question, question.options) == ("Why?", ("a", "b"))


def test_a_number_as_text_is_the_option_of_that_text(tmp_path):
    row = {**GOOD, "options": [2.0, 1.0], "answer": 2.0}
    file = table(tmp_path / "a.jsonl", [row])
    assert "unclear answers" in problems(lambda: load_questions(file))[0]  # A, or the second
    (question,) = load_questions(table(tmp_path / "b.jsonl", [{**row, "options": [7.5, 2.0]}]))
    assert question.answer == "B"


def test_answers_that_can_be_read_in_two_ways_stop(tmp_path):
    file = tmp_path / "q.jsonl"
    jsonl(file, *({"question": q, "choices": o, "answer": 1 + g % 2} for q, o, g in ROWS))
    assert "unclear answers" in problems(lambda: load(file))[0]
    for how, letters in (("index0", "CBBC"), ("index1", "BAAB")):
        found = load(file, Columns(answer_is=how))
        assert "".join(q.answer for q in found) == letters
    jsonl(file, {"question": "2?", "options": ["1", "2", "3", "4"], "answer": "2"})
    assert "unclear answers" in problems(lambda: load(file))[0]
    jsonl(file, *SHAPES["index from 0"] * 3, {"question": "?", "choices": ["a", "b"], "answer": -1})
    (line,) = problems(lambda: load(file))
    assert "line 13: field `answer`: '-1 (read as index0)'" in line


def test_the_options_of_a_chat_are_the_last_list(tmp_path):
    user = "I. yes\nII. no\nA. Who asks?\n\nWhich?\nA. I only\nB. II only\n\nAnswer with a letter."
    chat = [{"role": "user", "content": user}, {"role": "assistant", "content": "B"}]
    file = jsonl(tmp_path / "q.jsonl", {"talk": chat}, {"talk": [], "id": "empty"})
    lines = problems(lambda: load(file, Columns(messages="talk")))
    assert all("line 2" in line for line in lines)
    file.write_text(json.dumps({"talk": chat}))
    (question,) = load(file, Columns(messages="talk"))
    assert question.options == ("I only", "II only") and question.answer == "B"
    assert question.question == "I. yes\nII. no\nA. Who asks?\n\nWhich?"
    chat[0]["content"] = "Which?\nA. both of\nI. one\nC. two\nB. none\nC. all"
    file = jsonl(tmp_path / "q.jsonl", {"messages": chat})  # its letters are not in turn
    assert "question: <column>" in str(problems(lambda: load(file)))


# ---- open-ended files


def test_open_questions_take_the_data_sets_own_fields(tmp_path):
    squad = {"title": "T", "question": "Who?", "context": "Ann."}
    squad |= {"answers": {"text": ["Ann", "Ann"]}}
    jsonl(tmp_path / "squad.jsonl", squad, {**squad, "id": 5, "fact": 7, "answers": ["Ann"]})
    truth = {"question": "?", "best_answer": "b", "correct_answers": ["a", "b", ""]}
    truth |= {"incorrect_answers": ["c"]}
    jsonl(tmp_path / "truthfulqa.jsonl", truth, {**truth, "answers": ["x"], "id": None})
    gsm = {"question": "1+1?", "answer": "1+1=2\n#### 2"}
    jsonl(tmp_path / "gsm8k.jsonl", gsm, {**gsm, "answer": 2, "solution": "1+1=2"})
    found = load_open_questions(tmp_path)
    assert [(q.id, q.task, q.answers) for q in found] == [
        ("gsm8k-0", "gsm8k", ("2",)), ("gsm8k-1", "gsm8k", ("2",)), ("squad-0", "squad", ("Ann",)),
        ("5", "squad", ("Ann",)), ("truthfulqa-0", "truthfulqa", ("b", "a")),
        ("truthfulqa-1", "truthfulqa", ("x",)),
    ]  # fmt: skip
    assert [q.solution for q in found[:2]] == ["1+1=2", "1+1=2"] and found[4].incorrect == ("c",)
    assert [q.fact for q in found[2:4]] == ["T", "7"]
    jsonl(tmp_path / "squad.jsonl", {"question": "Who?", "answers": []})
    assert (
        "squad.jsonl, line 1: field `answers`" in problems(lambda: load_open_questions(tmp_path))[0]
    )


# ---- drawing


def test_draw_repeats_and_takes_used_questions_last(questions):
    pool = by_domain(questions)["law"]
    assert draw(pool, 4, seed=1) == draw(pool, 4, seed=1) != draw(pool, 4, seed=2)
    used = {question.id for question in draw(pool, 4, seed=1)}
    later = [question.id for question in draw(pool, 4, 2, used)]
    assert not used & set(later[:2]) and set(later[2:]) <= used and len(set(later)) == 4
    assert len(draw(pool, 99, seed=1)) == len(pool)


def test_balanced_draws(questions):
    counts = Counter(question.domain for question in subset(questions, 10, 0, *DOMAINS))
    assert [counts[domain] for domain in DOMAINS] == [2, 2, 2, 1, 1, 1, 1]
    assert subset(questions, None, 0) == questions and len(subset(questions, 14, 0)) == 14


def test_splits_keep_facts_together_and_shares_by_domain():
    questions = make_questions(40)
    shares = {"train": 0.6, "dev": 0.1, "test": 0.3}
    parts = split_by_fact(questions, shares, seed=0)
    assert_apart(parts)
    for part, size in (("train", 24), ("dev", 4), ("test", 12)):
        assert set(Counter(question.domain for question in parts[part]).values()) == {size}
    assert parts == split_by_fact(questions, shares, seed=0) != split_by_fact(questions, shares, 1)


# ---- the splits of a run


def assert_apart(parts: dict[str, list[Question]]) -> None:
    facts = {split: {question.fact_key for question in parts[split]} for split in SPLITS}
    assert not facts["train"] & facts["test"] and not facts["train"] & facts["dev"]
    assert not facts["dev"] & facts["test"]


def write(path: Path, questions: list[Question]) -> str:
    jsonl(
        path, *(question.model_dump(exclude={"split"}, exclude_none=True) for question in questions)
    )
    return str(path)


def names_of(parts: dict[str, list[Question]]) -> dict[str, list[str]]:
    return {split: [question.id for question in group] for split, group in parts.items()}


def with_sources(*given: dict[str, Any]) -> Settings:
    return override(load_profile("pocket"), {"data.sources": list(given)})


def sizes(parts: dict[str, list[Question]]) -> list[int]:
    return [len(parts[split]) for split in SPLITS]


def test_a_file_is_divided_by_facts(tmp_path):
    settings = with_sources({"path": write(tmp_path / "all.jsonl", make_questions(40))})
    parts = splits(settings)
    assert sizes(parts) == [24 * 7, 4 * 7, 12 * 7]
    assert_apart(parts)
    assert parts == splits(override(settings, {"seed": 5})), "whatever the run's seed"
    few = splits(with_sources({"path": settings.data.sources[0].path, "rows": 10}))
    assert sum(sizes(few)) == 10
    rows = [
        {**GOOD, "id": f"{fact}-{n}", "question": f"{fact}, {n}?", "fact": fact}
        for fact in range(30)
        for n in range(4)
    ]
    assert_apart(splits(with_sources({"path": str(jsonl(tmp_path / "numbers.jsonl", *rows))})))


def test_a_folder_with_splits_keeps_them(tmp_path):
    questions = [q.model_copy(update={"fact": None}) for q in make_questions(20, ("law",))]
    files = {"train": questions[:14], "validation": questions[14:16], "test": questions[16:]}
    for name, group in files.items():
        write(tmp_path / "set" / f"{name}.jsonl", group)
    settings = with_sources({"path": str(tmp_path / "set")})
    parts = splits(settings)
    assert parts == splits(settings)
    for split, name in (("train", "train"), ("dev", "validation"), ("test", "test")):
        assert parts[split] == [q.model_copy(update={"split": name}) for q in files[name]]
    (tmp_path / "set" / "validation.jsonl").unlink()
    assert sizes(splits(settings)) == [13, 1, 4], "dev is cut from train"


def test_split_files_may_be_called_as_the_hub_s(tmp_path, capsys):
    questions = [q.model_copy(update={"fact": None}) for q in make_questions(20, ("law",))]
    names = ("train-00000-of-00001", "TEST", "Validation_1", "law")
    for place, name in enumerate(names):
        write(tmp_path / "set" / f"{name}.jsonl", questions[5 * place : 5 * place + 5])
    parts = splits(with_sources({"path": str(tmp_path / "set")}))
    assert sizes(parts) == [5, 5, 5] and names_of(parts)["test"] == [q.id for q in questions[5:10]]
    assert "5 questions of other splits" in capsys.readouterr().err


def test_a_source_without_rows_is_refused(tmp_path):
    (tmp_path / "test.jsonl").write_text("")
    write(tmp_path / "train.jsonl", make_questions(4, ("law",)))
    (tmp_path / "q.csv").write_text("question,A,B,answer,domain\n")
    for load in (lambda: splits(with_sources({"path": str(tmp_path)})),
                 lambda: load_questions(tmp_path / "q.csv")):  # fmt: skip
        assert "without rows" in problems(load)[0]


def test_a_test_question_in_training_is_left_out_of_it(tmp_path, capsys):
    """The same question in other letters and spaces, with shuffled options; and a shared fact."""
    one, two, three, four = (make_questions(7, ("law",))[index] for index in (0, 2, 4, 6))
    one = one.model_copy(update={"question": "Café or cafe?"})
    twin = {"id": "twin", "fact": None, "question": " CAFE\u0301\u00a0or cafe?"}
    twin |= {"options": one.options[::-1]}
    fact = two.model_copy(update={"id": "fact", "question": "In other words?"})
    files = {"train": [one.model_copy(update=twin), fact, three], "test": [one, two], "dev": [four]}
    paths = {use: write(tmp_path / f"{use}-file.jsonl", group) for use, group in files.items()}
    settings = with_sources(*({"path": path, "use": use} for use, path in paths.items()))
    expected = {"train": [three.id], "dev": [four.id], "test": [one.id, two.id]}
    assert names_of(splits(settings)) == expected
    assert "2 questions left out of train" in capsys.readouterr().err
    mine = override(settings, {"data.questions": write(tmp_path / "d.jsonl", [three])})
    assert names_of(splits(mine))["train"] == ["twin", "fact"], (
        "a reader's own test set is held out too"
    )


def test_a_bank_is_a_folder_with_a_file_per_split(tmp_path):
    settings = load_profile("pocket")
    bank = ROOT / settings.data.bank
    assert splits(settings) == {split: load_questions(bank / f"{split}.jsonl") for split in SPLITS}
    empty = override(settings, {"data.bank": str(tmp_path)})
    assert "train.jsonl: no .jsonl" in problems(lambda: splits(empty))[0]
    for split in ("train", "dev"):  # one that lacks its test split is not divided anew
        write(tmp_path / f"{split}.jsonl", make_questions(4, ("law",)))
    assert "test.jsonl: no .jsonl" in problems(lambda: splits(empty))[0]
    assert "open_ended/train.jsonl: no .jsonl" in problems(lambda: open_splits(empty))[0]


def test_ids_are_unique_over_sources(tmp_path):
    file = write(tmp_path / "a.jsonl", make_questions(4, ("law",)))
    twice = with_sources({"path": file, "use": "train"}, {"path": file, "use": "test"})
    assert "is the id of 2 questions" in problems(lambda: splits(twice))[0]


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="no question sets in ../shared beside this checkout"
)
def test_external_question_sets_are_a_source():
    questions = load_questions(SHARED)
    assert len(questions) == 1317 and {question.domain for question in questions} == set(DOMAINS)
    tasks = Counter(question.task for question in load_open_questions(SHARED))
    assert tasks == dict.fromkeys(("gsm8k", "squad", "truthfulqa"), 200)
    parts = splits(with_sources({"path": str(SHARED)}))
    assert 1300 < sum(sizes(parts)) <= 1317
    assert all({question.domain for question in parts[split]} == set(DOMAINS) for split in SPLITS)
    assert_apart(parts)


# ---- the hub: a folder stands for the snapshot that it gives


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data set `name` lies in `hub / name`; what was asked is in `hub / asked.jsonl`."""

    def snapshot(path: str, repo_type: str, revision: str | None) -> str:
        assert repo_type == "dataset"
        with (tmp_path / "asked.jsonl").open("a") as asked:
            asked.write(json.dumps([path, revision]) + "\n")
        return str(tmp_path / path.split("/")[-1])

    monkeypatch.setattr("foggen.inputs.snapshot_download", snapshot)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def numbers(first: int, last: int) -> list[dict[str, Any]]:
    options = {n: [str(n + more) for more in range(4)] for n in range(first, last)}
    return [{"question": f"Number {n}?", "choices": options[n], "answer": n % 4} for n in options]


def test_hub_sets_by_their_splits(hub, capsys):
    broken = {"question": "Twice?", "choices": ["a", "a", "b", "c"], "answer": 0}
    jsonl(hub / "set" / "train.jsonl", *numbers(0, 30), broken)
    jsonl(hub / "set" / "test.jsonl", *numbers(30, 40))
    entry = {"path": "some/set", "revision": "abc", "domain": "math"}
    parts = splits(with_sources(entry))
    assert (hub / "asked.jsonl").read_text() == '["some/set", "abc"]\n'
    assert sizes(parts) == [27, 3, 10] and {q.domain for q in parts["train"]} == {"math"}
    assert [q.answer for q in parts["test"]] == ["ABCD"[n % 4] for n in range(30, 40)]
    assert parts["test"][0].id == "set/test-0"
    told = capsys.readouterr().err
    assert "1 rows are left out: set/train, row 30: field `options`" in told
    hidden = [{**row, "answer": None} for row in numbers(30, 32)]
    jsonl(hub / "set" / "test.jsonl", *hidden)  # few of all rows, and the whole of its split
    read = Source(**entry, columns=Columns(answer_is="index0"))
    assert len(problems(lambda: load_source(read))) == 2
    divided = splits(with_sources({**entry, "split": "train", "use": "divide", "rows": 20}))
    assert sum(sizes(divided)) in (19, 20)
    unusable = ({**row, "answer": -1} for row in numbers(0, 5))
    jsonl(hub / "set" / "test.jsonl", *unusable, *numbers(5, 40))
    lines = problems(lambda: load_source(Source(**entry, split="test")))
    assert len(lines) == 5 and "set/test, row 4: field `answer`" in lines[4]


def test_a_missing_number_of_a_hub_set_is_no_text(hub):
    rows = [{**row, "context": n or float("nan")} for n, row in enumerate(numbers(0, 5))]
    (hub / "set").mkdir()
    table(hub / "set" / "test.parquet", rows)
    first, second, *_ = load_source(Source(path="some/set", domain="math"))
    assert (first.context, second.context) == ("", "1.0") and first.fact_key == "set/test-0"


@pytest.mark.parametrize("domain", [None, "Words"])
def test_a_hub_set_with_a_configuration_per_domain(domain, hub):
    configs = []
    for place, name in enumerate(("Law", "C++")):
        jsonl(hub / "set" / name / "all.jsonl", *numbers(40 * place, 40 * place + 40))
        files = [{"split": "test", "path": f"{name}/*"}]
        configs.append({"config_name": name, "data_files": files})
    (hub / "set" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    questions = load_source(Source(path="some/set", domain=domain))
    counts = Counter(question.domain for question in questions)
    assert counts == ({"law": 40, "c++": 40} if domain is None else {"words": 80})
    assert len({question.id for question in questions}) == 80
    assert len(load_source(Source(path="some/set", name="Law", domain="law"))) == 40
    with pytest.raises(HubError, match="Available"):
        load_source(Source(path="some/set", name="Art"))
    (hub / "set").rename(hub / "other")
    jsonl(
        hub / "other" / "Law" / "all.jsonl", *({**row, "domain": "Art"} for row in numbers(0, 40))
    )
    domains = {q.domain for q in load_source(Source(path="some/other"))}
    assert domains == {"art", "c++"}, "a column `domain` says more than the configuration"


def test_open_ended_sets_of_the_hub(hub):
    read = {"context": "Ann.", "answers": {"text": ["Ann"]}}
    squad = [{"title": f"T{n % 2}", "question": f"Who {n}?", **read} for n in range(30)]
    wrong = {"correct_answers": ["a"], "incorrect_answers": ["c"]}
    truth = [{"question": f"? {n}", "best_answer": "b", **wrong} for n in range(30)]
    gsm = [{"question": f"{n}?", "answer": f"so\n#### {n}"} for n in range(30)]
    for name, config, rows, names in (
        ("squad", "plain", squad, ("train", "validation")),
        ("truthful_qa", "generation", truth, ("validation",)),
        ("gsm8k", "main", gsm, ("train", "test")),
    ):
        files = [{"split": split, "path": f"{split}.jsonl"} for split in names]
        card = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
        for split in names:
            jsonl(hub / name / f"{split}.jsonl", *rows)
        (hub / name / "README.md").write_text(f"---\n{card}---\n")
    rows = {"squad": 4, "truthfulqa": 5, "gsm8k": 6, "replay": 0}
    given = {f"open_ended.r15.{name}": n for name, n in rows.items()}
    settings = override(
        load_profile("pocket"), {"data.open_ended": "hub", "open_ended.eval_questions": 20, **given}
    )
    parts = open_splits(settings)
    assert parts == open_splits(override(settings, {"seed": 7})), "whatever the run's seed"
    assert r15_asked(settings) == {"squad": 4, "truthfulqa": 5, "gsm8k": 18}
    assert Counter(q.task for q in parts["train"]) == r15_asked(settings)
    assert Counter(q.task for q in parts["test"]) == dict.fromkeys(rows.keys() - {"replay"}, 20)
    truths = [{q.question for q in part if q.task == "truthfulqa"} for part in parts.values()]
    assert not truths[0] & truths[1]
    assert {source.revision for source in OPEN_SETS.values()} == {
        json.loads(line)[1] for line in (hub / "asked.jsonl").read_text().splitlines()
    }
