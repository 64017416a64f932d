"""AutoMix: the edge model verifies its answer k times, and a meta-verifier decides who answers.

Holds the verification of answers, the meta-verifiers and what a routing is worth. Works on outcomes
tables (one row per question); must not know how a model is run or a figure drawn.

Source: Aggarwal, Madaan et al., "AutoMix: Automatically Mixing Language Models", NeurIPS 2024, and
its public code. Notation: v = verification share, S/L = small (edge) and large (cloud) model,
P = mean quality, c = cost, rho = share of routed queries, IBC = incremental benefit per cost,
dIBC = its relative gain over sending queries at random.
"""

from collections import namedtuple
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter1d

from foggen.engines import Engine, Sampling
from foggen.prompts import parse_verification, verify_messages
from foggen.questions import Question
from foggen.routing import correctness

BINS = 8  # one bin per verification: v is a multiple of 1/8 when all eight can be read
KINDS = ("NEEDY", "GOOD", "HOPELESS")
MAX_PENALTY = 4999  # the POMDP tries every integer from 0 as the penalty for routing in vain
UNION = ("POMDPSimple", "GreedyPOMDP", "DoubleThreshold", "Threshold")  # the paper's POMDP

# --------------------------------------------------------------------------------------------------
# Verification


def verification_share(texts: Sequence[str]) -> float:
    """Share of the readable decisions that say correct, 0 to 1; 0 when none can be read."""
    decisions = [decision for decision in map(parse_verification, texts) if decision is not None]
    return sum(decisions) / len(decisions) if decisions else 0.0


def verify(
    engine: Engine, questions: Sequence[Question], answers: Sequence[str | None], sampling: Sampling
) -> list[dict[str, Any]]:
    """Asks the engine `sampling.n` times whether each answer (a letter) is correct.

    An answer that could not be read (None) has nothing to verify: share 0, and no tokens. One row
    per answer, here of two samples: `{"verification": 0.5, "verification_tokens": 31, "texts":
    ["... answer is Correct.", "... answer is Incorrect."]}`
    """
    pairs = zip(questions, answers, strict=True)
    prompts = [verify_messages(question, letter) for question, letter in pairs if letter]
    replies = iter(engine.generate(prompts, sampling) if prompts else [])
    rows = []
    for letter in answers:
        samples = next(replies) if letter else []
        texts = [sample.text for sample in samples]
        share, tokens = verification_share(texts), sum(sample.tokens for sample in samples)
        rows.append({"verification": share, "verification_tokens": tokens, "texts": texts})
    return rows


def verification(outcomes: pd.DataFrame) -> NDArray[np.float64]:
    """v of every row (questions,); an empty cell is 0, as where no verification can be read."""
    return np.asarray(outcomes["verification"].fillna(0.0), dtype=float)


# --------------------------------------------------------------------------------------------------
# Costs


class Costs(NamedTuple):
    """Cost of one local answer, one cloud answer and the verification of one query, in one unit."""

    small: float = 1.0
    large: float = 50.0
    verify: float = 1.0


# What a routing is worth, as numbers or arrays (routings,): means over questions.
Price = namedtuple("Price", "accuracy routed cost ibc ibc_base dibc")


def price(outcomes: pd.DataFrame, routed: ArrayLike, costs: Costs) -> Price:
    """What it is worth to send the marked rows to the cloud.

    `routed` is a mask (questions,), or several (routings, questions).
    IBC = (P - P_S) / (C - c_S) with C = c_S + c_V + rho c_L, and 0 where nothing is spent.
    Its base line, random routing, is (P_L - P_S) / (c_L - c_S), without c_V.
    dIBC = IBC / base - 1. With a cloud that is no better than the edge dIBC is NaN: there is no
    gain to compare with, and its sign would reward losing accuracy.
    Raises ValueError for impossible costs.
    """
    if not (0 < costs.small < costs.large and costs.verify >= 0):
        raise ValueError(f"costs must be 0 < small < large and verify >= 0, got {costs}")
    small, large = correctness(outcomes)
    gap, mask = large - small, np.asarray(routed, dtype=float)
    # Means over questions: share routed, accuracy gained, cost beside the edge model's answer
    rho = mask.mean(axis=-1)
    gain = mask @ gap / len(gap)
    spent = costs.verify + rho * costs.large
    # Gain per cost, of this routing and of random routing
    ibc = gain / np.where(spent > 0, spent, 1.0)
    base = gap.mean() / (costs.large - costs.small)
    dibc = ibc / np.where(base > 1e-12, base, np.nan) - 1
    return Price(small.mean() + gain, rho, costs.small + spent, ibc, base, dibc)


# --------------------------------------------------------------------------------------------------
# Meta-verifiers: every method is a list of candidate policies; fitting picks one


