"""Any OpenAI-compatible server, hosted or own (`vllm serve`, llama.cpp): paid answers are kept and never asked twice.

The seed is part of an answer's name on disk and is not sent: hosted providers ignore it, CPU builds of vLLM die of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal

import openai
from filelock import FileLock
from tqdm import tqdm  # type: ignore[import-untyped]

from foggen.engines.base import Completion, Engine, EngineError, Sampling
from foggen.prompts import Messages
from foggen.store import ROOT, write_text

log = logging.getLogger(__name__)
Response = dict[str, Any]
SETTINGS = {
    400: "the prompt or a setting (`max_tokens`, `extra_body`, the server's context length)",
    402: "the account's quota: it is not paid",
    401: "the key in the environment variable {key_variable} (`key_variable`)",
    403: "the key in the environment variable {key_variable} (`key_variable`)",
    404: "`model` or `base_url`",
}


@dataclass
class OpenAIEngine(Engine):
    """See `Engine`. Prices are USD per million tokens; `on_cloud_failure` says what follows exhausted retries.

    `stop` raises (run again to resume: nothing paid is lost), `keep_local` leaves those prompts without completions
    and counts them in `failures`; outcomes tables then keep the local answer and mark the row. The client of `openai`
    waits 0.5 to 8 s between tries, or what Retry-After asks for.
    """

    model: str
    _: KW_ONLY
    base_url: str
    cache: str | Path = ROOT / "runs" / "answers"
    key_variable: str | None = None
    concurrency: int = 16
    timeout: float = 120.0
    max_retries: int = 10
    price_in: float = 0.0
    price_out: float = 0.0
    on_cloud_failure: Literal["stop", "keep_local"] = "stop"
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name, self.used, self.failures = self.model, [0, 0], 0
        self._failed: Exception | None = None

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        """As in `Engine`. `tokens` of one of n > 1 samples is their mean: servers report the sum."""
        fields = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        bodies = [self._body(prompt, **fields, stop=list(sampling.stop) or None) for prompt in prompts]
        answers = [_completions(kept)[: sampling.n] for kept in self._answers(bodies, sampling.n, sampling.seed)]
        return [texts if len(texts) == sampling.n else [] for texts in answers]

    def score(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[str]], temperature: float = 1.0
    ) -> list[list[float]]:
        """As in `Engine`, from the prompt log-probabilities of vLLM's server, which are at temperature 1."""
        if temperature != 1.0:
            raise EngineError("score: servers report log-probabilities at temperature 1; use another engine")
        fields = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
        pairs = zip(prompts, continuations, strict=True)
        bodies = [self._body(_continued(prompt, text), **fields) for prompt, texts in pairs for text in texts]
        answers = iter(self._answers(bodies, 1, 0))
        return [[_log_probability(next(answers), text) for text in texts] for texts in continuations]

    def reload(self, path: Path) -> None:
        """A server's weights are its own."""
        raise EngineError(f"engine openai cannot load {path}: use engine transformers or vllm for a trained model")

    def _body(self, prompt: Messages, **fields: Any) -> dict[str, Any]:
        """The request, which together with the seed names its answers on disk."""
        going_on = {"continue_final_message": True, "add_generation_prompt": False}
        more = going_on if prompt[-1]["role"] == "assistant" else {}
        return {"model": self.model, "messages": prompt, **fields, **more, **self.extra_body}

    def _answers(self, bodies: list[dict[str, Any]], n: int, seed: int) -> list[list[Response]]:
        """What is kept for each body. The event loop has a thread of its own, so that notebooks can call this, too."""
        key = os.environ.get(self.key_variable, "") if self.key_variable else "none"
        if not key:
            raise EngineError(f"environment variable {self.key_variable} (`key_variable`) is empty; put the key there")
        names = [hashlib.sha256(json.dumps([body, seed], sort_keys=True).encode()).hexdigest() for body in bodies]
        paths = [Path(self.cache) / name[:2] / f"{name}.json" for name in names]
        todo = {path: body for path, body in zip(paths, bodies, strict=True) if len(_completions(_read(path))) < n}
        self._failed = None
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(asyncio.run, self._ask(todo, n, key))
            try:
                future.result()
            except BaseException:  # such as Ctrl-C: answers on their way are still kept, nothing new is asked
                self._failed = EngineError("interrupted")
                raise
        if self._failed:
            raise self._failed
        return [_read(path) for path in paths]

    async def _ask(self, todo: dict[Path, dict[str, Any]], n: int, key: str) -> None:
        """Brings every file to `n` texts; after a failure those on their way are awaited, and no more are asked."""
        hooks: dict[str, Any] = {"request": [self._go_on], "response": [_judge]}
        web = openai.DefaultAsyncHttpxClient(event_hooks=hooks)
        client = openai.AsyncOpenAI(
            api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=self.max_retries, http_client=web
        )
        gate = asyncio.Semaphore(self.concurrency)
        progress = tqdm(total=len(todo), desc="cloud", unit=" questions", mininterval=5, disable=not todo)

        async def complete(path: Path, body: dict[str, Any]) -> None:
            async with gate:
                while (missing := n - len(_completions(_read(path)))) > 0:
                    asked = {**body, "n": missing} if missing > 1 else body
                    try:
                        response: Any = await client.post("/chat/completions", body=asked, cast_to=object)
                    except openai.OpenAIError as error:
                        return self._note(error, f"{type(error).__name__}: {error}".replace(key, "***"))
                    except EngineError:
                        return None
                    _add(path, response)
                    progress.set_postfix_str(self._count(response), refresh=False)
                progress.update()

        async with client:
            with progress:
                await asyncio.gather(*(complete(path, body) for path, body in todo.items()))

    def _count(self, response: Response) -> str:
        """Adds to `used`; what was used so far, in words."""
        self.used = [self.used[0] + _tokens(response, "prompt"), self.used[1] + _tokens(response, "completion")]
        cost = (self.used[0] * self.price_in + self.used[1] * self.price_out) / 1e6
        return f"{sum(self.used)} tokens, about ${cost:.4f}"

    async def _go_on(self, _: Any) -> None:
        """Before each try."""
        if self._failed:
            raise self._failed

    def _note(self, error: Exception, message: str) -> None:
        """Counts a failure, or makes it the end of this run."""
        status = getattr(error, "status_code", 500)
        advice = "check " + SETTINGS.get(status, "the server's log").format(key_variable=self.key_variable)
        if status in (408, 409, 429) or status >= 500:
            advice = f"gave up after {self.max_retries} retries (`max_retries`); run again to resume"
            if self.on_cloud_failure == "keep_local":
                self.failures += 1
                return log.warning("cloud: %s. %s", advice, message)
        self._failed = self._failed or EngineError(f"cloud: {advice}. {message}")


