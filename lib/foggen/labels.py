"""From a model's own answers to confidence labels, and from labels to training rows.

Holds how a checkpoint is asked what it knows, and how that becomes a label. Must not know how a
model is run, trained or stored.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

from foggen import prompts
from foggen.config import Settings
from foggen.engines import PURE, Engine, Sampling
from foggen.questions import Question

Questions = Sequence[Question]
Shares = Mapping[str, float]  # letter -> share of the answers, or probability
Sample = dict[str, Any]  # what a checkpoint knows of one question: see `judged_sample`
SftRow = dict[str, Any]  # one row of a training: see `training_row`


def bucket(p: float, tie: Literal["up", "down"] = "up") -> float:
    """The confidence nearest to `p` of 0, 0.25, 0.5, 0.75 and 1; halfway it goes up or down.

    >>> [bucket(k / 8) for k in range(9)]
    [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    """
    quarters = math.floor(4 * p + 0.5) if tie == "up" else math.ceil(4 * p - 0.5)
    return quarters / 4


# ------------------------------------------------------------------------------------------------
# Asking the checkpoint: by samples


def recipe_sampling(settings: Settings, seed: int = 0) -> Sampling:
    """How the recipe draws answers: `samples` of them at its temperature, top_p and top_k."""
    drawn = settings.only("temperature", "top_p", "top_k")
    return Sampling(settings.samples, max_tokens=settings.max_new_tokens, seed=seed, **drawn)


def sample_answers(
    engine: Engine, questions: Questions, settings: Settings, seed: int
) -> list[Sample]:
    """Answers every question `samples` times, and counts the right answers: see `judged_sample`.

    Each sample has the answers' `texts` too, and `tokens`, their number of tokens in all.
    """
    messages = [prompts.mcq_messages(question, settings.prompt_variant) for question in questions]
    replies = engine.generate(messages, recipe_sampling(settings, seed))
    samples: list[Sample] = []
    for question, completions in zip(questions, replies, strict=True):
        texts = [completion.text for completion in completions]
        read = [prompts.parse_response(text, len(question.options)).answer for text in texts]
        votes = "".join(letter or "-" for letter in read)
        shares = {letter: votes.count(letter) / len(votes) for letter in votes if letter != "-"}
        tokens = sum(completion.tokens for completion in completions)
        samples.append({**judged_sample(question, shares, votes), "texts": texts, "tokens": tokens})
    return samples


def judged_sample(question: Question, shares: Shares, votes: str | None = None) -> Sample:
    """The sample of a question whose letters were given with these shares (or probabilities).

    {"id": "law-7", "p_correct": 0.75, "majority_answer": "A", "votes": "AABA-AAA"}

    `p_correct`: share (or probability) of right answers. `votes`: one letter per answer, `-` for an
    unreadable one; None where probabilities were read instead (`labels: exact`).
    """
    majority = max(shares, key=shares.__getitem__, default=None)  # the first among equals
    p = shares.get(question.answer, 0.0)
    return {"id": question.id, "p_correct": p, "majority_answer": majority, "votes": votes}


# ------------------------------------------------------------------------------------------------
# Asking the checkpoint: by probabilities


class AnswerScores(NamedTuple):
    """What a model's probabilities say of one question. NaN where every answer is impossible."""

    letters: NDArray[np.float64]  # (options,): P(letter), whatever the confidence before it
    expected_confidence: float  # E[c], the mean bucket: a confidence with more than five levels
    option_probability: float  # the likeliest letter's share among the letters


def score_answers(
    engine: Engine, questions: Questions, variant: prompts.Variant, sampling: Sampling = PURE
) -> list[AnswerScores]:
    """Exact probabilities of all answers in the format, drawn as `sampling` says.

    Shares are taken of logarithms: a model that seldom keeps the format has them all the same.
    """
    messages = [prompts.mcq_messages(question, variant) for question in questions]
    heads = [f"{prompts.CONFIDENCE_PREFIX} {text}" for text in prompts.BUCKET_TEXTS]
    ends = [f"{prompts.ANSWER_PREFIX} {letter}" for letter in prompts.LETTERS]
    continuations = [
        heads + [head + end for head in heads for end in ends[: len(question.options)]]
        for question in questions
    ]
    scores = []
    for row in engine.score(messages, continuations, sampling):
        log_confidence, log_joint = np.split(np.array(row), [len(heads)])
        log_letters = logsumexp(log_joint.reshape(len(heads), -1), axis=0)  # of (5, options)
        expected = float(softmax(log_confidence) @ prompts.BUCKETS)
        likeliest = float(softmax(log_letters).max())
        scores.append(AnswerScores(np.exp(log_letters), expected, likeliest))
    return scores


def exact_answers(engine: Engine, questions: Questions, settings: Settings) -> list[Sample]:
    """As `sample_answers`, with the probability of a right answer: its share in endless samples.

    Only answers in the full format count, so a model off the format gets lower labels than from
    samples, where a right letter counts after any confidence.
    """
    scores = score_answers(engine, questions, settings.prompt_variant, recipe_sampling(settings))
    samples = []
    for question, score in zip(questions, scores, strict=True):
        pairs = zip(prompts.LETTERS, score.letters.tolist(), strict=False)
        samples.append(judged_sample(question, {letter: p for letter, p in pairs if p}))
    return samples


# ------------------------------------------------------------------------------------------------
# Labels


def training_row(question: Question, sample: Sample, settings: Settings) -> SftRow | None:
    """The row that teaches a question with its label and the gold letter.

    {"id": "law-7", "domain": "law", "messages": [{"role": "system", "content": ...}, ...],
     "target": "Confidence: 0.75\\nFinal answer: A", "answer": "A", "confidence": 0.75,
     "votes": "AABA-AAA"}

    With `answer_target: self` it teaches the majority letter; None where there is none to teach.
    """
    answer = sample["majority_answer"] if settings.answer_target == "self" else question.answer
    if answer is None:
        return None
    label = bucket(sample["p_correct"], settings.tie)
    messages = prompts.mcq_messages(question, settings.prompt_variant)
    row = {"id": question.id, "domain": question.domain, "messages": messages}
    row |= {"target": prompts.target_text(label, answer), "answer": answer}
    return {**row, "confidence": label, "votes": sample["votes"]}


def control_labels(
    control: str, rows: Sequence[SftRow], seed: int, buffer: Sequence[SftRow] = ()
) -> list[SftRow]:
    """Rows whose labels say nothing about their question: what they teach is not knowledge.

    `random` draws every label from those of the `buffer` (R0 has none: of the rows), so that not
    even a domain's level is left; `permuted` exchanges labels within a domain; others leave them.
    """
    labels, rng = np.array([row["confidence"] for row in rows]), random.Random(seed)
    if control == "random":
        labels = np.array(rng.choices([row["confidence"] for row in buffer or rows], k=len(rows)))
    elif control == "permuted":
        for domain in sorted({row["domain"] for row in rows}):
            places = [place for place, row in enumerate(rows) if row["domain"] == domain]
            labels[places] = labels[rng.sample(places, len(places))]
    return [
        {**row, "confidence": label, "target": prompts.target_text(label, row["answer"])}
        for row, label in zip(rows, labels.tolist(), strict=True)
    ]


def label_histogram(rows: Sequence[SftRow]) -> dict[str, int]:
    """Rows per label: {"0.0": 12, "0.25": 3, "0.5": 9, "0.75": 11, "1.0": 45}."""
    labels = [row["confidence"] for row in rows]
    return {text: labels.count(float(text)) for text in prompts.BUCKET_TEXTS}
