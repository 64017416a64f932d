"""Labels: from samples to buckets to training rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_model, make_questions

from foggen.confidence import (
    Sample,
    SftRow,
    bucket,
    control,
    exact_answers,
    histogram,
    label,
    sample_answers,
    score_answers,
)
from foggen.config import load_profile, override
from foggen.engines import Completion, Sampling, make_engine
from foggen.prompts import BUCKETS, Messages, mcq_messages, parse_response
from foggen.questions import DOMAINS
from foggen.training import encode_row

POCKET = load_profile("pocket")


def test_the_five_lines_of_the_recipe():
    """k correct of 8, tie up and down."""
    assert [bucket(k / 8, "up") for k in range(9)] == [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1]
    assert [bucket(k / 8, "down") for k in range(9)] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1]


@pytest.mark.parametrize("n", range(1, 40))
def test_bucket_is_a_nearest_one_and_ties_alone_differ(n):
    for k in range(n + 1):
        up, down = bucket(k / n, "up"), bucket(k / n, "down")
        best = min(abs(8 * n * c - 8 * k) for c in BUCKETS)  # in whole numbers
        assert abs(8 * n * up - 8 * k) == abs(8 * n * down - 8 * k) == best
        assert (up != down) == (8 * k % n == 0 and (8 * k // n) % 2 == 1) and up >= down


class Says:
    """An engine that answers from a list of texts, and scores from a given distribution."""

    name = "says"

    def __init__(self, *texts: str) -> None:
        self.texts, self.samplings = texts, list[Sampling]()

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        self.samplings.append(sampling)
        return [[Completion(text, 3, True) for text in self.texts[: sampling.n]] for _ in prompts]

    def score(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[str]], temperature: float = 1.0
    ) -> list[list[float]]:
        """P(c) = .1 .1 .2 .3 .2 (.1 elsewhere); P(A | c) = c, the rest evenly over the other options."""
        rows = []
        for texts in continuations:
            n = len(texts) // 5 - 1
            row = []
            for text in texts:
                confidence, letter = parse_response(text)
                assert confidence is not None
                p = (0.1, 0.1, 0.2, 0.3, 0.2)[BUCKETS.index(confidence)]
                if letter:
                    p *= confidence if letter == "A" else (1 - confidence) / (n - 1)
                row.append(math.log(p) if p else -math.inf)
            rows.append(row)
        return rows

    def reload(self, path: Path) -> None: ...

    def close(self) -> None: ...


def answers(letters: str) -> Says:
    return Says(*(f"Confidence: 0.5\nFinal answer: {letter}" if letter != "-" else "hm" for letter in letters))


QUESTION = make_questions(1, ("law",))[0].model_copy(update={"answer": "A", "options": ("w", "x", "y", "z")})


def test_sampling_counts_right_answers():
    engine = answers("AAB-EaCB")
    (sample,) = sample_answers(engine, [QUESTION], POCKET, seed=7)
    assert sample["votes"] == "AAB--ACB" and sample["p_correct"] == 3 / 8 and sample["own_answer"] == "A"
    assert sample["tokens"] == 24 and len(sample["texts"]) == 8
    (sampling,) = engine.samplings
    assert sampling == Sampling(n=8, temperature=0.7, max_tokens=POCKET.max_new_tokens, seed=7)


def test_own_answer_is_the_majority_letter_first_said_on_ties():
    assert sample_answers(answers("BBCCA---"), [QUESTION], POCKET, 0)[0]["own_answer"] == "B"
    assert sample_answers(answers("CBBCA---"), [QUESTION], POCKET, 0)[0]["own_answer"] == "C"
    assert sample_answers(answers("--------"), [QUESTION], POCKET, 0)[0]["own_answer"] is None


def test_exact_answers_multiply_confidence_and_letter():
    (score,) = score_answers(Says(), [QUESTION])
    right = sum(p * c for p, c in zip((0.1, 0.1, 0.2, 0.3, 0.2), BUCKETS, strict=True))
    assert score.letters == pytest.approx([right, *[(0.9 - right) / 3] * 3])
    assert score.graded_confidence == pytest.approx(right / 0.9)
    (sample,) = exact_answers(Says(), [QUESTION], POCKET)
    assert sample["p_correct"] == pytest.approx(right) and sample["own_answer"] == "A" and sample["votes"] is None


def unsure_model(folder: Path) -> Path:
    """A tiny model trained on contradictory answers to one question, all its weights, until it knows the format."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    taught = [("0.5", "A"), ("0.5", "A"), ("1.0", "A"), ("0.25", "B")]
    rows = [encode_row(tokenizer, mcq_messages(QUESTION), f"Confidence: {c}\nFinal answer: {x}") for c, x in taught]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        ids = torch.tensor([rows[step % 4]["input_ids"]])
        labels = torch.tensor([rows[step % 4]["labels"]])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def test_samples_tend_to_the_exact_probability(tmp_path, small):
    engine = make_engine("transformers", unsure_model(make_model(tmp_path)), dtype="float32")
    settings = override(small, {"samples": 400, "temperature": 0.9, "max_new_tokens": 32})
    (sampled,) = sample_answers(engine, [QUESTION], settings, seed=3)
    (exact,) = exact_answers(engine, [QUESTION], settings)
    p = exact["p_correct"]
    assert 0.05 < p < 0.95, "the test needs a model that is unsure"
    formed = [parse_response(text) for text in sampled["texts"]]
    right = sum(answer == "A" and confidence is not None for confidence, answer in formed) / 400
    assert abs(right - p) < 4 * math.sqrt(p * (1 - p) / 400) + 0.02
    assert sampled["p_correct"] >= right, "a right letter counts, with a readable confidence or without"


