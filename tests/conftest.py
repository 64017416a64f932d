"""Fixtures: a tiny random Qwen3 with a byte-level tokenizer, questions, and settings small enough for seconds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from foggen.config import Settings, load_profile
from foggen.questions import DOMAINS, Question
from foggen.store import LOCK_VARIABLE, RUN_VARIABLE

TEMPLATE = (  # Qwen's, without tools
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' and enable_thinking is defined %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer with Qwen's special tokens: any text, no unknowns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = ["Confidence: 0.25\nFinal answer: A\n0.0 0.5 0.75 1.0 user system assistant question answer"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(folder: Path, seed: int = 0) -> Path:
    """A random Qwen3 of two layers, saved with its tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_run_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run folder that `make test` sets for the notebooks is not the unit tests'."""
    for variable in (RUN_VARIABLE, LOCK_VARIABLE):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


def make_questions(n: int = 6, domains: tuple[str, ...] = DOMAINS, seed: int = 0) -> list[Question]:
    """`n` questions a domain, two a fact."""
    dice = random.Random(seed)
    return [
        Question(
            id=f"{domain}-{index}",
            domain=domain,
            question=f"What is {domain} {index}?",
            options=("one", "two", "three", "four")[: dice.choice((2, 3, 4, 4))],
            answer=dice.choice("AB"),
            fact=f"{domain}/{index // 2}",
        )
        for domain in domains
        for index in range(n)
    ]


@pytest.fixture
def questions() -> list[Question]:
    return make_questions()


@pytest.fixture
def small(tiny_model: Path) -> Settings:
    """The pocket profile, shrunk to a chain of two rounds on the tiny model."""
    return load_profile(
        "pocket",
        {
            "edge.model": str(tiny_model),
            "domains": ["finance", "law"],
            "rounds": 2,
            "calibration_rows": 6,
            "new_rows": 4,
            "replay_rows": 5,
            "samples": 4,
            "max_new_tokens": 6,
            "dev_questions": 4,
            "epochs": 1,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "max_length": 700,
        },
    )
