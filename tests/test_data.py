"""Sources of questions: files and hub sets, their splits, and that no test question is ever trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tiny import make_questions

from foggen import data
from foggen.config import Settings, Source, load_profile, override
from foggen.questions import DOMAINS, Question, QuestionError, load_questions
from foggen.store import ROOT

SHARED = ROOT.parent / "shared" / "data"


def write(path: Path, questions: list[Question]) -> Path:
    rows = [question.model_dump(exclude={"split"}, exclude_none=True) for question in questions]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def with_sources(*sources: dict[str, Any]) -> Settings:
    return override(load_profile("pocket"), {"data.sources": list(sources)})


def marks(questions: list[Question]) -> set[str]:
    return {question.unit for question in questions}


def test_one_file_is_divided_by_facts(tmp_path: Path) -> None:
    questions = make_questions(40)
    settings = with_sources({"path": str(write(tmp_path / "all.jsonl", questions))})
    parts = data.splits(settings)
    assert [len(parts[split]) for split in ("train", "dev", "test")] == [24 * 7, 4 * 7, 12 * 7]
    assert not marks(parts["train"]) & marks(parts["test"]) and not marks(parts["dev"]) & marks(parts["test"])
    assert data.splits(settings) == parts == data.splits(override(settings, {"seed": 5})), "whatever the run's seed"


def test_a_folder_with_own_splits_keeps_them(tmp_path: Path) -> None:
    questions = [one.model_copy(update={"fact": None}) for one in make_questions(20, ("law",))]
    write(tmp_path / "set" / "train.jsonl", questions[:14])
    write(tmp_path / "set" / "validation.jsonl", questions[14:16])
    write(tmp_path / "set" / "test.jsonl", questions[16:])
    parts = data.splits(with_sources({"path": str(tmp_path / "set")}))
    ids = {split: [one.id for one in group] for split, group in parts.items()}
    assert ids == {
        "train": [one.id for one in questions[:14]],
        "dev": [one.id for one in questions[14:16]],
        "test": [one.id for one in questions[16:]],
    }
    (tmp_path / "set" / "validation.jsonl").unlink()
    parts = data.splits(with_sources({"path": str(tmp_path / "set")}))
    assert [len(parts[split]) for split in ("train", "dev", "test")] == [13, 1, 4], "dev is cut from train"


def test_a_test_question_in_training_is_left_out_of_it(tmp_path: Path, capsys: Any) -> None:
    """The same words with shuffled options and another id, from another file; and a shared fact."""
    one, two, three, four = (make_questions(7, ("law",))[index] for index in (0, 2, 4, 6))
    copy = one.model_copy(
        update={
            "id": "copy",
            "fact": None,
            "question": f" {one.question.upper()} ",
            "options": one.options[::-1],
        }
    )
    fact = two.model_copy(update={"id": "fact", "question": "In other words?"})
    train = write(tmp_path / "a.jsonl", [copy, fact, three])
    test = write(tmp_path / "b.jsonl", [one, two])
    dev = write(tmp_path / "c.jsonl", [four])
    sources = [{"path": str(path), "use": use} for path, use in ((train, "train"), (test, "test"), (dev, "dev"))]
    parts = data.splits(with_sources(*sources))
    assert {split: [q.id for q in group] for split, group in parts.items()} == {
        "train": [three.id],
        "dev": [four.id],
        "test": [one.id, two.id],
    }
    assert "2 questions left out of train" in capsys.readouterr().err
    mine = override(with_sources(*sources), {"data.questions": str(write(tmp_path / "d.jsonl", [three]))})
    assert [q.id for q in data.splits(mine)["train"]] == ["copy", "fact"], "one's own test set is held out too"


def test_the_bank_loses_no_question_to_the_check() -> None:
    settings = load_profile("pocket")
    files = {split: ROOT / settings.data.bank / f"{split}.jsonl" for split in ("train", "dev", "test")}
    assert data.splits(settings) == {split: load_questions(file) for split, file in files.items()}


def test_a_bank_is_a_folder_with_a_file_for_each_split(tmp_path: Path) -> None:
    settings = override(load_profile("pocket"), {"data.bank": str(tmp_path)})
    for split, question in zip(("train", "dev"), make_questions(2, ("law",)), strict=True):
        write(tmp_path / f"{split}.jsonl", [question])
    with pytest.raises(QuestionError, match=r"test\.jsonl: no such file"):
        data.splits(settings)
    with pytest.raises(QuestionError, match=r"open_ended/train\.jsonl: no such file"):
        data.open_splits(settings)


def test_ids_are_unique_over_sources_and_rows_can_be_limited(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", make_questions(40, ("law",)))
    with pytest.raises(QuestionError, match="twice: law-0"):
        data.splits(with_sources({"path": str(file), "use": "train"}, {"path": str(file), "use": "test"}))
    few = data.splits(with_sources({"path": str(file), "rows": 10}))
    assert sum(map(len, few.values())) == 10


def hub_table(rows: list[dict[str, Any]]) -> Dataset:
    features = Features(
        {
            "question": Value("string"),
            "choices": [Value("string")],
            "answer": ClassLabel(names=list("ABCD")),
        }
    )
    return Dataset.from_list(rows, features=features)


def test_hub_sets_by_their_splits(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    rows = [
        {"question": f"Number {n}?", "choices": [f"{n}", f"{n + 1}", f"{n + 2}", f"{n + 3}"], "answer": n % 4}
        for n in range(40)
    ]
    broken = {"question": "Twice?", "choices": ["a", "a", "b", "c"], "answer": 0}
    asked = []

    def load(path: str, name: str | None, split: str | None, revision: str | None, token: Any) -> Any:
        asked.append((path, name, split, revision))
        whole = {"train": hub_table([*rows[:30], broken]), "test": hub_table(rows[30:])}
        return whole[split] if split else DatasetDict(whole)

    monkeypatch.setattr("datasets.load_dataset", load)
    entry = {"path": "some/set", "name": "small", "revision": "abc", "domain": "math"}
    parts = data.splits(with_sources(entry))
    assert asked == [("some/set", "small", None, "abc")]
    assert [len(parts[split]) for split in ("train", "dev", "test")] == [27, 3, 10]
    assert [one.answer for one in parts["test"]] == ["ABCD"[n % 4] for n in range(30, 40)]
    assert parts["test"][0].id == "set/small/test-0" and {one.domain for one in parts["train"]} == {"math"}
    said = capsys.readouterr().err
    assert "set/small/train: 1 of 31 rows are unusable" in said and "row 30: field `options`" in said
    divided = data.splits(with_sources({**entry, "split": "train", "use": "divide", "rows": 20}))
    assert asked[-1][2] == "train" and sum(map(len, divided.values())) in (19, 20)
    hidden = [{**row, "answer": -1} for row in rows[:20]]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: hub_table([*hidden, *rows[20:]]))
    with pytest.raises(QuestionError, match=r"set/small/test: 20 problems in 40 rows"):
        data.load_source(Source(**{**entry, "split": "test"}))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no external question sets beside this checkout ({SHARED.name})")
def test_external_question_sets_are_a_source() -> None:
    parts = data.splits(with_sources({"path": str(SHARED)}))
    assert 1300 < sum(map(len, parts.values())) <= 1317
    for split in parts:
        assert {question.domain for question in parts[split]} == set(DOMAINS)
    assert not marks(parts["train"]) & marks(parts["test"])
