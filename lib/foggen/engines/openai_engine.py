"""Any OpenAI-compatible server, hosted or one's own (`vllm serve`, llama.cpp).

A sample is a request, and a request is a file, named by server, prompt, settings, seed and number:
what was paid for is not asked again. It holds text and token count, never the key. The seed is not
sent: hosted providers ignore it, CPU builds of vLLM die of it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import httpx2
import openai
from tqdm import tqdm

from foggen.engines.base import Chats, Completion, Engine, EngineError, Sampling
from foggen.prompts import Messages
from foggen.store import ROOT, digest, progress, write_text

log = logging.getLogger(__name__)
ADVICE = "check `model` and `base_url`, the key in {} (`key_variable`) and its account's quota"
ADDRESS = re.compile(r"(https?)://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?(/[^\s?#@]*)?", re.I)


@dataclass
class OpenAIEngine(Engine):
    """See `Engine`. `timeout` is in seconds, for a whole reply.

    `on_failure` says what follows when retries are used up: `stop` raises (run again to resume),
    `keep_local` leaves the prompt without completions, for the next run to ask, and counts it in
    `failures`. The client of `openai` waits .5 to 8 s between tries, or up to 120 s of Retry-After.
    Raises EngineError at once for an address, a key, a cache or options that cannot work.
    """

    model: str
    _: KW_ONLY
    base_url: str
    cache: str | Path = ROOT / "runs" / "answers"
    key_variable: str | None = None
    concurrency: int = 16
    timeout: float = 120.0
    max_retries: int = 10
    on_failure: Literal["stop", "keep_local"] = "stop"
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name, self.failures = self.model, 0
        self.end: EngineError | None = None  # why no more is asked
        check_address(self.base_url)
        read_key(self.key_variable)
        for name, least in {"concurrency": 1, "timeout": 0.001, "max_retries": 0}.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not value >= least:
                raise EngineError(f"{name}: {value!r}; expected: a number of at least {least}")
        if self.on_failure not in ("stop", "keep_local"):
            raise EngineError(f"on_failure: {self.on_failure!r}; expected: stop or keep_local")

    def generate(self, prompts: Chats, sampling: Sampling) -> list[list[Completion]]:
        """As in `Engine`."""
        url, key, self.end = self.base_url.rstrip("/"), read_key(self.key_variable), None
        samples, retries = range(sampling.n), self.max_retries
        bodies = [self._body(prompt, sampling) for prompt in prompts]
        check_cache(Path(self.cache))
        names = [[digest([url, body, sampling.seed, k]) for k in samples] for body in bodies]
        todo = {name: body for body, row in zip(bodies, names, strict=True) for name in row}
        http = LimitedClient(self)
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=retries, http_client=http)
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            asked = pool.map(partial(self._reply, client), todo, todo.values())
            try:
                bar = tqdm(asked, "cloud", len(todo), unit=" questions", delay=1)
                replies = dict(zip(todo, bar, strict=True))
            except BaseException:  # such as Ctrl-C: what is on its way is kept, no more is asked
                self.end = self.end or EngineError("cloud: interrupted")
                progress("  cloud: stops when the answers on their way are in (at most 2 min)")
                raise
        answers = [[replies[name] for name in row] for row in names]
        self.failures = sum(None in row for row in answers)
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
        """What the file of this name holds, or else the server says; None if that failed."""
        file = Path(self.cache) / name[:2] / f"{name}.json"
        reply = read_reply(file.read_bytes()) if file.exists() else None
        if reply is None:
            try:
                sent = client.post("/chat/completions", body=body, cast_to=httpx2.Response)
            except openai.OpenAIError as error:
                self._fail(error, client.api_key)
                return None
            if reply := read_reply(sent.content, client.api_key):
                write_text(file, reply_text(reply))
        return reply

    def _fail(self, error: Any, key: str) -> None:
        """Warns of a failure that may pass, under keep_local. Raises EngineError for all others."""
        advice = ADVICE.format(self.key_variable)
        status, said, asks = 500, str(error.__cause__), ""
        if isinstance(error, openai.APIStatusError):
            status, reply = error.status_code, error.response
            # Where a redirection leads is told, and not followed: prompts go nowhere else
            telling = [k for k in reply.headers if "retry" in k or "location" in k]
            asks = "".join(f"{name}: {reply.headers[name]}, " for name in telling)
            said = f"{status} {asks}{reply.text}"
        passing = status in (408, 409, 429) or status >= 500
        if passing:
            retries = int(error.request.headers.get("x-stainless-retry-count", 0))
            advice = f"gave up after {retries} retries (`max_retries`); run again to resume"
            if asks and retries < self.max_retries:  # the client waits for 120 s at most
                advice = "the server refuses retries for now; run again then to resume"
        message = masked(f"cloud: {advice}. {type(error).__name__}: {said}", key)[:1000]
        if not passing or self.on_failure == "stop":
            self.end = self.end or EngineError(message)
            raise self.end from None
        log.warning(message)


class LimitedClient(openai.DefaultHttpxClient):
    """Gives a try the engine's `timeout` in all (httpx: per piece), and none once `end` is set.

    A reply without a choice that can be read becomes a server's fault (502), which is tried again.
    """

    def __init__(self, engine: OpenAIEngine) -> None:
        super().__init__(timeout=engine.timeout, follow_redirects=False)
        self.engine, self.tries = engine, ThreadPoolExecutor(1000)

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """The response, read to its end."""
        if self.engine.end:
            raise self.engine.end
        try:
            sent = self.tries.submit(super().send, request, **options)
            response = sent.result(self.engine.timeout)
        except (TimeoutError, httpx2.TimeoutException):  # a silent server: whichever is first
            late = f"no whole reply within {self.engine.timeout} s (`timeout`)"
            raise httpx2.ReadTimeout(late, request=request) from None
        if response.status_code == 429 and b"insufficient_quota" in response.content:
            response.status_code = 402  # which waiting does not help
        if response.is_success and read_reply(response.content) is None:
            response.status_code = 502
        return response


# --------------------------------------------------------------------------------------------------
# What a reply holds


def read_reply(body: bytes, key: str = "") -> Completion | None:
    """What a server or a file says, with the key masked; None if it has no choice, or an error.

    {"choices": [{"message": {"content": "Confidence: 1.0"}, "finish_reason": "stop"}],
     "usage": {"completion_tokens": 12}}
    """
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        reason = choice.get("finish_reason")
        failed = data.get("error") or choice.get("error") or reason == "error"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if failed:
        return None
    message, usage = choice.get("message"), data.get("usage")
    # Content: a text, or a list of parts, of which those that are text count
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    text = "".join(text for text in texts if isinstance(text, str))
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair could not be written
    tokens: Any = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    known = type(tokens) is int and 0 <= tokens < 10**9
    return Completion(masked(text, key), tokens if known else 0, reason != "length")


def reply_text(reply: Completion) -> str:
    """What `read_reply` reads, and no more; a missing count is null."""
    reason = "stop" if reply.finished else "length"
    choice = {"message": {"content": reply.text}, "finish_reason": reason}
    usage = {"completion_tokens": reply.tokens or None}
    return json.dumps({"choices": [choice], "usage": usage})


# --------------------------------------------------------------------------------------------------
# Addresses and keys


def masked(text: str, key: str) -> str:
    """The text without the key; a shorter word ("none", "EMPTY") is no secret, and may be meant."""
    return text.replace(key, "***") if len(key) >= 8 else text


def read_key(variable: str | None) -> str:
    """The key of an environment variable. Raises EngineError for what no HTTP header can carry."""
    key = os.environ.get(variable, "") if variable else "none"
    if not re.fullmatch("[!-~]+", key):
        odd = "is empty, or holds a space, a line break or a character that is not ASCII"
        raise EngineError(f"the key in {variable} (`key_variable`) {odd}: copy it again")
    return key


def check_cache(folder: Path) -> None:
    """Raises EngineError for a folder that cannot keep answers, before any is paid for."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise EngineError(f"cache: {error}; expected: a folder that can be written") from None


def check_address(url: Any) -> None:
    """Raises EngineError for what is not a server's address alone; warns of plain http."""
    address = ADDRESS.fullmatch(str(url))
    if not address:
        shown = re.sub("^.*@|[?#].*$", "***", str(url), flags=re.S)
        form = "http(s)://host[:port]/path, such as https://api.openai.com/v1"
        more = "a key goes into the environment variable that `key_variable` names"
        raise EngineError(f"base_url: expected {form}, found {shown!r}; {more}")
    local = re.fullmatch(r"localhost|127\..*|\[::1\]", address[2], re.I)
    if address[1].lower() == "http" and not local:
        log.warning("base_url %s is plain http: key and questions can be read on the way", url)
