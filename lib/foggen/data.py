"""Where a run's questions come from: the repository's bank, data sets of the hub, or files of the reader's own.

Knows the profile's `data` settings and nothing about models.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from foggen.config import Settings, Source
from foggen.hub import explained, is_local, token
from foggen.open_ended import load_hub
from foggen.questions import (
    OpenQuestion,
    Question,
    QuestionError,
    check_rows,
    draw,
    load_open_questions,
    load_questions,
    question_files,
    shape_rows,
    split_by_fact,
)
from foggen.store import ROOT, digest, progress

SHARES = {"train": 0.6, "dev": 0.1, "test": 0.3}  # of a data set without splits of its own
OWN_SPLITS = {"train": "train", "validation": "dev", "valid": "dev", "val": "dev", "dev": "dev", "test": "test"}
UNUSABLE = 0.1  # the share of a hub set's rows that may be unusable, and are left out


def splits(settings: Settings) -> dict[str, list[Question]]:
    """The multiple-choice questions by split: `train` (rounds), `dev` (curves, thresholds), `test`.

    `data.questions` replaces the test split alone. No fact and no question text is in two splits: what is in test
    stands in neither of the others, what is in dev not in train.
    """
    if settings.data.sources:
        parts = _from_sources(settings.data.sources)
    else:
        parts = {split: load_questions(ROOT / settings.data.bank / f"{split}.jsonl") for split in SHARES}
    if settings.data.questions:
        parts["test"] = load_questions(ROOT / settings.data.questions)
    return _held_out(parts)


def _text(question: Question) -> str:
    """What makes two questions the same: their words and their options in any order."""
    return digest([question.question.casefold().split(), sorted(question.options)])


def _held_out(parts: dict[str, list[Question]]) -> dict[str, list[Question]]:
    seen: set[str] = set()
    kept: dict[str, list[Question]] = {}
    for split in ("test", "dev", "train"):
        kept[split] = [one for one in parts[split] if not {one.unit, _text(one)} & seen]
        seen |= {mark for one in parts[split] for mark in (one.unit, _text(one))}
        if left := len(parts[split]) - len(kept[split]):
            progress(f"  {left} questions left out of {split}: held-out splits have them too")
    return {split: kept[split] for split in SHARES}


# ---------------------------------------------------------------------------------------------------------------
# Sources


def _from_sources(sources: list[Source]) -> dict[str, list[Question]]:
    """The questions of all sources by split. A question without a fact has its own text as its fact."""
    parts: dict[str, list[Question]] = {split: [] for split in SHARES}
    for source in sources:
        groups = {
            split: [one if one.fact else one.model_copy(update={"fact": _text(one)[:16]}) for one in questions]
            for split, questions in load_source(source).items()
        }
        for split, questions in _roles(source, groups).items():
            parts[split] += questions
    counts = Counter(question.id for questions in parts.values() for question in questions)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise QuestionError(f"data.sources: ids must be unique over all of them; twice: {', '.join(twice[:5])}")
    return parts


def _roles(source: Source, groups: dict[str, list[Question]]) -> dict[str, list[Question]]:
    """A source's questions as train, dev and test; seeds are fixed, so that all runs share the splits."""
    everything = [question for questions in groups.values() for question in questions]
    if source.use in SHARES:
        return {str(source.use): everything}
    own: dict[str, list[Question]] = {}
    for name, questions in groups.items():
        if name in OWN_SPLITS:
            own.setdefault(OWN_SPLITS[name], []).extend(questions)
    if source.use == "divide" or "test" not in own:
        return split_by_fact(everything, SHARES, seed=0)
    if "train" in own and "dev" not in own:
        own |= split_by_fact(own["train"], {"train": 0.9, "dev": 0.1}, seed=0)
    return own


def load_source(source: Source) -> dict[str, list[Question]]:
    """The questions of one source, by the names of its splits (a local one: of its files).

    Raises QuestionError for columns that cannot be told and for unusable rows: of a file any, of a hub set more
    than a tenth (fewer are left out, and counted on stderr). Raises HubError where the hub does not give it.
    """
    if is_local(source.path):
        files = question_files(ROOT / source.path)
        groups = {file.stem: load_questions(file, source.columns, source.domain) for file in files}
        return {name: draw(group, source.rows, seed=0) if source.rows else group for name, group in groups.items()}
    from datasets import load_dataset

    with explained(source.path, "dataset", source.revision):
        found = load_dataset(source.path, source.name, split=source.split, revision=source.revision, token=token())
    tables = {source.split: found} if source.split else found
    return {str(split): _from_table(table, str(split), source) for split, table in tables.items()}


def _from_table(table: Any, split: str, source: Source) -> list[Question]:
    """The questions of one split of a hub set, at random where only some are wanted."""
    from datasets import ClassLabel

    if source.rows and source.rows < len(table):
        table = table.shuffle(seed=0).select(range(source.rows))
    rows = table.to_list()
    for column, feature in table.features.items():
        if isinstance(feature, ClassLabel):
            names = dict(enumerate(feature.names))  # hidden labels are -1
            for row in rows:
                row[column] = names.get(row[column])
    where = "/".join(filter(None, (source.path.split("/")[-1], source.name, split)))
    placed = [(f"{where}, row {number}", row) for number, row in enumerate(rows)]
    questions, problems = check_rows(shape_rows(where, placed, source.columns, source.domain, where), Question)
    if len(problems) > UNUSABLE * len(rows):
        raise QuestionError(f"{where}: {len(problems)} problems in {len(rows)} rows:\n" + "\n".join(problems[:10]))
    if problems:
        progress(f"  {where}: {len(problems)} of {len(rows)} rows are unusable and left out: {problems[0]}")
    # ids are unique within a set, and not beside others
    return [
        one if one.id.startswith(where) else one.model_copy(update={"id": f"{where}-{one.id}"}) for one in questions
    ]


# ---------------------------------------------------------------------------------------------------------------
# Open-ended questions


def open_splits(settings: Settings) -> dict[str, list[OpenQuestion]]:
    """The open-ended questions by split: `train` (R15) and `test`; `data.open_ended` replaces the test split."""
    source = settings.data.open_ended
    if source == "hub":
        return _hub_splits(settings)
    folder = ROOT / settings.data.bank / "open_ended"
    files = {"train": folder / "train.jsonl", "test": ROOT / source if source else folder / "test.jsonl"}
    return {split: load_open_questions(file) for split, file in files.items()}


# TruthfulQA has one split: its questions beyond the evaluated ones are the training pool.
HUB_SPLITS = {"squad": ("train", "validation"), "truthfulqa": ("validation", "validation"), "gsm8k": ("train", "test")}


def _hub_splits(settings: Settings) -> dict[str, list[OpenQuestion]]:
    n, seed = settings.open_ended.eval_questions, settings.seed
    parts: dict[str, list[OpenQuestion]] = {"train": [], "test": []}
    for task, (train, test) in HUB_SPLITS.items():
        parts["test"] += load_hub(task, test, n, seed)
        # Word problems without a right trace are dropped, so more are asked than rows are wanted.
        wanted = 2 * getattr(settings.open_ended.r15, task)
        parts["train"] += load_hub(task, train, wanted, seed, skip=n if train == test else 0)
    return parts
