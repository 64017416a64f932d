"""Tables of questions, from files and the hub, in the usual shapes of public data sets.

A table is a list of rows with their places; `shaped` gives its rows the fields of a Question:

    ("mine.csv, row 3", {"Question": "Why?", "A": "so", "B": "not so", "Answer Key": "B"})
    ("mine.csv, row 3", {"question": "Why?", "options": ["so", "not so"], "answer": "B"})

Must not know what makes a question valid, nor what questions are for.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from foggen.config import Columns, Source
from foggen.inputs import Row, Table, TableError, hub_tables, read_rows
from foggen.prompts import LETTERS, SYSTEM_OPEN, parse_response
from foggen.store import progress

Kind = TypeVar("Kind", bound=BaseModel)

# The names of columns in lower case, the more telling first
USUAL = {
    "question": ("question", "query", "problem", "prompt"),
    "context": ("context", "passage", "article", "premise"),
    "options": ("options", "choices"),
    "answer": ("answerkey", "answer_key", "answer key", "answer_label", "answer_idx", "cop",
               "correct_option", "answer", "correct_answer", "correct", "label", "target"),
    "domain": ("domain", "category", "subject", "topic"),
    "fact": ("fact",),
    "id": ("id", "question_id"),
    "messages": ("messages",),
}  # fmt: skip
OPTION_COLUMN = re.compile(r"(op|option|choice)?[ _]?([a-z]|[0-9]{1,2})")  # a, opa, option_1
KEPT = {"difficulty": int, "lang": str, "split": str}
HINTS = {"options": "<column, or [a, b, c, d]>", "answer_is": "<letter, text, index0 or index1>"}


class QuestionError(ValueError):
    """Rows that cannot be used, all of them, each with its place, field and the expected form."""


INVISIBLE = "\\s\u00ad\u200b-\u200f\u2060-\u2064\ufeff"  # white space, joiners, marks of order


def normalised(text: str, keep_case: bool = False) -> str:
    """A text as it is compared with others: NFC, all that is invisible a blank, and without case.

    Options keep their case, since `Rr` and `RR` are different genotypes.
    """
    text = unicodedata.normalize("NFC", text if keep_case else text.casefold())
    return " ".join(filter(None, re.split(f"[{INVISIBLE}]+", text)))


def listed(value: Any) -> Any:
    """A list or mapping that a cell of a CSV holds as JSON; all else as it is."""
    if not isinstance(value, str) or value[:2] not in ('["', '{"'):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


# ---------------------------------------------------------------------------------------------
# Files and the hub

ENDINGS = (".jsonl", ".csv", ".parquet")


def file_tables(path: Path, open_ended: bool = False) -> dict[str, Table]:
    """The tables of a file, or of the files of a folder, by their stems.

    The files of a folder are those of the open-ended tasks, or else all others; stderr names those
    of other formats. Raises QuestionError with every row that cannot be read.
    """
    found = [file for file in sorted(path.glob("*.*")) if file.suffix.lower() in ENDINGS]
    files = [file for file in found if (file.stem in SYSTEM_OPEN) == open_ended]
    others = [file.name for file in {*path.glob("[!.]*.*")} - {*found} if file.suffix != ".md"]
    if others:
        progress(f"  {path}: not read: {', '.join(sorted(others))}; expected: {', '.join(ENDINGS)}")
    tables: dict[str, Table] = {}
    problems = []
    for file in [path] if path.is_file() else files:
        try:
            tables[file.stem] = tables.get(file.stem, []) + read_rows(file)
        except TableError as error:
            problems.append(str(error))
    if not tables and not problems:
        problems = [f"{path}: no such file, or no {', '.join(ENDINGS)} of this kind in it"]
    refuse(problems)
    return tables


OPEN_SETS = {  # revisions are pinned, so that later edits of a set cannot change a result
    "squad": Source(path="rajpurkar/squad", revision="7b6d24c440a36b6815f21b70d25016731768db1f"),
    "truthfulqa": Source(path="truthfulqa/truthful_qa", name="generation",
                         revision="741b8276f2d1982aa3d5b832d3ee81ed3b896490"),
    "gsm8k": Source(path="openai/gsm8k", name="main",
                    revision="740312add88f781978c0658806c59bc2815b9866"),
}  # fmt: skip


def open_table(task: str, split: str) -> Table:
    """A split of the public set of an open-ended task, in one random order for all runs."""
    table = hub_tables(OPEN_SETS[task].model_copy(update={"split": split}))[split]
    order = random.Random(0).sample(table, len(table))
    return [(place, row | {"task": task}) for place, row in order]


# ---------------------------------------------------------------------------------------------
# Checks


def _problem(problem: Mapping[str, Any], kind: type[BaseModel]) -> str:
    """Such as: field `question`: Field required; expected: a nonempty text."""
    if not problem["loc"]:
        return str(problem["msg"]).removeprefix("Value error, ")
    name = str(problem["loc"][0])
    form = kind.model_fields[name].description or "a text"
    return f"field `{name}`: {problem['msg']}; expected: {form}"


def check_rows(table: Table, kind: type[Kind]) -> tuple[list[Kind], list[str]]:
    """The rows that are of a kind (a model with an `id`), and what is wrong with the others."""
    questions: dict[str, Kind] = {}
    problems: list[str] = []
    for place, row in table:
        try:
            question: Any = kind.model_validate(row)
        except ValidationError as error:
            # The first complaint about a field: the others follow from it.
            told = {problem["loc"][:1]: problem for problem in reversed(error.errors())}
            problems += [f"{place}: {_problem(problem, kind)}" for problem in told.values()]
            continue
        if question.id in questions:
            problems.append(f"{place}: field `id`: {question.id!r} again; expected: a unique text")
        questions.setdefault(question.id, question)
    return list(questions.values()), problems


def refuse(problems: Sequence[str]) -> None:
    """Raises QuestionError with all problems, if there are any."""
    if problems:
        more = [f"and {len(problems) - 100} more"] if len(problems) > 100 else []
        head = f"{len(problems)} problem(s), nothing was loaded:"
        raise QuestionError("\n".join([head, *problems[:100], *more]))


# ---------------------------------------------------------------------------------------------
# Shapes


def _columns(table: Table, given: Columns) -> Columns:
    """The given columns, and the others by their usual names; `options` may be [], for none.

    Names that differ in case only (`answer`, `Answer`) are not told apart: neither is known.
    """
    names = {column for _, row in table for column in row}
    counts = Counter(name.casefold() for name in names)
    known = {name.casefold(): name for name in names if counts[name.casefold()] == 1}
    usual: dict[str, Any] = {
        field: next((known[name] for name in names if name in known), None)
        for field, names in USUAL.items()
    }
    usual["options"] = usual["options"] or _option_columns(known)
    return Columns.model_validate(usual | given.model_dump(exclude_none=True))


def _option_columns(known: Mapping[str, str]) -> list[str]:
    """Columns named A, B, C, or opa, opb, or option_1, option_2; [] where one is missing."""
    marks = {name: mark for name in known if (mark := OPTION_COLUMN.fullmatch(name))}
    kinds = {(mark[1], mark[2].isdigit()) for mark in marks.values()}
    places = sorted(
        (int(mark[2]) if mark[2].isdigit() else LETTERS.index(mark[2].upper()), known[name])
        for name, mark in marks.items()
    )
    first = places[0][0] if places else 0  # numbers begin with 0 or 1
    in_turn = [place for place, _ in places] == [*range(first, first + len(places))]
    in_turn = in_turn and len(kinds) == 1 and first <= any(is_number for _, is_number in kinds)
    return [column for _, column in places] if in_turn else []


def _missing(table: Table, columns: Columns) -> list[str]:
    """The fields whose column is not known, or is in no row."""
    known = {column for _, row in table for column in row}
    missing = []
    for field, column in columns.model_dump(exclude={"answer_is"}).items():
        names = [column] if isinstance(column, str) else column or []
        needed = field in ("question", "options", "answer")
        if not known.issuperset(names) or (needed and not names):
            missing.append(field)
    return missing if table else []


def _untold(table: Table, trouble: str) -> QuestionError:
    """What is wrong, the first row, and the lines to write into the profile."""
    place, row = table[0]
    shown = ", ".join(f"{column}: {value!r:.60}" for column, value in row.items())
    advice = "rename columns, or make this an entry of data.sources with the needed ones of"
    lines = [f"      {field}: {HINTS.get(field, '<column>')}" for field in Columns.model_fields]
    head = [f"{place}: {trouble}", f"  the row is {shown}", f"  {advice}:", "    columns:"]
    return QuestionError("\n".join([*head, *lines]))


def _from_chat(turns: Any) -> Row:
    r"""Question, options and answer of a chat such as

    user: `Why?\nA. so\nB. not so`, assistant: `Confidence: 0.5\nFinal answer: B`
    """
    said = [turn for turn in turns or [] if isinstance(turn, Mapping)]
    chat = {turn.get("role"): str(turn.get("content")) for turn in said}
    user, assistant = chat.get("user", ""), chat.get("assistant", "")
    # The options begin with the last line of an A, and end with a blank line.
    parts = re.match(r"(?sm)(.*)^[ \t]*\(?A[.):][ \t]+(.*?)(?:\n[ \t]*\n|\Z)", user)
    question, options = parts.groups() if parts else (user, "")
    texts = [options.strip()]
    for letter in LETTERS[1:]:  # in turn: a line that begins with `I. ` may be part of a text
        texts += re.split(rf"\n[ \t]*\(?{letter}[.):][ \t]+", texts.pop(), maxsplit=1)
        if len(texts) < LETTERS.index(letter) + 1:
            break
    answer = parse_response(assistant).answer or assistant
    return {"question": question.strip(), "options": texts, "answer": answer}


def _unmarked(options: list[Any]) -> list[Any]:
    """Options without the `A)` or `(A)` before each; the A. of `A. Smith` is no mark."""
    pairs = zip(LETTERS.ljust(len(options)), map(str, options), strict=False)
    marks = [re.match(rf"\(?{letter}\)\s*(?=\S)", text) for letter, text in pairs]
    return [mark.string[mark.end() :] for mark in marks if mark] if all(marks) else options


def _options(value: Any) -> tuple[Any, list[str]]:
    """Options of any usual form as a list, and the row's labels of them, where it has any."""
    value = listed(value)
    if isinstance(value, list):
        return _unmarked(value), []
    if not isinstance(value, Mapping):
        return value, []
    labels, texts = list(value), list(value.values())
    if isinstance(value.get("text"), list):
        labels, texts = value.get("label") or [], list(value["text"])
    while texts and texts[-1] in (None, ""):  # fewer options than other rows have
        texts.pop()
    return texts, [str(label).casefold() for label in labels]