class Policy(NamedTuple):
    """A rule that says from v alone which queries go to the cloud.

    `parameter` of a POMDP: 1 (routed) or 0 for each of B + 1 bins, of which the nearest to v
    decides. Of the other methods: (t) routes 0 <= v <= t, (t1, t2) routes t1 <= v <= t2, and (t1,
    t2, t3) routes 0 <= v <= t1 and t2 <= v <= t3.
    """

    method: str
    parameter: tuple[float, ...]

    def route(self, v: ArrayLike) -> NDArray[np.bool_]:
        """(questions,) shares in 0..1 -> (questions,) True where the cloud is asked."""
        v = np.asarray(v, dtype=float)
        if "POMDP" in self.method:
            return np.array(self.parameter, dtype=bool)[nearest_bin(v, len(self.parameter) - 1)]
        ends = self.parameter if len(self.parameter) % 2 == 0 else (0.0, *self.parameter)
        intervals = zip(ends[::2], ends[1::2], strict=True)
        return np.asarray(np.any([(low <= v) & (v <= high) for low, high in intervals], axis=0))


def nearest_bin(v: ArrayLike, bins: int = BINS) -> NDArray[np.int64]:
    """Index of the nearest multiple of 1/bins, half-way up; exact for v = i/bins at any `bins`."""
    return np.floor(np.asarray(v, dtype=float) * bins + 0.5).astype(np.int64)


def categories(outcomes: pd.DataFrame) -> NDArray[np.str_]:
    """(questions,) the first of `KINDS` that both correctness columns allow, else UNDEFINED."""
    small, large = correctness(outcomes)
    low = (small <= np.quantile(small, 0.1)) & (large <= np.quantile(large, 0.1))
    return np.select([small < large, (small == large) & (small != 0), low], KINDS, "UNDEFINED")


def _interval_policies(method: str, ends: int, points: int, bins: int) -> list[Policy]:
    """Every rising choice of `ends` interval ends among the first `points` of 0, 1/bins, ..., 1."""
    return [Policy(method, t) for t in combinations([i / bins for i in range(points)], ends)]


def _pomdp_simple(outcomes: pd.DataFrame, bins: int) -> list[Policy]:
    """The policies of a one-step POMDP: the distinct sets of bins that some penalty routes.

    A bin with n needy, g good and h hopeless rows is routed by penalties above (100 (n + g + h) -
    h) / n: from the integer `start` on (in floats, bins of the same odds could differ). The
    highest penalty comes first: of two policies with the same dIBC, the one that routes more is
    the more accurate.
    """
    v, kind = verification(outcomes), categories(outcomes)
    index = nearest_bin(v, bins)
    kind[np.abs(v * bins - index) == 0.5] = ""  # half-way between two bins: a row of neither
    needy, good, hopeless = (np.bincount(index[kind == k], minlength=bins + 1) for k in KINDS)
    start = (100 * (needy + good + hopeless) - hopeless) // np.maximum(needy, 1) + 1
    start[needy == 0] = MAX_PENALTY + 1
    penalties = [*np.unique(start[start <= MAX_PENALTY])[::-1], 0]
    return [Policy("POMDPSimple", tuple((start <= p).astype(int).tolist())) for p in penalties]


def _greedy_pomdp(outcomes: pd.DataFrame, bins: int) -> list[Policy]:
    """Nested sets of bins (v rounded down), by falling mean gain, smoothed (Gaussian, sigma 2)."""
    small, large = correctness(outcomes)
    index = np.floor(verification(outcomes) * bins + 1e-9).astype(np.int64)
    count = np.bincount(index, minlength=bins + 1)
    gain = np.bincount(index, large - small, minlength=bins + 1) / np.maximum(count, 1)
    falling = np.argsort(gaussian_filter1d(gain, sigma=2), kind="stable")[::-1]
    rank = np.argsort(falling)
    return [Policy("GreedyPOMDP", tuple((rank <= n).astype(int).tolist())) for n in range(bins + 1)]


CANDIDATES: dict[str, Callable[[pd.DataFrame, int], list[Policy]]] = {
    "Threshold": lambda _, bins: _interval_policies("Threshold", 1, bins + 1, bins),
    "DoubleThreshold": lambda _, bins: _interval_policies("DoubleThreshold", 2, bins, bins),
    "TripleThreshold": lambda _, bins: _interval_policies("TripleThreshold", 3, bins, bins),
    "SelfConsistency": lambda *_: [Policy("SelfConsistency", (0.5,))],  # a majority vote
    "POMDPSimple": _pomdp_simple,
    "GreedyPOMDP": _greedy_pomdp,
    "POMDP": lambda *data: [policy for part in UNION for policy in CANDIDATES[part](*data)],
}


def best_policy(method: str, outcomes: pd.DataFrame, costs: Costs) -> Policy:
    """The candidate of the highest dIBC on `outcomes`; without a dIBC, of the highest accuracy.

    The first wins a tie.
    """
    policies, v = CANDIDATES[method](outcomes, BINS), verification(outcomes)
    worth = price(outcomes, [policy.route(v) for policy in policies], costs)
    rank = worth.accuracy if np.isnan(worth.dibc).all() else worth.dibc
    return policies[int(np.isclose(rank, rank.max(), rtol=1e-12, atol=1e-12).argmax())]


def fit(method: str, outcomes: pd.DataFrame, costs: Costs) -> list[Policy]:
    """The fits of every table: one on all rows; of over 1,000 rows, ten on 1,000 sampled ones."""
    seeds = range(10) if len(outcomes) > 1000 else []
    samples = [outcomes.sample(1000, random_state=seed) for seed in seeds] or [outcomes]
    return [best_policy(method, sample, costs) for sample in samples]
