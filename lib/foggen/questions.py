"""Questions: the two types, their loaders and validation, sampling, splits and leakage checks.

Knows nothing of prompts or models.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from foggen.shapes import LETTERS, Columns, ShapeError, canonical

# The recipe's rotation order
DOMAINS = ("finance", "science", "coding", "law", "math", "kazakh_culture", "medical")
TASKS = ("squad", "truthfulqa", "gsm8k")  # a file of this name holds open-ended questions


class QuestionError(ValueError):
    """Rows that cannot be used, all of them, each with its file, line, field and the expected form."""


class Question(BaseModel):
    """A multiple-choice question. `fact` is what it asks about: the unit of splitting and of resampling."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    id: str = Field(min_length=1, description="a nonempty text, unique")
    domain: str = Field(min_length=1, description=f"a nonempty text, such as {', '.join(DOMAINS)}")
    question: str = Field(min_length=1, description="a nonempty text")
    options: tuple[str, ...] = Field(
        min_length=2, max_length=26, description="a list of 2 to 26 distinct nonempty texts"
    )
    answer: str = Field(description="the letter of the right option")
    fact: str | None = None
    difficulty: int | None = None
    lang: str = "en"
    split: str | None = None

    @field_validator("options")
    @classmethod
    def _told_apart(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        if not all(option.strip() for option in options) or len(set(options)) < len(options):
            raise ValueError("options must be nonempty and distinct")
        return options

    @model_validator(mode="after")
    def _answer_is_an_option(self) -> Question:
        letters = LETTERS[: len(self.options)]
        if len(self.answer) != 1 or self.answer not in letters:
            raise ValueError(f"answer must be one letter of A-{letters[-1]}, got {self.answer!r}")
        return self

    @property
    def unit(self) -> str:
        """What is sampled independently: the fact where it is known, else the question itself."""
        return self.fact or self.id


class OpenQuestion(BaseModel):
    """A question with a free answer. `answers` are all right ones; `incorrect` known wrong ones (TruthfulQA)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str = Field(min_length=1, description="a nonempty text, unique")
    task: Literal["squad", "truthfulqa", "gsm8k"] = Field(description=" or ".join(TASKS))
    question: str = Field(min_length=1, description="a nonempty text")
    context: str = ""
    answers: tuple[str, ...] = Field(min_length=1, description="a list of at least one text")
    incorrect: tuple[str, ...] = ()
    solution: str = ""
    fact: str | None = None
    split: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _public_names(cls, row: Any) -> Any:
        """The data sets' own field names are accepted: `correct_answers`, `incorrect_answers`, `answer`."""
        if not isinstance(row, Mapping):
            return row
        row = dict(row)
        if "correct_answers" in row:
            best = [row["best_answer"]] if row.get("best_answer") else []
            row.setdefault("answers", list(dict.fromkeys([*best, *row["correct_answers"]])))
        if "answer" in row:
            row.setdefault("answers", [row["answer"]])
        return {"incorrect": row.get("incorrect_answers", ()), **row}


Row = TypeVar("Row", Question, OpenQuestion)
Placed = tuple[str, Any]  # where a row stands, and the row: an error where it cannot be read

# ---------------------------------------------------------------------------------------------------------------
# Loading


def question_files(path: Path, open_ended: bool = False) -> list[Path]:
    """The files under `path` that hold the wanted kind of question, by name."""
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob("*") if file.suffix in (".jsonl", ".csv", ".parquet"))
    files = [file for file in found if (file.stem in TASKS) == open_ended]
    if not files:
        kind = "no .jsonl, .csv or .parquet file with questions of this kind in it"
        raise QuestionError(f"{path}: no such file, or {kind}")
    return files


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return QuestionError(f"not JSON ({error.msg}); expected: one JSON object a line")


