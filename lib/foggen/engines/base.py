"""The protocol behind which every model runs, and what the engines share.

A profile's `engine:` names one of `ENGINES`; the rest of its block are that engine's options. Knows
nothing of questions, labels or rounds.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol

from foggen.prompts import Messages, plain_ids

ENGINES = {  # imported at first use, so that a machine needs only the packages of its engines
    "transformers": "foggen.engines.transformers_engine:TransformersEngine",
    "vllm": "foggen.engines.vllm_engine:VLLMEngine",
    "openai": "foggen.engines.openai_engine:OpenAIEngine",
}
Chats = Sequence[Messages]
Texts = Sequence[Sequence[str]]


class EngineError(RuntimeError):
    """An engine cannot do what it was asked; the message names the setting to change."""


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt: `n` texts of up to `max_tokens` tokens; temperature 0 is greedy.

    `stop` strings end a text and are cut off. Only the `top_k` likeliest tokens are drawn (0: all),
    and of these the fewest that hold `top_p` of the probability, both after the temperature.
    """

    n: int = 1
    temperature: float = 0.0
    max_tokens: int = 64
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        """Raises EngineError for what no engine can draw by."""
        heat = self.temperature == 0 or self.temperature >= 1e-3
        bounds = self.n >= 0 and self.max_tokens >= 1 and 0 < self.top_p <= 1 and self.top_k >= 0
        if not heat or not bounds or "" in self.stop:
            raise EngineError(f"{self}: a number is out of range, or a stop string is empty")


@dataclass(frozen=True)
class Completion:
    """One text. `tokens` counts those generated, with the end token; not `finished` = cut off."""

    text: str
    tokens: int
    finished: bool


# In place of an answer that a failing cloud did not give
NOTHING = Completion("", 0, finished=False)


class Engine(Protocol):
    """What domain code may ask of a model. Results keep the order of the prompts.

    A prompt whose last message has the role `assistant` is a prefix that the model continues.
    """

    name: str

    def generate(self, prompts: Chats, sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions per prompt; none for one that a cloud failed to answer."""

    def score(
        self, prompts: Chats, texts: Texts, temperature: float = 1, top_p: float = 1, top_k: int = 0
    ) -> list[list[float]]:
        """log P(text | prompt) in nats of each prompt's `texts`, under the distribution that
        `Sampling` draws from: -inf for what `top_p` or `top_k` rule out.
        """
        raise EngineError(f"{self.name}: this engine gives no probabilities (engine, cloud.engine)")

    def sleep(self) -> None:
        """Frees the accelerator for something else (a fine-tuning), until the next `reload`."""

    def reload(self, path: Path) -> None:
        """Takes the weights and end tokens in `path` (same architecture, same tokenizer)."""
        raise EngineError(f"{self.name}: this engine loads no weights (engine, cloud.engine)")

    def close(self) -> None:
        """Frees what the engine holds."""


def make_engine(kind: str, model: str | Path, **options: Any) -> Engine:
    """The engine `kind` of a model (a folder or a name). Raises EngineError for an unknown kind."""
    if kind not in ENGINES:
        raise EngineError(f"engine: {kind!r} is unknown; expected one of {', '.join(ENGINES)}")
    engine: Engine = resolve_name(ENGINES[kind])(model, **options)
    return engine


@dataclass
class EngineSlot:
    """Room for one engine, made or reloaded only when another checkpoint is asked for."""

    make: Callable[[Path], Engine]
    engine: Engine | None = None
    model: Path | None = None  # what the engine has loaded

    def load(self, model: Path) -> Engine:
        """The engine with the weights of the checkpoint `model`."""
        if self.engine is None:
            self.engine = self.make(model)
        elif model != self.model:
            self.model = None  # should the reload fail
            self.engine.reload(model)
        self.model = model
        return self.engine

    def sleep(self) -> None:
        """Leaves the accelerator to a training; the next `load` loads weights again."""
        if self.engine and self.model:
            self.engine.sleep()
            self.model = None

    def close(self) -> None:
        """Frees the engine; the next `load` makes another."""
        if self.engine:
            self.engine.close()
            self.engine = self.model = None


def constrained_texts(engine: Engine, prompts: Chats, steps: Sequence[Texts]) -> list[str]:
    r"""What a model answers that can write nothing but certain texts: structured outputs, greedily.

    `steps[k][i]`: the choices of prompt i at step k. The likeliest one is taken, and goes on:

        steps = [[["Confidence: 0.0", "Confidence: 1.0"]], [["\nFinal answer: A", ...]]]
        constrained_texts(engine, [prompt], steps) == ["Confidence: 1.0\nFinal answer: A"]

    Choices are compared whole. A grammar that rules out tokens one by one (vLLM's `choice`) can
    write another where a choice begins likely and goes on unlikely. Needs an engine with `score`.
    """
    texts = [""] * len(prompts)
    for choices in steps:
        pairs = zip(texts, choices, strict=True)
        wanted = [[text + choice for choice in own] for text, own in pairs]
        rows = engine.score(prompts, wanted)
        texts = [own[row.index(max(row))] for own, row in zip(wanted, rows, strict=True)]
    return texts


def check_room(prompts: Chats, ids: Sequence[Sequence[int]], more: int, room: int) -> None:
    """Raises EngineError, with the first of them, for prompts without room for `more` tokens."""
    long = [chat for chat, row in zip(prompts, ids, strict=True) if len(row) + more > room]
    if long:
        user = [message["content"] for message in long[0] if message["role"] == "user"][-1]
        raise EngineError(
            f"{len(long)} of {len(ids)} prompts with {more} tokens to come do not fit into the "
            f"model's {room} (max_model_len); the first: {user[:100]!r} ... {user[-100:]!r}"
        )


def text_ids(tokenizer: Any, texts: Texts) -> list[list[tuple[int, ...]]]:
    """Token ids of the texts that `score` is asked for. Raises EngineError for an empty one."""
    ids = {text: tuple(plain_ids(tokenizer, text)) for own in texts for text in own}
    if not all(ids.values()):
        raise EngineError("score: a text is empty; expected at least one token")
    return [[ids[text] for text in own] for own in texts]


def prompt_seeds(seed: int, prompts: Sequence[list[int]]) -> list[int]:
    """A number of 128 bits for each prompt (its token ids): of the seed, the prompt and how often
    it came before. Its samples are drawn by it, whatever its neighbours.
    """
    earlier: Counter[str] = Counter()
    seeds = []
    for text in (repr((seed, prompt)) for prompt in prompts):
        key = hashlib.sha256(f"{text}{earlier[text]}".encode()).digest()
        seeds.append(int.from_bytes(key[:16], "little"))
        earlier[text] += 1
    return seeds


def end_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """Ids that end a turn: those of a checkpoint's generation_config, and the tokenizer's own."""
    listed = getattr(generation_config, "eos_token_id", None)
    ids = listed if isinstance(listed, list) else [listed]
    return sorted({int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None})
