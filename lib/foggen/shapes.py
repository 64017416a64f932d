"""The shapes in which public multiple-choice sets come, and what they all mean: question, options, right letter.

Columns are recognised by their names and values, or named by the profile. Knows nothing of files, hubs or splits.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
AnswerIs = Literal["letter", "index0", "index1", "text"]
Row = Mapping[str, Any]


class ShapeError(ValueError):
    """A data set whose columns cannot be told; the message shows them and the YAML lines that would tell."""


class Columns(BaseModel):
    """Names of columns (`a.b` reaches into a nested one); null: to be recognised.

    `options` is one column, or one for each option in order. `answer_is` says what the answer column holds: a letter
    (or the label of an option), a position from 0 or from 1, or the right option's text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str | None = None
    options: str | list[str] | None = None
    answer: str | None = None
    answer_is: AnswerIs | None = None
    id: str | None = None
    domain: str | None = None


# Names in use, the usual first.
NAMES: Mapping[str, tuple[str, ...]] = {
    "question": ("question.stem", "question", "query", "stem", "question_text", "problem", "prompt", "input"),
    "options": ("options", "choices", "question.choices", "candidates", "answers", "option"),
    "answer": (
        "answer", "answerkey", "answer_key", "answer key", "answer_label", "answer_idx", "answer_index", "correct",
        "correct_answer", "correct_option", "correct_choice", "correct_idx", "cop", "gold", "label", "target",
    ),
    "id": ("id", "question_id", "qid", "uid"),
    "domain": ("domain", "category", "subject", "topic"),
}  # fmt: skip
_KEPT = {"fact": str, "difficulty": int, "lang": str, "split": str}
_LETTERED = (
    "{}",
    "op{}",
    "option{}",
    "option_{}",
    "option {}",
    "choice{}",
    "choice_{}",
    "answer_{}",
    "option_{}.",
)
_MARK = re.compile(r"^\s*\(?([A-Za-z])[).:]\s*")
_INLINE = re.compile(r"(?m)^[ \t]*\(?([A-Z])[).:][ \t]+")


def read(row: Row, column: str) -> Any:
    """The value of a column, or of a nested one by its dotted path; None where there is none."""
    value: Any = row
    for part in [column] if column in row else column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def recognise(rows: Sequence[Row], given: Columns) -> Columns:
    """The columns of a data set: the given ones, and the others by their names. `options` [] = in the question's text.

    Raises ShapeError where question or answer cannot be told.
    """
    names = list(dict.fromkeys(name for row in rows[:1000] for name in row))
    nested = [
        f"{name}.{inner}"
        for name in names
        if isinstance(first := next((row[name] for row in rows if row.get(name)), None), Mapping)
        for inner in first
    ]
    known = {name.casefold(): name for name in [*nested, *names]}
    values = given.model_dump()
    for field, usual in NAMES.items():
        if values[field] is None:
            values[field] = next((known[name] for name in usual if name in known), None)
    if given.options is None and values["options"] is None:
        series = (
            [known[form.format(mark)] for mark in marks if form.format(mark) in known]
            for form in _LETTERED
            for marks in ("abcdefghij", "123456789")
        )
        values["options"] = next((columns for columns in series if len(columns) > 1), [])
    missing = [field for field in ("question", "answer") if values[field] is None]
    if values["options"] == [] and not any(_inside(read(row, values["question"] or "")).options for row in rows):
        missing.insert(1, "options")
    if missing:
        raise ShapeError(_advice(rows, values, f"cannot tell which column holds: {', '.join(missing)}"))
    found = Columns.model_validate(values)
    named = {name for name in [given.question, given.answer, *_listed(given.options)] if name}
    if absent := sorted(name for name in named if all(read(row, name) is None for row in rows)):
        raise ShapeError(_advice(rows, values, f"no row has a value in {', '.join(absent)}"))
    return found


def _listed(options: str | list[str] | None) -> list[str]:
    return options if isinstance(options, list) else [options] if options else []


