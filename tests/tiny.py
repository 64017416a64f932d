"""A random Qwen3 of two layers with a byte-level tokenizer, and questions for it: made in a second, offline."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from foggen.questions import DOMAINS, Question

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
