"""Questions: the two types and their checks, how they are drawn, and the splits of a run.

A row of a question file (`fact` is what is asked about: the unit of splitting and resampling):

    {"id": "law-7", "domain": "law", "question": "Who may veto a bill?", "fact": "law/veto",
     "options": ["the court", "the president", "a voter"], "answer": "B"}

Must not know how models are prompted, run or trained.
"""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from foggen import sources
from foggen.config import Columns, Settings, Source
from foggen.inputs import Table, hub_tables, is_local
from foggen.prompts import LETTERS, SYSTEM_OPEN
from foggen.sources import INVISIBLE, Kind, listed, normalised
from foggen.sources import QuestionError as QuestionError
from foggen.store import ROOT, digest, progress

DOMAINS = ("finance", "science", "coding", "law", "math", "kazakh_culture", "medical")  # rotation
TASKS = tuple(SYSTEM_OPEN)  # a file with the name of a task holds open-ended questions

# ---------------------------------------------------------------------------------------------
# Types


def as_name(value: Any) -> Any:
    """A scalar as a name: 12, 12.0 and "12.0" are one; null, NaN and white space are none."""
    if value is None or value != value or isinstance(value, list | dict):
        return None if value != value else value
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return re.sub(r"\A(-?\d+)\.0+\Z", r"\1", str(value).strip()) or None


def _texts(value: Any) -> list[Any]:
    """Texts without repeats: of a list, of SQuAD's `{"text": [...]}`, or of one text alone."""
    value = listed(value)
    if isinstance(value, Mapping):
        value = value.get("text")
    texts = value if isinstance(value, list | tuple) else [value]
    given = [text for text in texts if text not in (None, "")]
    return [text for place, text in enumerate(given) if text not in given[:place]]


Text = Annotated[str, Field(pattern=f"[^{INVISIBLE}]", description="a nonempty text")]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_texts)]
Name = Annotated[Text, BeforeValidator(as_name)]
Fact = Annotated[str | None, BeforeValidator(as_name), Field(description="a text or a number")]


def _fact_key(question: Question | OpenQuestion) -> str:
    """What is sampled independently: the fact; without one the passage; without both the id."""
    if question.fact is not None:
        return normalised(question.fact)
    passage = normalised(question.context)
    return digest(passage)[:12] if passage else question.id


class Question(BaseModel, frozen=True, extra="ignore", coerce_numbers_to_str=True):
    """A multiple-choice question; no two of its options are the same text but for white space."""

    id: Name
    domain: Name
    question: Text
    options: tuple[Text, ...] = Field(min_length=2, max_length=26, description="2 to 26 texts")
    answer: str = Field(description="the letter of the right option")
    fact: Fact = None
    difficulty: int | None = None
    lang: str = "en"
    split: str | None = None
    context: str = ""
    fact_key = property(_fact_key)

    @model_validator(mode="after")
    def _checked(self) -> Question:
        letters = LETTERS[: len(self.options)]
        texts = {normalised(option, keep_case=True) for option in self.options}
        if len(texts) < len(letters):
            raise ValueError("field `options`: two are the same; expected: different texts")
        if len(self.answer) != 1 or self.answer not in letters:
            raise ValueError(f"field `answer`: {self.answer!r}; expected: a letter of {letters}")
        if self.domain == "mean":
            raise ValueError("field `domain`: `mean` stands for averages; expected: another name")
        return self


class OpenQuestion(BaseModel, frozen=True, extra="ignore", coerce_numbers_to_str=True):
    """A question with a free answer: all right ones, and (TruthfulQA) known wrong ones."""

    id: Name
    task: Literal["squad", "truthfulqa", "gsm8k"] = Field(description=" or ".join(TASKS))
    question: Text
    context: str = ""
    answers: Texts = Field(min_length=1, description="at least one text")
    incorrect: Texts = ()
    solution: str = ""
    fact: Fact = None
    split: str | None = None
    fact_key = property(_fact_key)

    @model_validator(mode="before")
    @classmethod
    def _public_fields(cls, row: dict[str, Any]) -> dict[str, Any]:
        """The fields of SQuAD, TruthfulQA and GSM8K are read too."""
        answer = row.get("answer")
        fields = {"answers": answer, "fact": row.get("title")}
        if "correct_answers" in row:
            fields["answers"] = [row.get("best_answer"), *_texts(row["correct_answers"])]
            fields["incorrect"] = row.get("incorrect_answers")
        if "####" in str(answer):
            solution, _, number = str(answer).rpartition("####")
            fields |= {"solution": solution.strip(), "answers": number.strip()}
        return fields | row


