"""A server of OpenAI's protocol that fails as real ones do: as its `script` says, or at random."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-0123456789"
STATUSES = {
    "500": 500,
    "503": 503,
    "408": 408,
    "409": 409,
    "429": 429,
    "too long": 400,
    "quota": 429,
}
BODIES = {
    "invalid": b'{"choices": [{',
    "html": b"<html>busy</html>",
    "nothing": b"",
    "no list": b'{"choices": {"message": {"content": "A"}}}',
    "empty": b'{"choices": []}',
    "null choice": b'{"choices": [null]}',
    "list": b'[{"choices": [{"message": {"content": "A"}}]}]',
    "error": b'{"error": {"message": "upstream is busy"}}',
    "error in it": b'{"error": {"code": 429}, "choices": [{"message": {"content": ""}}]}',
    "error of the choice": b'{"choices": [{"error": {"code": 429}, "message": {"content": ""}}]}',
    "error as the end": b'{"choices": [{"message": {"content": ""}, "finish_reason": "error"}]}',
    "nested": b"[" * 100_000,
}
RANDOM = ("500", "429", "hang", "cut", "invalid", "empty", "408", "409", "html")


def reply(content: Any = "A", **changes: Any) -> dict[str, Any]:
    """A whole reply; `changes` replace fields of it."""
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return {"id": "x", "choices": [choice], "usage": usage} | changes


class FaultServer(ThreadingHTTPServer):
    """Answers `echo: <question>`, unless `script` has something else for that question.

    A script lists what the first request gets, the second, and so on (the last one for ever): a
    reply, a body of bytes, or the name of a fault. Without one, requests fail at a set `rate`.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: dict[str, list[Any]] = {}
        self.rate, self.faults, self.random = 0.0, RANDOM, random.Random(0)
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()  # requests, by question
        self.billed: Counter[str] = Counter()  # whole replies, by question
        self.played: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.most = self.now = 0
        self.kind = "application/json"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def next(self, question: str) -> Any:
        """What this request gets."""
        with self.lock:
            self.asked[question] += 1
            if steps := self.script.get(question):
                return steps[min(self.asked[question], len(steps)) - 1]
            if self.random.random() < self.rate:
                return self.random.choice(self.faults)
            return reply(f"echo: {question}")


class Handler(BaseHTTPRequestHandler):
    server: FaultServer

    def log_message(self, *_: Any) -> None: ...

    def send(self, status: int, data: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", self.server.kind)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            self.server.bodies.append(body)
        try:
            self.answer(body["messages"][-1]["content"], body["model"])
        except OSError:
            pass  # the client went away
        finally:
            with self.server.lock:
                self.server.now -= 1

    def answer(self, question: str, model: str) -> None:
        if self.headers["Authorization"] != f"Bearer {KEY}":
            said = {"error": f"wrong key: {self.headers['Authorization']}"}
            return self.send(401, json.dumps(said).encode())
        if model != "cloud":
            return self.send(404, b'{"error": {"message": "no such model"}}')
        play = self.server.next(question)
        if not isinstance(play, str):
            with self.server.lock:
                self.server.billed[question] += 1
            return self.send(200, play if isinstance(play, bytes) else json.dumps(play).encode())
        with self.server.lock:
            self.server.played[play] += 1
        self.fail(play)

    def fail(self, play: str) -> None:
        good = json.dumps(reply()).encode()
        name, _, value = play.partition(": ")
        if play == "hang":
            time.sleep(3)
        elif play == "cut":
            self.send(200, good[: len(good) // 2], len(good))
        elif play == "drip":
            self.send(200, b"", 10_000)
            self.drip(b" " * 200)
        elif play == "drip headers":
            self.drip(b"HTTP/1.1 200 OK\r\nX-Header: " + b"x" * 200)
        elif play.startswith("redirect"):
            self.send(int(play.split()[1]), b"{}", Location="http://elsewhere/v1")
        elif value:
            self.send(429, b"{}", **{name: value})
        elif play in BODIES:
            self.send(200, BODIES[play])
        else:
            headers = {"Retry_After": "0.02"} if play == "429" else {}
            code = "insufficient_quota" if play == "quota" else "maximum context length"
            self.send(STATUSES[play], json.dumps({"error": {"code": code}}).encode(), **headers)

    def drip(self, data: bytes) -> None:
        """A byte ten times a second."""
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.1)
