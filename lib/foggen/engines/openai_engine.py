"""Any OpenAI-compatible server, hosted or one's own (`vllm serve`, llama.cpp).

A sample is a request, and a request is a file, named by server, prompt, settings, seed and number:
what was paid for is not asked again. It holds text and token count, never the key. The seed is not
sent: hosted providers ignore it, CPU builds of vLLM die of it.
"""

import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, asdict, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx2
import openai
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from foggen.engines import Chats, Completion, Engine, EngineError, Sampling
from foggen.prompts import Messages
from foggen.store import ROOT, digest, read_record, write_json

log = logging.getLogger(__name__)
ADDRESS = r"(?i)^https?://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?(/[^\s?#@]*)?$"  # alone
SAFE = re.compile(r"https://|http://(localhost|127\.[0-9.]+|\[::1\])(?=[:/]|$)", re.I)
TOLD = ("retry-after", "location")
PASSING = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)


@dataclass(config={"extra": "forbid", "hide_input_in_errors": True})  # which may be a password
class OpenAIEngine(Engine):
    """See `Engine`. `timeout` is in seconds, for a whole reply.

    `on_failure` says what follows when retries are used up: `stop` raises (run again to resume),
    `keep_local` leaves the prompt without completions, for the next run to ask. The client of
    `openai` waits .5 to 8 s between tries, or up to 120 s of Retry-After; after a failure or Ctrl-C
    it makes the tries of the requests on their way, and no other request. Raises EngineError or
    pydantic's ValidationError at once for an address, a key or options that cannot work.
    """

    model: str
    _: KW_ONLY
    base_url: Annotated[str, Field(pattern=ADDRESS)]
    cache: Path = ROOT / "runs" / "answers"
    key_variable: str | None = None
    concurrency: PositiveInt = 16
    timeout: PositiveFloat = 120.0
    max_retries: NonNegativeInt = 10
    on_failure: Literal["stop", "keep_local"] = "stop"
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.model
        read_key(self.key_variable)
        if not SAFE.match(self.base_url):
            log.warning("base_url %s, plain http: others can read key and questions", self.base_url)

    def generate(self, prompts: Chats, sampling: Sampling) -> list[list[Completion]]:
        """As in `Engine`. Raises OSError for a cache that cannot be made, before any request."""
        self.cache.mkdir(parents=True, exist_ok=True)
        url, retries = self.base_url.rstrip("/"), self.max_retries
        bodies = [self._body(prompt, sampling) for prompt in prompts]
        samples = range(sampling.n)
        names = [[digest([url, body, sampling.seed, k]) for k in samples] for body in bodies]
        todo = {name: body for body, row in zip(bodies, names, strict=True) for name in row}
        key, http = read_key(self.key_variable), LimitedClient(self.timeout)
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=retries, http_client=http)
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            # After a failure or Ctrl-C `map` asks no more, and what is on its way is kept
            asked = pool.map(partial(self._reply, client), todo, todo.values())
            bar = tqdm(asked, "cloud", len(todo), unit=" questions", delay=1)
            replies = dict(zip(todo, bar, strict=True))
        answers = [[replies[name] for name in row] for row in names]
        if uncounted := sum(bool(c and c.text and not c.tokens) for row in answers for c in row):
            log.warning("cloud: %d replies came without a token count: 0 stands for it", uncounted)
        return [[c for c in row if c and None not in row] for row in answers]

    def _body(self, prompt: Messages, sampling: Sampling) -> dict[str, Any]:
        """The request. `top_p` is always said: a server may have a default of its own."""
        body = {"model": self.model, "messages": prompt, "max_tokens": sampling.max_tokens}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        body |= {"top_k": sampling.top_k} if sampling.top_k else {}
        body |= {"stop": list(sampling.stop)} if sampling.stop else {}
        if prompt[-1]["role"] == "assistant":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body | self.extra_body

    def _reply(self, client: openai.OpenAI, name: str, body: dict[str, Any]) -> Completion | None:
        """What the file of this name holds, or else the server says; None if that failed.

        {"text": "Confidence: 1.0\\nFinal answer: B", "tokens": 12, "finished": true}
        """
        file = self.cache / name[:2] / f"{name}.json"
        kept = read_record(file)
        if kept.keys() == {"text", "tokens", "finished"}:
            return Completion(**kept)
        try:
            sent = client.post("/chat/completions", body=body, cast_to=httpx2.Response)
        except openai.APIError as error:
            self._fail(error, client.api_key)
            return None
        if reply := read_reply(sent.content, client.api_key):
            write_json(file, asdict(reply))
        return reply

    def _fail(self, error: openai.APIError, key: str) -> None:
        """Warns of a failure that may pass, under keep_local. Raises EngineError for all others."""
        said = f"{type(error).__name__}: {error.__cause__}"
        if isinstance(error, openai.APIStatusError):
            reply = error.response
            # Where a redirection leads is told, and not followed: prompts go nowhere else
            told = {name: reply.headers[name] for name in TOLD if name in reply.headers}
            said = f"{type(error).__name__} {reply.status_code} {told or ''}: {reply.text}"
        check = f"check `model`, `base_url` and the key in {self.key_variable} (`key_variable`)"
        message = f"cloud: {masked(said, key)[:1000]}; run again to resume, or {check}"
        if self.on_failure == "stop" or not isinstance(error, PASSING):
            raise EngineError(message) from None
        log.warning(message)


