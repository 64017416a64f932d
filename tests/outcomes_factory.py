"""Synthetic outcomes tables with known parameters."""

from __future__ import annotations

import numpy as np
import pandas as pd

LEVELS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
STATED = np.array([0.1, 0.15, 0.2, 0.25, 0.3])  # how often each level is stated
LOCAL = np.array([0.25, 0.4, 0.5, 0.65, 0.85])  # P(local right | level)
CLOUD = np.array([0.6, 0.65, 0.7, 0.75, 0.8])


def make_outcomes(
    n: int = 300,
    domains: int = 3,
    seed: int = 0,
    per_fact: int = 1,
    rich: bool = False,
    agree: float = 1.0,
) -> pd.DataFrame:
    """`n` questions a domain; the `per_fact` questions of a fact share its confidence and, each by
    the chance `agree`, its correctness.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for d in range(domains):
        fact = np.arange(n) // per_fact
        level = rng.choice(5, fact[-1] + 1, p=STATED)[fact]
        local = (rng.random(fact[-1] + 1)[fact] < LOCAL[level]).astype(float)
        if agree < 1:
            alone = (rng.random(n) < LOCAL[level]).astype(float)
            local = np.where(rng.random(n) < agree, local, alone)
        cloud = (rng.random(fact[-1] + 1)[fact] < CLOUD[level]).astype(float)
        part = pd.DataFrame({"id": [f"d{d}-{i}" for i in range(n)], "domain": f"domain{d}"})
        part = part.assign(local_correct=local, cloud_correct=cloud, confidence=LEVELS[level])
        if per_fact > 1:
            part["fact"] = [f"d{d}/{f}" for f in fact]
        parts.append(_rich(part, rng) if rich else part)
    return pd.concat(parts, ignore_index=True)


def make_seeds(seeds: int = 3, n: int = 50, **options: int) -> pd.DataFrame:
    """The outcomes of several training seeds on the same questions."""
    runs = [make_outcomes(n, seed=s, **options).assign(seed=s) for s in range(seeds)]
    return pd.concat(runs, ignore_index=True)


def mean_row(table: pd.DataFrame) -> pd.Series:
    """The row of a table that is the mean over the domains."""
    return table.set_index("domain").loc["mean"]


def _rich(part: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Every optional column."""
    n, right = len(part), part["local_correct"].to_numpy()
    gold = rng.choice(list("ABCD"), n)
    answer = np.where(right == 1, gold, np.where(gold == "A", "B", "A"))
    noisy = np.clip(part["confidence"] + rng.normal(0, 0.15, n), 0, 1)
    chance = 0.3 + 0.5 * right
    votes = [
        "".join(np.where(rng.random(8) < c, a, "-")) for c, a in zip(chance, answer, strict=True)
    ]
    words = np.where(right == 1, "easy", "hard")
    text = [f"{w if rng.random() < 0.7 else 'plain'} question {i}" for i, w in enumerate(words)]
    return part.assign(
        expected_confidence=noisy,
        option_probability=noisy,
        p_true=noisy[::-1].copy(),
        verification=0.5,
        votes=votes,
        gold=gold,
        n_options=4,
        local_answer=answer,
        cloud_answer=gold,
        question=text,
        local_tokens=14,
        cloud_tokens=30,
        sample_tokens=112,
        verification_tokens=400,
    )
