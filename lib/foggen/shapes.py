"""The shapes in which public multiple-choice sets come, and what they all mean: question, options, right letter.

Columns are recognised by their names and values, or named by the profile. Knows nothing of files, hubs or splits.
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

LETTERS = string.ascii_uppercase
AnswerIs = Literal["letter", "index0", "index1", "text"]
Row = Mapping[str, Any]
Asked = tuple[Any, Any, list[str]]  # what stands in a row: question, options, and the labels that it gives them itself


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
OPTION_COLUMNS = (
    "{}", "op{}", "option{}", "option_{}", "option {}", "choice{}", "choice_{}", "answer_{}", "option_{}.",
)  # fmt: skip
KEPT = {"fact": str, "difficulty": int, "lang": str, "split": str}
WANTED = {
    "question": "<column of the question>",
    "options": "<column of the options, or a list of columns: [a, b, c, d]>",
    "answer": "<column of the right answer>",
    "answer_is": "<letter, index0, index1 or text>",
}


def read(row: Row, column: str | None) -> Any:
    """The value of a column, or of a nested one by its dotted path; None where there is none."""
    value: Any = row
    for part in [column] if column in row else (column or "").split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def recognise(rows: Sequence[Row], given: Columns) -> Columns:
    """The columns of a data set: the given ones, and the others by their names. `options` [] = in the question's text.

    Raises ShapeError where question or answer cannot be told.
    """
    cells = [cell for row in rows[:1000] for cell in row.items()]
    nested = [f"{name}.{inner}" for name, value in cells if isinstance(value, Mapping) for inner in value]
    known = {name.casefold(): name for name in [*nested, *(name for name, _ in cells)]}
    values = given.model_dump()
    for field, usual in NAMES.items():
        if values[field] is None:
            values[field] = next((known[name] for name in usual if name in known), None)
    if values["options"] is None:
        series = (
            [known[form.format(mark)] for mark in marks if form.format(mark) in known]
            for form in OPTION_COLUMNS
            for marks in ("abcdefghij", "123456789")
        )
        values["options"] = next((columns for columns in series if len(columns) > 1), [])
    missing = [field for field in ("question", "answer") if values[field] is None]
    if values["options"] == [] and not any(_inside(read(row, values["question"]))[1] for row in rows):
        missing.insert(1, "options")
    if missing:
        raise _untold(rows, values, f"cannot tell which column holds: {', '.join(missing)}")
    options = given.options if isinstance(given.options, list) else [given.options]
    named = {name for name in [given.question, given.answer, *options] if name}
    if absent := sorted(name for name in named if all(read(row, name) is None for row in rows)):
        raise _untold(rows, values, f"no row has a value in {', '.join(absent)}")
    return Columns.model_validate(values)


def _untold(rows: Sequence[Row], values: Mapping[str, Any], trouble: str) -> ShapeError:
    """What is wrong, the columns, one row, and the lines to write into the profile."""
    sample = rows[0] if rows else {}
    kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in sample.items())
    shown = {name: value if len(str(value)) < 200 else f"{str(value)[:200]}..." for name, value in sample.items()}
    row = json.dumps(shown, ensure_ascii=False, default=str)
    head = [f"{trouble}.", f"  its columns: {kinds}", f"  one row: {row}"]
    lines = [f"      {field}: {values.get(field) or WANTED[field]}".replace("'", "") for field in WANTED]
    told = "  write into the profile, under this entry of data.sources:"
    return ShapeError("\n".join([*head, told, "    columns:", *lines]))


# ---------------------------------------------------------------------------------------------------------------
# Options


def asked(row: Row, columns: Columns) -> Asked:
    """Question and options of a row, whichever way it holds them; what cannot be read is left for validation."""
    question = read(row, columns.question)
    if columns.options == []:
        return _inside(question)
    if isinstance(columns.options, list):
        texts = [read(row, name) for name in columns.options]
        while texts and texts[-1] in (None, ""):  # a question with fewer options than there are columns
            texts.pop()
        return question, texts, []
    options = read(row, columns.options)
    if isinstance(options, str):
        options = _parsed(options)
    if isinstance(options, Mapping) and isinstance(options.get("text"), list):
        return question, options["text"], [str(label) for label in options.get("label") or []]
    if isinstance(options, Mapping):
        return question, list(options.values()), list(map(str, options))
    if isinstance(options, list) and options and all(isinstance(one, Mapping) for one in options):
        labels = [str(one.get("label", one.get("key", ""))) for one in options]
        return question, [one.get("text", one.get("value")) for one in options], labels
    return question, _unmarked(options), []


def _parsed(text: str) -> Any:
    """A list or mapping that was written as text, in JSON or Python."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return parse(text)
    return text


