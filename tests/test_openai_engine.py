"""The client of OpenAI-compatible servers, against a small server that fails in every way at a set rate."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from foggen.engines import EngineError, Sampling, make_engine
from foggen.engines.openai_engine import OpenAIEngine
from foggen.prompts import Messages

KEY = "sk-secret-0123456789"
FAULTS = ("500", "429", "hang", "cut", "invalid", "empty", "408", "409", "html")


class FaultyServer(ThreadingHTTPServer):
    """Answers `echo: <question>`; each request fails with probability `rate`, in a way drawn from `faults`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, rate: float = 0.0, faults: tuple[str, ...] = FAULTS) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rate, self.faults, self.random, self.lock = rate, faults, random.Random(0), threading.Lock()
        self.billed: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.most = self.now = 0
        self.many = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def fault(self) -> str:
        with self.lock:
            return self.random.choice(self.faults) if self.random.random() < self.rate else ""


class Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def log_message(self, *_: Any) -> None: ...

    def send(self, status: int, data: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(int(headers.pop("length", len(data)))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            self.answer(body)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def answer(self, body: dict[str, Any]) -> None:
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self.send(401, json.dumps({"error": f"wrong: {self.headers['Authorization']}"}).encode())
        if body["model"] != "cloud":
            return self.send(404, b'{"error": {"message": "no such model"}}')
        question = body["messages"][-1]["content"]
        if "unpaid" in question:
            self.server.seen["unpaid"] += 1
            return self.send(429, b'{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}')
        if "too long" in question:
            return self.send(400, b'{"error": {"message": "maximum context length is 10"}}')
        good = json.dumps(self.choices(question, body.get("n", 1) if self.server.many else 1)).encode()
        fault = self.server.fault()
        self.server.seen[fault] += 1
        if fault == "hang":
            time.sleep(1.0)
        elif fault == "cut":
            self.send(200, good[: len(good) // 2], length=str(len(good)))
        elif fault:
            status, data, kind = {
                "invalid": (200, b'{"choices": [{', "application/json"),
                "empty": (200, b'{"choices": []}', "application/json"),
                "html": (200, b"<html>busy</html>", "text/html"),
            }.get(fault, (int(fault) if fault.isdigit() else 500, b"{}", "application/json"))
            self.send(status, data, kind, **({"Retry_After": "0.02"} if fault == "429" else {}))
        else:
            with self.server.lock:
                self.server.billed[question] += 1
                self.server.bodies.append(body)
            self.send(200, good)

    def choices(self, question: str, n: int) -> dict[str, Any]:
        choice = {"message": {"role": "assistant", "content": f"echo: {question}"}, "finish_reason": "stop"}
        return {"choices": [choice] * n, "usage": {"prompt_tokens": 7, "completion_tokens": 3 * n}}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_KEY", KEY)


def client(server: FaultyServer, cache: Path, **options: Any) -> OpenAIEngine:
    settings = {"key_variable": "CLOUD_KEY", "timeout": 0.5, "max_retries": 30, **options}
    return OpenAIEngine(options.pop("model", "cloud"), base_url=server.url, cache=cache, **settings)


def ask(*questions: str) -> list[Messages]:
    return [[{"role": "user", "content": question}] for question in questions]


QUESTIONS = [f"question {k}" for k in range(120)]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_answer_arrives_once_and_in_order(server: FaultyServer, tmp_path: Path, fault: str) -> None:
    server.rate, server.faults = 0.2, (fault,)
    answers = client(server, tmp_path).generate(ask(*QUESTIONS), Sampling())
    assert [one.text for (one,) in answers] == [f"echo: {question}" for question in QUESTIONS]
    assert server.billed == Counter(QUESTIONS)
    assert server.seen[fault] > 5
    assert answers[0][0].tokens == 3 and answers[0][0].finished


def test_all_faults_at_once_and_the_key_is_nowhere(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    server.rate = 0.2
    engine = client(server, tmp_path, concurrency=8, price_in=1.0, price_out=10.0)
    assert all(engine.generate(ask(*QUESTIONS), Sampling()))
    assert server.billed == Counter(QUESTIONS)
    assert 2 <= server.most <= 8 + server.seen["hang"]
    shown = capsys.readouterr().err
    assert engine.used == [7 * 120, 3 * 120] and "about $0.0044" in shown
    assert KEY not in shown + caplog.text + "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_known_answers_are_not_asked_again(server: FaultyServer, tmp_path: Path) -> None:
    client(server, tmp_path).generate(ask("a", "b", "a"), Sampling())
    assert server.billed == Counter("ab")
    again = client(server, tmp_path).generate(ask("b", "c"), Sampling())
    assert [one.text for (one,) in again] == ["echo: b", "echo: c"]
    assert server.billed == Counter("abc")
    client(server, tmp_path).generate(ask("a"), Sampling(temperature=0.7, seed=1))
    assert server.billed["a"] == 2
    next(tmp_path.rglob("*.json")).write_text('[{"choices": [')
    assert all(client(server, tmp_path).generate(ask("a", "b", "c"), Sampling()))


@pytest.mark.parametrize("many", [True, False])
def test_n_answers_also_from_servers_that_give_one(server: FaultyServer, tmp_path: Path, many: bool) -> None:
    server.many = many
    (answers,) = client(server, tmp_path).generate(ask("a"), Sampling(n=4, temperature=1.0))
    assert len(answers) == 4 and server.billed["a"] == (1 if many else 4)
    (more,) = client(server, tmp_path).generate(ask("a"), Sampling(n=5, temperature=1.0))
    assert len(more) == 5 and server.billed["a"] == (2 if many else 5)
    assert {one.tokens for one in more} == {3}


def test_wrong_key_stops_at_once_and_names_the_setting(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CLOUD_KEY", "sk-wrong-1")
    with pytest.raises(EngineError, match=r"CLOUD_KEY \(`key_variable`\)") as caught:
        client(server, tmp_path, concurrency=2).generate(ask(*QUESTIONS), Sampling())
    assert "sk-wrong-1" not in str(caught.value) + caplog.text
    assert not list(tmp_path.rglob("*.json"))
    monkeypatch.delenv("CLOUD_KEY")
    with pytest.raises(EngineError, match="CLOUD_KEY"):
        client(server, tmp_path).generate(ask("a"), Sampling())


def test_other_permanent_failures_name_their_setting(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="`model` or `base_url`"):
        OpenAIEngine("other", base_url=server.url, cache=tmp_path, key_variable="CLOUD_KEY").generate(
            ask("a"), Sampling()
        )
    with pytest.raises(EngineError, match="context length"):
        client(server, tmp_path, concurrency=1).generate(ask("a", "too long", "b"), Sampling())
    assert server.billed == Counter("a")
    with pytest.raises(EngineError, match="quota"):
        client(server, tmp_path, on_cloud_failure="keep_local").generate(ask("unpaid"), Sampling())
    assert server.seen["unpaid"] == 1


def test_a_dead_server_stops_the_run_and_it_resumes(server: FaultyServer, tmp_path: Path) -> None:
    client(server, tmp_path).generate(ask(*QUESTIONS[:5]), Sampling())
    server.rate, server.faults = 1.0, ("500",)
    with pytest.raises(EngineError, match="run again to resume"):
        client(server, tmp_path, max_retries=2).generate(ask(*QUESTIONS[:9]), Sampling())
    engine = client(server, tmp_path, max_retries=1, on_cloud_failure="keep_local")
    answers = engine.generate(ask(*QUESTIONS[:9]), Sampling())
    assert [len(row) for row in answers] == [1] * 5 + [0] * 4 and engine.failures == 4
    server.rate = 0.0
    assert all(client(server, tmp_path).generate(ask(*QUESTIONS[:9]), Sampling()))
    assert server.billed == Counter(QUESTIONS[:9])


def test_retry_after_is_honoured(server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="openai")
    server.rate, server.faults = 1.0, ("429",)
    with pytest.raises(EngineError, match=r"gave up after 5 retries.*RateLimitError"):
        client(server, tmp_path, max_retries=5).generate(ask("a"), Sampling())
    assert server.seen["429"] == 6 and caplog.text.count("in 0.020000 seconds") == 5


def test_assistant_prefix_is_sent_as_one(server: FaultyServer, tmp_path: Path) -> None:
    prompt = [*ask("a")[0], {"role": "assistant", "content": "Confidence:"}]
    client(server, tmp_path, extra_body={"top_p": 1}).generate([prompt], Sampling(stop=("\n",)))
    body = server.bodies[0]
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert (body["stop"], body["top_p"]) == (["\n"], 1) and "seed" not in body and "n" not in body


def test_score_needs_a_server_that_can(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no prompt log-probabilities"):
        client(server, tmp_path).score(ask("a"), [["b"]])
    with pytest.raises(EngineError, match="temperature 1"):
        client(server, tmp_path).score(ask("a"), [["b"]], 0.7)
    with pytest.raises(EngineError, match="cannot load"):
        make_engine("openai", "cloud", base_url=server.url, cache=tmp_path).reload(tmp_path)


PROCESS = """
import sys
from pathlib import Path
from foggen.engines import Sampling, make_engine
engine = make_engine("openai", "cloud", base_url=sys.argv[1], cache=sys.argv[2], key_variable="CLOUD_KEY",
                     timeout=0.5, max_retries=30, concurrency=4)
engine.generate([[{"role": "user", "content": f"question {k}"}] for k in range(120)], Sampling())
"""


def test_killed_and_concurrent_processes_lose_and_damage_nothing(server: FaultyServer, tmp_path: Path) -> None:
    server.rate, server.faults = 0.3, ("500", "429")
    command = [sys.executable, "-c", PROCESS, server.url, str(tmp_path)]
    first = subprocess.Popen(command)
    while sum(server.billed.values()) < 20:
        time.sleep(0.01)
    first.kill()
    first.wait()
    kept = len(list(tmp_path.rglob("[!.]*.json")))
    assert kept >= sum(server.billed.values()) - 4  # at most the answers that were on their way
    workers = [subprocess.Popen(command) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    files = list(tmp_path.rglob("[!.]*.json"))
    assert len(files) == 120
    assert all(json.loads(path.read_text())[0]["choices"] for path in files)


ADDS = """
import sys
from pathlib import Path
from foggen.engines.openai_engine import _add
for k in range(50):
    _add(Path(sys.argv[1]), {"choices": [], "from": sys.argv[2], "number": k})
"""


def test_processes_that_answer_the_same_question_at_once_keep_all_answers(tmp_path: Path) -> None:
    file = tmp_path / "ab" / "abc.json"
    workers = [subprocess.Popen([sys.executable, "-c", ADDS, str(file), name]) for name in "xy"]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert len({(one["from"], one["number"]) for one in json.loads(file.read_text())}) == 100


NOTEBOOK = """
import logging
from foggen.engines import Sampling, make_engine
logging.basicConfig(filename="all.log", level=logging.DEBUG)
options = dict(base_url=URL, cache="answers", key_variable="CLOUD_KEY", max_retries=2)
engine = make_engine("openai", "cloud", **options)
print(engine.generate([[{"role": "user", "content": "a"}]], Sampling()), vars(engine))
"""


def test_the_key_is_in_no_artefact_log_or_executed_notebook(server: FaultyServer, tmp_path: Path) -> None:
    wrong = NOTEBOOK.replace('"cloud",', '"other",')
    cells = [nbformat.v4.new_code_cell(text.replace("URL", repr(server.url))) for text in (NOTEBOOK, wrong)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}).execute()
    nbformat.write(notebook, tmp_path / "executed.ipynb")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".lock", ".log", ".ipynb"}
    assert "no such model" in (tmp_path / "executed.ipynb").read_text() and server.billed == Counter("a")
    assert "chat/completions" in (tmp_path / "all.log").read_text()
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
