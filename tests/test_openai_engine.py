"""The client of OpenAI-compatible servers, against a small server that fails in every way."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from fault_server import BODIES, KEY, RANDOM, FaultServer, reply
from pydantic import ValidationError

from foggen.engines import Completion, EngineError, Sampling, make_engine
from foggen.engines.openai_engine import OpenAIEngine
from foggen.prompts import Messages

QUESTIONS = [f"question {k}" for k in range(60)]


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def client(server: FaultServer, cache: Path, **options: Any) -> OpenAIEngine:
    given = {"key_variable": "CLOUD_KEY", "timeout": 20, "max_retries": 30, "base_url": server.url}
    return OpenAIEngine(options.pop("model", "cloud"), cache=cache, **given | options)


def chats(*questions: str) -> list[Messages]:
    return [[{"role": "user", "content": question}] for question in questions]


def ask(engine: OpenAIEngine, *questions: str, **sampling: Any) -> list[list[Completion]]:
    return engine.generate(chats(*questions), Sampling(**sampling))


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.json"))  # a kill may leave a temporary file beside them


# --------------------------------------------------------------------------------------------------
# Every answer arrives, once


@pytest.mark.parametrize("fault", RANDOM)
def test_every_answer_arrives_once_and_in_order(
    server: FaultServer, tmp_path: Path, fault: str
) -> None:
    server.rate, server.faults = 0.2, (fault,)
    answers = ask(client(server, tmp_path), *QUESTIONS)
    assert [c.text for (c,) in answers] == [f"echo: {question}" for question in QUESTIONS]
    assert server.billed == Counter(QUESTIONS) and server.played[fault] > 2
    assert answers[0][0] == Completion("echo: question 0", 3, finished=True)
    assert len(files(tmp_path)) == len(QUESTIONS)


@pytest.mark.parametrize("fault", sorted(BODIES))
def test_a_reply_without_a_choice_is_tried_again_and_not_kept(
    server: FaultServer, tmp_path: Path, fault: str
) -> None:
    server.script["a"] = [fault, reply("A")]
    assert ask(client(server, tmp_path), "a")[0][0].text == "A" and server.asked["a"] == 2
    server.script["b"] = [fault]
    with pytest.raises(EngineError, match="cloud: InternalServerError"):
        ask(client(server, tmp_path, max_retries=1), "b")
    assert len(files(tmp_path)) == 1


def test_known_answers_are_not_asked_again(server: FaultServer, tmp_path: Path) -> None:
    ask(client(server, tmp_path), "a", "b", "a")
    assert server.billed == Counter("ab")
    assert [c.text for (c,) in ask(client(server, tmp_path), "b", "c")] == ["echo: b", "echo: c"]
    assert server.billed == Counter("abc")
    for changes in ({"temperature": 0.7}, {"seed": 1}, {"max_tokens": 9}, {"top_p": 0.8}):
        ask(client(server, tmp_path), "a", **changes)
    ask(client(server, tmp_path, base_url=server.url + "/"), "a")
    assert server.billed["a"] == 5
    other = server.url.replace("127.0.0.1", "localhost")
    ask(client(server, tmp_path, base_url=other), "a")
    assert server.billed["a"] == 6, "another server's answer"


@pytest.mark.parametrize(
    "damage",
    [b"[{}]", b"[null]", b"{}", b'{"choices": [', b"", b"\xff\xfe\x00", b"[" * 100_000],
)
def test_a_damaged_file_is_asked_again(server: FaultServer, tmp_path: Path, damage: bytes) -> None:
    ask(client(server, tmp_path), "a")
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert ask(client(server, tmp_path), "a")[0][0].text == "echo: a"
    assert server.billed["a"] == 2 and file.read_bytes() == whole


def test_samples_are_requests_of_their_own(server: FaultServer, tmp_path: Path) -> None:
    server.script["a"] = [reply(f"text {k}") for k in range(9)]
    (four,) = ask(client(server, tmp_path, concurrency=1), "a", n=4, temperature=1.0)
    assert [c.text for c in four] == [f"text {k}" for k in range(4)]
    (six,) = ask(client(server, tmp_path, concurrency=1), "a", n=6, temperature=1.0)
    assert six[:4] == four and server.billed["a"] == 6


def test_what_is_sent(server: FaultServer, tmp_path: Path) -> None:
    prompt = [*chats("a")[0], {"role": "assistant", "content": "Confidence:"}]
    engine = client(server, tmp_path, extra_body={"min_p": 0})
    engine.generate([prompt], Sampling(stop=("\n",), seed=5))
    assert server.bodies[0] == {
        "model": "cloud", "messages": prompt, "temperature": 0.0, "top_p": 1.0, "max_tokens": 64,
        "stop": ["\n"], "continue_final_message": True, "add_generation_prompt": False, "min_p": 0,
    }  # fmt: skip
    ask(engine, "b", temperature=0.7, top_p=0.8, top_k=20)
    assert {"top_p": 0.8, "top_k": 20, "temperature": 0.7}.items() <= server.bodies[1].items()
    assert not {"seed", "stop", "n", "continue_final_message"} & server.bodies[1].keys()


# --------------------------------------------------------------------------------------------------
# What replies hold


ODD = {
    "null": (reply(None), "", 3),
    "no content": (reply(choices=[{"message": {"role": "assistant"}}]), "", 3),
    "no message": (reply(choices=[{"finish_reason": "stop"}]), "", 3),
    "message null": (reply(choices=[{"message": None}]), "", 3),
    "empty": (reply(""), "", 3),
    "number": (reply(5), "", 3),
    "one part": (reply({"type": "text", "text": "A"}), "A", 3),
    "other object": (reply({"image": "A"}), "", 3),
    "parts": (reply([{"type": "text", "text": "Final"}, {"text": ": A"}]), "Final: A", 3),
    "odd parts": (reply([None, "A", 5, {"image": 1}, {"text": None}, ["x"]]), "A", 3),
    "half a pair": (reply("A\ud83d"), "A?", 3),
    "usage null": (reply("A", usage=None), "A", 0),
    "usage text": (reply("A", usage="3 tokens"), "A", 0),
    "usage list": (reply("A", usage=[3]), "A", 0),
    "no usage": ({"choices": reply("A")["choices"]}, "A", 0),
    **{
        f"count {count!r}": (reply("A", usage={"completion_tokens": count}), "A", 0)
        for count in (None, "3", [3], {}, True, -1, 3.5, 10**400)
    },
    "mark": (b"\xef\xbb\xbf" + json.dumps(reply("A")).encode(), "A", 3),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_reply_is_an_answer_and_never_paid_again(
    server: FaultServer, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    said, text, tokens = ODD[name]
    server.script["a"] = [said]
    for _ in range(2):
        assert ask(client(server, tmp_path), "a") == [[Completion(text, tokens, finished=True)]]
        assert ("1 replies came without a token count" in caplog.text) == (not tokens)
    assert server.asked["a"] == 1
    (file,) = files(tmp_path)
    assert json.loads(file.read_text()) == {"text": text, "tokens": tokens, "finished": True}


@pytest.mark.parametrize("kind", ["text/plain", "text/event-stream", "application/xml", ""])
def test_json_under_another_name_is_json(server: FaultServer, tmp_path: Path, kind: str) -> None:
    server.kind = kind
    assert ask(client(server, tmp_path), "a")[0][0].text == "echo: a" and server.asked["a"] == 1


def test_a_text_that_was_cut_is_not_finished(server: FaultServer, tmp_path: Path) -> None:
    server.script["a"] = [reply(choices=[{"message": {"content": "A"}, "finish_reason": "length"}])]
    for _ in range(2):
        assert ask(client(server, tmp_path), "a") == [[Completion("A", 3, finished=False)]]


# --------------------------------------------------------------------------------------------------
# Keys and addresses


def test_the_key_of_a_server_that_echoes_it_is_masked(
    server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.script["a"] = [reply(f"your headers: Bearer {KEY}", headers={"Authorization": KEY})]
    server.script["b"] = [json.dumps({"error": f"busy, {KEY}"}).encode()]
    assert ask(client(server, tmp_path), "a")[0][0].text == "your headers: Bearer ***"
    with pytest.raises(EngineError, match=r"busy, \*\*\*"):
        ask(client(server, tmp_path, max_retries=0), "b")
    engine = client(server, tmp_path, max_retries=0, on_failure="keep_local")
    ask(engine, "b")
    assert "run again to resume" in caplog.text and "/chat/completions" in caplog.text
    kept = "".join(file.read_text() for file in files(tmp_path))
    assert KEY not in caplog.text + kept + repr(vars(engine))


def test_a_short_key_is_no_secret(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fault_server.KEY", "A")
    monkeypatch.setenv("CLOUD_KEY", "A")
    server.script["a"] = [reply("Final answer: A")]
    assert ask(client(server, tmp_path), "a")[0][0].text == "Final answer: A"


@pytest.mark.parametrize("value", ["", "sk-1\r\n", "\nsk-1", "sk 1", "sk-\u0456", "sk-\x7f"])
def test_a_key_that_no_header_can_carry_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("CLOUD_KEY", value)
    with pytest.raises(EngineError, match=r"CLOUD_KEY.*expected a key, in ASCII") as caught:
        OpenAIEngine("cloud", base_url="http://localhost/v1", key_variable="CLOUD_KEY")
    assert not value.strip() or value.strip() not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [None, "", " ", "localhost:8000/v1", "//host/v1", "ftp://host/v1", "http:/host", "http://", "https:///v1",
     "http://host:port/v1", "http://host:999999/v1", "http://ho st/v1", "http://host/v 1", "http://host/v1\n",
     "http://[::1/v1", "http://user:passw0rd@host/v1", "http://passw0rd@host/v1", "passw0rd@host",
     "https://host/v1?api_key=passw0rd", "https://host/v1#passw0rd", "http://user:pass\nw0rd@host/v1"],
)  # fmt: skip
def test_an_address_that_is_none_or_more_is_refused_and_not_shown(url: Any) -> None:
    with pytest.raises(ValidationError, match="base_url") as caught:
        OpenAIEngine("cloud", base_url=url)
    assert "w0rd" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "warned"),
    [("http://localhost:8000/v1", False), ("http://127.0.0.1/v1", False),
     ("http://[::1]:80/v1", False), ("https://api.openai.com/v1", False),
     ("http://gpu-box:8000/v1", True), ("HTTP://10.0.0.5/v1", True),
     ("http://localhost.example.com/v1", True), ("http://[fe80::2]/v1", True)],
)  # fmt: skip
def test_plain_http_to_another_machine_is_warned_of(
    caplog: pytest.LogCaptureFixture, url: str, warned: bool
) -> None:
    OpenAIEngine("cloud", base_url=url)
    assert ("plain http" in caplog.text) == warned


# --------------------------------------------------------------------------------------------------
# Failures


@pytest.mark.parametrize(
    ("options", "question", "said"),
    [({"model": "other"}, "a", "check `model`, `base_url`"),
     ({}, "too long", "context length")],
)  # fmt: skip
@pytest.mark.parametrize("on_failure", ["stop", "keep_local"])
def test_what_waiting_does_not_help_ends_the_run_and_names_the_setting(
    server: FaultServer, tmp_path: Path, options: Any, question: str, said: str, on_failure: str
) -> None:
    server.script = {"too long": ["too long"]}
    engine = client(server, tmp_path, concurrency=1, on_failure=on_failure, **options)
    with pytest.raises(EngineError, match=said):
        ask(engine, question, "b")
    asked = [body["messages"][-1]["content"] for body in server.bodies]
    assert asked.count(question) == 1


def test_a_wrong_key_ends_the_run_and_is_not_shown(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_KEY", "sk-wrong-1")
    with pytest.raises(EngineError, match=r"401.*the key in CLOUD_KEY") as caught:
        ask(client(server, tmp_path, concurrency=2), *QUESTIONS)
    assert "sk-wrong-1" not in str(caught.value) and len(server.bodies) < 20


def test_a_dead_server_ends_the_run_and_it_resumes(server: FaultServer, tmp_path: Path) -> None:
    ask(client(server, tmp_path), *QUESTIONS[:5])
    server.rate, server.faults = 1.0, ("500",)
    with pytest.raises(EngineError, match=r"500.*run again to resume"):
        ask(client(server, tmp_path, max_retries=2), *QUESTIONS[:9])
    server.rate = 0.0
    assert all(ask(client(server, tmp_path), *QUESTIONS[:9]))
    assert server.billed == Counter(QUESTIONS[:9])


def test_keep_local_leaves_failures_out_and_asks_again(server: FaultServer, tmp_path: Path) -> None:
    server.script = {"b": ["500", "500", reply("B")], "c": [reply("")]}
    engine = client(server, tmp_path, max_retries=1, on_failure="keep_local")
    assert [[c.text for c in row] for row in ask(engine, "a", "b", "c")] == [["echo: a"], [], [""]]
    assert len(files(tmp_path)) == 2
    assert [c.text for (c,) in ask(engine, "a", "b", "c")] == ["echo: a", "B", ""]
    assert server.billed == Counter("abc")


def test_no_server_is_told_as_what_it_is(tmp_path: Path) -> None:
    engine = OpenAIEngine("cloud", base_url="http://127.0.0.1:9/v1", cache=tmp_path, max_retries=0)
    with pytest.raises(EngineError, match=r"APIConnectionError.*Connection refused"):
        ask(engine, "a")


def test_a_short_retry_after_is_honoured(
    server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="openai")
    server.script["a"] = ["429"]
    with pytest.raises(EngineError, match=r"RateLimitError 429 {'retry-after': '0.02'}"):
        ask(client(server, tmp_path, max_retries=5), "a")
    assert server.asked["a"] == 6 and caplog.text.count("in 0.020000 seconds") == 5


def test_a_used_up_account_is_not_asked_again(server: FaultServer, tmp_path: Path) -> None:
    server.script["a"] = ["quota"]
    with pytest.raises(EngineError, match=r"402.*insufficient_quota"):
        ask(client(server, tmp_path, on_failure="keep_local"), "a")
    assert server.asked["a"] == 1


LATER = formatdate(time.time() + 86_400, usegmt=True)


@pytest.mark.parametrize(
    "header",
    ["Retry-After: 3600", f"Retry-After: {LATER}"],
    ids=["seconds", "date"],
)
def test_a_long_retry_after_is_told(server: FaultServer, tmp_path: Path, header: str) -> None:
    server.script["a"] = [header]
    name, _, value = header.partition(": ")
    with pytest.raises(EngineError, match=f"{{'{name.lower()}': '{value}'}}: .*run again"):
        ask(client(server, tmp_path), "a")
    assert server.asked["a"] == 1
    failed, answered = ask(client(server, tmp_path, on_failure="keep_local"), "a", "b")
    assert not failed and answered


@pytest.mark.parametrize("fault", ["drip", "drip headers", "hang"])
def test_a_reply_has_a_limit_in_all(server: FaultServer, tmp_path: Path, fault: str) -> None:
    server.script = {"a": [fault, reply("A")], "b": [fault]}
    assert ask(client(server, tmp_path, timeout=2), "a")[0][0].text == "A"
    with pytest.raises(EngineError, match=r"no whole reply within 0.5 s \(`timeout`\)"):
        ask(client(server, tmp_path, max_retries=1, timeout=0.5), "b")
    assert server.asked["b"] == 2


@pytest.mark.parametrize("status", ["301", "302", "307", "308"])
def test_prompts_follow_no_redirection(server: FaultServer, tmp_path: Path, status: str) -> None:
    server.script["a"] = [f"redirect {status}"]
    with pytest.raises(EngineError, match=rf"{status} {{'location': 'http://elsewhere.*base_url"):
        ask(client(server, tmp_path), "a")
    assert server.asked == Counter("a") and not files(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("concurrency", 0), ("timeout", "abc"), ("timeout", float("nan")), ("max_retries", -1),
     ("on_failure", "Stop"), ("temperature", 1)],
)  # fmt: skip
def test_options_that_cannot_work_are_refused_at_once(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        make_engine("openai", "cloud", base_url="http://localhost/v1", **{name: value})


def test_answers_that_could_not_be_kept_are_not_asked_for(
    server: FaultServer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        ask(client(server, tmp_path / "file"), "a")
    assert not server.asked and (tmp_path / "file").read_text() == "mine"


def test_what_a_server_cannot_do_is_refused(tmp_path: Path) -> None:
    engine = make_engine("openai", "cloud", base_url="http://localhost/v1", cache=tmp_path)
    with pytest.raises(EngineError, match="no probabilities"):
        engine.score(chats("a"), [["b"]])
    with pytest.raises(EngineError, match="loads no weights"):
        engine.reload(tmp_path)
    engine.sleep()
    engine.close()


# --------------------------------------------------------------------------------------------------
# Many at once


def test_as_many_at_a_time_as_asked_for(server: FaultServer, tmp_path: Path) -> None:
    server.rate = 0.2
    assert all(ask(client(server, tmp_path, concurrency=8), *QUESTIONS))
    assert 2 <= server.most <= 8 + server.played["hang"]


PROCESS = """
import sys
import openai._base_client
from foggen.engines import Sampling, make_engine
openai._base_client.INITIAL_RETRY_DELAY = 0.05
engine = make_engine("openai", "cloud", base_url=sys.argv[1], cache=sys.argv[2],
                     key_variable="CLOUD_KEY", timeout=5, max_retries=30, concurrency=4)
engine.generate([[{"role": "user", "content": f"question {k}"}] for k in range(80)], Sampling())
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_ended_and_concurrent_processes_lose_and_damage_nothing(
    server: FaultServer, tmp_path: Path, end: signal.Signals
) -> None:
    server.rate, server.faults = 0.3, ("500", "429")
    command = [sys.executable, "-c", PROCESS, server.url, str(tmp_path)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while sum(server.billed.values()) < 20:
        time.sleep(0.01)
    first.send_signal(end)
    assert first.wait(20) != 0
    time.sleep(0.1)
    paid = sum(server.billed.values())
    # What was on its way is lost by a kill, and kept at an interrupt, which asks no more
    assert len(files(tmp_path)) >= paid - (4 if end == signal.SIGKILL else 0) and paid < 60
    workers = [subprocess.Popen(command) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert len(files(tmp_path)) == 80
    assert all(json.loads(path.read_text())["text"] for path in files(tmp_path))