def _unmarked(options: Any) -> Any:
    """Options without the `A)` in front of each, where every one has its own."""
    mark = re.compile(r"\s*\(?([A-Za-z])[).:]\s*")
    marks = [mark.match(str(one)) for one in options] if isinstance(options, list) else []
    if not marks or [one and one[1].upper() for one in marks] != list(LETTERS[: len(marks)]):
        return options
    return [mark.sub("", one, count=1) for one in options]


def _inside(question: Any) -> Asked:
    """A question whose text ends with its options, one a line, each with its letter."""
    marks = list(re.finditer(r"(?m)^[ \t]*\(?([A-Z])[).:][ \t]+", question)) if isinstance(question, str) else []
    start = next((at for at in reversed(range(len(marks))) if marks[at][1] == "A"), None)
    if start is None:
        return question, None, []
    marks = marks[start:]
    ends = [*(mark.start() for mark in marks[1:]), len(question)]
    texts = [question[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
    stem = re.sub(r"(?i)\n\s*(options|choices|answer choices)\s*:?\s*$", "", question[: marks[0].start()].rstrip())
    texts[-1] = re.sub(r"(?is)\n\s*answer\s*:?\s*$", "", texts[-1])
    return stem, texts, [mark[1] for mark in marks]


# ---------------------------------------------------------------------------------------------------------------
# The answer


def places(answer: Any, options: Sequence[Any], labels: Sequence[str]) -> dict[AnswerIs, int]:
    """The right option's place, by every way in which the answer can be read."""
    said, texts = str(answer).strip(), [str(option).strip() for option in options]
    found: dict[AnswerIs, int] = {}
    if isinstance(answer, str) and said in labels:
        found["letter"] = labels.index(said)
    elif letter := re.fullmatch(r"\(?([A-Za-z])(?:[).:].*)?", said, re.DOTALL):
        found["letter"] = LETTERS.index(letter[1].upper())
    if said in texts:
        found["text"] = texts.index(said)
    number = int(float(said)) if re.fullmatch(r"-?\d+(\.0)?", said) else -1
    if 0 <= number < len(options):
        found["index0"] = number
    if 1 <= number <= len(options):
        found["index1"] = number - 1
    return found


def reading(rows: Sequence[Row], columns: Columns) -> AnswerIs:
    """What the answer column holds: the one reading that explains most rows.

    Raises ShapeError where two explain as many and disagree, or none explains half of them.
    """
    if columns.answer_is:
        return columns.answer_is
    found = []
    for row in rows[:5000]:
        _, options, labels = asked(row, columns)
        if isinstance(options, list):
            found.append(places(read(row, columns.answer), options, labels))
    counts = Counter(name for one in found for name in one)
    best = max(counts.values(), default=0)
    if best == 0 or 2 * best < len(found):
        raise _untold(rows, columns.model_dump(), f"cannot read the answers in the column {columns.answer}")
    first, *rivals = [name for name, count in counts.items() if count == best]
    if any(one.get(name) != one.get(first) for one in found for name in rivals):
        trouble = f"the column {columns.answer} can be read as {' and as '.join([first, *rivals])}"
        raise _untold(rows, columns.model_dump(), trouble)
    return first


def settle(rows: Sequence[Row], given: Columns) -> tuple[Columns, AnswerIs]:
    """The columns, and what the answers are: of several possible answer columns the first that can be read."""
    columns = recognise(rows, given)
    known = {name.casefold(): name for row in rows[:1000] for name in row}
    usual = [] if given.answer else [known[name] for name in NAMES["answer"] if name in known]
    errors = []
    for name in dict.fromkeys([columns.answer, *usual]):
        candidate = columns.model_copy(update={"answer": name})
        try:
            return candidate, reading(rows, candidate)
        except ShapeError as error:
            errors.append(error)
    raise errors[0]


def canonical(rows: Sequence[Row], given: Columns, domain: str | None = None) -> Iterator[dict[str, Any]]:
    """Rows in the fields of a `Question`; what a row lacks is missing or wrong there too, for validation to tell.

    A fact, difficulty, language and split are kept where they are given. Domains become lower-case names with
    underscores; `domain` stands for all rows.
    """
    columns, holds = settle(rows, given)
    for row in rows:
        question, options, labels = asked(row, columns)
        answer = read(row, columns.answer)
        place = places(answer, options, labels).get(holds) if isinstance(options, list) else None
        named = domain or read(row, columns.domain)
        values = {
            **{name: row[name] for name, kind in KEPT.items() if isinstance(row.get(name), kind)},
            "question": question,
            "options": options,
            "answer": answer if place is None else LETTERS[place : place + 1],
            "domain": re.sub(r"\W+", "_", named.strip().casefold()) if isinstance(named, str) else named,
            "id": read(row, columns.id),
        }
        yield {name: value for name, value in values.items() if value is not None}
