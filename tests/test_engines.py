"""The transformers engine on a tiny random Qwen3: equal to `model.generate`, and exact where it says so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from foggen.engines import EngineError, Sampling, make_engine
from foggen.engines.transformers_engine import TransformersEngine, split_prefix
from foggen.prompts import Messages, encode_chat

TEMPLATE = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(["Confidence: 0.75\nFinal answer: A", "You are a self-aware assistant. Rules"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(vocabulary: int, seed: int = 0, **changes: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.2,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**{**sizes, **changes}, tie_word_embeddings=True)).eval()
    model.generation_config.eos_token_id = [
        2,
        *range(40, vocabulary, 12),
    ]  # a random model ends somewhere, too
    return model


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer()
    yield TransformersEngine(tiny_model(len(tokenizer)), tokenizer, "tiny")


def chats(count: int) -> list[Messages]:
    return [
        [
            {"role": "system", "content": "You are a self-aware assistant."},
            {"role": "user", "content": f"Question {k * 7919 % 1000}" + " and more" * (k % 5)},
        ]
        for k in range(count)
    ]


def one_by_one(engine: TransformersEngine, prompt: Messages, tokens: int) -> list[int]:
    ids = torch.tensor([encode_chat(engine.tokenizer, prompt)])
    out = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("budget", [1, 200, 100_000])
def test_greedy_is_generate_token_by_token(engine: TransformersEngine, budget: int) -> None:
    small = TransformersEngine(engine.model, engine.tokenizer, token_budget=budget)
    prompts = chats(24)
    mine = small.generate(prompts, Sampling(max_tokens=20))
    theirs = [one_by_one(engine, prompt, 20) for prompt in prompts]
    for (got,), want in zip(mine, theirs, strict=True):
        assert got.text == engine.tokenizer.decode(want, skip_special_tokens=True)
        assert (got.tokens, got.finished) == (len(want), want[-1] in engine.end_ids)
    assert {got.finished for (got,) in mine} == {True, False}


@pytest.mark.parametrize("kind", ["gemma3", "llama", "gpt2", "bloom"])
def test_other_architectures(engine: TransformersEngine, kind: str) -> None:
    torch.manual_seed(0)
    small = {
        "vocab_size": len(engine.tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
    }
    more = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 128}
    config = {
        "gemma3": lambda: Gemma3TextConfig(**small, **more, sliding_window=96),
        "llama": lambda: LlamaConfig(**small, **more),
        "gpt2": lambda: GPT2Config(vocab_size=len(engine.tokenizer), n_embd=64, n_layer=2, n_head=4),
        "bloom": lambda: BloomConfig(**small, n_head=4),
    }[kind]()
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = [2, *range(40, 300, 12)]
    other = TransformersEngine(model, engine.tokenizer)
    lengths = [8, 96] if kind == "gemma3" else [12]  # 96 tokens leave its sliding window
    for tokens in lengths:
        for prompt, (got,) in zip(chats(7), other.generate(chats(7), Sampling(max_tokens=tokens)), strict=True):
            want = one_by_one(other, prompt, tokens)
            assert got.text == other.tokenizer.decode(want, skip_special_tokens=True)
    ends = [" 0.75\nFinal answer: A", " 0.75", " B" * max(lengths)]
    ids = encode_chat(other.tokenizer, chats(1)[0])
    (scores,) = other.score(chats(1), [ends], 0.7)
    for text, got in zip(ends, scores, strict=True):
        more = other.tokenizer(text)["input_ids"]
        logits = model(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1].detach().double() / 0.7
        want = logits.log_softmax(-1)[range(len(more)), more].sum()
        assert got == pytest.approx(float(want), abs=1e-3)


def test_single_prompt_and_no_prompt(engine: TransformersEngine) -> None:
    assert engine.generate([], Sampling()) == []
    assert engine.score([], []) == []
    assert engine.score(chats(2), [[], []]) == [[], []]
    alone = engine.generate(chats(1), Sampling(max_tokens=8))
    assert alone[0] == engine.generate(chats(4), Sampling(max_tokens=8))[0]


def test_samples_do_not_depend_on_neighbours_or_batches(engine: TransformersEngine) -> None:
    sampling = Sampling(n=4, temperature=0.9, max_tokens=6, seed=3)
    together = engine.generate(chats(10), sampling)
    tight = TransformersEngine(engine.model, engine.tokenizer, token_budget=100)
    assert tight.generate(chats(10), sampling) == together
    assert engine.generate(chats(10)[7:], sampling) == together[7:]
    assert engine.generate(chats(10), Sampling(n=4, temperature=0.9, max_tokens=6, seed=4)) != together
    twice = engine.generate(chats(1) * 2, sampling)
    assert twice[0] == together[0] and twice[1] != twice[0]


def test_score_is_the_chain_rule(engine: TransformersEngine) -> None:
    prompts = [[*chat, {"role": "assistant", "content": "Confidence:"}] for chat in chats(5)]
    ends = [
        [" 0.75\nFinal answer: A", " 0.75", " 0.5", " 0.75\nFinal answer: B"],
        [" A"],
        [],
        [" B", " B"],
        [" 1"],
    ]
    for temperature in (1.0, 0.7):
        scores = engine.score(prompts, ends, temperature)
        assert [len(row) for row in scores] == [4, 1, 0, 2, 1]
        for prompt, texts, row in zip(prompts, ends, scores, strict=True):
            for text, got in zip(texts, row, strict=True):
                ids = encode_chat(engine.tokenizer, prompt)
                more = engine.tokenizer(text)["input_ids"]
                logits = engine.model(torch.tensor([ids + more])).logits[0].detach().double() / temperature
                want = sum(float(logits[len(ids) + k - 1].log_softmax(-1)[t]) for k, t in enumerate(more))
                assert got == pytest.approx(want, abs=1e-4)


def test_exact_score_is_the_mean_of_many_samples(engine: TransformersEngine) -> None:
    prompt, count = chats(1)[0], 20_000
    drawn = engine.generate([prompt], Sampling(n=count, temperature=0.7, max_tokens=2, seed=1))[0]
    frequent = [text for text, _ in Counter(sample.text for sample in drawn if sample.tokens == 2).most_common(30)]
    ids = {text: engine.tokenizer(text)["input_ids"] for text in frequent}
    texts = [text for text in frequent if len(ids[text]) == 2 and engine.tokenizer.decode(ids[text]) == text]
    assert len(texts) >= 5
    for text, score in zip(texts, engine.score([prompt], [texts], 0.7)[0], strict=True):
        p = math.exp(score)
        share = sum(sample.text == text for sample in drawn) / count
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / count)


def test_stop_strings_end_and_are_cut(engine: TransformersEngine) -> None:
    whole = engine.generate(chats(6), Sampling(max_tokens=16))
    mark = whole[0][0].text[5]
    cut = engine.generate(chats(6), Sampling(max_tokens=16, stop=(mark,)))
    for (free,), (short,) in zip(whole, cut, strict=True):
        assert short.text == free.text.split(mark)[0]
        assert short.finished == (free.finished or mark in free.text)


def test_assistant_prefix_is_continued(engine: TransformersEngine) -> None:
    chat = chats(1)[0]
    first = engine.generate([chat], Sampling(max_tokens=8))[0][0]
    head = engine.generate([chat], Sampling(max_tokens=4))[0][0].text
    if engine.tokenizer.decode(engine.tokenizer(head)["input_ids"]) == head:
        more = engine.generate([[*chat, {"role": "assistant", "content": head}]], Sampling(max_tokens=4))
        assert more[0][0].tokens <= 4
        assert first.text.startswith(head)


def test_reload_takes_the_new_weights(engine: TransformersEngine, tmp_path: Path) -> None:
    other = tiny_model(len(engine.tokenizer), seed=1)
    for name, model in (("old", engine.model), ("new", other)):
        model.save_pretrained(tmp_path / name)
        engine.tokenizer.save_pretrained(tmp_path / name)
    live = make_engine("transformers", tmp_path / "old", device="cpu", dtype="float32")
    before = live.generate(chats(5), Sampling(max_tokens=8))
    live.reload(tmp_path / "new")
    after = live.generate(chats(5), Sampling(max_tokens=8))
    fresh = make_engine("transformers", tmp_path / "new", device="cpu", dtype="float32")
    assert after == fresh.generate(chats(5), Sampling(max_tokens=8)) != before
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), Qwen3ForCausalLM)


def test_split_prefix_leaves_a_token_each() -> None:
    assert split_prefix([[1, 2, 3], [1, 2]]) == ([1], [[2, 3], [2]])
    assert split_prefix([[5]]) == ([], [[5]])
    assert split_prefix([[1, 2], [3]]) == ([], [[1, 2], [3]])


def test_unknown_engine_is_named() -> None:
    with pytest.raises(EngineError, match="transformers, vllm, openai"):
        make_engine("llama", "x")
