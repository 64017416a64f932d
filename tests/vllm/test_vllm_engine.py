"""The vLLM engine against the transformers engine, on the same weights and questions."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip(
    "vllm.version", reason="vLLM is not in this environment; `make test-vllm` sets one up"
)

from foggen.engines import PURE, Engine, EngineError, Sampling
from foggen.engines.transformers_engine import TransformersEngine
from foggen.engines.vllm_engine import VLLMEngine
from foggen.prompts import BUCKET_TEXTS, Messages, encode_chat, mcq_messages
from foggen.questions import load_questions

ROOT = Path(__file__).parents[2]
EDGE = ROOT / "data" / "pocket" / "edge"
OPTIONS: dict[str, Any] = {"enforce_eager": True, "max_model_len": 512, "dtype": "float32"}
OPTIONS |= {"kv_cache_memory_bytes": 1 << 28}
GREEDY = Sampling(max_tokens=16)
pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def prompts() -> list[Messages]:
    questions = load_questions(ROOT / "data" / "bank" / "questions" / "test.jsonl")
    return [mcq_messages(question) for question in questions[:: len(questions) // 500][:500]]


@pytest.fixture(scope="module")
def plain() -> TransformersEngine:
    return TransformersEngine(EDGE, dtype="float32")


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    engine = VLLMEngine(EDGE, **OPTIONS)
    yield engine
    engine.close()


def texts(engine: Engine, prompts: list[Messages]) -> list[str]:
    return [completion.text for (completion,) in engine.generate(prompts, GREEDY)]


def test_greedy_texts_are_those_of_transformers(
    engine: VLLMEngine, plain: TransformersEngine, prompts: list[Messages]
) -> None:
    pairs = list(zip(prompts, texts(engine, prompts), texts(plain, prompts), strict=True))
    different = [(prompt, a, b) for prompt, a, b in pairs if a != b]
    print(len(different), "of", len(pairs), "differ")
    assert len(different) <= 0.01 * len(pairs)
    for prompt, a, b in different:  # a tie in float arithmetic, and nothing else
        first, second = plain.score([prompt], [[a, b]])[0]
        assert abs(first - second) < 1e-2


@pytest.mark.parametrize("top", [{}, {"top_p": 0.8, "top_k": 20}])
def test_samples_have_the_models_probabilities(
    engine: VLLMEngine, prompts: list[Messages], top: dict[str, Any]
) -> None:
    asked, count = prompts[:40], 64
    answers = texts(engine, asked)
    sampling = Sampling(n=count, temperature=0.7, max_tokens=16, seed=2, **top)
    scores = engine.score(asked, [[answer] for answer in answers], sampling)
    rows = engine.generate(asked, sampling)
    assert [len(row) for row in rows] == [count] * 40
    assert all(c.finished and c.tokens > 1 for row in rows for c in row if c.text in answers)
    shares = [
        sum(c.text == text for c in row) / count for row, text in zip(rows, answers, strict=True)
    ]
    exact = [math.exp(row[0]) for row in scores]
    error = math.sqrt(sum(p * (1 - p) / count for p in exact)) / len(exact)
    # The scores are of texts, and samples end with their end token, too: nearly always
    assert abs(sum(shares) - sum(exact)) / len(exact) < 4 * error + 1e-3


@pytest.mark.parametrize(
    "sampling",
    [PURE, Sampling(temperature=0.7, top_p=0.8), Sampling(temperature=0.7, top_k=3)],
)
def test_scores_are_those_of_transformers(
    engine: VLLMEngine,
    plain: TransformersEngine,
    prompts: list[Messages],
    monkeypatch: pytest.MonkeyPatch,
    sampling: Sampling,
) -> None:
    stated = [f"Confidence: {bucket}" for bucket in BUCKET_TEXTS]
    ends = stated + [f"{text}\nFinal answer: {letter}" for text in stated for letter in "ABCD"]
    requests: list[int] = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda ids, own: requests.append(len(ids)) or run(ids, own))
    mine = engine.score(prompts[:40], [ends] * 40, sampling)
    theirs = plain.score(prompts[:40], [ends] * 40, sampling)
    wrong = 0
    for row, wanted in zip(mine, theirs, strict=True):
        wrong += any(math.isinf(a) != math.isinf(b) for a, b in zip(row, wanted, strict=True))
        both = [(a, b) for a, b in zip(row, wanted, strict=True) if a > -math.inf < b]
        assert [a for a, _ in both] == pytest.approx([b for _, b in both], abs=2e-3)
    assert wrong <= 1, "a token on the brink of top_p"
    print(sum(requests) / 40, "requests per question", len(requests), "calls")
    assert sum(requests) <= 8 * 40


def shaken(folder: Path) -> Path:
    """The edge model with noise in every weight, and with a line break as an end token."""
    copied = Path(shutil.copytree(EDGE, folder / "shaken"))
    weights = load_file(EDGE / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        weights[name] = weight * (1 + 0.2 * torch.randn(weight.shape, generator=noise))
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((EDGE / "generation_config.json").read_text())
    ends = [config["eos_token_id"], *line_breaks()]
    (copied / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    return copied


def line_breaks() -> list[int]:
    tokenizer = TransformersEngine(EDGE, dtype="float32").tokenizer
    return [token for token in range(len(tokenizer)) if "\n" in tokenizer.decode([token])]


def cached_tokens(engine: VLLMEngine, prompt: Messages) -> int:
    ids = {"prompt_token_ids": encode_chat(engine.tokenizer, prompt)}
    (output,) = engine.llm.generate([ids], use_tqdm=False)
    return int(output.num_cached_tokens or 0)


def test_reload_takes_weights_and_end_tokens_and_leaves_no_stale_blocks(
    engine: VLLMEngine, prompts: list[Messages], tmp_path: Path
) -> None:
    asked, other = prompts[:100], shaken(tmp_path)
    before = texts(engine, asked)
    assert cached_tokens(engine, asked[0]) > 0 and "\n" in "".join(before)
    engine.sleep()
    engine.reload(other)
    assert cached_tokens(engine, asked[0]) == 0
    after = texts(engine, asked)
    assert after == texts(TransformersEngine(other, dtype="float32"), asked)
    assert all("\n" not in text[:-1] for text in after)
    engine.reload(EDGE)
    assert texts(engine, asked) == before != after


def test_a_prompt_that_is_too_long_is_named_and_nothing_runs(
    engine: VLLMEngine, prompts: list[Messages]
) -> None:
    long = [{"role": "user", "content": "Who was the first " + "very " * 2000}]
    with pytest.raises(EngineError, match=r"exceed max_model_len, 512, .* very very"):
        engine.generate([*prompts[:2], long], GREEDY)
    assert all(texts(engine, prompts[:2]))
