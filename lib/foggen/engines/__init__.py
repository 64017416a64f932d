"""Where models run: the protocol of every engine, and what the engines share.

A profile's `engine:` names one of `ENGINES`; the rest of its block are that engine's options. Knows
nothing of questions, labels or rounds.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Protocol

import pydantic.dataclasses
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from foggen.prompts import Messages, encode_chat

ENGINES = {  # imported at first use, so that a machine needs only the packages of its engines
    "transformers": "foggen.engines.transformers_engine:TransformersEngine",
    "vllm": "foggen.engines.vllm_engine:VLLMEngine",
    "openai": "foggen.engines.openai_engine:OpenAIEngine",
}
Chats = Sequence[Messages]
Texts = Sequence[Sequence[str]]


class EngineError(RuntimeError):
    """An engine cannot do what it was asked; the message names the setting to change."""


@pydantic.dataclasses.dataclass(frozen=True, config={"extra": "forbid"})
class Sampling:
    """How to continue a prompt: `n` texts of up to `max_tokens` tokens; temperature 0 is greedy.

    `stop` strings end a text and are cut off. Only the `top_k` likeliest tokens are drawn (0: all),
    and of these the fewest that hold `top_p` of the probability, both after the temperature.
    """

    n: NonNegativeInt = 1
    temperature: NonNegativeFloat = 0.0
    max_tokens: PositiveInt = 64
    seed: int = 0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0


PURE = Sampling(temperature=1.0)  # the model's own distribution


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

    def score(self, prompts: Chats, texts: Texts, sampling: Sampling = PURE) -> list[list[float]]:
        """log P(text | prompt) in nats of each prompt's `texts` (none of them empty), under the
        distribution that `sampling` draws from: -inf for what its `top_p` or `top_k` rule out.
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
    """The engine `kind` (one of `ENGINES`) of a model: a folder or a name."""
    return resolve_name(ENGINES[kind])(model, **options)  # type: ignore[no-any-return]


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


# --------------------------------------------------------------------------------------------------
# What local engines share


def prompt_ids(tokenizer: Any, prompts: Chats, more: int, room: float) -> list[list[int]]:
    """Token ids of the prompts. Raises EngineError if `more` tokens do not fit behind them."""
    ids = [encode_chat(tokenizer, prompt) for prompt in prompts]
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) + more > room:
            text = "\n".join(message["content"] for message in prompt)
            limits = f"{len(row)} tokens and {more} to come exceed max_model_len, {room}"
            raise EngineError(f"{limits}, in the prompt that ends with {text[-200:]!r}")
    return ids


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
