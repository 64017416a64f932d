"""An engine of a few lines in place of a model, and trainings that only note their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foggen import training
from foggen.engines import Completion, Engine, EngineSlot, Sampling
from foggen.prompts import VERIFY_SYSTEM, Messages
from foggen.questions import OpenQuestion
from foggen.store import write_json

OPEN = [
    OpenQuestion(id=f"s{i}", task="squad", question="Who?", context=f"C{i}", answers=("A",))
    for i in range(4)
] + [
    OpenQuestion(id=f"g{i}", task="gsm8k", question=f"{i}+1?", answers=(str(i + 1),))
    for i in range(4)
]


class Scripted:
    """Answers `answer` with confidence `stated`, word problems with 2; judges all answers correct.

    `texts` replaces the answer to a prompt by its place in a call (None: no reply). `asked` counts
    texts and scored prompts; `events` are what else was asked of it.
    """

    name = "scripted"

    def __init__(
        self, stated: str = "1.0", answer: str = "A", texts: dict[int, str | None] | None = None
    ) -> None:
        self.stated, self.answer, self.texts = stated, answer, texts or {}
        self.asked, self.events = 0, list[Any]()

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        self.asked += len(prompts) * sampling.n
        replies = [self._text(n, prompt) for n, prompt in enumerate(prompts)]
        return [
            [] if text is None else [Completion(text, len(text.split()), True)] * sampling.n
            for text in replies
        ]

    def _text(self, place: int, prompt: Messages) -> str | None:
        system = prompt[0]["content"]
        if system == VERIFY_SYSTEM:
            return "Verification Decision: The AI generated answer is Correct."
        if place in self.texts:
            return self.texts[place]
        answer = "So 2.\nFinal answer: 2" if "math assistant" in system else ""
        return f"Confidence: {self.stated}\n{answer or f'Final answer: {self.answer}'}"

    def score(self, prompts: Any, continuations: Any, *drawn: Sampling) -> list[list[float]]:
        """The first of two continuations is three times as likely as the second."""
        self.asked += len(prompts)
        two = {2: [-1.0, -1.0 - 1.0986123]}
        return [two.get(len(texts), [-3.0] * len(texts)) for texts in continuations]

    def reload(self, path: Path) -> None:
        self.events.append(path)

    def sleep(self) -> None:
        self.events.append("sleep")

    def close(self) -> None:
        self.events.append("close")


def slot(engine: Scripted) -> EngineSlot:
    """The engine behind a slot; its events tell with which model it was made."""

    def make(model: Path) -> Engine:
        engine.events.append(f"made with {model.name}")
        return engine

    return EngineSlot(make)


def noted_trainings(monkeypatch: Any) -> list[list[dict[str, Any]]]:
    """Replaces training by a note of its rows, for tests of the bookkeeping."""
    rows: list[list[dict[str, Any]]] = []

    def note(job: training.Job) -> None:
        rows.append([dict(row) for row in job.rows])
        job.out.mkdir()
        (job.out / "model.safetensors").write_text(str(job.seed))
        write_json(job.out.with_name("training.json"), {"rows": len(job.rows)})

    monkeypatch.setattr(training, "train", note)
    return rows
