"""Labels: from answers to buckets to training rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_model, make_questions

from foggen.config import load_profile, override
from foggen.engines import Completion, Sampling, make_engine
from foggen.labels import (
    Sample,
    SftRow,
    bucket,
    control_labels,
    exact_answers,
    label_histogram,
    sample_answers,
    score_answers,
    training_row,
)
from foggen.prompts import BUCKETS, Messages, mcq_messages, parse_response
from foggen.questions import DOMAINS
from foggen.training import encode_row

POCKET = load_profile("pocket")
QUESTION = make_questions(1, ("law",))[0].model_copy(
    update={"answer": "A", "options": ("w", "x", "y", "z")}
)
CONFIDENCES = (0.1, 0.1, 0.2, 0.3, 0.2)  # .1 is left to other texts


@pytest.mark.parametrize("n", [*range(1, 20), 400])
def test_bucket_is_the_nearest_and_only_ties_differ(n):
    for k in range(n + 1):
        up, down = bucket(k / n, "up"), bucket(k / n, "down")
        nearest = min(abs(8 * n * c - 8 * k) for c in BUCKETS)  # in whole numbers
        assert abs(8 * n * up - 8 * k) == abs(8 * n * down - 8 * k) == nearest
        assert (up != down) == (8 * k % n == 0 and (8 * k // n) % 2 == 1) and up >= down


class Scripted:
    """An engine that answers with given texts; its scores make P(A | c) = c, and `scale` them."""

    name = "scripted"

    def __init__(self, letters: str = "", scale: float = 0.0) -> None:
        self.texts = [f"Confidence: 0.5\nFinal answer: {x}" if x != "-" else "hm" for x in letters]
        self.scale, self.calls = scale, list[Any]()

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        self.calls.append(sampling)
        return [[Completion(text, 3, True) for text in self.texts[: sampling.n]] for _ in prompts]

    def score(self, prompts: Any, continuations: Any, *drawn: Sampling) -> list[list[float]]:
        self.calls.append(drawn)
        return [[self._log(text, len(texts) // 5 - 1) for text in texts] for texts in continuations]

    def _log(self, text: str, options: int) -> float:
        confidence, letter = parse_response(text)
        assert confidence is not None
        p = CONFIDENCES[BUCKETS.index(confidence)]
        if letter:
            p *= confidence if letter == "A" else (1 - confidence) / (options - 1)
        return math.log(p) + self.scale if p else -math.inf


# ---- asking


@pytest.mark.parametrize(
    ("letters", "votes", "p", "majority"),
    [
        ("AAB-EaCB", "AAB--ACB", 3 / 8, "A"),  # E is none of four options
        ("BBCCA---", "BBCCA---", 1 / 8, "B"),  # the first among equals
        ("CBBCA---", "CBBCA---", 1 / 8, "C"),
        ("--------", "--------", 0, None),
    ],
)
def test_samples_are_counted(letters, votes, p, majority):
    engine = Scripted(letters)
    settings = override(POCKET, {"top_p": 0.8, "top_k": 20})
    (sample,) = sample_answers(engine, [QUESTION], settings, 7)
    counted = {name: sample[name] for name in ("votes", "p_correct", "majority_answer")}
    assert counted == {"votes": votes, "p_correct": p, "majority_answer": majority}
    assert sample["tokens"] == 24 and len(sample["texts"]) == 8
    assert engine.calls == [Sampling(8, 0.7, POCKET.max_new_tokens, 7, top_p=0.8, top_k=20)]


def test_exact_answers_multiply_confidence_and_letter():
    engine = Scripted()
    (score,) = score_answers(engine, [QUESTION], "blank_line")
    right = sum(p * c for p, c in zip(CONFIDENCES, BUCKETS, strict=True))
    assert score.letters == pytest.approx([right, *[(0.9 - right) / 3] * 3])
    assert score.expected_confidence == pytest.approx(right / 0.9)
    assert score.option_probability == pytest.approx(right / 0.9)
    settings = override(POCKET, {"top_p": 0.8, "top_k": 20})
    (sample,) = exact_answers(engine, [QUESTION], settings)
    p = pytest.approx(right)
    assert sample == {"id": QUESTION.id, "p_correct": p, "majority_answer": "A", "votes": None}
    drawn = [(s.temperature, s.top_p, s.top_k) for (s,) in engine.calls]
    assert drawn == [(1.0, 1.0, 0), (0.7, 0.8, 20)], "labels see the recipe's truncation"
    (other,) = exact_answers(engine, [QUESTION.model_copy(update={"answer": "D"})], settings)
    assert other["p_correct"] == pytest.approx((0.9 - right) / 3)


def test_shares_hold_for_a_model_that_never_keeps_the_format():
    """Its probabilities are below every floor, and below what a float holds."""
    (plain,), (off,) = (score_answers(Scripted(scale=s), [QUESTION], "compact") for s in (0, -900))
    assert off.letters.max() == 0
    assert off.option_probability == pytest.approx(plain.option_probability)
    assert off.expected_confidence == pytest.approx(plain.expected_confidence)
    (sample,) = exact_answers(Scripted(scale=-900), [QUESTION], POCKET)
    assert sample["p_correct"] == 0 and sample["majority_answer"] is None


def unsure_model(folder: Path) -> Path:
    """A tiny model that learnt contradictory answers to one question, until it kept the format."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    taught = [("0.5", "A"), ("0.5", "A"), ("1.0", "A"), ("0.25", "B")]
    targets = [f"Confidence: {stated}\nFinal answer: {letter}" for stated, letter in taught]
    rows = [encode_row(tokenizer, mcq_messages(QUESTION), target) for target in targets]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        row = rows[step % 4]
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def test_samples_tend_to_the_exact_probability(tmp_path, small):
    """Also when both are drawn from the likeliest tokens only."""
    engine = make_engine("transformers", unsure_model(make_model(tmp_path)), dtype="float32")
    for truncation in ({}, {"top_k": 2}):
        values = {"samples": 400, "temperature": 0.9, "max_new_tokens": 32}
        settings = override(small, values | truncation)
        (sampled,) = sample_answers(engine, [QUESTION], settings, seed=3)
        p = exact_answers(engine, [QUESTION], settings)[0]["p_correct"]
        assert 0.05 < p < 0.98, "the test needs a model that is unsure"
        read = [parse_response(text) for text in sampled["texts"]]
        right = sum(answer == "A" and stated is not None for stated, answer in read) / 400
        assert abs(right - p) < 4 * math.sqrt(p * (1 - p) / 400) + 0.02, truncation
        assert sampled["p_correct"] >= right, "a right letter counts after any confidence"


