"""The protocol behind which every model runs: two verbs, `generate` and `score`; plus what engines share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from foggen.prompts import Messages


class EngineError(RuntimeError):
    """An engine cannot do what it was asked; the message names the setting to change."""


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt: `n` texts; temperature 0 is greedy; `stop` strings end a text and are cut off."""

    n: int = 1
    temperature: float = 0.0
    max_tokens: int = 64
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One text; `tokens` counts generated tokens with the end token; not `finished` = cut at `max_tokens`."""

    text: str
    tokens: int
    finished: bool


NOTHING = Completion("", 0, finished=False)  # in place of an answer that a failing cloud did not give


class Engine(Protocol):
    """What domain code may ask of a model. Results keep the order of the prompts.

    A prompt whose last message has the role `assistant` is a prefix that the model continues.
    """

    name: str

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt."""

    def score(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[str]], temperature: float = 1.0
    ) -> list[list[float]]:
        """log P(continuation | prompt) in nats, under softmax(logits / temperature) over all tokens."""

    def sleep(self) -> None:
        """Frees the accelerator for something else (a fine-tuning), until the next `reload`."""

    def reload(self, path: Path) -> None:
        """Takes the weights in `path` (same architecture and tokenizer), in place."""

    def close(self) -> None:
        """Frees what the engine holds."""


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    found = [position for mark in stop if (position := text.find(mark)) >= 0]
    return text[: min(found)] if found else text