def _advice(rows: Sequence[Row], values: Mapping[str, Any], trouble: str) -> str:
    """What is wrong, the columns, one row, and the lines to write into the profile."""
    sample = rows[0] if rows else {}
    kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in sample.items())
    shown = {name: value if len(str(value)) < 200 else f"{str(value)[:200]}..." for name, value in sample.items()}
    wanted = {
        "question": "<column of the question>",
        "options": "<column of the options, or a list of columns: [a, b, c, d]>",
        "answer": "<column of the right answer>",
        "answer_is": "<letter, index0, index1 or text>",
    }
    lines = [f"      {field}: {values.get(field) or wanted[field]}".replace("'", "") for field in wanted]
    row = json.dumps(shown, ensure_ascii=False, default=str)
    head = [f"{trouble}.", f"  its columns: {kinds}", f"  one row: {row}"]
    return "\n".join([*head, "  write into the profile, under this entry of data.sources:", "    columns:", *lines])


# ---------------------------------------------------------------------------------------------------------------
# Options


class Asked(NamedTuple):
    """What stands in a row: question, option texts, and the labels that the row itself gives the options."""

    question: Any
    options: Any
    labels: list[str]


def asked(row: Row, columns: Columns) -> Asked:
    """Question and options of a row, whichever way it holds them; what cannot be read is left for validation."""
    question = read(row, columns.question or "")
    if columns.options == []:
        return _inside(question)
    if isinstance(columns.options, list):
        texts = [_text(read(row, name)) for name in columns.options]
        while texts and texts[-1] in (None, ""):  # a question with fewer options than there are columns
            texts.pop()
        return Asked(question, texts, [])
    options = read(row, columns.options or "")
    if isinstance(options, str):
        options = _parsed(options)
    if isinstance(options, Mapping):
        table = isinstance(options.get("text"), list)
        named = options["text"] if table else options.values()
        marks = (options.get("label") or []) if table else options
        return Asked(question, [_text(text) for text in named], [str(mark) for mark in marks])
    if isinstance(options, list) and options and all(isinstance(one, Mapping) for one in options):
        labels = [str(one.get("label", one.get("key", ""))) for one in options]
        return Asked(question, [_text(one.get("text", one.get("value"))) for one in options], labels)
    return Asked(question, _unmarked(options), [])


def _text(value: Any) -> Any:
    """A number as text; all else as it is."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _parsed(text: str) -> Any:
    """A list or mapping that was written as text, in JSON or Python."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _unmarked(options: Any) -> Any:
    """Options without the `A)` in front of each, where every one has its own."""
    if not isinstance(options, list):
        return options
    texts = [_text(one) for one in options]
    marks = [_MARK.match(text) if isinstance(text, str) else None for text in texts]
    if texts and all(mark and mark[1].upper() == letter for mark, letter in zip(marks, LETTERS, strict=False)):
        return [text[mark.end() :] for text, mark in zip(texts, marks, strict=True) if mark]
    return texts


