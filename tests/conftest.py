"""Fixtures: the tiny model, its questions, and settings small enough for seconds."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tiny import make_model, make_questions, make_tokenizer

from foggen.config import Settings, load_profile
from foggen.questions import Question
from foggen.store import LOCK_VARIABLE, ROOT, RUN_VARIABLE

# for `import make_bank` and `import make_pocket`; `benchmarks` is found beside this file
sys.path += [str(ROOT / "data" / "bank"), str(ROOT / "data" / "pocket")]

# The background of a shell ignores interrupts, and so would the processes that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples at every run, and no judging by the clock; `--hypothesis-profile=search` draws
# new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(autouse=True, scope="module")
def no_run_of_the_callers() -> Iterator[None]:
    """The run folder that `make test` sets for the notebooks is not the unit tests'.

    Set before every fixture of a module, since some of them start runs in processes of their own.
    """
    with pytest.MonkeyPatch.context() as patch:
        for variable in (RUN_VARIABLE, LOCK_VARIABLE):
            patch.delenv(variable, raising=False)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def questions() -> list[Question]:
    return make_questions()


@pytest.fixture
def small(tiny_model: Path) -> Settings:
    """The pocket profile, shrunk to a chain of two rounds on the tiny model."""
    return load_profile(
        "pocket",
        {
            "edge.model": str(tiny_model),
            "domains": ["finance", "law"],
            "rounds": 2,
            "calibration_rows": 6,
            "new_rows": 4,
            "replay_rows": 5,
            "samples": 4,
            "max_new_tokens": 6,
            "dev_questions": 4,
            "sft.num_train_epochs": 1,
            "sft.per_device_train_batch_size": 4,
            "sft.learning_rate": 1e-3,
            "training.max_length": 700,
        },
    )
