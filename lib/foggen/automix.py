"""AutoMix: the edge model verifies its answer k times, and a meta-verifier decides who answers.

Holds the verification of answers, the meta-verifiers, their costs, and the table that sets them
beside a one-pass confidence router. Works on outcomes tables (one row per question); must not know
how a model is run or a figure drawn.

Source: Aggarwal, Madaan et al., "AutoMix: Automatically Mixing Language Models", NeurIPS 2024, and
its public code. Notation: v = verification share, S/L = small (edge) and large (cloud) model,
P = mean quality, c = cost, rho = share of routed queries, IBC = incremental benefit per cost,
dIBC = its relative gain over sending queries at random.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from itertools import chain, combinations, product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter1d

from foggen import resampling, stats
from foggen.engines import Engine, Sampling
from foggen.prompts import parse_verification, verify_messages
from foggen.questions import Question

BINS = 8  # one bin per verification: v is a multiple of 1/8 when all eight can be read
KINDS = ("NEEDY", "GOOD", "HOPELESS")
MAX_PENALTY = 4999  # the POMDP tries every integer from 0 as the penalty for routing in vain
UNION = ("POMDPSimple", "GreedyPOMDP", "DoubleThreshold", "Threshold")  # the paper's POMDP
USED = ["id", "domain", "fact", "local_correct", "cloud_correct", "confidence", "verification"]

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
    """Cost of one local answer, one cloud answer and the verification of one query, in one unit.

    Numbers, or arrays with one entry per routing to be priced.
    """

    small: Any = 1.0
    large: Any = 50.0
    verify: Any = 1.0


# What a routing is worth, as numbers or arrays (routings,): `cost` is per query, `lift` is the
# accuracy above sending the same share (of each domain) at random.
Price = namedtuple("Price", "accuracy routed cost ibc ibc_base dibc lift")


def price(outcomes: pd.DataFrame, routed: ArrayLike, costs: Costs, domains: bool = False) -> Price:
    """What it is worth to send the marked rows to the cloud.

    `routed` is a mask (questions,), or several (routings, questions). All are means over
    questions, or over domains (`domains`). IBC = (P - P_S) / (C - c_S) with C = c_S + c_V + rho
    c_L, and 0 where nothing is spent; its base line is (P_L - P_S) / (c_L - c_S), without c_V;
    dIBC = IBC / base - 1. With a cloud that is no better than the edge dIBC is NaN: there is no
    gain to compare with, and its sign would reward losing accuracy. Raises ValueError for
    impossible costs.
    """
    if not np.all((costs.small > 0) & (costs.large > costs.small) & (costs.verify >= 0)):
        raise ValueError(f"costs must be 0 < small < large and verify >= 0, got {costs}")
    small, large = stats.correctness(outcomes)
    mask, gap = np.asarray(routed, dtype=float), large - small
    domain = pd.factorize(outcomes["domain"])[0] if domains else np.zeros(len(gap), dtype=int)
    count = np.bincount(domain)
    weight = 1 / (len(count) * count[domain])  # (questions,), in sum 1
    surplus = gap - (np.bincount(domain, gap) / count)[domain]  # above a random query of the domain
    rho, gain, lift = mask @ weight, mask @ (weight * gap), mask @ (weight * surplus)
    spent = costs.verify + rho * costs.large
    ibc = gain / np.where(spent > 0, spent, 1.0)
    base = weight @ gap / (costs.large - costs.small)
    dibc = ibc / np.where(base > 1e-12, base, np.nan) - 1
    return Price(weight @ small + gain, rho, costs.small + spent, ibc, base, dibc, lift)


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
    small, large = stats.correctness(outcomes)
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
    """Nested sets of bins (v rounded down), by falling mean gain after a Gaussian filter, sigma
    2."""
    small, large = stats.correctness(outcomes)
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
    """The fits of every table: one on all rows; above 1,000 rows, ten on 1,000 sampled ones
    each."""
    seeds = range(10) if len(outcomes) > 1000 else []
    samples = [outcomes.sample(1000, random_state=seed) for seed in seeds] or [outcomes]
    return [best_policy(method, sample, costs) for sample in samples]


# --------------------------------------------------------------------------------------------------
# Beside a one-pass confidence router


def comparison_table(
    outcomes: pd.DataFrame,
    fit_outcomes: pd.DataFrame,
    costs: Sequence[Costs] = (Costs(),),
    tau: float = 0.5,
    refit: bool = False,
    resamples: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """FogGen and every meta-verifier, one row per method and cost, with 95% intervals (_low,
    _high).

    Meta-verifiers are fitted on `fit_outcomes`, never on the rows that they are judged on; with
    `refit` every resample fits again, so that the intervals contain the noise of fitting. FogGen
    pays no c_V. Columns: method, ratio (c_L / c_S), c_V, n, the fields of `Price` (means over
    domains and fits), `difference` (FogGen's lift minus the method's, paired), and note (why a
    cell is NaN). dIBC is unstable where the cloud is nearly as good as the edge, or where little
    is routed. A row, in part: method POMDP, ratio 50, c_V 1, n 1820, accuracy .78, accuracy_low
    .76, dibc .31, lift .05
    """
    free = dict.fromkeys(("FogGen", cost._replace(verify=0.0)) for cost in costs)
    cases = [*free, *product(CANDIDATES, costs)]

    def fitted(frame: pd.DataFrame) -> list[Sequence[Policy | None]]:
        return [fit(m, frame, cost) if m in CANDIDATES else [None] for m, cost in cases]

    def measured(policies: list[Sequence[Policy | None]], frame: pd.DataFrame) -> pd.DataFrame:
        v, unsure = verification(frame), ~(frame["confidence"] >= tau).to_numpy()
        masks = {policy: policy.route(v) if policy else unsure for policy in {*chain(*policies)}}
        fits = [len(group) for group in policies]
        paid = Costs(*np.repeat([cost for _, cost in cases], fits, axis=0).T)  # each (routings,)
        worth = price(frame, [masks[policy] for policy in chain(*policies)], paid, domains=True)
        parts = np.split(np.array(worth), np.cumsum(fits)[:-1], axis=1)  # per case (fields, fits)
        table = pd.DataFrame([part.mean(axis=1) for part in parts], columns=Price._fields)
        return table.assign(difference=table["lift"][0] - table["lift"])

    test, dev = outcomes.filter(USED), fit_outcomes.filter(USED)
    policies = fitted(dev)
    choose = fitted if refit else lambda _: policies
    table = resampling.nested_bootstrap(dev, test, choose, measured, resamples, seed)
    rows = [{"method": m, "ratio": c.large / c.small, "c_V": c.verify} for m, c in cases]
    why = "dibc: the cloud is no better than the edge, or not in 2.5% of the resamples"
    return pd.DataFrame(rows).join(table).assign(note=np.where(table["dibc_low"].isna(), why, ""))