class LimitedClient(openai.DefaultHttpxClient):
    """Gives a try `limit` seconds in all (httpx: per piece).

    A reply without a choice that can be read becomes a server's fault (502), which is tried again.
    """

    def __init__(self, limit: float) -> None:
        super().__init__(timeout=limit, follow_redirects=False)
        self.limit, self.tries = limit, ThreadPoolExecutor(1000)

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """The response, read to its end."""
        try:
            sent = self.tries.submit(super().send, request, **options)
            response = sent.result(self.limit)
        except (TimeoutError, httpx2.TimeoutException):  # a silent server: whichever is first
            late = f"no whole reply within {self.limit} s (`timeout`)"
            raise httpx2.ReadTimeout(late, request=request) from None
        if response.status_code == 429 and b"insufficient_quota" in response.content:
            response.status_code = 402  # which waiting does not help
        if response.is_success and read_reply(response.content) is None:
            response.status_code = 502
        return response


# --------------------------------------------------------------------------------------------------
# Replies, addresses and keys


def read_reply(body: bytes, key: str = "") -> Completion | None:
    """What a server says, with the key masked; None if it has no choice, or an error.

    {"choices": [{"message": {"content": "Confidence: 1.0"}, "finish_reason": "stop"}],
     "usage": {"completion_tokens": 12}}

    Content that is no text is empty, and a count that is none is 0: it was paid for.
    """
    try:
        data = json.loads(body)
        choice, usage = data["choices"][0], data.get("usage")
        reason, content = choice.get("finish_reason"), (choice.get("message") or {}).get("content")
        if data.get("error") or choice.get("error") or reason == "error":
            return None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    # A text, or a list of parts, of which those that are text count
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    text = "".join(text for text in texts if isinstance(text, str))
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair could not be written
    tokens: Any = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    known = type(tokens) is int and 0 <= tokens < 10**9
    return Completion(masked(text, key), tokens if known else 0, reason != "length")


def masked(text: str, key: str) -> str:
    """The text without the key; a shorter word ("none", "EMPTY") is no secret, and may be meant."""
    return text.replace(key, "***") if len(key) >= 8 else text


def read_key(variable: str | None) -> str:
    """The key of an environment variable. Raises EngineError for what no HTTP header can carry."""
    key = os.environ.get(variable, "") if variable else "none"
    if not re.fullmatch("[!-~]+", key):
        raise EngineError(f"{variable} (`key_variable`): expected a key, in ASCII without spaces")
    return key
