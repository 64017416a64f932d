"""Questions: the two types and their checks, how they are drawn, and the splits of a run.

A row of a question file (`fact` is what is asked about: the unit of splitting and resampling):

    {"id": "law-7", "domain": "law", "question": "Who may veto a bill?", "fact": "law/veto",
     "options": ["the court", "the president", "a voter"], "answer": "B"}

Must not know how models are prompted, run or trained.
"""

import random
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from pydantic.functional_validators import AfterValidator, BeforeValidator, model_validator

from foggen import inputs
from foggen.config import Settings, Source, is_local
from foggen.inputs import INVISIBLE, Row, Table, TableError, as_name, normalised
from foggen.prompts import SYSTEM_OPEN
from foggen.store import ROOT, digest, progress

DOMAINS = ("finance", "science", "coding", "law", "math", "kazakh_culture", "medical")  # rotation
TASKS = tuple(SYSTEM_OPEN)  # a file with the name of a task holds open-ended questions

# ---------------------------------------------------------------------------------------------
# Types


def _texts(value: Any) -> list[str]:
    """Texts without repeats: of a list, of SQuAD's `{"text": [...]}`, or of one text alone."""
    value = inputs.listed(value)
    value = value.get("text") if isinstance(value, Mapping) else value
    texts = value if isinstance(value, list | tuple) else [value]
    return list(dict.fromkeys(str(text) for text in texts if text not in (None, "")))


def _different(options: tuple[str, ...]) -> tuple[str, ...]:
    if len({normalised(option, keep_case=True) for option in options}) < len(options):
        raise ValueError("two are the same")
    return options


Text = Annotated[str, Field(pattern=f"[^{INVISIBLE}]", description="a nonempty text")]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_texts)]
Options = Annotated[tuple[Text, ...], AfterValidator(_different)]
Name = Annotated[str, BeforeValidator(as_name)]
Fact = Annotated[str | None, BeforeValidator(as_name)]


class AnyQuestion(BaseModel, frozen=True, coerce_numbers_to_str=True, regex_engine="python-re"):
    """What questions of both kinds have; `split` names the file or split that they come from."""

    id: Name
    question: Text
    context: str = ""
    fact: Fact = None
    split: str | None = None

    @property
    def fact_key(self) -> str:
        """What is sampled independently: the fact, or else the passage, or else the id."""
        if self.fact is not None:
            return normalised(self.fact)
        passage = normalised(self.context)
        return digest(passage)[:12] if passage else self.id


class Question(AnyQuestion, frozen=True):
    """A multiple-choice question; no two of its options are the same text but for white space."""

    domain: Name = Field(pattern="^(?!mean$)", description="a name other than `mean`")
    options: Options = Field(min_length=2, max_length=26, description="2 to 26 different texts")
    answer: str = Field(pattern="^[A-Z]$", description="the letter of the right option")
    difficulty: int | str | None = None
    lang: str = "en"


class OpenQuestion(AnyQuestion, frozen=True):
    """A question with a free answer: all right ones, and (TruthfulQA) known wrong ones."""

    task: Literal["squad", "truthfulqa", "gsm8k"] = Field(description=" or ".join(TASKS))
    answers: Texts = Field(min_length=1, description="at least one text")
    incorrect: Texts = ()
    solution: str = ""

    @model_validator(mode="before")
    @classmethod
    def _public_fields(cls, row: Row) -> Row:
        """The fields of SQuAD, TruthfulQA and GSM8K are read too."""
        fields = {"answers": row.get("answer"), "fact": row.get("title")}
        if "correct_answers" in row:
            fields["answers"] = [row.get("best_answer"), *_texts(row["correct_answers"])]
            fields["incorrect"] = row.get("incorrect_answers")
        if "####" in str(row.get("answer")):
            fields["solution"], fields["answers"] = map(str.strip, row["answer"].rsplit("####", 1))
        return fields | row


# ---------------------------------------------------------------------------------------------
# Rows of any usual shape as questions


