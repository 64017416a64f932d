"""Any OpenAI-compatible server, hosted or own (`vllm serve`, llama.cpp): paid answers are kept and never asked twice.

The seed is part of an answer's name on disk and is not sent: hosted providers ignore it, CPU builds of vLLM die of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, cast

import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from foggen.engines.base import Completion, EngineError, Sampling
from foggen.prompts import Messages
from foggen.store import ROOT

log = logging.getLogger(__name__)
Answer = dict[str, Any]
SETTINGS = {
    400: "the prompt or a setting (`max_tokens`, `extra_body`, the server's context length)",
    401: "the key in the environment variable `key_variable`",
    403: "the key in the environment variable `key_variable`",
    404: "`model` or `base_url`",
}


class BadAnswer(Exception):
    """The server said 200 and sent nothing usable."""


class Stopped(Exception):
    """Another request failed for good, so this one is not tried."""


class OpenAIEngine:
    """See `Engine`. Prices are USD per million tokens; `on_cloud_failure` says what follows exhausted retries.

    `stop` raises (run again to resume: nothing paid is lost), `keep_local` leaves those prompts without completions
    and counts them in `failures`. `backoff` is the first wait in seconds; it doubles, with jitter, up to a minute.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        cache: str | Path = ROOT / "runs" / "answers",
        key_variable: str | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        attempts: int = 8,
        backoff: float = 1.0,
        price_in: float = 0.0,
        price_out: float = 0.0,
        on_cloud_failure: Literal["stop", "keep_local"] = "stop",
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        self.name = self.model = model
        self.cache, self.key_variable, self.concurrency = Path(cache), key_variable, concurrency
        self.attempts, self.backoff, self.prices = attempts, backoff, (price_in, price_out)
        self.on_cloud_failure, self.extra = on_cloud_failure, extra_body or {}
        self.client: dict[str, Any] = {"base_url": base_url, "timeout": timeout, "max_retries": 0}
        self.used = [0, 0]
        self.failures = 0
        self._failed: Exception | None = None

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        """As in `Engine`. `tokens` of one of n > 1 samples is their mean: servers report the sum."""
        asked = {key: value for key, value in asdict(sampling).items() if key not in ("n", "seed")}
        fields = {**asked, "stop": list(sampling.stop) or None}
        answers = self._answers([self._body(prompt, fields) for prompt in prompts], sampling.n, sampling.seed)
        return [[Completion(**one) for one in answer["texts"][: sampling.n]] if answer else [] for answer in answers]

    def score(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[str]], temperature: float = 1.0
    ) -> list[list[float]]:
        """As in `Engine`, from the prompt log-probabilities of vLLM's server, which are at temperature 1."""
        if temperature != 1.0:
            raise EngineError(
                "score: servers report log-probabilities at temperature 1; use engine transformers or vllm"
            )
        fields = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
        bodies = [
            self._body(_continued(prompt, text), fields)
            for prompt, texts in zip(prompts, continuations, strict=True)
            for text in texts
        ]
        answers = iter(self._answers(bodies, 1, 0))
        return [[_log_probability(next(answers), text) for text in texts] for texts in continuations]

    def reload(self, path: Path) -> None:
        """A server's weights are its own."""
        raise EngineError(f"engine openai cannot load {path}: use engine transformers or vllm for a trained model")

    def sleep(self) -> None:
        """Nothing of this machine is held."""

    def close(self) -> None:
        """Nothing is held between calls."""

    def _body(self, prompt: Messages, fields: dict[str, Any]) -> dict[str, Any]:
        """The request, which together with the seed names its answers on disk."""
        going_on = {"continue_final_message": True, "add_generation_prompt": False}
        more = going_on if prompt[-1]["role"] == "assistant" else {}
        return {"model": self.model, "messages": prompt, **fields, **more, **self.extra}

    def _answers(self, bodies: list[dict[str, Any]], n: int, seed: int) -> list[Answer | None]:
        """Answers in order. The event loop runs in a thread of its own, so that notebooks can call this, too."""
        key = os.environ.get(self.key_variable, "") if self.key_variable else "none"
        if not key:
            raise EngineError(
                f"environment variable {self.key_variable} (`key_variable`) is empty; put the server's key there"
            )
        self._failed = None
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(asyncio.run, self._all(bodies, n, seed, key))
            try:
                return future.result()
            except BaseException as error:
                self._failed = Stopped(str(error))  # Ctrl-C: answers on their way are still kept, nothing new is asked
                raise

    async def _all(self, bodies: list[dict[str, Any]], n: int, seed: int, key: str) -> list[Answer | None]:
        paths = [self._path(body, seed) for body in bodies]
        todo = {path: body for path, body in zip(paths, bodies, strict=True) if len(_read(path)["texts"]) < n}
        gate, progress = asyncio.Semaphore(self.concurrency), _Progress(len(todo), self)
        async with openai.AsyncOpenAI(api_key=key, **self.client) as client:

            async def one(path: Path, body: dict[str, Any]) -> None:
                async with gate:
                    while (missing := n - len(_read(path)["texts"])) > 0:
                        asked = {**body, "n": missing} if missing > 1 else body
                        answer = await self._retried(lambda asked=asked: _ask(client, asked), key)  # type: ignore[misc]
                        if answer is None:
                            return
                        _add(path, answer)
                        progress.add(answer)

            await asyncio.gather(*(one(path, body) for path, body in todo.items()))
        progress.report()
        if self._failed:
            raise self._failed
        return [answer if len(answer["texts"]) >= n else None for answer in map(_read, paths)]

    async def _retried(self, ask: Callable[[], Awaitable[Answer]], key: str) -> Answer | None:
        """The answer, or None after a failure, which is noted so that nothing more is asked."""
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.attempts),
            wait=self._wait,
            retry=retry_if_exception(lambda error: _transient(error) and not self._failed),
            reraise=True,
        )
        try:
            return await retrying(self._unless_failed, ask)
        except Stopped:
            pass
        except (openai.OpenAIError, BadAnswer, ValueError) as error:
            self._note(error, f"{type(error).__name__}: {error}".replace(key, "***"))
        return None

    def _note(self, error: Exception, message: str) -> None:
        """Counts a failure, or makes it the end of this run."""
        if _transient(error) and self.on_cloud_failure == "keep_local":
            self.failures += 1
            log.warning("cloud: no answer after %d attempts (%s)", self.attempts, message)
        elif not self._failed:
            self._failed = EngineError(self._explain(error, message))

    async def _unless_failed(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        if self._failed:
            raise Stopped
        return await ask()

    def _explain(self, error: Exception, message: str) -> str:
        if _transient(error):
            return f"cloud: gave up after {self.attempts} attempts (`attempts`); run again to resume. {message}"
        status = getattr(error, "status_code", 0)
        setting = SETTINGS.get(status, "the server's log").replace(
            "key_variable`", f"key_variable` ({self.key_variable})"
        )
        return f"cloud: check {setting}. {message}"

    def _wait(self, state: RetryCallState) -> float:
        """Seconds to wait: what the server asks for, else doubling with jitter."""
        error = state.outcome.exception() if state.outcome else None
        asked = _retry_after(error)
        wait = min(60.0, self.backoff * 2.0 ** (state.attempt_number - 1)) * random.uniform(0.5, 1.0)
        log.info("cloud: attempt %d failed (%s)", state.attempt_number, type(error).__name__)
        return wait if asked is None else asked + 0.1 * wait

    def _path(self, body: dict[str, Any], seed: int) -> Path:
        name = hashlib.sha256(json.dumps([body, seed], sort_keys=True).encode()).hexdigest()
        return self.cache / name[:2] / f"{name}.json"


class _Progress:
    """Logs what was answered and what it cost, every ten seconds and at the end."""

    def __init__(self, todo: int, engine: OpenAIEngine) -> None:
        self.todo, self.engine, self.done, self.last = todo, engine, 0, time.monotonic()

    def add(self, answer: Answer) -> None:
        self.done += 1
        self.engine.used = [old + new for old, new in zip(self.engine.used, answer["used"], strict=True)]
        if time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            self.report()

    def report(self) -> None:
        cost = sum(tokens * price for tokens, price in zip(self.engine.used, self.engine.prices, strict=True)) / 1e6
        text = "cloud: %d answers to %d new questions; so far %d + %d tokens, about $%.4f"
        log.info(text, self.done, self.todo, *self.engine.used, cost)


async def _ask(client: openai.AsyncOpenAI, body: dict[str, Any]) -> Answer:
    """One paid request; a server may give fewer than the `n` texts asked for."""
    raw = await client.post("/chat/completions", body=body, cast_to=object)
    choices = raw.get("choices") if isinstance(raw, dict) else None
    if not choices or not all(isinstance(choice.get("message"), dict) for choice in choices):
        raise BadAnswer("no choices")
    usage = cast(dict[str, Any], raw).get("usage") or {}
    used = [usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)]
    texts = [
        {
            "text": choice["message"].get("content") or "",
            "tokens": round(used[1] / len(choices)),
            "finished": choice.get("finish_reason") != "length",
        }
        for choice in choices
    ]
    return {"texts": texts, "used": used, "prompt_logprobs": cast(dict[str, Any], raw).get("prompt_logprobs")}


