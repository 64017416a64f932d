"""The chain on a tiny model: what is learnt, that it repeats, and that a kill loses one stage."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from scripted import OPEN, Scripted, noted_trainings, slot
from tiny import make_model

from foggen import evaluation
from foggen.chain import (
    buffer_rows,
    calibration_questions,
    edge_slot,
    replay,
    run_chain,
    run_r15,
    trained_checkpoint,
)
from foggen.config import Settings, SettingsError, override
from foggen.engines import EngineError, EngineSlot
from foggen.questions import by_domain
from foggen.store import ROOT, Run, read_json, read_jsonl


def weights(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def engine() -> Scripted:
    return Scripted()


@pytest.fixture
def edge(engine: Scripted) -> EngineSlot:
    return slot(engine)


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    return noted_trainings(monkeypatch)


def stages(run: Run) -> dict[str, list[str]]:
    """The stages in the order they were made, with their inputs."""
    rows = read_jsonl(run.folder / "manifest.jsonl")
    return {row["stage"].rsplit("-", 1)[0]: row["inputs"] for row in rows}


# ---- the chain


def test_the_chain_repeats_and_comes_from_the_run(small, tmp_path, questions, capfd):
    run, other = Run(tmp_path / "a", small), Run(tmp_path / "b", small)
    with closing(edge_slot(small)) as slot:
        first, again = (run_chain(one, questions, questions, slot) for one in (run, other))
    assert [result.domain for result in first] == [None, "finance", "law"]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("R")]
    assert len(lines) == 6 and lines[1].startswith("R1  finance") and lines[:3] == lines[3:]
    assert [weights(one.model) for one in again] == [weights(one.model) for one in first]
    assert all(a.evaluation.equals(b.evaluation) for a, b in zip(first, again, strict=True))
    none = EngineSlot(lambda model: pytest.fail("a finished chain loads no model"))
    found = run_chain(run, questions, questions, none)
    assert str([one.record() for one in found]) == str([one.record() for one in first])
    steps = ("samples", "sft", "dev-answers")
    expected = [f"r{n:02d}-{step}" for n in range(3) for step in steps]
    assert list(stages(run)) == [name for name in expected if name != "r00-sft"]


def test_every_round_starts_from_the_merged_weights_before(
    small, tmp_path, questions, engine, edge, learnt
):
    results = run_chain(Run(tmp_path, small), questions, questions, edge)
    raw, *models = [result.model for result in results]
    # Labelled by the checkpoint before; asleep while training; the caller's slot stays open
    made = f"made with {raw.name}"
    assert engine.events == [made, "sleep", models[0], "sleep", models[1]]
    stage = read_json(models[1].parent / "stage.json")
    assert stage["inputs"] == [f"{models[0].parent.name}/model"]
    assert [result.training for result in results] == [{}, {"rows": 9}, {"rows": 9}]


def test_rotation_replay_and_buffer(small, tmp_path, questions, edge, learnt):
    settings = override(small, {"rounds": 5, "new_rows": 2, "calibration_rows": 4})
    results = run_chain(Run(tmp_path, settings), questions, questions, edge)
    turns = ["finance", "law", "finance", "law", "finance"]
    assert [result.domain for result in results[1:]] == turns
    new = [[row["id"] for row in result.rows] for result in results]
    buffer = list(new[0])
    for number, rows in enumerate(learnt, 1):
        ids = [row["id"] for row in rows]
        assert ids[:2] == new[number] and len(ids) == 2 + min(5, len(buffer))
        assert set(ids[2:]) <= set(buffer)
        buffer += new[number]
    # 12 questions, of which 4 + 2 * 5 are asked: fresh ones while there are any
    assert len(set(buffer)) == 4 + 4 * 2 < len(buffer)
    rows = buffer_rows(results)
    assert [row["id"] for row in rows] == buffer
    assert replay(rows, 7, 1) == replay(rows, 7, 1) != replay(rows, 7, 2)


def test_no_replay_and_relabelled_replay(small, tmp_path, questions, edge, learnt):
    none = override(small, {"replay_rows": 0})
    run_chain(Run(tmp_path / "a", none), questions, questions, edge)
    assert [len(rows) for rows in learnt] == [4, 4]
    again = Run(tmp_path / "b", override(small, {"relabel_replay": True}))
    run_chain(again, questions, questions, edge)
    assert [len(rows) for rows in learnt[2:]] == [9, 9]
    assert {"r01-replay-samples", "r02-replay-samples"} <= set(stages(again))


def test_only_what_changed_is_computed_again(small, tmp_path, questions, engine, edge, learnt):
    for changes, asked, trained in (
        ({}, 6 * 4 + 4 + 2 * (4 * 4 + 4), 2),
        ({"tau": 0.25}, 0, 0),
        ({"rounds": 3}, 4 * 4 + 4, 1),
        ({"lora.r": 8}, 4 + 4 * 4 + 4, 2),  # the first round's labels stand
        ({"top_p": 0.9}, 6 * 4 + 2 * 4 * 4, 0),  # the same labels, so the same training
    ):
        before = engine.asked, len(learnt)
        run_chain(Run(tmp_path, override(small, changes)), questions, questions, edge)
        assert (engine.asked - before[0], len(learnt) - before[1]) == (asked, trained), changes


def test_format_install_trains_on_the_teachers_labels(
    small, tmp_path, questions, engine, edge, learnt
):
    teacher = make_model(tmp_path / "teacher", seed=1)
    settings = override(small, {"edge.format_install": {"labels_from": str(teacher)}, "rounds": 0})
    (base,) = run_chain(Run(tmp_path / "run", settings), questions, questions, edge)
    assert [row["id"] for row in learnt[0]] == [row["id"] for row in base.rows]
    assert base.model.parent.name.startswith("r00-sft") and len(learnt) == 1
    # The teacher's engine cannot take the edge model's weights: it is closed, and another made
    assert engine.events == ["made with teacher", "close", "made with model"]


# ---- labels: controls, and what the cloud says


def test_frozen_labels_are_those_of_the_raw_model(small, tmp_path, questions, edge, learnt):
    run = Run(tmp_path, override(small, {"label_control": "frozen", "relabel_replay": True}))
    results = run_chain(run, questions, questions, edge)
    inputs = stages(run)
    labelled = [f"r{n:02d}-{step}" for n in (1, 2) for step in ("samples", "replay-samples")]
    assert all(inputs[name] == inputs["r00-samples"] for name in labelled)
    assert inputs["r02-sft"] == [f"{results[1].model.parent.name}/model"], "the chain goes on"


def test_random_labels_are_drawn_from_the_buffers(small, tmp_path, questions, edge, learnt):
    settings = override(small, {"label_control": "random", "calibration_rows": 12, "rounds": 1})
    base, result = run_chain(Run(tmp_path, settings), questions, questions, edge)
    drawn = {row["confidence"] for row in result.rows}
    assert drawn <= {row["confidence"] for row in base.rows} == {0.0, 1.0}


def cloud_of(monkeypatch: pytest.MonkeyPatch, texts: dict[int, str | None]) -> list[Scripted]:
    """The clouds that are made: they answer B, but for these texts."""
    made: list[Scripted] = []

    def make(settings: Settings) -> Scripted:
        made.append(Scripted(answer="B", texts=texts))
        return made[-1]

    monkeypatch.setattr(evaluation, "cloud_engine", make)
    return made


@pytest.mark.parametrize("setting", ["answer_target", "label_reference"])
def test_the_clouds_letters_are_asked_once_and_taught_or_counted(
    setting, small, tmp_path, questions, edge, learnt, monkeypatch
):
    made = cloud_of(monkeypatch, {2: "I pass."})
    run = Run(tmp_path, override(small, {setting: "cloud", "relabel_replay": True}))
    results = run_chain(run, questions, questions, edge)
    gold = {question.id: question.answer for question in questions}
    rows = buffer_rows(results)
    assert len(rows) == 6 + 2 * 4 - 1, "the unreadable answer teaches nothing"
    if setting == "answer_target":
        assert {row["answer"] for row in rows} == {"B"}
        assert all(row["confidence"] == float(gold[row["id"]] == "A") for row in rows)
    else:  # the edge says A: wrong wherever the cloud says B
        assert [row["answer"] for row in rows] == [gold[row["id"]] for row in rows]
        assert {row["confidence"] for row in rows} == {0.0}
    wrong = sum(gold[row["id"]] != "B" for row in rows) + 1
    assert sum(int(result.record()["cloud wrong"]) for result in results) == wrong
    assert run_chain(run, questions, questions, edge)[2].rows == results[2].rows
    assert len(made) == 1 and next(iter(stages(run))) == "chain-cloud-answers"


def test_a_chain_needs_all_of_the_clouds_letters(
    small, tmp_path, questions, edge, learnt, monkeypatch
):
    run = Run(tmp_path, override(small, {"answer_target": "cloud"}))
    made = cloud_of(monkeypatch, {2: None})
    for attempt in (1, 2):
        with pytest.raises(EngineError, match="run again to resume"):
            run_chain(run, questions, questions, edge)
        assert len(made) == attempt, "an outage is not kept"
    cloud_of(monkeypatch, dict.fromkeys(range(99), "I pass."))
    results = run_chain(run, questions, questions, edge)
    assert [result.rows for result in results] == [[], [], []], "not replaced by gold"


# ---- its parts


def test_the_calibration_buffer_is_balanced(small, questions):
    chosen = calibration_questions(questions, override(small, {"calibration_rows": 5}))
    counts = {domain: len(group) for domain, group in by_domain(chosen).items()}
    assert counts == {"finance": 3, "law": 2}


def test_missing_questions_are_told_before_a_model_is_asked(small, tmp_path, questions):
    none = EngineSlot(lambda model: pytest.fail("asked"))
    for wrong in (["law", "alchemy"], ["law", "law"]):
        run = Run(tmp_path, override(small, {"domains": wrong}))
        with pytest.raises(SettingsError, match=f"domains: .*{wrong[1]}.*; expected: each once"):
            run_chain(run, questions, questions, none)
    with pytest.raises(SettingsError, match="no dev questions"):
        run_chain(Run(tmp_path, small), questions, [], none)


def test_a_rounds_metrics_by_hand(small, tmp_path, questions, edge, learnt):
    result = run_chain(Run(tmp_path, override(small, {"rounds": 0})), questions, questions, edge)[0]
    table = result.evaluation.assign(local_correct=[1, 0, 0, 0], confidence=[1.0, 0.25, 0.5, None])
    metrics = result._replace(evaluation=table.astype({"confidence": float})).metrics
    assert (metrics["n"], metrics["local_accuracy"]) == (4, 1 / 4)
    assert (metrics["kept"], metrics["parsed"], metrics["auroc"]) == (2 / 4, 3 / 4, 1.0)
    assert metrics["mean_confidence"] == pytest.approx(1.75 / 3)
    assert metrics["ece_bucket"] == pytest.approx((0 + 0.25 + 0.5) / 3)


@pytest.mark.parametrize("sentinel", ['{"results": {"edge": "%s", "checkpoint": "r1"}}', "", "[]"])
def test_the_best_checkpoint_at_hand(sentinel, small, tmp_path):
    """That of the run, if 02 finished with this edge model; a broken sentinel is none."""
    run = Run(tmp_path / "run", small)
    edge = Path(small.edge.model)
    assert trained_checkpoint(run) == edge
    (run.folder / "r1").mkdir()
    done = run.folder / "done" / "02_rounds.json"
    done.parent.mkdir(exist_ok=True)
    done.write_text(sentinel.replace("%s", small.edge.model))
    assert trained_checkpoint(run) == (run.folder / "r1" if "%s" in sentinel else edge)
    other = Run(tmp_path / "run", override(small, {"edge.model": "data/pocket/edge"}))
    assert trained_checkpoint(other) == ROOT / "data/pocket/foggen-r14"


def test_the_edge_slot_makes_the_engine_of_the_settings(small, monkeypatch):
    made: list[Any] = []
    monkeypatch.setattr("foggen.chain.make_engine", lambda *args, **more: made.append((args, more)))
    edge_slot(override(small, {"engine_options": {"token_budget": 7}})).load(Path("m"))
    assert made == [(("transformers", Path("m")), {"dtype": "float32", "token_budget": 7})]


def test_the_branch_replays_the_buffer_and_drops_unsolved_problems(
    small, tmp_path, questions, edge, learnt
):
    sizes = {"squad": 3, "truthfulqa": 0, "gsm8k": 4, "replay": 99}
    values = {f"open_ended.r15.{task}": n for task, n in sizes.items()}
    run = Run(tmp_path / "run", override(small, {**values, "rounds": 1}))
    rounds = run_chain(run, questions, questions, edge)
    branch = run_r15(run, rounds, OPEN, edge)
    assert [row["id"] for row in branch.labelled] == [question.id for question in OPEN]
    assert [row["id"] for row in branch.rows] == ["s0", "s1", "s2", "g1"], "1 + 1 is 2"
    assert sum(row["target"] is None for row in branch.labelled) == 3
    buffer = buffer_rows(rounds)
    assert sorted(row["id"] for row in branch.replayed) == sorted(row["id"] for row in buffer)
    assert learnt[-1] == [*branch.rows, *branch.replayed] and branch.model.is_dir()
    again = run_r15(run, rounds, OPEN, edge)
    assert again.model == branch.model and len(learnt) == 2


# ---- killed

KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tiny import make_questions
from foggen.chain import edge_slot, run_chain
from foggen.config import Settings
from foggen.store import Run, write_json
settings = Settings.model_validate_json(Path(sys.argv[2]).read_text())
run, questions = Run(sys.argv[1], settings), make_questions()
results = run_chain(run, questions, questions, edge_slot(settings))
write_json(run.folder / "table.json", [result.record() for result in results])
"""


@pytest.mark.slow
def test_ten_kills_end_with_the_same_chain(small, tmp_path):
    """kill -9 at random moments of real training: table and weights are an unbroken run's."""
    file = tmp_path / "settings.json"
    file.write_text(override(small, {"rounds": 6}).model_dump_json())

    def start(run: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", KILLED, str(run), str(file), str(ROOT / "tests")]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT / "lib")})

    started = time.time()
    assert start(tmp_path / "whole").wait() == 0
    whole = time.time() - started
    rng = random.Random(0)
    killed = 0
    for _ in range(10):
        process = start(tmp_path / "run")
        time.sleep(rng.uniform(0.3, 0.9) * whole)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert start(tmp_path / "run").wait() == 0 and killed > 0

    def ends(run: Path) -> tuple[Any, dict[str, str]]:
        models = {path.name: weights(path / "model") for path in (run / "stages").glob("r*-sft-*")}
        return json.loads((run / "table.json").read_text()), models

    assert str(ends(tmp_path / "run")) == str(ends(tmp_path / "whole"))