def _fields(row: Row, columns: Columns) -> Row:
    """A row by the names of a Question's fields; `labels` are the row's names of its options."""
    fields = {name: row[name] for name, kind in KEPT.items() if isinstance(row.get(name), kind)}
    fields |= {field: row.get(column) for field, column in columns if isinstance(column, str)}
    options = fields.get("options")
    if isinstance(columns.options, list):
        options = {column: row.get(column) for column in columns.options}
    fields["options"], fields["labels"] = _options(options)
    return fields


def _places(row: Row) -> dict[str, int]:
    """The place of the right option (0 is the first), by every way to read the answer."""
    text = "" if row["answer"] is None else normalised(str(row["answer"]), keep_case=True)
    options = row["options"] if isinstance(row["options"], list) else []
    texts = [normalised(str(option), keep_case=True) for option in options]
    is_number = re.fullmatch(r"[0-9]{1,2}(\.0)?", text) and text not in row["labels"]
    number = int(float(text)) if is_number else -1
    places = {"index0": number, "index1": number - 1}
    marked = re.match(r"\(?([A-Za-z])(?:[.):]|\Z)", text)
    names = [text.casefold(), marked[1].casefold() if marked else ""]
    if known := [row["labels"].index(name) for name in names if name in row["labels"]]:
        places["letter"] = known[0]
    elif marked and not any(re.fullmatch("[a-z]", label) for label in row["labels"]):
        places["letter"] = LETTERS.index(marked[1].upper())
    if text and text in texts:
        places["text"] = texts.index(text)
    return {how: place for how, place in places.items() if 0 <= place < len(texts)}


