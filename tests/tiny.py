"""Random models of two layers with byte-level tokenizers, and questions for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

from foggen.questions import DOMAINS, Question

QWEN3 = (  # without tools
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and enable_thinking is defined %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
SMOLLM2 = (  # adds a system turn where a chat begins without one
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
_GEMMA = (
    "{%- for message in turns %}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles alternate') }}{%- endif %}"
    "{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{{- (first if loop.first else '') + message.content | trim + '<end_of_turn>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
GEMMA3 = (  # puts the system text before the first user turn's
    "{{- bos_token }}{%- set first = '' %}{%- set turns = messages %}"
    "{%- if messages[0].role == 'system' %}"
    "{%- set first = messages[0].content + '\n\n' %}{%- set turns = messages[1:] %}{%- endif %}"
) + _GEMMA
# Refuses a system turn
GEMMA2 = "{{- bos_token }}{%- set first = '' %}{%- set turns = messages %}" + _GEMMA


class Family(NamedTuple):
    """A chat template, special tokens (padding, end of text, beginning) and the marks of a turn."""

    template: str
    pad: str
    eos: str
    bos: str | None
    marks: tuple[str, ...]


FAMILIES = {
    "qwen3": Family(QWEN3, "<|endoftext|>", "<|im_end|>", None, ("<|im_start|>", "<|im_end|>")),
    "smollm2": Family(
        SMOLLM2, "<|im_end|>", "<|im_end|>", "<|im_start|>", ("<|im_start|>", "<|im_end|>")
    ),
    "gemma3": Family(GEMMA3, "<pad>", "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "gemma2": Family(GEMMA2, "<pad>", "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
}


def make_tokenizer(family: str = "qwen3") -> Any:
    """A byte-level BPE tokenizer with the special tokens and the template of a family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    known = FAMILIES[family]
    special = list(
        dict.fromkeys([known.pad, *known.marks, known.eos, *([known.bos] if known.bos else [])])
    )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [
        "Confidence: 0.25\nFinal answer: A\n0.0 0.5 0.75 1.0 user system assistant question answer"
    ] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=known.eos,
        pad_token=known.pad,
        bos_token=known.bos,
        additional_special_tokens=list(known.marks),
    )
    tokenizer.chat_template = known.template
    return tokenizer


def make_model(folder: Path, seed: int = 0, family: str = "qwen3", hidden: int = 64) -> Path:
    """A random Qwen3 or Gemma 3 of two layers, saved with its tokenizer."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer(family)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "gemma3":  # one layer of each of its two kinds of attention
        kinds = ["sliding_attention", "full_attention"]
        model: Any = Gemma3ForCausalLM(
            Gemma3TextConfig(**sizes, sliding_window=2048, layer_types=kinds)
        )
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_questions(n: int = 6, domains: tuple[str, ...] = DOMAINS, seed: int = 0) -> list[Question]:
    """`n` questions per domain, two per fact."""
    rng = random.Random(seed)
    return [
        Question(
            id=f"{domain}-{index}",
            domain=domain,
            question=f"What is {domain} {index}?",
            options=("one", "two", "three", "four")[: rng.choice((2, 3, 4, 4))],
            answer=rng.choice("AB"),
            fact=f"{domain}/{index // 2}",
        )
        for domain in domains
        for index in range(n)
    ]
