"""Local engines on tiny random models: equal to `model.generate`, exact, whatever the neighbours.

vLLM is played by a fake that writes with such a model: what our engine asks of it is checked.
"""

from __future__ import annotations

import ast
import hashlib
import math
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import make_model, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
)

from foggen.engines import (
    PURE,
    Engine,
    EngineError,
    EngineSlot,
    Sampling,
    end_tokens,
    prompt_seeds,
)
from foggen.engines import transformers_engine as module
from foggen.engines.transformers_engine import TransformersEngine
from foggen.engines.vllm_engine import VLLMEngine, beginnings
from foggen.prompts import (
    ANSWER_PREFIX,
    BUCKET_TEXTS,
    Messages,
    encode_chat,
    parse_response,
    plain_ids,
)
from foggen.store import ROOT

ENDS = [" 0.75\nFinal answer: A", " 0.75", " 0.5", " 0.75\nFinal answer: B", " A", " 1.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_ends(make_model(tmp_path_factory.mktemp("model"), hidden=64))


def with_ends(folder: Path, step: int = 12, scale: float = 4) -> Path:
    """The model with every `step`th token as an end token, and with larger weights: surer."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for weight in model.parameters():
        weight.data *= scale if weight.dim() > 1 else 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        *range(40, len(tokenizer), step),
    ]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> TransformersEngine:
    torch.set_num_threads(1)
    return TransformersEngine(folder, dtype="float32")


def chats(count: int) -> list[Messages]:
    return [
        [
            {"role": "system", "content": "You are a self-aware assistant."},
            {"role": "user", "content": f"Question {k * 7919 % 1000}" + " and more" * (k % 5)},
        ]
        for k in range(count)
    ]


def generated(engine: TransformersEngine, prompt: Messages, tokens: int) -> list[int]:
    """What `model.generate` makes of one prompt."""
    ids = torch.tensor([encode_chat(engine.tokenizer, prompt)])
    settings = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0}
    out = engine.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return out[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def text_of(engine: TransformersEngine, ids: list[int]) -> str:
    """The text of generated ids, without the end token."""
    ended = ids[-1] in engine.end_ids
    return str(engine.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True))


def chain_rule(engine: Any, prompt: Messages, text: str, sampling: Sampling = PURE) -> float:
    """log P(text | prompt), token by token from whole passes, in double precision."""
    ids, more = encode_chat(engine.tokenizer, prompt), list(plain_ids(engine.tokenizer, text))
    with torch.no_grad():
        logits = engine.model(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1].double()
    total = 0.0
    for row, token in zip(logits / sampling.temperature, more, strict=True):
        order = row.argsort(descending=True)[: sampling.top_k or None]
        held = row[order].softmax(-1).cumsum(-1)
        allowed = order[: 1 + int((held < sampling.top_p).sum())].tolist()
        total += float(row[token] - row[allowed].logsumexp(-1)) if token in allowed else -math.inf
    return total


# --------------------------------------------------------------------------------------------------
# transformers


@pytest.fixture(scope="module")
def wanted(engine: TransformersEngine) -> list[list[int]]:
    return [generated(engine, prompt, 16) for prompt in chats(20)]


@pytest.mark.parametrize("budget", [1, 200, 100_000])
def test_greedy_is_generate_token_by_token(
    engine: TransformersEngine, folder: Path, wanted: list[list[int]], budget: int
) -> None:
    small = TransformersEngine(folder, "float32", token_budget=budget)
    answers = [answer for (answer,) in small.generate(chats(20), Sampling(max_tokens=16))]
    for answer, ids in zip(answers, wanted, strict=True):
        assert answer.text == text_of(engine, ids)
        assert (answer.tokens, answer.finished) == (len(ids), ids[-1] in engine.end_ids)
    assert {answer.finished for answer in answers} == {True, False}


@pytest.mark.parametrize("kind", ["gemma3", "llama", "gpt2", "bloom"])
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    small = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2}
    small |= {"initializer_range": 0.2}
    more = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
    more |= {"intermediate_size": 128}
    config: Any = {
        "gemma3": lambda: Gemma3TextConfig(**small, **more, sliding_window=48),
        "llama": lambda: LlamaConfig(**small, **more),
        "gpt2": lambda: GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4),
        "bloom": lambda: BloomConfig(**small, n_head=4),
    }[kind]()  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = TransformersEngine(with_ends(tmp_path, scale=1), "float32")
    tokens = 24 if kind == "gemma3" else 12  # 24 more leave its sliding window
    answers = engine.generate(chats(5), Sampling(max_tokens=tokens))
    for prompt, (answer,) in zip(chats(5), answers, strict=True):
        assert answer.text == text_of(engine, generated(engine, prompt, tokens))
    texts, warm = [*ENDS, " B" * tokens], Sampling(temperature=0.7)
    scores = engine.score(chats(3), [texts] * 3, warm)
    for prompt, row in zip(chats(3), scores, strict=True):
        exact = [chain_rule(engine, prompt, text, warm) for text in texts]
        assert row == pytest.approx(exact, abs=1e-3)


def test_one_prompt_and_none(engine: TransformersEngine) -> None:
    assert engine.generate([], Sampling()) == [] == engine.score([], [])
    assert engine.score(chats(2), [[], []]) == [[], []]
    alone = engine.generate(chats(1), Sampling(max_tokens=8))
    assert alone[0] == engine.generate(chats(4), Sampling(max_tokens=8))[0]


def test_samples_do_not_depend_on_neighbours_or_batches(
    engine: TransformersEngine, folder: Path
) -> None:
    sampling = Sampling(n=4, temperature=0.9, max_tokens=6, seed=3)
    together = engine.generate(chats(10), sampling)
    small = TransformersEngine(folder, "float32", token_budget=100)
    assert small.generate(chats(10), sampling) == together
    assert engine.generate(chats(10)[7:], sampling) == together[7:]
    assert engine.generate(chats(10), replace(sampling, seed=4)) != together
    twice = engine.generate(chats(1) * 2, sampling)
    assert twice[0] == together[0] and twice[1] != twice[0]


def test_samples_are_drawn_by_the_numbers_of_seed_prompt_and_occurrence() -> None:
    prompts = [[5, 6], [7], [5, 6]]
    noise = module.sample_noise(prompts, Sampling(n=2, max_tokens=3, seed=9))
    for row, prompt, occurrence in zip(noise, prompts, (0, 0, 1), strict=True):
        key = hashlib.sha256((repr((9, prompt)) + repr(occurrence)).encode()).digest()[:16]
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        assert row.tolist() == generator.random((2, 3)).tolist()
    logits = torch.tensor([[0.0, 1.0, 2.0]]) * 0.7  # shares .090, .245, .665
    numbers = torch.tensor([0, 0.09, 0.1, 0.34])
    sampling = Sampling(temperature=0.7)
    drawn = module.pick_tokens(logits, torch.zeros(4, dtype=int), sampling, numbers)
    assert drawn.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("top", "allowed"),
    [({"top_k": 2}, {1, 2}), ({"top_p": 0.6}, {1}), ({"top_p": 0.7}, {1, 2}),
     ({"top_k": 1, "top_p": 0.99}, {1}), ({}, {0, 1, 2, 3, 4})],
)  # fmt: skip
def test_a_token_that_is_ruled_out_is_never_drawn(top: dict[str, Any], allowed: set[int]) -> None:
    logits, count = torch.tensor([[1.0, 3.0, 2.0, 0.0, -1.0]]), 1000
    numbers = torch.linspace(0, 1, count, dtype=torch.float64).clamp(max=1 - 2**-53)
    sampling = Sampling(temperature=1.0, **top)
    drawn = module.pick_tokens(logits, torch.zeros(count, dtype=int), sampling, numbers)
    assert set(drawn.tolist()) == allowed


@pytest.mark.parametrize(
    "sampling",
    [
        PURE,
        Sampling(temperature=0.7),
        Sampling(temperature=0.7, top_k=20),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=0.7, top_p=0.8, top_k=20),
    ],
)
def test_score_is_the_chain_rule(engine: TransformersEngine, sampling: Sampling) -> None:
    prompts = [[*chat, {"role": "assistant", "content": "Confidence:"}] for chat in chats(5)]
    texts = [ENDS, [" A"], [], [" B", " B"], [" 1"]]
    scores = engine.score(prompts, texts, sampling)
    for prompt, asked, row in zip(prompts, texts, scores, strict=True):
        wanted = [chain_rule(engine, prompt, text, sampling) for text in asked]
        assert row == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("top", [{}, {"top_p": 0.9, "top_k": 50}])
def test_score_is_the_mean_of_many_samples(engine: TransformersEngine, top: dict[str, Any]) -> None:
    prompt, count = chats(1)[0], 20_000
    sampling = Sampling(n=count, temperature=0.7, max_tokens=2, seed=1, **top)
    drawn = Counter(c.text for c in engine.generate([prompt], sampling)[0] if not c.finished)
    ids = {text: plain_ids(engine.tokenizer, text) for text, _ in drawn.most_common(30)}
    two = [text for text in ids if len(ids[text]) == 2]
    texts = [text for text in two if engine.tokenizer.decode(ids[text]) == text]
    assert len(texts) >= 3
    for text, score in zip(texts, engine.score([prompt], [texts], sampling)[0], strict=True):
        p = math.exp(score)
        assert abs(drawn[text] / count - p) < 4 * math.sqrt(p * (1 - p) / count)


def test_notebook_08s_constrained_texts_are_the_likeliest(engine: TransformersEngine) -> None:
    book = nbformat.read(ROOT / "notebooks" / "08_your_model.ipynb", as_version=4)
    (cell,) = (c.source for c in book.cells if "def constrained_texts" in c.source)
    names = {"Engine": Engine, "Messages": Messages, "np": np}
    exec(ast.unparse(ast.parse(cell).body[0]), names)
    constrained_texts: Any = names["constrained_texts"]
    buckets = [f"Confidence: {text}" for text in BUCKET_TEXTS]
    letters = [[f"{ANSWER_PREFIX} {letter}" for letter in "ABCDE"[: 2 + k]] for k in range(4)]
    texts = constrained_texts(engine, chats(4), [[buckets] * 4, letters])
    for k, (prompt, text) in enumerate(zip(chats(4), texts, strict=True)):
        first = max(buckets, key=lambda choice: chain_rule(engine, prompt, choice))
        whole = [first + letter for letter in letters[k]]
        assert text == max(whole, key=lambda choice: chain_rule(engine, prompt, choice))
        assert parse_response(text, 2 + k).answer is not None
    free = [text for (text,) in engine.generate(chats(4), Sampling(max_tokens=16))]
    assert all(parse_response(answer.text).answer is None for answer in free), "it was the rule"


def test_stop_strings_end_and_are_cut(engine: TransformersEngine) -> None:
    whole = engine.generate(chats(6), Sampling(max_tokens=16))
    text = max((answer.text for (answer,) in whole), key=len)
    mark = text[len(text) // 2]
    cut = engine.generate(chats(6), Sampling(max_tokens=16, stop=("never", mark)))
    for (free,), (short,) in zip(whole, cut, strict=True):
        assert short.text == free.text.split(mark)[0]
        assert short.finished == (free.finished or mark in free.text)
        assert short.tokens <= free.tokens


def test_an_assistant_turn_is_continued(engine: TransformersEngine) -> None:
    prompt = [*chats(1)[0], {"role": "assistant", "content": "Confidence:"}]
    (answer,) = engine.generate([prompt], Sampling(max_tokens=8))[0]
    ids = generated(engine, prompt, 8)
    assert answer.text == text_of(engine, ids)
    assert encode_chat(engine.tokenizer, prompt)[-1] == plain_ids(engine.tokenizer, ":")[0]


def test_reload_takes_weights_and_end_tokens(folder: Path, tmp_path: Path) -> None:
    other = with_ends(make_model(tmp_path / "other", seed=1, hidden=64), step=5)
    live, fresh = TransformersEngine(folder, "float32"), TransformersEngine(other, "float32")
    before = live.generate(chats(5), Sampling(max_tokens=8))
    live.sleep()
    live.reload(other)
    after = live.generate(chats(5), Sampling(max_tokens=8))
    assert after == fresh.generate(chats(5), Sampling(max_tokens=8)) != before
    assert live.end_ids == fresh.end_ids and len(live.end_ids) > 20
    live.close()


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert module.pick_dtype("bfloat16", cpu) == torch.bfloat16
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bf16)
        assert module.pick_dtype("auto", cpu) == dtype
    for capability, dtype in (((9, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert module.pick_dtype("auto", gpu) == dtype


# --------------------------------------------------------------------------------------------------
# What engines share


def test_prompts_have_seeds_far_apart() -> None:
    seeds = prompt_seeds(0, [[1], [2], [1], [1, 2]])
    assert len(set(seeds)) == 4 and seeds[:2] == prompt_seeds(0, [[1], [2]])
    assert seeds != prompt_seeds(1, [[1], [2], [1], [1, 2]])
    short = sorted(seed % 2**62 for seed in prompt_seeds(0, [[k] for k in range(1000)]))
    assert min(np.diff(short)) > 1000  # vLLM's sample i has seed + i


def test_end_tokens() -> None:
    tokenizer = SimpleNamespace(eos_token_id=2)
    for listed, ids in ((None, [2]), (5, [2, 5]), ([5, 2, 7], [2, 5, 7])):
        assert end_tokens(SimpleNamespace(eos_token_id=listed), tokenizer) == ids
    assert end_tokens(None, SimpleNamespace(eos_token_id=None)) == []


class Recorder:
    """An engine that notes what is done to it."""

    def __init__(self, model: Path) -> None:
        self.done = [f"make {model}"]

    def reload(self, model: Path) -> None:
        self.done.append(f"reload {model}")
        if model.name == "broken":
            raise OSError("broken")

    def sleep(self) -> None:
        self.done.append("sleep")

    def close(self) -> None:
        self.done.append("close")


def test_a_slot_loads_only_what_it_needs() -> None:
    slot = EngineSlot(Recorder)  # type: ignore[arg-type]
    slot.sleep()
    slot.close()
    first = slot.load(Path("a"))
    assert slot.load(Path("a")) is first and slot.load(Path("b")) is first
    slot.sleep()
    slot.load(Path("b"))
    with pytest.raises(OSError, match="broken"):
        slot.load(Path("broken"))
    slot.load(Path("b"))
    slot.close()
    assert slot.load(Path("b")) is not first
    wanted = ["make a", "reload b", "sleep", "reload b", "reload broken", "reload b", "close"]
    assert first.done == wanted  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------
# vLLM, played by a fake


class FakeLLM:
    """Writes with the tiny model, as far as our engine asks for it."""

    def __init__(self, model: str, **options: Any) -> None:
        self.writer: TransformersEngine = options.pop("writer")
        self.options, self.requests, self.done = options, [], []
        room = SimpleNamespace(max_model_len=options.get("max_model_len", 4096))
        core = SimpleNamespace(shutdown=lambda: self.done.append("shutdown"))
        self.llm_engine = SimpleNamespace(model_config=room, engine_core=core)

    def get_tokenizer(self) -> Any:
        return self.writer.tokenizer

    def generate(self, prompts: Any, params: list[dict[str, Any]], use_tqdm: bool) -> list[Any]:
        self.requests.append(params)
        assert not use_tqdm and len(prompts) == len(params)
        return [
            SimpleNamespace(outputs=[self.write(p["prompt_token_ids"], own)] * own.get("n", 1))
            for p, own in zip(prompts, params, strict=True)
        ]

    def write(self, ids: list[int], own: dict[str, Any]) -> Any:
        """One sampled text, with the log-probabilities of the tokens asked for at each place."""
        new: list[int] = []
        logs: list[dict[int, Any]] = []
        while len(new) < own["max_tokens"] and not set(new) & set(own.get("stop_token_ids", [])):
            with torch.no_grad():
                logits = self.writer.model(torch.tensor([ids + new])).logits[:, -1]
            drawn = Sampling(temperature=own["temperature"] or 1e-6, top_p=own["top_p"])
            shares = module.tempered(logits, replace(drawn, top_k=own["top_k"])).log_softmax(-1)[0]
            listed = own.get("logprob_token_ids", [])
            logs.append({token: SimpleNamespace(logprob=float(shares[token])) for token in listed})
            new.append(int(torch.multinomial(shares.exp(), 1)))
        text = self.writer.tokenizer.decode(new, skip_special_tokens=True)
        return SimpleNamespace(text=text, token_ids=new, finish_reason="stop", logprobs=logs)

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: self.done.append((name, *given, *named.values())) or True


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine, folder: Path) -> Any:
    """Makes engines of the fake, as on a GPU or as on a CPU."""
    config = "vllm.transformers_utils.config"
    fakes = {name: ModuleType(name) for name in ("vllm", "vllm.transformers_utils", config)}
    fakes["vllm"].__dict__["LLM"] = partial(FakeLLM, writer=engine)
    fakes["vllm"].__dict__["SamplingParams"] = dict
    fakes[config].__dict__["try_get_generation_config"] = lambda path, trust_remote_code: (
        GenerationConfig.from_pretrained(path)
    )
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)

    def make(gpu: bool = True, **options: Any) -> VLLMEngine:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: gpu)
            return VLLMEngine(folder, dtype="float32", **options)

    return make


def test_vllm_gets_a_seed_for_every_prompt(vllm: Any) -> None:
    engine = vllm()
    sampling = Sampling(8, 0.7, max_tokens=4, seed=3, stop=("x",), top_p=0.8, top_k=20)
    engine.generate([*chats(30), *chats(2)], sampling)
    (sent,) = engine.llm.requests
    seeds = sorted(own.pop("seed") for own in sent)
    assert len(seeds) == 32 and min(np.diff(seeds)) >= 8 and max(seeds) < 2**63 - 8
    assert sent == [{
        "n": 8, "temperature": 0.7, "max_tokens": 4, "top_p": 0.8, "top_k": 20, "stop": ["x"],
        "stop_token_ids": engine.end_ids,
    }] * 32  # fmt: skip
    engine.generate(chats(30)[7:], sampling)
    again = [own["seed"] for own in engine.llm.requests[1]]
    assert set(again) < set(seeds), "a prompt's seed depends on its neighbours"


def test_vllm_on_a_cpu_is_seeded_as_a_whole(vllm: Any) -> None:
    engine = vllm(gpu=False)
    sampling = Sampling(temperature=0.7, max_tokens=4, seed=3)
    assert engine.generate(chats(3), sampling) == engine.generate(chats(3), sampling)
    assert not any(own["seed"] for own in engine.llm.requests[0])
    assert engine.llm.options["distributed_executor_backend"] == "uni"


@pytest.mark.parametrize("top", [{}, {"top_p": 0.9, "top_k": 50}])
def test_vllm_scores_in_few_requests(
    vllm: Any, engine: TransformersEngine, top: dict[str, Any]
) -> None:
    fake, sampling = vllm(), Sampling(temperature=0.7, **top)
    buckets = [f" {bucket}" for bucket in BUCKET_TEXTS]
    texts = buckets + [f"{bucket}{ANSWER_PREFIX} {k}" for bucket in buckets for k in "ABCD"]
    torch.manual_seed(0)
    for asked in ([texts, texts[:3], [" A"]], [[], [" B", " B"], texts]):
        scores = fake.score(chats(3), asked, sampling)
        for row, wanted in zip(scores, engine.score(chats(3), asked, sampling), strict=True):
            assert row == pytest.approx(wanted, abs=1e-4)
    nodes = {start for t in texts for start in beginnings(plain_ids(engine.tokenizer, t))}
    assert max(len(own["logprob_token_ids"]) for sent in fake.llm.requests for own in sent) <= 128
    assert sum(len(sent) for sent in fake.llm.requests) < 2.5 * len({s[:-1] for s in nodes})


def test_vllm_takes_new_weights_and_end_tokens(vllm: Any, folder: Path, tmp_path: Path) -> None:
    engine = vllm()
    other = with_ends(make_model(tmp_path, seed=1), step=5)
    before = engine.end_ids
    engine.sleep()
    engine.reload(other)
    loads = ("collective_rpc", "reload_weights", {"weights_path": str(other)})
    wakes = [("wake_up", ["weights"]), loads, ("wake_up", ["kv_cache"])]
    assert engine.llm.done == [("sleep", 2), *wakes, ("reset_prefix_cache",)]
    assert before == TransformersEngine(folder, "float32").end_ids
    assert engine.end_ids == TransformersEngine(other, "float32").end_ids != before
    engine.generate(chats(1), Sampling(max_tokens=2))
    assert engine.llm.requests[-1][0]["stop_token_ids"] == engine.end_ids
    engine.llm.reset_prefix_cache = lambda: False
    with pytest.raises(EngineError, match="mix two models"):
        engine.reload(other)


@pytest.mark.parametrize(
    "odd",
    [
        {"n": -1},
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"stop": ("",)},
        {"k": 1},
    ],
)
def test_what_no_engine_can_draw_by_is_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(odd))):
        Sampling(**odd)


@pytest.mark.parametrize("room", [100, 2048])
def test_a_prompt_longer_than_the_model_is_named(vllm: Any, tiny_model: Path, room: int) -> None:
    engine = vllm(max_model_len=100) if room == 100 else TransformersEngine(tiny_model)
    long = [*chats(1), [{"role": "user", "content": "so " * 3000}]]
    short = Sampling(max_tokens=8)
    for ask in (lambda: engine.generate(long, short), lambda: engine.score(long, [["a"]] * 2)):
        with pytest.raises(EngineError, match=rf"to come exceed max_model_len, {room},.* so so"):
            ask()
    with pytest.raises(EngineError, match=f"{room} to come"):
        engine.generate(chats(1), Sampling(max_tokens=room))
