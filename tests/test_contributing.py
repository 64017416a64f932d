"""What CONTRIBUTING says is enough: a toy domain, engine, baseline and profile."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import make_bank
import pytest
import yaml
from outcomes_factory import make_outcomes

from foggen import chain, evaluation, routing
from foggen.config import Cloud, Settings, load_profile
from foggen.engines import ENGINES, Completion, Engine, Sampling, make_engine
from foggen.questions import Question, splits
from foggen.reproduce import notebook_keys
from foggen.store import ROOT, write_jsonl

SPLITS = ("train", "dev", "test")


def profile(folder: Path, **differs: Any) -> Path:
    """A profile file: the pocket one, and what differs."""
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({"base": "pocket", "name": "toy", **differs}))
    return path


def test_a_domain_is_a_source_of_a_profile(tmp_path: Path) -> None:
    row = {"options": ["4", "6"], "answer": "A"}
    rows = [
        {"id": f"m{n}", "question": f"How many strings has instrument {n}?", **row}
        for n in range(60)
    ]
    music = write_jsonl(tmp_path / "music.jsonl", rows)
    source = {"path": str(music), "domain": "music", "use": "divide"}
    settings = load_profile(profile(tmp_path, domains=["music"], data={"sources": [source]}))
    parts = splits(settings)
    assert {question.domain for part in parts.values() for question in part} == {"music"}
    assert all(len(parts[split]) > 3 for split in SPLITS)
    buffer = chain.calibration_questions(parts["train"], settings)
    assert len(buffer) == len(parts["train"])


def test_a_domain_of_the_bank_is_a_file(tmp_path: Path) -> None:
    strings = {"violin": 4, "guitar": 6, "dombyra": 2, "oud": 11, "banjo": 5, "harp": 47}
    facts = [[f"{size} {name}", n, 1] for size in ("small", "large") for name, n in strings.items()]
    relation = {
        "id": "strings",
        "lang": "en",
        "phrasings": ["How many strings has the {s}?"],
        "statements": ["The {s} has {a} strings."],
        "facts": facts,
    }
    bank, questions = tmp_path / "bank", tmp_path / "bank" / "questions"
    shutil.copytree(make_bank.BANK, bank)
    music = {"computed": "arithmetic", "relations": [relation]}
    (bank / "music.yaml").write_text(yaml.safe_dump(music))
    make_bank.main(["--facts", str(bank), "--out", str(questions)])
    before = splits(load_profile("pocket"))
    toy = profile(tmp_path, domains=["music"], data={"bank": str(questions)})
    parts = splits(load_profile(toy))
    music = {split: [q for q in parts[split] if q.domain == "music"] for split in SPLITS}
    assert all(len({question.fact for question in music[split]}) > 3 for split in SPLITS)
    for split in SPLITS:
        others = [question for question in parts[split] if question.domain != "music"]
        gone = set(before[split]) - set(others)
        assert [q for q in before[split] if q not in gone] == others, "the other domains stay"
        assert split == "train" or not gone  # a new test question may be one of training's
    asked = {" ".join(question.question.split()[:2]) for question in music["test"]}
    assert {"What is", "How many"} <= asked


class Parrot(Engine):
    """An engine that always says the same."""

    def __init__(self, model: Path | str, dtype: str = "auto") -> None:
        self.name = str(model)

    def generate(self, prompts: Sequence[Any], sampling: Sampling) -> list[list[Completion]]:
        said = Completion("Confidence: 0.75\nFinal answer: A", 5, True)
        return [[said] * sampling.n for _ in prompts]


def test_an_engine_is_a_line(monkeypatch: pytest.MonkeyPatch, questions: list[Question]) -> None:
    monkeypatch.setitem(ENGINES, "parrot", f"{__name__}:Parrot")
    settings = load_profile("pocket").model_copy(update={"engine": "parrot"})
    engine = chain.edge_slot(settings).load(Path("any"))
    rows = evaluation.greedy_answers(engine, questions, settings)
    assert {row["confidence"] for row in rows} == {0.75}
    right = [row["local_correct"] for row in rows]
    assert right == [question.answer == "A" for question in questions]


def test_profiles_know_the_engines_there_are() -> None:
    assert set(get_args(Cloud.model_fields["engine"].annotation)) == set(ENGINES)
    assert set(get_args(Settings.model_fields["engine"].annotation)) == set(ENGINES) - {"openai"}
    with pytest.raises(KeyError, match="parrot"):
        make_engine("parrot", "any")


def test_a_baseline_is_a_column() -> None:
    outcomes = make_outcomes(80).assign(luck=lambda table: table["local_correct"])
    table = routing.score_table(outcomes, ["luck", "confidence"], 0.3, resamples=20)
    table = table.set_index(["score", "domain"])
    luck, ours = table.loc[("luck", "mean")], table.loc[("confidence", "mean")]
    assert luck["sysacc"] > ours["sysacc"] and luck["auroc"] == 1 and ours["difference"] > 0


def test_a_profile_is_a_file(tmp_path: Path) -> None:
    settings = load_profile(profile(tmp_path, rounds=3))
    assert (settings.rounds, settings.name) == (3, "toy")
    assert settings.tau == load_profile("pocket").tau
    keys = notebook_keys(settings, ROOT / "notebooks")
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    assert [notebook.stem for notebook in keys] == names