def load_questions(
    path: Path, columns: Columns | None = None, domain: str | None = None
) -> list[Question]:
    """Multiple-choice questions of a JSONL, CSV or Parquet file, or of a folder of such files.

    A row has question, options and answer in any usual shape, or as `columns` say, and a domain,
    unless `domain` is that of all. Raises QuestionError with all bad rows, or with the columns
    that cannot be told.
    """
    table: Table = []
    for stem, rows in sources.file_tables(path).items():
        table += sources.shaped(stem, rows, columns or Columns(), domain)
    return _all(table, Question, path)


def load_open_questions(path: Path) -> list[OpenQuestion]:
    """Open-ended questions of a file, or of a folder's squad, truthfulqa and gsm8k files.

    A row's task is its field `task`, or else its file's name. Raises QuestionError with all bad
    rows.
    """
    table: Table = []
    for stem, rows in sources.file_tables(path, open_ended=True).items():
        for number, (place, row) in enumerate(rows):
            filled = {field: value for field, value in row.items() if value is not None}
            table.append((place, {"task": stem, "id": f"{stem}-{number}"} | filled))
    return _all(table, OpenQuestion, path)


def _all(table: Table, kind: type[Kind], source: object) -> list[Kind]:
    questions, problems = sources.check_rows(table, kind)
    sources.refuse(problems if questions or problems else [f"{source}: no rows"])
    return questions


# ---------------------------------------------------------------------------------------------
# Drawing

Questions = Sequence[Question]
Parts = dict[str, list[Question]]  # by split: train, dev, test