def _reading(readings: Sequence[Mapping[str, int]]) -> str | None:
    """The way that reads most answers; None where two do and disagree, or none reads half."""
    counts = Counter(how for places in readings for how in places)
    most = max(counts.values(), default=0)
    best = [how for how, count in counts.items() if count == most]
    agree = all(len({places.get(how) for how in best}) < 2 for places in readings)
    return best[0] if best and agree and 2 * most >= len(readings) else None


def shaped(name: str, table: Table, given: Columns, domain: str | None = None) -> Table:
    """A table of any usual shape with the fields of a Question; validation tells what a row lacks.

    `name` begins the ids of rows without one; `domain` stands for all rows. The answer becomes a
    letter; a position counts from 1 only where the rows prove it. Raises QuestionError, with the
    lines to write into the profile, where columns or answers cannot be told.
    """
    columns = _columns(table, given)
    if columns.messages and not columns.question:
        table = [(place, row | _from_chat(row.get(columns.messages))) for place, row in table]
        columns = _columns(table, given)
    if missing := _missing(table, columns):
        raise _untold(table, f"cannot tell which column holds: {', '.join(missing)}")
    rows = [_fields(row, columns) for _, row in table]
    words = [str(row["question"]) for row in rows if row.get("context")]
    if not given.question and any(re.fullmatch("[A-Za-z]+", word) for word in words):
        raise _untold(table, "a question of one word cannot stand alone")
    readings = [_places(row) for row in rows]
    how = columns.answer_is or _reading(readings)
    if rows and not how:
        raise _untold(table, f"cannot tell how to read the answers in {columns.answer}")
    for number, (row, places) in enumerate(zip(rows, readings, strict=True)):
        named = domain or row.get("domain")
        if isinstance(named, str):
            row["domain"] = re.sub("[ _-]+", "_", normalised(named))
        if row.get("id") in (None, ""):
            row["id"] = f"{name}-{number}"
        if how in places:
            row["answer"] = LETTERS[places[how] : places[how] + 1]
        elif row["answer"] is not None:
            row["answer"] = f"{row['answer']} (read as {how})"
    present = [{field: value for field, value in row.items() if value is not None} for row in rows]
    return [(place, row) for (place, _), row in zip(table, present, strict=True)]
