"""What CONTRIBUTING says is enough: a toy domain, engine, baseline and profile, each added in its one place."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import make_bank
import pytest
import yaml
from outcomes_factory import make_outcomes

from foggen import engines, rounds, routing
from foggen.config import Cloud, Settings, load_profile
from foggen.data import splits
from foggen.engines import ENGINES, Completion, Sampling
from foggen.questions import Question
from foggen.reproduce import make_plan
from foggen.store import ROOT, write_jsonl


def profile(folder: Path, **differs: Any) -> Path:
    """A profile file: the pocket one, and what differs."""
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({"base": "pocket", "name": "toy", **differs}))
    return path


def test_a_domain_is_a_source_of_a_profile(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"m{i}",
            "question": f"How many strings has instrument {i}?",
            "options": ["4", "6"],
            "answer": "A",
        }
        for i in range(60)
    ]
    music = write_jsonl(tmp_path / "music.jsonl", rows)
    source = {"path": str(music), "domain": "music", "use": "divide"}
    settings = load_profile(profile(tmp_path, domains=["music"], data={"sources": [source]}))
    parts = splits(settings)
    assert {question.domain for part in parts.values() for question in part} == {"music"}
    assert [len(parts[split]) > 3 for split in ("train", "dev", "test")] == [True] * 3
    assert len(rounds.calibration_questions(parts["train"], settings)) == len(parts["train"])


def test_a_domain_of_the_bank_is_a_file(tmp_path: Path) -> None:
    strings = {"violin": 4, "guitar": 6, "dombyra": 2, "oud": 11, "banjo": 5, "sitar": 18, "harp": 47, "kobyz": 2}
    relation = {
        "id": "strings",
        "lang": "en",
        "phrasings": ["How many strings has the {s}?"],
        "statements": ["The {s} has {a} strings."],
        "facts": [[f"{size} {name}", count, 1] for size in ("small", "large") for name, count in strings.items()],
    }
    facts, questions = tmp_path / "bank", tmp_path / "bank" / "questions"
    shutil.copytree(make_bank.BANK, facts)
    (facts / "music.yaml").write_text(yaml.safe_dump({"computed": "arithmetic", "relations": [relation]}))
    make_bank.main(["--facts", str(facts), "--out", str(questions)])
    before = splits(load_profile("pocket"))
    parts = splits(load_profile(profile(tmp_path, domains=["music"], data={"bank": str(questions)})))
    music = {split: [one for one in part if one.domain == "music"] for split, part in parts.items()}
    assert {split: parts[split][: len(before[split])] for split in parts} == before, "the other domains stay"
    assert all(music[split] == parts[split][len(before[split]) :] for split in parts)
    assert [len({question.fact for question in music[split]}) > 3 for split in ("train", "dev", "test")] == [True] * 3
    assert {"What is", "How many"} <= {" ".join(one.question.split()[:2]) for one in music["test"]}


class Parrot:
    """An engine that always says the same."""

    def __init__(self, model: Path | str, dtype: str = "auto") -> None:
        self.name = str(model)

    def generate(self, prompts: Sequence[Any], sampling: Sampling) -> list[list[Completion]]:
        return [[Completion("Confidence: 0.75\nFinal answer: A", 5, True)] * sampling.n for _ in prompts]

    def score(self, prompts: Sequence[Any], continuations: Any, temperature: float = 1.0) -> Any:
        return [[0.0] * len(texts) for texts in continuations]

    def sleep(self) -> None: ...

    def reload(self, path: Path) -> None: ...

    def close(self) -> None: ...


def test_an_engine_is_a_line(monkeypatch: pytest.MonkeyPatch, questions: list[Question]) -> None:
    monkeypatch.setitem(ENGINES, "parrot", f"{__name__}:Parrot")
    settings = load_profile("pocket").model_copy(update={"engine": "parrot"})
    outcomes = rounds.evaluate(rounds.edge_engine(settings)(Path("any")), questions, settings)
    assert {row["confidence"] for row in outcomes} == {0.75}
    assert [row["local_correct"] for row in outcomes] == [question.answer == "A" for question in questions]


def test_profiles_know_the_engines_there_are() -> None:
    assert set(get_args(Cloud.model_fields["engine"].annotation)) == set(ENGINES)
    assert set(get_args(Settings.model_fields["engine"].annotation)) == set(ENGINES) - {"openai"}
    with pytest.raises(engines.EngineError, match="expected one of transformers, vllm, openai"):
        engines.make_engine("parrot", "any")


def test_a_baseline_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = make_outcomes(80).assign(luck=lambda table: table["local_correct"])
    monkeypatch.setitem(routing.SCORES, "luck", ("clairvoyant", 3, 7))
    table = routing.baselines_table(outcomes, resamples=20).set_index(["method", "domain"])
    row, ours = table.loc[("clairvoyant", "mean")], table.loc[("FogGen", "mean")]
    assert row["sysacc"] > ours["sysacc"] and (row["forward_passes"], row["extra_tokens"]) == (3, 7)


def test_a_profile_is_a_file(tmp_path: Path) -> None:
    settings = load_profile(profile(tmp_path, rounds=3))
    assert (settings.rounds, settings.name) == (3, "toy") and settings.tau == load_profile("pocket").tau
    plan = make_plan(settings, tmp_path / "run", {}, ROOT / "notebooks")
    assert [notebook.stem[:2] for notebook in plan.keys] == ["00", "01", "02", "03", "04", "05"]