def _rows(file: Path) -> list[Placed]:
    """The rows of a file with their places."""
    if file.suffix == ".parquet":
        from pyarrow import parquet

        rows = parquet.read_table(file).to_pylist()
        return [(f"{file.name}, row {number}", row) for number, row in enumerate(rows, 1)]
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return [(file.name, QuestionError(f"not UTF-8 at byte {error.start}; expected: UTF-8 text"))]
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey="(more)")
        return [(f"{file.name}, row {number}", row) for number, row in enumerate(reader, 1)]
    lines = enumerate(text.split("\n"), 1)
    return [(f"{file.name}, line {number}", _json(line)) for number, line in lines if line.strip()]


def _problems(place: str, error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """One line a field: of several complaints about it the first, since the others follow from it."""
    told: dict[str, str] = {}
    for problem in error.errors():
        whole = "answer" if problem["type"] == "value_error" else "row"
        name = str(problem["loc"][0]) if problem["loc"] else whole
        field = kind.model_fields.get(name)
        form = field.description if field else "a JSON object"
        message = problem["msg"].removeprefix("Value error, ")
        told.setdefault(name, f"{place}: field `{name}`: {message}" + (f"; expected: {form}" if form else ""))
    return list(told.values())


def check_rows(placed: Iterable[Placed], kind: type[Row]) -> tuple[list[Row], list[str]]:
    """The rows that are questions, and what is wrong with the others."""
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    for place, values in placed:
        if isinstance(values, QuestionError):
            problems.append(f"{place}: {values}")
            continue
        try:
            row = kind.model_validate(values)
        except ValidationError as error:
            problems += _problems(place, error, kind)
            continue
        if row.id in seen:
            trouble = f"{row.id!r} stands in {seen[row.id]} already; expected: {kind.model_fields['id'].description}"
            problems.append(f"{place}: field `id`: {trouble}")
        else:
            seen[row.id] = place
            rows.append(row)
    return rows, problems


def shape_rows(
    source: str, placed: Sequence[Placed], columns: Columns, domain: str | None, ids: str
) -> Iterator[Placed]:
    """Rows of a data set of any usual shape (see `shapes`) in the fields of a Question; `ids` begins missing ids."""
    try:
        shaped = canonical([row for _, row in placed if isinstance(row, dict)], columns, domain)
        for number, (place, row) in enumerate(placed):
            yield place, {"id": f"{ids}-{number}", **next(shaped)} if isinstance(row, dict) else row
    except ShapeError as error:
        raise QuestionError(f"{source}: {error}") from None


def load_questions(path: Path, columns: Columns | None = None, domain: str | None = None) -> list[Question]:
    """Multiple-choice questions of a JSONL, CSV or Parquet file, or of a folder's but the open-ended tasks'.

    A row has question, options and answer in any usual shape, or as `columns` say, and a domain, unless `domain` is
    that of all. Raises QuestionError with every bad row of every file, or with the columns that cannot be told.
    """
    placed: list[Placed] = []
    for file in question_files(path):
        placed += shape_rows(file.name, _rows(file), columns or Columns(), domain, file.stem)
    return _all_or_nothing(placed, Question)


def load_open_questions(path: Path) -> list[OpenQuestion]:
    """Open-ended questions of a JSONL file, or of a folder's squad.jsonl, truthfulqa.jsonl and gsm8k.jsonl.

    A row's task is its field `task`, or else its file's name. Raises QuestionError with every bad row.
    """
    placed = [
        (place, {"task": file.stem, **row} if isinstance(row, dict) else row)
        for file in question_files(path, open_ended=True)
        for place, row in _rows(file)
    ]
    return _all_or_nothing(placed, OpenQuestion)


def _all_or_nothing(placed: Iterable[Placed], kind: type[Row]) -> list[Row]:
    rows, problems = check_rows(placed, kind)
    if problems or not rows:
        raise QuestionError(f"{len(problems)} problem(s), nothing was loaded:\n" + "\n".join(problems or ["no rows"]))
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Choosing questions


def by_domain(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """Questions grouped by domain, in the order given."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.domain, []).append(question)
    return groups


def draw(questions: Sequence[Question], n: int, seed: int | str, used: Iterable[str] = ()) -> list[Question]:
    """`n` questions at random; those whose id is in `used` only once the others are spent.

    Fewer than `n` come back where the pool itself is smaller.
    """
    taken = set(used)
    order = random.Random(seed).sample(list(questions), len(questions))
    return sorted(order, key=lambda question: question.id in taken)[:n]


def draw_balanced(questions: Sequence[Question], n: int, domains: Sequence[str], seed: int) -> list[Question]:
    """`n` questions in equal parts from the `domains` (the first ones give one more where it does not divide).

    Each domain has a draw of its own: with one seed for all, the same places of every domain would be drawn, and with
    them the same gold letters.
    """
    groups, each, more = by_domain(questions), n // len(domains), n % len(domains)
    return [
        question
        for place, domain in enumerate(domains)
        for question in draw(groups.get(domain, []), each + (place < more), f"{seed}/{domain}")
    ]


def subset(questions: Sequence[Question], n: int | None, seed: int) -> list[Question]:
    """`n` questions in equal parts from their domains; all of them where `n` is None."""
    return list(questions) if n is None else draw_balanced(questions, n, list(by_domain(questions)), seed)


def split_by_fact(questions: Sequence[Question], shares: Mapping[str, float], seed: int) -> dict[str, list[Question]]:
    """Parts of the given shares (they sum to 1), stratified by domain, with no fact in two parts."""
    parts: dict[str, list[Question]] = {name: [] for name in shares}
    for domain, group in sorted(by_domain(questions).items()):
        units = sorted({question.unit for question in group})
        random.Random(f"{seed}/{domain}").shuffle(units)
        ends = [round(total * len(units)) for total in accumulate(shares.values())]
        part_of: dict[str, str] = {}
        for name, start, end in zip(shares, [0, *ends], ends, strict=False):
            part_of |= dict.fromkeys(units[start:end], name)
        for question in group:
            parts[part_of[question.unit]].append(question)
    return parts


# ---------------------------------------------------------------------------------------------------------------
# Looking at questions


def describe(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """One row a domain: n, facts, chance level, share of each gold letter (the constant-letter answerers' accuracy)."""
    rows = []
    for domain, group in by_domain(questions).items():
        facts = len({question.unit for question in group})
        chance = sum(1 / len(question.options) for question in group) / len(group)
        gold = Counter(sorted(question.answer for question in group))
        shares = {f"gold {letter}": n / len(group) for letter, n in gold.items()}
        rows.append({"domain": domain, "n": len(group), "facts": facts, "chance": chance, **shares})
    return rows


class Twin(NamedTuple):
    """A pair of questions that look alike: ids, and the Jaccard similarity of their word sets (0 to 1)."""

    first: str
    second: str
    similarity: float


def near_duplicates(first: Sequence[Question], second: Sequence[Question], threshold: float = 0.9) -> list[Twin]:
    """Pairs across two sets whose words (question and options) overlap by at least `threshold`, most alike first.

    1.0 are the same words in any order, which takes in exact duplicates with shuffled options.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    if not first or not second:
        return []
    texts = [" ".join([one.question, *one.options]) for one in (*first, *second)]
    words = CountVectorizer(binary=True, token_pattern=r"\w+", preprocessor=str.casefold).fit_transform(texts)
    sizes = words.sum(axis=1).A1
    shared = (words[: len(first)] @ words[len(first) :].T).tocoo()
    similarities = shared.data / (sizes[shared.row] + sizes[len(first) + shared.col] - shared.data)
    twins = [
        Twin(first[i].id, second[j].id, float(similarity))
        for i, j, similarity in zip(shared.row, shared.col, similarities, strict=True)
        if similarity >= threshold
    ]
    return sorted(twins, key=lambda twin: -twin.similarity)
