"""The paper in miniature: the `paper` profiles' own code path, from a file of questions to the evaluation, on a CPU.

Only sizes and places differ from the profile: models of two layers, few rows, the transformers engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_questions

from foggen import data
from foggen.config import Settings, load_profile, override
from foggen.outcomes import Examination, OpenExamination
from foggen.questions import TASKS
from foggen.rounds import Loan, edge_engine, run_chain, run_r15
from foggen.routing import check_outcomes, routing_table
from foggen.store import Store, read_json, read_jsonl

PROFILES = {"qwen3": "paper", "gemma3": "paper-gemma3-1b"}


def miniature(folder: Path, family: str, rounds: int) -> Settings:
    rows = [
        {
            "question": one.question,
            "choices": list(one.options),
            "answerKey": one.answer,
            "subject": one.domain,
        }
        for one in make_questions(30)
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
            "rounds": rounds,
            "calibration_rows": 14,
            "new_rows": 3,
            "replay_rows": 9,
            "samples": 2,
            "epochs": 1,
            "max_new_tokens": 4,
            "dev_questions": 7,
            "test_questions": 14,
            "eval_questions": 2,
            **{f"open_ended.max_new_tokens.{task}": 4 for task in TASKS},
            **{f"r15.{task}": 2 for task in TASKS},
            "r15.replay": 6,
            "automix.k": 2,
            "automix.max_new_tokens": 4,
        },
    )


def run_paper(folder: Path, family: str, rounds: int) -> None:
    settings = miniature(folder, family, rounds)
    parts = data.splits(settings)
    store = Store(folder / "run")
    chain = run_chain(settings, store, parts["train"], parts["dev"])
    turns = [settings.domains[number % 7] for number in range(rounds)]
    assert [result.domain for result in chain] == [None, *turns]
    assert all(result.training["dtype"] == "torch.bfloat16" for result in chain[1:])
    weights = {(result.model / "model.safetensors").read_bytes() for result in chain}
    assert len(weights) == rounds + 1, "every round moves the model"
    assert all((result.model.parent / "adapter" / "adapter_config.json").exists() for result in chain[1:])

    loan = Loan(edge_engine(settings))
    pools = data.open_splits(settings)
    train = [one for task in TASKS for one in [q for q in pools["train"] if q.task == task][:2]]
    branch = run_r15(settings, store, chain, train, loan)
    assert len(branch.replayed) == 6 and (branch.model / "model.safetensors").read_bytes() not in weights
    questions = parts["test"][: settings.test_questions]
    test = Examination(settings, store, "test", questions, loan)
    for label, model in (("last", chain[-1].model), ("r15", branch.model)):
        table = check_outcomes(test.outcomes(label, model))
        assert (
            len(table) == len(questions) and routing_table(table, settings.tau, resamples=20)["raw"].between(0, 1).all()
        )
    asked = [one for task in TASKS for one in [q for q in pools["test"] if q.task == task][:2]]
    opened = OpenExamination(settings, store, "open", asked, loan)
    assert len(check_outcomes(opened.outcomes("last", chain[-1].model))) == 6
    loan.close()
    stages = {stage["stage"].rsplit("-", 1)[0]: stage for stage in read_jsonl(store.run / "manifest.jsonl")}
    assert {f"r{rounds:02d}-sft", "r15-sft", "r15-labels", f"r{rounds:02d}-dev"} <= set(stages)


@pytest.mark.parametrize("family", PROFILES)
def test_fourteen_rounds_r15_and_the_evaluation(family: str, tmp_path: Path) -> None:
    run_paper(tmp_path, family, rounds=14)


def test_format_install_by_a_larger_sibling(tmp_path: Path) -> None:
    """An edge model without a chat template: the sibling labels the buffer, and its template is taken over."""
    settings = miniature(tmp_path, "gemma3", 1)
    edge = make_model(tmp_path / "base", 3, "gemma3", hidden=32)
    (edge / "chat_template.jinja").unlink()
    install = {"labels_from": settings.edge.model}
    settings = override(settings, {"edge.model": str(edge), "edge.format_install": install})
    parts = data.splits(settings)
    chain = run_chain(settings, Store(tmp_path / "run"), parts["train"], parts["dev"])
    assert [result.number for result in chain] == [0, 1] and chain[0].training["rows"] == 14
    assert all((result.model / "chat_template.jinja").exists() for result in chain)
    assert read_json(chain[1].model / "config.json")["hidden_size"] == 32
    ends = read_json(chain[1].model / "generation_config.json")["eos_token_id"]
    assert len(ends) == 2, "the end of a turn ends an answer, beside the base model's own end of text"


def test_released_checkpoints_are_evaluated_without_training(tmp_path: Path, monkeypatch: Any) -> None:
    """No round: the edge model is the chain's last checkpoint, and the branch is the released one."""

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is trained")

    monkeypatch.setattr("foggen.training.train", refuse)
    released = make_model(tmp_path / "r15", 2)
    settings = override(miniature(tmp_path, "qwen3", 0), {"r15_model": str(released)})
    parts = data.splits(settings)
    store = Store(tmp_path / "run")
    (only,) = run_chain(settings, store, parts["train"], parts["dev"])
    assert only.number == 0 and str(only.model) == settings.edge.model
    loan = Loan(edge_engine(settings))
    branch = run_r15(settings, store, [only], data.open_splits(settings)["train"][:3], loan)
    assert branch.model == released
    loan.close()