def shaped(name: str, table: Table, source: Source) -> Table:
    """A table of any usual shape with the fields of a Question; validation tells what a row lacks.

    `name` is the split, and begins the ids of rows without one. The answer becomes a letter; a
    position counts from 1 only where the rows prove it. Raises TableError, with the lines to write
    into the profile, where columns or answers cannot be told.
    """
    given = source.columns
    if given.messages or not any(row.keys() & {*inputs.USUAL["question"]} for _, row in table):
        table = [(place, inputs.read_chat(row, given.messages) | row) for place, row in table]
    columns = inputs.find_columns(table, given)
    questions: Table = []
    readings = []
    for number, (place, row) in enumerate(table):
        fields = {field: row.get(str(column)) for field, column in columns.items()}
        options, labels = inputs.read_options(row, columns["options"])
        readings.append(inputs.read_answer(fields["answer"], options, labels))
        domain = normalised(str(as_name(source.domain or fields["domain"]) or ""))
        fields |= {"options": options, "domain": re.sub("[ _-]+", "_", domain) or None}
        filled = {field: value for field, value in (row | fields).items() if value is not None}
        questions.append((place, {"id": f"{name}-{number}"} | filled | {"split": name}))
    alone = [str(row.get("question")) for _, row in questions if "context" in row]
    if not source.columns.question and any(re.fullmatch("[A-Za-z]+", word) for word in alone):
        raise TableError(f"{name}: questions of one word; name their column: `question: <column>`")
    how = source.columns.answer_is or best_reading(readings)
    if not how:
        raise TableError(f"{name}: unclear answers; say answer_is: letter, text, index0 or index1")
    for (_, row), letters in zip(questions, readings, strict=True):
        row["answer"] = letters.get(how, f"{row.get('answer')} (read as {how})")
    return questions


def best_reading(readings: Sequence[Mapping[str, str]]) -> str | None:
    """The way that reads most answers; None where two do and disagree, or none reads half."""
    counts = Counter(how for letters in readings for how in letters)
    most = max(counts.values(), default=0)
    best = [how for how, count in counts.items() if count == most]
    agree = all(len({letters.get(how) for how in best}) < 2 for letters in readings)
    return best[0] if best and agree and 2 * most >= len(readings) else None


def load_source(source: Source) -> list[Question]:
    """The questions of one source, each with its `split` (in local ones: the name of its file).

    Raises TableError for columns that cannot be told and for unusable rows: of a file any, of
    a hub's split more than a tenth (fewer are left out, and counted on stderr); HubError where the
    hub does not give the set.
    """
    # A reader can mend files, but no hub set: a few of its rows are left out
    is_file = source.path.lower().endswith(tuple(inputs.READERS))  # if only a misspelt one
    local = is_file or is_local(source.path)
    tables = inputs.file_tables(ROOT / source.path) if local else inputs.hub_tables(source)
    parts = []
    for name, table in tables.items():
        if source.rows and source.rows < len(table):
            table = random.Random(0).sample(table, source.rows)
        parts.append(shaped(name, table, source))
    if local:  # all that is wrong with the files is told at once
        return inputs.check_rows([row for part in parts for row in part], Question, "id")
    checked = [inputs.check_rows(part, Question, "id", unusable=0.1) for part in parts]
    return [question for part in checked for question in part]


def load_questions(path: Path) -> list[Question]:
    """Multiple-choice questions of a JSONL, CSV or Parquet file, or of a folder of such files.

    A row has question, options and answer in any usual shape, and a domain. Raises TableError with
    all bad rows, or with the columns that cannot be told.
    """
    return load_source(Source(path=str(path.absolute())))


def load_open_questions(path: Path) -> list[OpenQuestion]:
    """Open-ended questions of a file, or of a folder's squad, truthfulqa and gsm8k files.

    A row's task is its field `task`, or else its file's name. Raises TableError with all bad rows.
    """
    table: Table = []
    for stem, rows in inputs.file_tables(path, open_ended=True).items():
        for number, (place, row) in enumerate(rows):
            filled = {field: value for field, value in row.items() if value is not None}
            table.append((place, {"task": stem, "id": f"{stem}-{number}"} | filled))
    return inputs.check_rows(table, OpenQuestion, "id")


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
    order = random.Random(seed).sample(pool, len(pool))
    return sorted(order, key=lambda question: question.id in spent)[:n]


