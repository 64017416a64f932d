"""The vLLM engine against the transformers engine, on the same weights and questions."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm.version", reason="vLLM is not in this environment; `make test-vllm` sets one up")

from foggen.engines import Sampling
from foggen.engines.transformers_engine import TransformersEngine
from foggen.engines.vllm_engine import VLLMEngine
from foggen.prompts import BUCKET_TEXTS, Messages, encode_chat, mcq_messages
from foggen.questions import load_questions

ROOT = Path(__file__).parents[2]
EDGE = ROOT / "data" / "pocket" / "edge"
OPTIONS = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 1 << 28, "dtype": "float32"}
GREEDY = Sampling(max_tokens=16)
pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def prompts() -> list[Messages]:
    questions = load_questions(ROOT / "data" / "bank" / "questions" / "test.jsonl")
    return [mcq_messages(question) for question in questions[:: len(questions) // 500][:500]]


@pytest.fixture(scope="module")
def plain() -> TransformersEngine:
    return TransformersEngine.load(EDGE, dtype="float32")


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    engine = VLLMEngine(EDGE, **OPTIONS)
    yield engine
    engine.close()


def texts(engine: VLLMEngine | TransformersEngine, prompts: list[Messages]) -> list[str]:
    return [one.text for (one,) in engine.generate(prompts, GREEDY)]


def cached_tokens(engine: VLLMEngine, prompt: Messages) -> int:
    (output,) = engine._run([encode_chat(engine.tokenizer, prompt)], [{"max_tokens": 1}])
    return int(output.num_cached_tokens or 0)


def test_greedy_texts_are_those_of_transformers(
    engine: VLLMEngine, plain: TransformersEngine, prompts: list[Messages]
) -> None:
    pairs = list(zip(prompts, texts(engine, prompts), texts(plain, prompts), strict=True))
    different = [(prompt, one, other) for prompt, one, other in pairs if one != other]
    print(len(different), "of", len(pairs), "differ")
    assert len(different) <= 0.01 * len(pairs)
    for prompt, one, other in different:  # a tie in float arithmetic, and nothing else
        first, second = plain.score([prompt], [[one, other]])[0]
        assert abs(first - second) < 1e-2


def test_eight_samples_have_the_models_probabilities(engine: VLLMEngine, prompts: list[Messages]) -> None:
    asked, count = prompts[:40], 64
    answers = texts(engine, asked)
    scores = engine.score(asked, [[answer] for answer in answers], 0.7)
    sampled = engine.generate(asked, Sampling(n=8, temperature=0.7, max_tokens=16, seed=1))
    assert [len(row) for row in sampled] == [8] * 40
    assert all(one.finished and one.tokens > 1 for row in sampled for one in row if one.text in answers)
    rows = engine.generate(asked, Sampling(n=count, temperature=0.7, max_tokens=16, seed=2))
    share = [sum(one.text == text for one in row) / count for row, text in zip(rows, answers, strict=True)]
    exact = [math.exp(row[0]) for row in scores]
    error = math.sqrt(sum(p * (1 - p) / count for p in exact)) / len(exact)
    assert abs(sum(share) - sum(exact)) / len(exact) < 4 * error + 1e-3


def test_scores_are_those_of_transformers(
    engine: VLLMEngine, plain: TransformersEngine, prompts: list[Messages]
) -> None:
    asked = [[*prompt, {"role": "assistant", "content": "Confidence:"}] for prompt in prompts[:10]]
    ends = [f" {bucket}\nFinal answer: {letter}" for bucket in BUCKET_TEXTS for letter in "ABCD"]
    ends += [f" {bucket}" for bucket in BUCKET_TEXTS]
    for temperature in (1.0, 0.7):
        mine = engine.score(asked, [ends] * len(asked), temperature)
        theirs = plain.score(asked, [ends] * len(asked), temperature)
        for one, other in zip(mine, theirs, strict=True):
            assert one == pytest.approx(other, abs=2e-3)


def shaken(folder: Path) -> Path:
    """The edge model with noise in every weight, the (tied) embeddings included: what a round's training changes."""
    copied = Path(shutil.copytree(EDGE, folder / "shaken"))
    weights = load_file(EDGE / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        weights[name] = weight * (1 + 0.2 * torch.randn(weight.shape, generator=noise))
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


def test_reload_is_a_fresh_engine_without_stale_blocks(
    engine: VLLMEngine, prompts: list[Messages], tmp_path: Path
) -> None:
    asked, other = prompts[:100], shaken(tmp_path)
    before = texts(engine, asked)
    assert cached_tokens(engine, asked[0]) > 0
    engine.sleep()
    engine.reload(other)
    assert cached_tokens(engine, asked[0]) == 0
    after = texts(engine, asked)
    assert after == texts(TransformersEngine.load(other, dtype="float32"), asked)
    engine.reload(EDGE)
    assert texts(engine, asked) == before != after
    fresh = VLLMEngine(other, **OPTIONS)
    assert texts(fresh, asked) == after
    fresh.close()