def by_domain(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """Questions grouped by domain, in the order given."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.domain, []).append(question)
    return groups


def draw(pool: Questions, n: int, seed: int | str, used: Iterable[str] = ()) -> list[Question]:
    """`n` questions at random; those whose id is in `used` only once the others are spent.

    Fewer than `n` come back where the pool is smaller.
    """
    spent = set(used)
    order = random.Random(seed).sample(list(pool), len(pool))
    return sorted(order, key=lambda question: question.id in spent)[:n]


def draw_balanced(pool: Questions, n: int, domains: Sequence[str], seed: int) -> list[Question]:
    """`n` questions in equal parts from the `domains` (the first give one more if need be).

    The seed of a domain's draw holds its name: with one seed for all, the same places of every
    domain would be drawn, and with them the same gold letters.
    """
    groups = by_domain(pool)
    share, rest = divmod(n, len(domains))
    drawn = []
    for place, domain in enumerate(domains):
        drawn += draw(groups.get(domain, []), share + (place < rest), f"{seed}/{domain}")
    return drawn


def subset(pool: Questions, n: int | None, seed: int) -> list[Question]:
    """`n` questions in equal parts from their domains; all of them where `n` is None."""
    domains = [*by_domain(pool)]
    return list(pool) if n is None or not domains else draw_balanced(pool, n, domains, seed)


def split_by_fact(pool: Questions, shares: Mapping[str, float], seed: int) -> Parts:
    """Parts of the given shares (they sum to 1), by domain, with no fact in two parts."""
    parts: Parts = {name: [] for name in shares}
    for domain, group in sorted(by_domain(pool).items()):
        facts = sorted({question.fact_key for question in group})
        random.Random(f"{seed}/{domain}").shuffle(facts)
        ends = [round(total * len(facts)) for total in accumulate(shares.values())]
        part_of = {fact: [*shares][bisect(ends, place)] for place, fact in enumerate(facts)}
        for question in group:
            parts[part_of[question.fact_key]].append(question)
    return parts


# ---------------------------------------------------------------------------------------------
# The splits of a run. Their seeds are fixed, so that runs with other seeds share them.

SHARES = {"train": 0.6, "dev": 0.1, "test": 0.3}  # of a data set without a test split
DEV_NAMES = ("dev", "validation", "valid", "val")
ROLES = {"train": "train", "test": "test"} | dict.fromkeys(DEV_NAMES, "dev")
UNUSABLE = 0.1  # the share of a hub set's rows that may be unusable, and are left out


def splits(settings: Settings) -> Parts:
    """The multiple-choice questions by split: `train` (rounds), `dev` (curves, tau), `test`.

    `data.questions` replaces the test split. No fact and no question is in two splits: what is
    in test stands in neither of the others, what is in dev not in train.
    """
    data = settings.data
    if data.sources:
        parts = _from_sources(data.sources)
    else:
        parts = {split: load_questions(ROOT / data.bank / f"{split}.jsonl") for split in SHARES}
    if data.questions:
        parts["test"] = load_questions(ROOT / data.questions)
    return _held_out(parts)


def _held_out(parts: Parts) -> Parts:
    """The parts without what a part that is held out from them has too."""
    seen: set[Any] = set()
    for split in ("test", "dev", "train"):
        marks = [{(q.fact is None, q.fact_key), _text(q)} for q in parts[split]]
        apart = [q for q, mark in zip(parts[split], marks, strict=True) if not mark & seen]
        if shared := len(marks) - len(apart):
            progress(f"  {shared} questions left out of {split}: held-out splits have them too")
        parts[split] = apart
        seen = seen.union(*marks)
    return parts


def _text(question: Question) -> str:
    """What makes two questions the same: their texts, with the options in any order."""
    options = sorted(map(normalised, question.options))
    return digest([normalised(question.context), normalised(question.question), options])


def _from_sources(entries: Sequence[Source]) -> Parts:
    parts: Parts = {split: [] for split in SHARES}
    for source in entries:
        for split, group in _roles(source.use, load_source(source)).items():
            parts[split] += group
    counts = Counter(question.id for group in parts.values() for question in group)
    twice = [name for name, count in counts.items() if count > 1]
    sources.refuse([f"data.sources: {name!r} is the id of two questions" for name in twice])
    return parts


def _roles(use: str | None, groups: Parts) -> Parts:
    """The questions of one source as train, dev and test."""
    together = [question for group in groups.values() for question in group]
    if use in SHARES:
        return {use: together}
    parts: Parts = {}
    # A file of a split may be called as the hub calls its own: train-00000-of-00002
    roles = {name: ROLES.get(re.split("[^a-z]", name.lower())[0]) for name in groups}
    for name, role in roles.items():
        parts.setdefault(role or "", []).extend(groups[name])
    if use == "divide" or "test" not in parts:
        return split_by_fact(together, SHARES, seed=0)
    if unused := [name for name, role in roles.items() if not role]:
        progress(f"  not used, since others are named as splits: {', '.join(unused)}")
        del parts[""]
    if "train" in parts and "dev" not in parts:
        parts |= split_by_fact(parts["train"], {"train": 0.9, "dev": 0.1}, seed=0)
    return parts


def load_source(source: Source) -> Parts:
    """The questions of one source, by the names of its splits (a local one: of its files).

    Raises QuestionError for columns that cannot be told and for unusable rows: of a file any, of
    a hub set more than a tenth (fewer are left out, and counted on stderr); HubError where the
    hub does not give the set.
    """
    local = is_local(source.path)
    tables = sources.file_tables(ROOT / source.path) if local else hub_tables(source)
    groups: Parts = {}
    for name, table in tables.items():
        sources.refuse([] if table else [f"{source.path}, {name}: no rows"])
        if source.rows and source.rows < len(table):
            table = random.Random(0).sample(table, source.rows)
        rows = sources.shaped(name, table, source.columns, source.domain)
        groups[name], problems = sources.check_rows(rows, Question)
        if local or len(problems) > UNUSABLE * len(table):
            sources.refuse(problems)
        if problems:
            progress(f"  {len(problems)} rows of {source.path} are left out: {problems[0]} ...")
    return groups


# ---------------------------------------------------------------------------------------------
# Open-ended splits

# TruthfulQA has one split: its questions beyond the evaluated ones are the training pool.
OPEN_TRAIN = {"squad": "train", "truthfulqa": "validation", "gsm8k": "train"}
OPEN_TEST = {"squad": "validation", "truthfulqa": "validation", "gsm8k": "test"}


def r15_asked(settings: Settings) -> dict[str, int]:
    """How many questions R15 asks per task: as many as it takes rows, but three times the word
    problems, since those without a right trace are dropped.
    """
    rows = settings.open_ended.r15
    return {"squad": rows.squad, "truthfulqa": rows.truthfulqa, "gsm8k": 3 * rows.gsm8k}


def open_splits(settings: Settings) -> dict[str, list[OpenQuestion]]:
    """The open-ended questions by split: `train` (R15), `test`; `data.open_ended` replaces test."""
    test = settings.data.open_ended
    if test != "hub":
        bank = ROOT / settings.data.bank / "open_ended"
        files = {"train": bank / "train.jsonl", "test": bank / "test.jsonl"}
        files |= {"test": ROOT / test} if test else {}
        return {split: load_open_questions(file) for split, file in files.items()}
    evaluated = settings.open_ended.eval_questions
    chosen: dict[str, Table] = {"train": [], "test": []}
    for task, count in r15_asked(settings).items():
        skip = evaluated if OPEN_TRAIN[task] == OPEN_TEST[task] else 0
        chosen["test"] += sources.open_table(task, OPEN_TEST[task])[:evaluated]
        chosen["train"] += sources.open_table(task, OPEN_TRAIN[task])[skip : skip + count]
    return {split: _all(table, OpenQuestion, "the hub") for split, table in chosen.items()}