def _transient(error: BaseException) -> bool:
    """Worth another attempt: timeouts, lost connections, broken bodies, 408, 409, 429 (unless unpaid) and 5xx."""
    if isinstance(error, openai.APIStatusError):
        unpaid = error.code == "insufficient_quota"
        return not unpaid and (error.status_code in (408, 409, 429) or error.status_code >= 500)
    return isinstance(error, (openai.APIConnectionError, openai.APIResponseValidationError, BadAnswer, ValueError))


def _retry_after(error: BaseException | None) -> float | None:
    """Seconds from a Retry-After header (a number or a date)."""
    if not isinstance(error, openai.APIStatusError) or "retry-after" not in error.response.headers:
        return None
    text = error.response.headers["retry-after"]
    try:
        return max(0.0, float(text))
    except ValueError:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())


def _continued(prompt: Messages, text: str) -> Messages:
    """The prompt with `text` as (the continuation of) its assistant turn."""
    begun = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
    return [*(prompt[:-1] if begun else prompt), {"role": "assistant", "content": begun + text}]


def _log_probability(answer: Answer | None, text: str) -> float:
    """The sum over the last prompt tokens that spell `text`."""
    listed = (answer or {}).get("prompt_logprobs")
    if not listed:
        raise EngineError("score: this server (`base_url`) reports no prompt log-probabilities; `vllm serve` does")
    total, spelled = 0.0, ""
    for token in reversed(listed):
        if spelled == text or token is None:
            break
        (entry,) = token.values()
        total, spelled = total + entry["logprob"], entry["decoded_token"] + spelled
    if spelled != text:
        raise EngineError(f"score: the server's tokens do not spell {text!r} but {spelled!r}")
    return total


def _read(path: Path) -> Answer:
    """What is kept of an answer; without texts when there is nothing or the file is damaged."""
    try:
        answer: Answer = json.loads(path.read_text())
    except (OSError, ValueError):
        return {"texts": [], "used": [0, 0]}
    return answer


def _add(path: Path, answer: Answer) -> None:
    """Adds paid texts to the file, which changes at once and as a whole, whoever else writes it."""
    before = _read(path)
    used = [old + new for old, new in zip(before["used"], answer["used"], strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    fresh.write_text(json.dumps({**answer, "texts": before["texts"] + answer["texts"], "used": used}))
    os.replace(fresh, path)
