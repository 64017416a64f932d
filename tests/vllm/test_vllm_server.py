"""`vllm serve` on this machine as the cloud: answers, a wrong key, and a server that dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm.version", reason="vLLM is not in this environment; `make test-vllm` sets one up"
)

from served import KEY, Server

from foggen.engines import EngineError, Sampling
from foggen.engines.openai_engine import OpenAIEngine
from foggen.engines.transformers_engine import TransformersEngine
from foggen.prompts import Messages, mcq_messages
from foggen.questions import load_questions

ROOT = Path(__file__).parents[2]
CLOUD = ROOT / "data" / "pocket" / "cloud"
GREEDY = Sampling(max_tokens=16)
pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(CLOUD, tmp_path_factory.mktemp("served") / "log.txt")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def prompts() -> list[Messages]:
    questions = load_questions(ROOT / "data" / "bank" / "questions" / "test.jsonl")
    return [mcq_messages(question) for question in questions[:: len(questions) // 100][:100]]


@pytest.fixture(scope="module")
def plain() -> TransformersEngine:
    return TransformersEngine(CLOUD, dtype="float32")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_KEY", KEY)


def client(server: Server, cache: Path, **options: Any) -> OpenAIEngine:
    url = f"http://127.0.0.1:{server.port}/v1"
    settings = {"key_variable": "CLOUD_KEY", "max_retries": 4, **options}
    return OpenAIEngine("cloud", base_url=url, cache=cache, **settings)


def test_answers_are_those_of_the_weights(
    server: Server, plain: TransformersEngine, prompts: list[Messages], tmp_path: Path
) -> None:
    served = [c for (c,) in client(server, tmp_path).generate(prompts, GREEDY)]
    own = [c for (c,) in plain.generate(prompts, GREEDY)]
    assert sum(a != b for a, b in zip(served, own, strict=True)) <= 1
    eight = Sampling(n=8, temperature=0.7, max_tokens=16, top_p=0.9, top_k=20)
    (samples,) = client(server, tmp_path).generate(prompts[:1], eight)
    assert len(samples) == 8
    kept = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert KEY not in kept + server.log.read_text()


def test_an_assistant_turn_is_continued(
    server: Server, plain: TransformersEngine, prompts: list[Messages], tmp_path: Path
) -> None:
    begun = {"role": "assistant", "content": "Confidence: 1.0\nFinal answer:"}
    asked, limit = [[*prompt, begun] for prompt in prompts[:5]], Sampling(max_tokens=1)
    assert client(server, tmp_path).generate(asked, limit) == plain.generate(asked, limit)


def test_wrong_key(
    server: Server, prompts: list[Messages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_KEY", "sk-other")
    with pytest.raises(EngineError, match="CLOUD_KEY"):
        client(server, tmp_path).generate(prompts[:3], GREEDY)


def test_too_long_a_prompt(server: Server, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="context length"):
        client(server, tmp_path).generate([[{"role": "user", "content": "very " * 2000}]], GREEDY)


def test_killed_in_the_middle_and_resumed(
    server: Server, plain: TransformersEngine, prompts: list[Messages], tmp_path: Path
) -> None:
    def kill_soon() -> None:
        while len(list(tmp_path.rglob("[!.]*.json"))) < 10:
            time.sleep(0.02)
        server.kill()

    killer = threading.Thread(target=kill_soon)
    killer.start()
    with pytest.raises(EngineError, match="run again to resume"):
        client(server, tmp_path, concurrency=2).generate(prompts, GREEDY)
    killer.join()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*.json")}
    assert 10 <= len(kept) < len(prompts)
    server.start()
    answers = [c.text for (c,) in client(server, tmp_path).generate(prompts, GREEDY)]
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items())
    own = [c.text for (c,) in plain.generate(prompts, GREEDY)]
    assert sum(a != b for a, b in zip(answers, own, strict=True)) <= 1