def subset(pool: Questions, n: int | None, seed: int, *domains: str) -> list[Question]:
    """`n` questions in equal parts from the `domains` (the first give one more if need be).

    By default from the domains of the pool; all questions where `n` is None. The seed of a domain's
    draw holds its name: with one seed for all, the same places of every domain would be drawn, and
    with them the same gold letters.
    """
    groups = by_domain(pool)
    domains = domains or tuple(groups)
    if n is None or not domains:
        return list(pool)
    share, rest = divmod(n, len(domains))
    drawn = []
    for place, domain in enumerate(domains):
        drawn += draw(groups.get(domain, []), share + (place < rest), f"{seed}/{domain}")
    return drawn


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
ROLES = dict(train="train", dev="dev", validation="dev", valid="dev", val="dev", test="test")


def splits(settings: Settings) -> Parts:
    """The multiple-choice questions by split: `train` (rounds), `dev` (curves, tau), `test`.

    `data.questions` replaces the test split. No fact and no question is in two splits: what is
    in test stands in neither of the others, what is in dev not in train.
    """
    data = settings.data
    parts: Parts = {split: [] for split in SHARES}
    files = [{"path": f"{data.bank}/{split}.jsonl", "use": split} for split in parts]
    bank = [Source.model_validate(file) for file in files]
    for source in data.sources or bank:
        for split, group in _roles(source.use, load_source(source)).items():
            parts[split] += group
    counts = Counter(question.id for group in parts.values() for question in group)
    inputs.refuse([f"{name!r} is the id of {n} questions" for name, n in counts.items() if n > 1])
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


def _roles(use: str | None, questions: list[Question]) -> Parts:
    """The questions of one source as train, dev and test."""
    if use in SHARES:
        return {use: questions}
    parts: Parts = {}
    for question in questions:
        # A file of a split may be called as the hub calls its own: train-00000-of-00002
        role = ROLES.get(re.split("[^a-z]", str(question.split).lower())[0], "unused")
        parts.setdefault(role, []).append(question)
    if use == "divide" or "test" not in parts:
        return split_by_fact(questions, SHARES, seed=0)
    if unused := parts.pop("unused", []):
        progress(f"  {len(unused)} questions of other splits than train, dev and test: not used")
    if "train" in parts and "dev" not in parts:
        parts |= split_by_fact(parts["train"], {"train": 0.9, "dev": 0.1}, seed=0)
    return parts


# ---------------------------------------------------------------------------------------------
# Open-ended splits

OPEN_SETS = {  # revisions are pinned, so that later edits of a set cannot change a result
    "squad": Source(path="rajpurkar/squad", revision="7b6d24c440a36b6815f21b70d25016731768db1f"),
    "truthfulqa": Source(path="truthfulqa/truthful_qa", name="generation",
                         revision="741b8276f2d1982aa3d5b832d3ee81ed3b896490"),
    "gsm8k": Source(path="openai/gsm8k", name="main",
                    revision="740312add88f781978c0658806c59bc2815b9866"),
}  # fmt: skip


def r15_asked(settings: Settings) -> dict[str, int]:
    """How many questions R15 asks per task: as many as it takes rows, but three times the word
    problems, since those without a right trace are dropped.
    """
    rows = settings.open_ended.r15
    return {"squad": rows.squad, "truthfulqa": rows.truthfulqa, "gsm8k": 3 * rows.gsm8k}


def open_splits(settings: Settings) -> dict[str, list[OpenQuestion]]:
    """The open-ended questions by split: `train` (R15), `test`; `data.open_ended` replaces test.

    From the hub's sets, for `data.open_ended: hub`, they are drawn alike for all runs.
    """
    data, count = settings.data, settings.open_ended.eval_questions
    if data.open_ended != "hub":
        bank = f"{data.bank}/open_ended"
        files = {"train": f"{bank}/train.jsonl", "test": data.open_ended or f"{bank}/test.jsonl"}
        return {split: load_open_questions(ROOT / file) for split, file in files.items()}
    chosen: dict[str, Table] = {"train": [], "test": []}
    for task, asked in r15_asked(settings).items():
        tables = inputs.hub_tables(OPEN_SETS[task]).values()
        mixed = [random.Random(0).sample(table, len(table)) for table in tables]
        # TruthfulQA has one split: what is not evaluated is for training
        skip = count if len(mixed) == 1 else 0
        for split, rows in ("train", mixed[0][skip : skip + asked]), ("test", mixed[-1][:count]):
            chosen[split] += [(place, row | {"task": task}) for place, row in rows]
    return {split: inputs.check_rows(table, OpenQuestion, "id") for split, table in chosen.items()}
