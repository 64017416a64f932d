"""Where a run's questions come from: the repository's bank, or the reader's own file for the evaluation.

Knows the profile's `data` settings and nothing about models.
"""

from __future__ import annotations

from pathlib import Path

from foggen import bank
from foggen.config import Settings
from foggen.open_ended import load_hub
from foggen.questions import OpenQuestion, Question, load_open_questions, load_questions
from foggen.store import ROOT


def _resolve(path: str) -> Path:
    """A path of the checkout, or an absolute one."""
    return ROOT / path


def splits(settings: Settings) -> dict[str, list[Question]]:
    """The multiple-choice questions by split: `train` (rounds), `dev` (curves, thresholds), `test`.

    `data.questions` replaces the test split alone. No fact is in two splits of the bank.
    """
    facts = bank.load_facts(_resolve(settings.data.bank))
    parts = {split: bank.make_questions(facts, split) for split in ("train", "dev", "test")}
    if settings.data.questions:
        parts["test"] = load_questions(_resolve(settings.data.questions))
    return parts


def open_splits(settings: Settings) -> dict[str, list[OpenQuestion]]:
    """The open-ended questions by split: `train` (R15) and `test`; `data.open_ended` replaces the test split."""
    source = settings.data.open_ended
    if source == "hub":
        return _hub_splits(settings)
    folder = _resolve(settings.data.bank)
    parts = {split: bank.make_open_questions(folder, split) for split in ("train", "test")}
    if source:
        parts["test"] = load_open_questions(_resolve(source))
    return parts


# TruthfulQA has one split: its questions beyond the evaluated ones are the training pool.
HUB_SPLITS = {
    "squad": ("train", "validation"),
    "truthfulqa": ("validation", "validation"),
    "gsm8k": ("train", "test"),
}


def _hub_splits(settings: Settings) -> dict[str, list[OpenQuestion]]:
    n, seed = settings.open_ended.eval_questions, settings.seed
    parts: dict[str, list[OpenQuestion]] = {"train": [], "test": []}
    for task, (train, test) in HUB_SPLITS.items():
        parts["test"] += load_hub(task, test, n, seed)
        # Word problems without a right trace are dropped, so more are asked than rows are wanted.
        wanted = 2 * getattr(settings.open_ended.r15, task)
        parts["train"] += load_hub(task, train, wanted, seed, skip=n if train == test else 0)
    return parts
