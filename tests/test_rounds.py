"""The chain on a tiny model: what is learned, that it repeats, and that a kill loses one stage at most."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model

from foggen import training
from foggen.config import SettingsError, override
from foggen.engines import Completion, Engine, Sampling
from foggen.prompts import Messages
from foggen.questions import by_domain
from foggen.rounds import calibration_questions, dev_metrics, model_folder, replay, run_chain
from foggen.store import ROOT, Store, read_json, read_jsonl


def weights(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


class Scripted:
    """An engine that answers A with confidence 1.0, and counts what it was asked."""

    def __init__(self, model: Path) -> None:
        self.name, self.asked, self.models, self.slept = "scripted", 0, [model], 0

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        self.asked += len(prompts) * sampling.n
        return [[Completion("Confidence: 1.0\nFinal answer: A", 9, True)] * sampling.n for _ in prompts]

    def score(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[str]], temperature: float = 1.0
    ) -> list[list[float]]:
        self.asked += len(prompts)
        return [[-1.0 for _ in texts] for texts in continuations]

    def reload(self, path: Path) -> None:
        self.models.append(path)

    def sleep(self) -> None:
        self.slept += 1

    def close(self) -> None:
        pass


@pytest.fixture
def fake_sft(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """Replaces training by a note of its rows, for tests of the chain's bookkeeping."""
    calls: list[list[dict[str, Any]]] = []

    def note(job: training.Job) -> dict[str, Any]:
        calls.append([dict(row) for row in job.rows])
        job.out.mkdir()
        (job.out / "model.safetensors").write_text(str(job.seed))
        return {"rows": len(job.rows)}

    monkeypatch.setattr(training, "train", note)
    return calls


# ---- the chain


def test_chain_repeats_and_comes_from_the_store(small, tmp_path, questions):
    def nothing(folder: Path) -> Engine:
        raise AssertionError("a finished chain loads no model")

    first = run_chain(small, Store(tmp_path / "a"), questions, questions)
    assert [result.domain for result in first] == [None, "finance", "law"]
    assert str(run_chain(small, Store(tmp_path / "a"), questions, questions, nothing)) == str(first)
    again = run_chain(small, Store(tmp_path / "b"), questions, questions)
    assert [weights(result.model) for result in again] == [weights(result.model) for result in first]
    assert [r.evaluation for r in again] == [r.evaluation for r in first]
    names = [stage["stage"].rsplit("-", 1)[0] for stage in read_jsonl(tmp_path / "a" / "manifest.jsonl")]
    steps = [f"r{n:02d}-{step}" for n in range(3) for step in ("samples", "sft", "dev")]
    assert names == [step for step in steps if step != "r00-sft"]


def test_each_round_starts_from_the_merged_weights_before(small, tmp_path, questions, fake_sft):
    engine = Scripted(Path())
    results = run_chain(small, Store(tmp_path / "run"), questions, questions, lambda model: engine)
    models = [result.model for result in results]
    assert engine.models[1:] == models[1:]
    assert engine.slept == 2, "before each training"
    assert read_json(models[2].parent / "stage.json")["inputs"] == [f"{models[1].parent.name}/model"]


def test_rotation_replay_and_buffer(small, tmp_path, questions, fake_sft):
    settings = override(small, {"rounds": 5, "new_rows": 2, "calibration_rows": 4})
    results = run_chain(settings, Store(tmp_path / "run"), questions, questions, Scripted)
    assert [result.domain for result in results[1:]] == ["finance", "law", "finance", "law", "finance"]
    new = [[row["id"] for row in result.rows] for result in results]
    buffer = list(new[0])
    for number, rows in enumerate(fake_sft, 1):
        ids = [row["id"] for row in rows]
        assert ids[:2] == new[number] and len(ids) == 2 + min(5, len(buffer))
        assert set(ids[2:]) <= set(buffer)
        buffer += new[number]
    assert len(set(buffer)) == 4 + 4 * 2 and buffer.count(buffer[-1]) > 1, "fresh questions while there are any"


def test_no_replay_and_relabelled_replay(small, tmp_path, questions, fake_sft):
    run_chain(override(small, {"replay_rows": 0}), Store(tmp_path / "a"), questions, questions, Scripted)
    assert [len(rows) for rows in fake_sft] == [4, 4]
    again = override(small, {"relabel_replay": True})
    run_chain(again, Store(tmp_path / "b"), questions, questions, Scripted)
    assert [len(rows) for rows in fake_sft[2:]] == [9, 9]
    assert any(folder.name.startswith("r01-replay-samples") for folder in (tmp_path / "b" / "stages").iterdir())