def sample(p: float, own: str | None = "B") -> Sample:
    return Sample(id=QUESTION.id, p_correct=p, own_answer=own, votes=None, texts=[], tokens=0)


@pytest.mark.parametrize(
    ("overrides", "target"),
    [
        ({}, "Confidence: 0.5\nFinal answer: A"),
        ({"tie": "down"}, "Confidence: 0.25\nFinal answer: A"),
        ({"answer_target": "self"}, "Confidence: 0.5\nFinal answer: B"),
    ],
)
def test_rows_teach_the_bucket_and_the_target_answer(overrides, target):
    (row,) = label([QUESTION], [sample(3 / 8)], override(POCKET, overrides), seed=0)
    assert row["target"] == target and row["messages"] == mcq_messages(QUESTION) and row["domain"] == "law"


def test_self_leaves_out_what_it_cannot_answer():
    settings = override(POCKET, {"answer_target": "self"})
    assert label([QUESTION], [sample(0, None)], settings, 0) == []
    assert len(label([QUESTION], [sample(0, None)], POCKET, 0)) == 1


def rows_of(n: int = 40) -> list[SftRow]:
    questions = make_questions(n)
    places = {domain: place for place, domain in enumerate(DOMAINS)}
    samples = [sample(((index % 3) + places[q.domain] % 3) / 4) for index, q in enumerate(questions)]
    return label(questions, samples, POCKET, seed=0)


def per_domain(rows: Sequence[Any]) -> dict[str, Counter[float]]:
    counts: dict[str, Counter[float]] = {}
    for row in rows:
        counts.setdefault(row["domain"], Counter())[row["confidence"]] += 1
    return counts


def test_permuted_labels_stay_within_their_domain():
    rows = rows_of()
    permuted = control(rows, "permuted", seed=1)
    assert per_domain(permuted) == per_domain(rows)
    assert [row["id"] for row in permuted] == [row["id"] for row in rows]
    moved = sum(a["confidence"] != b["confidence"] for a, b in zip(rows, permuted, strict=True))
    assert moved > len(rows) / 3
    assert all(parse_response(row["target"]) == (row["confidence"], row["answer"]) for row in permuted)
    assert control(rows, "permuted", 1) == permuted != control(rows, "permuted", 2)


def test_random_labels_come_from_all_domains():
    rows = rows_of(300)
    drawn = control(rows, "random", seed=1)
    whole = np.array([row["confidence"] for row in rows])
    for domain in DOMAINS:
        mine = [row["confidence"] for row in drawn if row["domain"] == domain]
        assert abs(np.mean(mine) - whole.mean()) < 4 * whole.std() / math.sqrt(len(mine))
    assert control(rows, "none", 1) == rows and control([], "random", 1) == []


def test_histogram_names_all_buckets():
    assert histogram(label([QUESTION], [sample(0.5)], POCKET, 0)) == {
        "0.0": 0,
        "0.25": 0,
        "0.5": 1,
        "0.75": 0,
        "1.0": 0,
    }
