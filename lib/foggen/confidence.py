"""From a model's own answers to confidence labels, and from labels to training rows.

Knows how a label is made and nothing about how a model is run or trained.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from foggen.config import Settings
from foggen.engines import Sampling
from foggen.prompts import (
    ANSWER_PREFIX,
    BUCKET_TEXTS,
    BUCKETS,
    CONFIDENCE_PREFIX,
    LETTERS,
    Messages,
    Variant,
    mcq_messages,
    parse_response,
    target_text,
)
from foggen.questions import Question

if TYPE_CHECKING:
    from foggen.engines import Engine

Floats = NDArray[np.floating[Any]]


class Sample(TypedDict):
    """What a checkpoint knows of one question: its share (or probability) of right answers, 0 to 1."""

    id: str
    p_correct: float
    own_answer: str | None  # its most frequent (or likely) letter; None: no readable answer
    votes: str | None  # one letter a generation, '-' unreadable; None: labels: exact
    texts: list[str]
    tokens: int


class SftRow(TypedDict):
    """One training row: the prompt, the assistant turn to learn, and what that was made from."""

    id: str
    domain: str
    messages: Messages
    target: str
    answer: str
    confidence: float
    votes: str | None


def bucket(p: float, tie: Literal["up", "down"] = "up") -> float:
    """The nearest of 0, 0.25, 0.5, 0.75, 1 to `p`; a `p` halfway between two goes up or down.

    >>> [bucket(k / 8) for k in range(9)]
    [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    """
    quarters = math.floor(4 * p + 0.5) if tie == "up" else math.ceil(4 * p - 0.5)
    return quarters / 4


# ---------------------------------------------------------------------------------------------------------------
# Asking the checkpoint


def sample_answers(engine: Engine, questions: Sequence[Question], settings: Settings, seed: int) -> list[Sample]:
    """Asks each question `samples` times at the recipe's temperature, and counts the right answers."""
    prompts = [mcq_messages(question, settings.prompt_variant) for question in questions]
    sampling = Sampling(settings.samples, settings.temperature, settings.max_new_tokens, seed)
    samples: list[Sample] = []
    for question, completions in zip(questions, engine.generate(prompts, sampling), strict=True):
        texts = [completion.text for completion in completions]
        votes = "".join(parse_response(text, len(question.options)).answer or "-" for text in texts)
        readable = Counter(votes.replace("-", ""))
        samples.append(
            Sample(
                id=question.id,
                p_correct=votes.count(question.answer) / len(votes),
                own_answer=readable.most_common(1)[0][0] if readable else None,
                votes=votes,
                texts=texts,
                tokens=sum(completion.tokens for completion in completions),
            )
        )
    return samples


class AnswerScores(NamedTuple):
    """Probabilities of a model's answers to one question, in the answer format; they sum to at most 1."""

    confidence: Floats  # (5,): P(bucket)
    joint: Floats  # (5, options): P(bucket and letter)

    @property
    def letters(self) -> Floats:
        """(options,): P(letter), whatever the confidence stated before it."""
        return cast(Floats, self.joint.sum(axis=0))

    @property
    def graded_confidence(self) -> float:
        """The expected bucket: a confidence with more than five levels."""
        return float(np.average(BUCKETS, weights=self.confidence))


def score_answers(
    engine: Engine, questions: Sequence[Question], variant: Variant = "blank_line", temperature: float = 1.0
) -> list[AnswerScores]:
    """Exact probabilities of every confidence and letter, P(c) * P(letter | c), at the given temperature."""
    prompts = [mcq_messages(question, variant) for question in questions]
    stated = [f"{CONFIDENCE_PREFIX} {text}" for text in BUCKET_TEXTS]
    whole = [
        stated + [f"{text}{ANSWER_PREFIX} {letter}" for text in stated for letter in LETTERS[: len(question.options)]]
        for question in questions
    ]
    scores = []
    for row in engine.score(prompts, whole, temperature):
        confidence, joint = np.split(np.exp(row), [len(stated)])
        scores.append(AnswerScores(confidence, joint.reshape(len(stated), -1)))
    return scores


def exact_answers(engine: Engine, questions: Sequence[Question], settings: Settings) -> list[Sample]:
    """The probability of a right answer at the recipe's temperature: the share in infinitely many samples.

    Only answers in the full format count: from a model that often states other confidences, sampling counts more.
    """
    samples: list[Sample] = []
    scores = score_answers(engine, questions, settings.prompt_variant, settings.temperature)
    for question, score in zip(questions, scores, strict=True):
        p = score.letters
        own = LETTERS[p.argmax()] if p.any() else None
        right = float(p[LETTERS.index(question.answer)])
        samples.append(Sample(id=question.id, p_correct=right, own_answer=own, votes=None, texts=[], tokens=0))
    return samples


# ---------------------------------------------------------------------------------------------------------------
# Labels


def training_row(question: Question, sample: Sample, settings: Settings) -> SftRow | None:
    """The row that teaches a question with its label; None where `answer_target: self` has no answer to teach."""
    answer = question.answer if settings.answer_target == "gold" else sample["own_answer"]
    if answer is None:
        return None
    confidence = bucket(sample["p_correct"], settings.tie)
    return SftRow(
        id=question.id,
        domain=question.domain,
        messages=mcq_messages(question, settings.prompt_variant),
        target=target_text(confidence, answer),
        answer=answer,
        confidence=confidence,
        votes=sample["votes"],
    )


def label(
    questions: Sequence[Question],
    samples: Sequence[Sample],
    settings: Settings,
    seed: int,
    overall: Sequence[float] = (),
) -> list[SftRow]:
    """Training rows of the sampled questions, under the label control that the settings ask for.

    `overall` are the confidences of the calibration buffer, which the control `random` draws from.
    """
    rows = [training_row(question, sample, settings) for question, sample in zip(questions, samples, strict=True)]
    return control([row for row in rows if row], settings.label_control, seed, overall)


def control(
    rows: Sequence[SftRow], kind: Literal["none", "random", "permuted"], seed: int, overall: Sequence[float] = ()
) -> list[SftRow]:
    """Rows whose labels say nothing about the question: what a chain gains with them it gains without knowing.

    `random` draws every label from the distribution over all domains (`overall`, or the rows' own where there is
    none yet), so that not even a domain's level is left; `permuted` exchanges labels within a domain.
    """
    labels = [row["confidence"] for row in rows]
    dice = random.Random(seed)
    if kind == "random":
        labels = dice.choices(list(overall) or labels, k=len(rows))
    elif kind == "permuted":
        before = list(labels)
        for domain in sorted({row["domain"] for row in rows}):
            places = [index for index, row in enumerate(rows) if row["domain"] == domain]
            for place, source in zip(places, dice.sample(places, len(places)), strict=True):
                labels[place] = before[source]
    return [
        {**row, "confidence": confidence, "target": target_text(confidence, row["answer"])}
        for row, confidence in zip(rows, labels, strict=True)
    ]


def histogram(rows: Iterable[SftRow]) -> dict[str, int]:
    """Rows a confidence bucket, all five named."""
    counts: Counter[Any] = Counter(row["confidence"] for row in rows)
    return {text: counts[value] for text, value in zip(BUCKET_TEXTS, BUCKETS, strict=True)}