# ---- training rows


def sample(p: float, majority: str | None = "B") -> Sample:
    return Sample(id=QUESTION.id, p_correct=p, majority_answer=majority, votes="AB")


@pytest.mark.parametrize(
    ("overrides", "majority", "target"),
    [
        ({}, "B", "Confidence: 0.5\nFinal answer: A"),
        ({"tie": "down"}, None, "Confidence: 0.25\nFinal answer: A"),
        ({"answer_target": "self"}, "B", "Confidence: 0.5\nFinal answer: B"),
        ({"answer_target": "self"}, None, None),
    ],
)
def test_a_row_teaches_bucket_and_answer(overrides, majority, target):
    row = training_row(QUESTION, sample(3 / 8, majority), override(POCKET, overrides))
    if target is None:
        assert row is None
        return
    assert row and row["target"] == target and row["messages"] == mcq_messages(QUESTION)
    assert (row["id"], row["domain"], row["votes"]) == (QUESTION.id, "law", "AB")
    assert parse_response(target) == (row["confidence"], row["answer"])


# ---- controls


def rows_of(n: int = 40) -> list[SftRow]:
    """Rows whose labels depend on the domain."""
    rows = []
    for index, question in enumerate(make_questions(n)):
        p = ((index % 3) + DOMAINS.index(question.domain) % 3) / 4
        row = training_row(question, sample(p), POCKET)
        rows.append(row)
    return [row for row in rows if row]


def per_domain(rows: Sequence[SftRow]) -> Counter[tuple[str, float]]:
    return Counter((row["domain"], row["confidence"]) for row in rows)


def test_permuted_labels_stay_within_their_domain():
    rows = rows_of()
    permuted = control_labels("permuted", rows, seed=1)
    assert per_domain(permuted) == per_domain(rows)
    assert [row["id"] for row in permuted] == [row["id"] for row in rows]
    moved = sum(a["confidence"] != b["confidence"] for a, b in zip(rows, permuted, strict=True))
    assert moved > len(rows) / 3
    assert all(parse_response(r["target"]) == (r["confidence"], r["answer"]) for r in permuted)
    again, other = (control_labels("permuted", rows, seed) for seed in (1, 2))
    assert again == permuted != other


def test_random_labels_come_from_all_domains_or_the_buffer():
    rows = rows_of(300)
    drawn = control_labels("random", rows, seed=1)
    whole = np.array([row["confidence"] for row in rows])
    for domain in DOMAINS:
        labels = [row["confidence"] for row in drawn if row["domain"] == domain]
        assert abs(np.mean(labels) - whole.mean()) < 4 * whole.std() / math.sqrt(len(labels))
    buffer = [{**row, "confidence": 0.25} for row in rows[:2]]
    counts = label_histogram(control_labels("random", rows, 1, buffer))
    assert counts == {"0.0": 0, "0.25": len(rows), "0.5": 0, "0.75": 0, "1.0": 0}


@pytest.mark.parametrize("control", ["none", "frozen"])
def test_other_controls_leave_the_labels(control):
    rows = rows_of()
    assert control_labels(control, rows, 1) == rows and control_labels("random", [], 1) == []