async def _judge(response: Any) -> None:
    """Gives the status its meaning, since the client retries by it: 429 is also said of an unpaid quota, which waiting
    does not help, and 200 of broken bodies, which another try may."""
    body = await response.aread()
    if response.status_code == 429 and b"insufficient_quota" in body:
        response.status_code = 402
    if response.status_code == 200:
        try:
            texts = [choice["message"]["content"] for choice in json.loads(body)["choices"]]
        except (ValueError, LookupError, TypeError):
            texts = []
        if not texts:
            response.status_code = 502


def _continued(prompt: Messages, text: str) -> Messages:
    """The prompt with `text` as (the continuation of) its assistant turn."""
    begun = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
    return [*(prompt[:-1] if begun else prompt), {"role": "assistant", "content": begun + text}]


def _log_probability(responses: list[Response], text: str) -> float:
    """The sum over the last prompt tokens that spell `text`."""
    listed = responses[0].get("prompt_logprobs") if responses else None
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


def _completions(responses: list[Response]) -> list[Completion]:
    return [
        Completion(
            choice["message"]["content"] or "",
            round(_tokens(response, "completion") / len(response["choices"])),
            choice.get("finish_reason") != "length",
        )
        for response in responses
        for choice in response["choices"]
    ]


def _tokens(response: Response, kind: str) -> int:
    return int((response.get("usage") or {}).get(f"{kind}_tokens", 0))


def _read(path: Path) -> list[Response]:
    """The responses kept for a question: none when there is no file, or it is damaged or holds something else."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return kept if isinstance(kept, list) else []


def _add(path: Path, response: Response) -> None:
    """Adds a paid response to the file, which changes at once and as a whole; one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent.with_name("writing.lock")):
        write_text(path, json.dumps([*_read(path), response]))