def _inside(question: Any) -> Asked:
    """A question whose text ends with its options, one a line, each with its letter."""
    marks = list(_INLINE.finditer(question)) if isinstance(question, str) else []
    start = next((at for at in range(len(marks) - 1, -1, -1) if marks[at][1] == "A"), None)
    if start is None:
        return Asked(question, None, [])
    marks = marks[start:]
    ends = [*(mark.start() for mark in marks[1:]), len(question)]
    texts = [question[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
    stem = re.sub(r"(?i)\n\s*(options|choices|answer choices)\s*:?\s*$", "", question[: marks[0].start()].rstrip())
    texts[-1] = re.sub(r"(?is)\n\s*answer\s*:?\s*$", "", texts[-1])
    return Asked(stem, texts, [mark[1] for mark in marks])


# ---------------------------------------------------------------------------------------------------------------
# The answer


def _by_letter(answer: Any, options: Sequence[str], labels: Sequence[str]) -> int | None:
    if isinstance(answer, str) and answer.strip() in labels:
        return labels.index(answer.strip())
    match = re.fullmatch(r"\(?([A-Za-z])(?:[).:].*)?", answer.strip(), re.DOTALL) if isinstance(answer, str) else None
    return LETTERS.index(match[1].upper()) if match else None


def _by_text(answer: Any, options: Sequence[str], labels: Sequence[str]) -> int | None:
    texts = [str(option).strip() for option in options]
    return texts.index(str(answer).strip()) if str(answer).strip() in texts else None


def _by_index(start: int) -> Callable[[Any, Sequence[str], Sequence[str]], int | None]:
    def place(answer: Any, options: Sequence[str], labels: Sequence[str]) -> int | None:
        whole = re.fullmatch(r"-?\d+(\.0)?", str(answer).strip())
        index = int(float(whole[0])) - start if whole else -1
        return index if 0 <= index < len(options) else None

    return place


READINGS: Mapping[AnswerIs, Callable[[Any, Sequence[str], Sequence[str]], int | None]] = {
    "letter": _by_letter,
    "text": _by_text,
    "index0": _by_index(0),
    "index1": _by_index(1),
}


def reading(rows: Sequence[Row], columns: Columns, sample: int = 5000) -> AnswerIs:
    """What the answer column holds: the one reading that explains most rows.

    Raises ShapeError where two explain as many and disagree, or none explains half of them.
    """
    if columns.answer_is:
        return columns.answer_is
    places: dict[AnswerIs, list[int | None]] = {name: [] for name in READINGS}
    for row in rows[:sample]:
        _, options, labels = asked(row, columns)
        if isinstance(options, list):
            for name, place in READINGS.items():
                places[name].append(place(read(row, columns.answer or ""), options, labels))
    counts = {name: sum(place is not None for place in found) for name, found in places.items()}
    best = max(counts.values())
    rivals = [name for name, count in counts.items() if count == best]
    values = columns.model_dump()
    if best == 0 or 2 * best < max(map(len, places.values())):
        raise ShapeError(_advice(rows, values, f"cannot read the answers in the column {columns.answer}"))
    if any(places[name] != places[rivals[0]] for name in rivals):
        trouble = f"the column {columns.answer} can be read as {' and as '.join(rivals)}"
        raise ShapeError(_advice(rows, values, trouble))
    return rivals[0]


def settle(rows: Sequence[Row], given: Columns) -> tuple[Columns, AnswerIs]:
    """The columns, and what the answers are: of several possible answer columns the first that can be read."""
    columns = recognise(rows, given)
    known = {name.casefold(): name for row in rows[:1000] for name in row}
    usual = [known[name] for name in NAMES["answer"] if name in known and known[name] != columns.answer]
    errors = []
    for name in [columns.answer, *([] if given.answer else usual)]:
        candidate = columns.model_copy(update={"answer": name})
        try:
            return candidate, reading(rows, candidate)
        except ShapeError as error:
            errors.append(error)
    raise errors[0]


def canonical(rows: Sequence[Row], given: Columns, domain: str | None = None) -> Iterable[dict[str, Any]]:
    """Rows in the fields of a `Question`; what a row lacks is missing or wrong there too, for validation to tell.

    A fact, difficulty, language and split are kept where they are given. Domains become lower-case names with
    underscores; `domain` stands for all rows.
    """
    columns, holds = settle(rows, given)
    for row in rows:
        question, options, labels = asked(row, columns)
        answer = read(row, columns.answer or "")
        place = READINGS[holds](answer, options, labels) if isinstance(options, list) else None
        values = {
            **{name: row[name] for name, kind in _KEPT.items() if isinstance(row.get(name), kind)},
            "question": question,
            "options": options,
            "answer": answer if place is None else LETTERS[place] if place < len(LETTERS) else str(place),
            "domain": domain or read(row, columns.domain or ""),
            "id": _text(read(row, columns.id or "")),
        }
        if isinstance(values["domain"], str):
            values["domain"] = re.sub(r"\W+", "_", values["domain"].strip().casefold())
        yield {name: value for name, value in values.items() if value is not None}
