"""The paper in miniature: the `paper` profiles' code path, from a file of questions to outcomes.

Only sizes and places differ from the profile: models of two layers, few rows, and the transformers
engine on a CPU.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_questions

from foggen.chain import edge_slot, run_chain, run_r15
from foggen.config import Settings, load_profile, override
from foggen.evaluation import evaluated_questions, open_outcomes, outcomes
from foggen.open_ended import first
from foggen.questions import TASKS, open_splits, splits
from foggen.routing import check_outcomes, routing_table
from foggen.store import Run, read_jsonl

PROFILES = {"qwen3": "paper", "gemma3": "paper-gemma3-1b"}
FEW = dict.fromkeys(TASKS, 2)


def miniature(folder: Path, family: str, rounds: int) -> Settings:
    names = {"question": "question", "choices": "options", "answerKey": "answer"}
    names |= {"subject": "domain"}
    rows = [
        {column: getattr(question, name) for column, name in names.items()}
        for question in make_questions(30)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_profile(
        PROFILES[family],
        {
            "edge.model": str(make_model(folder / "edge", 0, family)),
            "cloud.model": str(make_model(folder / "cloud", 1, family)),
            "edge.revision": None,
            "cloud.revision": None,
            "engine": "transformers",
            "cloud.engine": "transformers",
            "engine_options": {},
            "cloud.options": {},
            "threads": 1,
            "data.sources": [{"path": str(folder / "questions.jsonl")}],
            "data.open_ended": None,
            "answer_target": "gold",  # random models read no letters; test_chain has the cloud's
            "rounds": rounds,
            "calibration_rows": 14,
            "new_rows": 3,
            "replay_rows": 9,
            "samples": 2,
            "sft.num_train_epochs": 1,
            "max_new_tokens": 4,
            "dev_questions": 7,
            "test_questions": 14,
            "open_ended.eval_questions": 2,
            **{f"open_ended.max_new_tokens.{task}": 4 for task in TASKS},
            **{f"open_ended.r15.{task}": 2 for task in TASKS},
            "open_ended.r15.replay": 6,
            "automix.k": 2,
            "automix.max_new_tokens": 4,
        },
    )


@pytest.mark.parametrize("family", PROFILES)
def test_fourteen_rounds_r15_and_the_evaluation(family: str, tmp_path: Path) -> None:
    settings = miniature(tmp_path, family, rounds=14)
    parts, pools = splits(settings), open_splits(settings)
    run = Run(tmp_path / "run", settings)
    with closing(edge_slot(settings)) as edge:
        chain = run_chain(run, parts["train"], parts["dev"], edge)
        assert [result.domain for result in chain] == [None, *settings.domains * 2]
        assert all(result.training["dtype"] == "torch.bfloat16" for result in chain[1:])
        weights = {(result.model / "model.safetensors").read_bytes() for result in chain}
        assert len(weights) == 15, "every round moves the model"
        branch = run_r15(run, chain, first(pools["train"], FEW), edge)
        assert len(branch.replayed) == 6
        assert (branch.model / "model.safetensors").read_bytes() not in weights
        questions = evaluated_questions(parts["test"], settings)
        for name, model in (("test-r14", chain[-1].model), ("test-r15", branch.model)):
            table = check_outcomes(outcomes(run, edge, questions, model, name))
            raw = routing_table(table, settings.tau, resamples=20)["raw"]
            assert len(table) == 14 and raw.between(0, 1).all()
        opened = first(pools["test"], FEW)
        table = open_outcomes(run, edge, opened, chain[-1].model, "open-r14")
        assert len(check_outcomes(table)) == 6
    stages = {row["stage"].rsplit("-", 1)[0] for row in read_jsonl(run.folder / "manifest.jsonl")}
    assert {"r14-sft", "r14-dev-answers", "r15-labels", "r15-sft", "open-cloud-answers"} <= stages


def test_released_checkpoints_are_evaluated_without_training(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """No round: the edge model is the last checkpoint, and the branch is the released one."""
    monkeypatch.setattr("foggen.training.train", None)
    released = make_model(tmp_path / "r15", 2)
    values = {"open_ended.r15_model": str(released)}
    settings = override(miniature(tmp_path, "qwen3", 0), values)
    parts = splits(settings)
    run = Run(tmp_path / "run", settings)
    with closing(edge_slot(settings)) as edge:
        (base,) = run_chain(run, parts["train"], parts["dev"], edge)
        assert base.number == 0 and str(base.model) == settings.edge.model
        branch = run_r15(run, [base], open_splits(settings)["train"][:3], edge)
    assert branch.model == released
