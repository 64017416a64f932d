"""Every usual shape of a public multiple-choice set becomes the same question; what cannot be told stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from foggen.questions import QuestionError, load_questions
from foggen.shapes import Columns, ShapeError, canonical, reading, recognise

TEXTS = [["red", "green", "blue", "white"], ["two", "three", "four", "five"], ["iron", "lead", "tin", "zinc"]]
ASKED = ["Which colour is grass?", "How many legs has a horse?", "Which metal is Fe?"]
GOLD = [1, 2, 0]  # and one more row in which the last option is right, so that a count from 1 cannot hide
TEXTS.append(["Mars", "Venus", "Pluto", "Saturn"])
ASKED.append("Which of these has great rings?")
GOLD.append(3)
ROWS = list(zip(ASKED, TEXTS, GOLD, strict=True))
L = "ABCD"

SHAPES: dict[str, list[dict[str, Any]]] = {
    "options list, letter": [{"question": q, "options": o, "answer": L[g]} for q, o, g in ROWS],
    "choices list, index from 0": [{"question": q, "choices": o, "answer": g} for q, o, g in ROWS],
    "choices list, index from 1": [{"question": q, "choices": o, "label": g + 1} for q, o, g in ROWS],
    "index as text": [{"Question": q, "choices": o, "answer_idx": str(g)} for q, o, g in ROWS],
    "text": [{"question": q, "options": o, "correct_answer": o[g]} for q, o, g in ROWS],
    "letter with text": [{"question": q, "options": o, "answer": f"({L[g]}) {o[g]}"} for q, o, g in ROWS],
    "lower-case letter": [{"question": q, "options": o, "answer": L[g].lower()} for q, o, g in ROWS],
    "options dict": [{"question": q, "options": dict(zip(L, o, strict=True)), "answer": L[g]} for q, o, g in ROWS],
    "options list with marks": [
        {"question": q, "options": [f"{a}){t}" for a, t in zip(L, o, strict=True)], "correct": L[g]} for q, o, g in ROWS
    ],
    "columns A to D": [{"question": q, **dict(zip(L, o, strict=True)), "answer": L[g]} for q, o, g in ROWS],
    "columns a to d": [{"question": q, **dict(zip("abcd", o, strict=True)), "answer_label": L[g]} for q, o, g in ROWS],
    "an answer in words beside the answer's label": [
        {
            "question": q,
            "answer": f"It is {o[g]}, as everybody knows.",
            **dict(zip("abcd", o, strict=True)),
            "answer_label": L[g],
        }
        for q, o, g in ROWS
    ],
    "columns Option A to Option E": [
        {
            "Question": q,
            **{f"Option {a}": t for a, t in zip(L, o, strict=True)},
            "Option E": None,
            "Answer Key": L[g],
        }
        for q, o, g in ROWS
    ],
    "columns opa to opd": [
        {"question": q, **{f"op{a}": t for a, t in zip("abcd", o, strict=True)}, "cop": g} for q, o, g in ROWS
    ],
    "choices text and label": [
        {"question": q, "choices": {"text": o, "label": list(L)}, "answerKey": L[g]} for q, o, g in ROWS
    ],
    "choices with numbers as labels": [
        {"question": q, "choices": {"text": o, "label": list("1234")}, "answerKey": str(g + 1)} for q, o, g in ROWS
    ],
    "nested stem and choices": [
        {
            "question": {
                "stem": q,
                "choices": [{"text": t, "label": a} for a, t in zip(L, o, strict=True)],
            },
            "answerKey": L[g],
        }
        for q, o, g in ROWS
    ],
    "inside the question": [
        {
            "prompt": f"{q}\nOptions:\n" + "\n".join(f"{a}. {t}" for a, t in zip(L, o, strict=True)),
            "answer": L[g],
        }
        for q, o, g in ROWS
    ],
    "inside the question, brackets": [
        {
            "question": f"{q}\n" + "\n".join(f"({a}) {t}" for a, t in zip(L, o, strict=True)) + "\nAnswer:",
            "target": L[g],
        }
        for q, o, g in ROWS
    ],
    "a list written as text": [{"question": q, "options": str(o), "answer": L[g]} for q, o, g in ROWS],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_questions(shape: str, tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, SHAPES[shape])), encoding="utf-8")
    found = load_questions(file, domain="things")
    assert [(one.question, list(one.options), L.index(one.answer)) for one in found] == ROWS
    assert [one.id for one in found] == [f"set-{number}" for number in range(len(ROWS))]
    assert {one.domain for one in found} == {"things"}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_csv_and_parquet_files(ending: str, tmp_path: Path) -> None:
    rows = [{**row, "Subject": "Kazakh Culture"} for row in SHAPES["columns A to D"]]
    rows.append({**rows[0], "question": 'A "quoted", broken\nline?', "D": "None"})
    path = tmp_path / f"set.{ending}"
    table = Dataset.from_list(rows)
    table.to_csv(path) if ending == "csv" else table.to_parquet(path)
    found = load_questions(path)
    assert [one.answer for one in found] == [*(L[gold] for gold in GOLD), "B"]
    assert found[-1].question.endswith("broken\nline?") and found[-1].options[-1] == "None"
    assert {one.domain for one in found} == {"kazakh_culture"}


def test_named_columns_stand_over_recognised_ones() -> None:
    rows = [{"question": "?", "text": q, "opts": o, "answer": 0, "right": g} for q, o, g in ROWS]
    given = Columns(question="text", options="opts", answer="right")
    assert [(row["question"], row["answer"]) for row in canonical(rows, given)] == [(q, L[g]) for q, _, g in ROWS]
    one_by_one = [{"q": q, "w": o[0], "x": o[1], "y": o[2], "z": o[3], "k": g} for q, o, g in ROWS]
    given = Columns(question="q", options=["w", "x", "y", "z"], answer="k")
    assert [row["options"] for row in canonical(one_by_one, given)] == TEXTS


def test_untold_columns_stop_with_the_lines_to_write(tmp_path: Path) -> None:
    rows = [{"frage": q, "wahl": o, "richtig": g} for q, o, g in ROWS]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(QuestionError) as error:
        load_questions(tmp_path / "set.jsonl", domain="things")
    said = str(error.value)
    assert "set.jsonl: cannot tell which column holds: question, options, answer" in said
    assert "frage (str), wahl (list), richtig (int)" in said and '"Which colour is grass?"' in said
    lines = said[said.index("    columns:\n") :].replace("<column of the question>", "frage")
    lines = lines.replace("<column of the right answer>", "richtig")
    lines = lines.replace("<column of the options, or a list of columns: [a, b, c, d]>", "wahl")
    written = yaml.safe_load(lines.replace("<letter, index0, index1 or text>", "index0"))
    found = load_questions(tmp_path / "set.jsonl", Columns(**written["columns"]), "things")
    assert [L.index(one.answer) for one in found] == GOLD
    with pytest.raises(ShapeError, match="no row has a value in nothing"):
        recognise(rows, Columns(question="frage", options="wahl", answer="nothing"))


def test_an_index_that_could_count_from_0_or_1_stops() -> None:
    rows = [{"question": q, "choices": o, "answer": 1 + g % 2} for q, o, g in ROWS]
    with pytest.raises(ShapeError, match=r"read as index0 and as index1[\s\S]*answer_is: <letter"):
        list(canonical(rows, Columns()))
    assert reading(rows, Columns(question="question", answer="answer", answer_is="index1")) == "index1"
    digits = [{"question": "2?", "options": ["1", "2", "3", "4"], "answer": "2"}]
    with pytest.raises(ShapeError, match="text and as index"):
        list(canonical(digits, Columns()))


def test_a_few_bad_rows_do_not_hide_the_shape(tmp_path: Path) -> None:
    rows = [*SHAPES["choices list, index from 0"] * 3, {"question": "?", "choices": ["a", "b"], "answer": -1}]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(QuestionError, match="1 problem"):
        load_questions(tmp_path / "set.jsonl", domain="things")