def test_only_what_changed_is_computed_again(small, tmp_path, questions, fake_sft):
    engine = Scripted(Path())
    store = Store(tmp_path / "run")
    run_chain(small, store, questions, questions, lambda model: engine)
    asked = engine.asked
    run_chain(override(small, {"tau": 0.25}), store, questions, questions, lambda model: engine)
    assert engine.asked == asked and len(fake_sft) == 2
    run_chain(override(small, {"rounds": 3}), store, questions, questions, lambda model: engine)
    assert engine.asked == asked + 4 * 4 + 4 and len(fake_sft) == 3


def test_format_install_trains_on_the_siblings_labels(small, tmp_path, questions, fake_sft):
    sibling = make_model(tmp_path / "sibling", seed=1)
    settings = override(small, {"format_install": {"labels_from": str(sibling)}})
    engine = Scripted(Path())
    opened: list[Path] = []
    results = run_chain(
        settings, Store(tmp_path / "run"), questions, questions, lambda model: opened.append(model) or engine
    )
    assert opened == [sibling, results[0].model] and len(fake_sft) == 3
    assert [row["id"] for row in fake_sft[0]] == [row["id"] for row in results[0].rows]
    assert results[0].model.parent.name.startswith("r00-sft")


def test_calibration_buffer_is_balanced(small, questions):
    chosen = calibration_questions(questions, override(small, {"calibration_rows": 5}))
    assert {domain: len(group) for domain, group in by_domain(chosen).items()} == {"finance": 3, "law": 2}


def test_a_domain_without_questions_is_told(small, tmp_path, questions):
    with pytest.raises(SettingsError, match=r"domains: no training questions for alchemy; there are finance"):
        run_chain(override(small, {"domains": ["law", "alchemy"]}), Store(tmp_path), questions, questions, Scripted)


def test_a_model_that_is_nowhere_is_told_without_the_hub():
    with pytest.raises(SettingsError, match="no such folder"):
        model_folder("data/pocket/egde")


def test_replay_draws_without_repetition():
    rows: Any = [{"id": str(index)} for index in range(10)]
    assert len({row["id"] for row in replay(rows, 7, seed=1)}) == 7
    assert len(replay(rows, 99, seed=1)) == 10 and replay(rows, 7, 1) == replay(rows, 7, 1)


def test_dev_metrics_by_hand():
    rows = [
        {"id": "a", "domain": "law", "local_correct": 1, "confidence": 1.0},
        {"id": "b", "domain": "law", "local_correct": 0, "confidence": 0.25},
        {"id": "c", "domain": "law", "local_correct": 1, "confidence": 0.5},
        {"id": "d", "domain": "law", "local_correct": 0, "confidence": None},
    ]
    found = dev_metrics(rows, tau=0.5)
    assert (found["n"], found["accuracy"], found["kept"], found["parsed"]) == (4, 0.5, 0.5, 0.75)
    assert found["confidence"] == pytest.approx(1.75 / 3) and found["auroc"] == 1.0
    assert found["ece"] == pytest.approx((0 + 0.25 + 0.5) / 3)


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tiny import make_questions
from foggen.config import Settings
from foggen.rounds import run_chain
from foggen.store import Store, write_json
settings = Settings.model_validate_json(Path(sys.argv[2]).read_text())
store, questions = Store(sys.argv[1]), make_questions()
results = run_chain(settings, store, questions, questions)
write_json(store.run / "table.json", [result.record() for result in results])
"""


@pytest.mark.slow
def test_ten_kills_end_with_the_same_chain(small, tmp_path):
    """kill -9 at random moments of real training; the table and the weights are those of an unbroken run."""
    (tmp_path / "settings.json").write_text(override(small, {"rounds": 6}).model_dump_json())

    def start(run: Path) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-c",
            KILLED,
            str(run),
            str(tmp_path / "settings.json"),
            str(ROOT / "tests"),
        ]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT / "lib")})

    started = time.time()
    assert start(tmp_path / "whole").wait() == 0
    whole = time.time() - started
    dice = random.Random(0)
    killed = 0
    for _ in range(10):
        process = start(tmp_path / "run")
        time.sleep(dice.uniform(0.3, 0.9) * whole)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert start(tmp_path / "run").wait() == 0 and killed > 0

    def ends(run: Path) -> tuple[Any, dict[str, str]]:
        models = {folder.name: weights(folder / "model") for folder in (run / "stages").glob("r*-sft-*")}
        return json.loads((run / "table.json").read_text()), models

    assert str(ends(tmp_path / "run")) == str(ends(tmp_path / "whole"))
