"""AutoMix: the edge model verifies its own answer k times, and a meta-verifier decides who answers.

Holds the verification of answers, the meta-verifiers, their costs and the table that sets AutoMix beside a one-pass
confidence router. Works on outcome tables (one row a question); must not know how a model is run or a figure drawn.

Source: Aggarwal, Madaan et al., "AutoMix: Automatically Mixing Language Models", NeurIPS 2024, and its public code.
Notation: v = verification share, S/L = small (edge) and large (cloud) model, P = mean quality, c = cost, rho = share
of routed queries, IBC = incremental benefit per cost, dIBC = its relative gain over sending queries at random.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter1d

from foggen import stats
from foggen.engines import Engine, Sampling
from foggen.prompts import parse_verification, verify_messages
from foggen.questions import Question

Method = Literal[
    "Threshold", "DoubleThreshold", "TripleThreshold", "SelfConsistency", "POMDPSimple", "GreedyPOMDP", "POMDP"
]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

TOKENS = ["local_tokens", "verification_tokens"]
BINS = 8  # one bin a verification: v is a multiple of 1/8 when all eight can be read
MAX_REWARD = 4999  # the POMDP's penalty for routing in vain is tried at every integer from 0 to here
COST_RATIOS = (10.0, 50.0, 100.0)
UNION: tuple[Method, ...] = ("POMDPSimple", "GreedyPOMDP", "DoubleThreshold", "Threshold")  # the paper's POMDP


# ---------------------------------------------------------------------------------------------------------------
# Verification


def verification_share(texts: Sequence[str]) -> float:
    """Share of the readable decisions that say correct; 0 when none can be read."""
    decisions = [decision for decision in map(parse_verification, texts) if decision is not None]
    return sum(decisions) / len(decisions) if decisions else 0.0


def verify(
    engine: Engine,
    questions: Sequence[Question],
    answers: Sequence[str | None],
    k: int = 8,
    temperature: float = 1.0,
    max_tokens: int = 250,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Asks the engine k times whether each answer (a letter) is correct.

    A row an answer: `verification`, the share of its readable decisions that say correct; `verification_tokens`
    generated in all k samples; and their `texts`. An answer that could not be read (None) has nothing to verify: share
    0 and no tokens. The prompts share their worked examples as a common prefix, which an engine with a prefix cache
    reads once.
    """
    prompts = [verify_messages(q, answer) for q, answer in zip(questions, answers, strict=True) if answer is not None]
    sampling = Sampling(n=k, temperature=temperature, max_tokens=max_tokens, seed=seed)
    asked = iter(engine.generate(prompts, sampling) if prompts else [])
    rows = []
    for answer in answers:
        samples = [] if answer is None else next(asked)
        texts, tokens = [sample.text for sample in samples], sum(sample.tokens for sample in samples)
        rows.append({"verification": verification_share(texts), "verification_tokens": tokens, "texts": texts})
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Costs


@dataclass(frozen=True)
class Costs:
    """Cost of one local answer, one cloud answer and the verification of one query, all in one unit."""

    small: float = 1.0
    large: float = 50.0
    verify: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.small < self.large and self.verify >= 0):
            raise ValueError(f"costs must be 0 <= small < large and verify >= 0, got {self}")


class Price(NamedTuple):
    """What a routing is worth: accuracy, routed share, cost a query, IBC, IBC of the base line, dIBC."""

    accuracy: Any  # each a float from `price`, an array of resamples in the tables
    routed: Any
    cost: Any
    ibc: Any
    ibc_base: Any
    dibc: Any


def shares(outcomes: pd.DataFrame) -> Floats:
    """v of every row; an empty cell is 0, as where no verification can be read. ValueError without the column."""
    if "verification" not in outcomes or outcomes.empty:
        found = ", ".join(map(str, outcomes.columns))
        raise ValueError(f"outcomes need rows and a column `verification`; got {len(outcomes)} rows of: {found}")
    values: Floats = outcomes["verification"].to_numpy(dtype=float, na_value=0.0)
    return values


def price(outcomes: pd.DataFrame, routed: ArrayLike, costs: Costs) -> Price:
    """Accuracy and cost of routing the masked rows, every row alike.

    IBC = (P - P_S) / (C - c_S) with C = c_S + c_V + rho c_L; its base line is (P_L - P_S) / (c_L - c_S), without
    c_V; dIBC = (IBC - base) / |base|, so that more is better also where the cloud is worse than the edge. Spending
    nothing gains nothing: IBC = 0 at rho = c_V = 0. With P_L = P_S there is no base line, and dIBC is NaN.
    """
    mask, (small, large) = np.asarray(routed, dtype=float), stats.correctness(outcomes)
    gap = large - small
    return Price(*map(float, _price(small.mean(), gap.mean(), (mask * gap).mean(), mask.mean(), costs)))


def _price(small: Any, gap: Any, gain: Any, rho: Any, costs: Costs) -> Price:
    """`price` from P_S, P_L - P_S, P - P_S and the routed share: numbers, or arrays of one shape."""
    extra, base = costs.verify + rho * costs.large, gap / (costs.large - costs.small)
    ibc = np.divide(gain, extra, out=np.zeros_like(extra), where=extra > 0)
    dibc = np.divide(ibc - base, abs(base), out=np.full_like(ibc - base, np.nan), where=abs(gap) > 1e-12)
    return Price(small + gain, rho, costs.small + extra, ibc, base, dibc)


# ---------------------------------------------------------------------------------------------------------------
# Meta-verifiers: every method is a list of candidate policies; fitting picks one


@dataclass(frozen=True)
class Policy:
    """A rule that says from v alone which queries go to the cloud.

    Of a POMDP, `parameter` has a 0 or 1 (routed) for each of B + 1 bins, and the bin nearest to v decides. Of the
    others it holds the ends of closed intervals, with a 0 in front when their number is odd: (t) routes v <= t,
    (t1, t2) routes t1 <= v <= t2, and (t1, t2, t3) routes v <= t1 or t2 <= v <= t3.
    """

    method: Method
    parameter: tuple[float, ...]

    def route(self, v: ArrayLike) -> Mask:
        """(n,) shares in 0..1 -> (n,) True where the cloud is asked."""
        x = np.asarray(v, dtype=float)
        if "POMDP" in self.method:
            return np.asarray(self.parameter, dtype=bool)[nearest_bin(x, len(self.parameter) - 1)]
        low, high = np.reshape((0.0,) * (len(self.parameter) % 2) + self.parameter, (-1, 2, 1)).swapaxes(0, 1)
        return np.asarray(((low <= x) & (x <= high)).any(axis=0))


def nearest_bin(v: ArrayLike, bins: int = BINS) -> NDArray[np.int64]:
    """Index of the nearest multiple of 1/bins; half-way goes up. Exact for v = i/bins at any number of bins."""
    return np.floor(np.asarray(v, dtype=float) * bins + 0.5).astype(np.int64)


def categories(outcomes: pd.DataFrame) -> NDArray[np.str_]:
    """NEEDY, GOOD, HOPELESS or UNDEFINED, row by row, computed from both scores; the first match wins."""
    small, large = stats.correctness(outcomes)
    low = (small <= np.quantile(small, 0.1)) & (large <= np.quantile(large, 0.1))
    names = ["NEEDY", "GOOD", "HOPELESS"]
    return np.select([small < large, (small == large) & (small != 0), low], names, "UNDEFINED")


def _intervals(method: Method, ends: int, edges: int, bins: int) -> list[Policy]:
    """Every rising choice of `ends` interval ends among the first bins + `edges` multiples of 1/bins."""
    grid = [i / bins for i in range(bins + edges)]
    return [Policy(method, chosen) for chosen in combinations(grid, ends)]


def _pomdp_simple(outcomes: pd.DataFrame, bins: int) -> list[Policy]:
    """The policies of a one-step POMDP, one for each distinct answer to: which bins does penalty r route?

    A bin with n needy, g good and h hopeless rows is routed iff r > (100 (n + g + h) - h) / n, so from the integer
    `start` on (floats would tell bins of the same odds apart). Rows half-way between two bins are in neither. The
    highest penalty comes first: of two policies with the same dIBC, the one that routes more has the higher accuracy.
    """
    v = shares(outcomes)
    index, kind = nearest_bin(v, bins), categories(outcomes)
    inside = np.abs(v * bins - index) < 0.5
    needy, good, hopeless = (
        np.bincount(index[inside & (kind == name)], minlength=bins + 1) for name in ("NEEDY", "GOOD", "HOPELESS")
    )
    start = (100 * (needy + good + hopeless) - hopeless) // np.maximum(needy, 1) + 1
    start[needy == 0] = MAX_REWARD + 1
    rewards = [*np.unique(start[start <= MAX_REWARD])[::-1].tolist(), 0]
    return [Policy("POMDPSimple", tuple((start <= reward).astype(int).tolist())) for reward in rewards]


def _greedy_pomdp(outcomes: pd.DataFrame, bins: int) -> list[Policy]:
    """Nested sets: bins (rounded down) by falling mean gain, smoothed over neighbours with a Gaussian of sigma 2."""
    small, large = stats.correctness(outcomes)
    index = np.floor(shares(outcomes) * bins + 1e-9).astype(np.int64)
    count = np.bincount(index, minlength=bins + 1)
    mean = np.bincount(index, weights=large - small, minlength=bins + 1) / np.maximum(count, 1)
    order = np.argsort(gaussian_filter1d(mean, sigma=2), kind="stable")[::-1]
    rank = np.argsort(order)
    return [Policy("GreedyPOMDP", tuple((rank <= last).astype(int).tolist())) for last in range(bins + 1)]


CANDIDATES: dict[Method, Callable[[pd.DataFrame, int], list[Policy]]] = {
    "Threshold": lambda _, bins: _intervals("Threshold", 1, 1, bins),
    "DoubleThreshold": lambda _, bins: _intervals("DoubleThreshold", 2, 0, bins),
    "TripleThreshold": lambda _, bins: _intervals("TripleThreshold", 3, 0, bins),
    "SelfConsistency": lambda _, bins: [Policy("SelfConsistency", (0.5,))],  # a majority vote: no choice to make
    "POMDPSimple": _pomdp_simple,
    "GreedyPOMDP": _greedy_pomdp,
    "POMDP": lambda outcomes, bins: [policy for name in UNION for policy in CANDIDATES[name](outcomes, bins)],
}


def fit(method: Method, outcomes: pd.DataFrame, costs: Costs, bins: int = BINS, always: ArrayLike = False) -> Policy:
    """The candidate with the highest dIBC on `outcomes` (verification, local_correct, cloud_correct); first wins a tie.

    `always` (n,) marks rows that go to the cloud whatever v is (the original's fixed-answer routing). Where the cloud
    is no better than the edge, dIBC would reward losing accuracy at the highest cost: there the highest accuracy is
    taken.
    """
    v, (small, large) = shares(outcomes), stats.correctness(outcomes)
    fixed, gap = np.broadcast_to(np.asarray(always, dtype=bool), v.shape), large - small
    policies = CANDIDATES[method](outcomes, bins)
    # Rows with the same v are routed alike: one column a distinct v keeps refitting inside a bootstrap cheap.
    values, where = np.unique(v[~fixed], return_inverse=True)
    masks = np.array([policy.route(values) for policy in policies], dtype=float)
    rho = (masks @ np.bincount(where, minlength=len(values)) + fixed.sum()) / len(v)
    gain = (masks @ np.bincount(where, gap[~fixed], minlength=len(values)) + gap[fixed].sum()) / len(v)
    # IBC ranks as dIBC does: the base line is the same for all.
    worth = _price(0.0, gap.mean(), gain, rho, costs).ibc if gap.sum() > 0 else gain
    return policies[int(np.isclose(worth, worth.max(), rtol=1e-12, atol=1e-15).argmax())]


def fits(
    method: Method, outcomes: pd.DataFrame, costs: Costs, rows: int = 1000, seeds: Sequence[int] = range(10)
) -> list[Policy]:
    """The paper's protocol: one fit on `rows` sampled rows a seed; a single fit on all rows where there are no more."""
    if len(outcomes) <= rows:
        return [fit(method, outcomes, costs)]
    return [fit(method, outcomes.sample(rows, random_state=seed), costs) for seed in seeds]


# ---------------------------------------------------------------------------------------------------------------
# Beside a one-pass confidence router


def worth(
    outcomes: pd.DataFrame, masks: Sequence[Mask], costs: Sequence[Costs], resamples: int = 0, seed: int = 0
) -> list[dict[str, Floats]]:
    """What each mask of routed rows is worth at its costs, as means over domains: the fields of `Price`, and `lift`.

    Each is an array (1 + resamples,): the value, then its bootstrap copies. The lift is that above sending the same
    share of each domain at random.
    """
    frame = outcomes.assign(_row=np.arange(len(outcomes)))
    routed = np.array(masks, dtype=float).T

    def statistic(part: pd.DataFrame, weights: stats.Array) -> stats.Array:
        mask, (local, cloud) = routed[part["_row"]], stats.correctness(part)
        gap = cloud - local
        means = stats.means(weights, np.column_stack([local, gap, mask * gap[:, None], mask]))
        gain, rho = np.split(means[:, 2:], 2, axis=1)
        return np.concatenate([means, gain - rho * means[:, 1:2]], axis=1)

    result = stats.bootstrap(frame, statistic, [""] * (2 + 3 * len(masks)), resamples, seed)
    (small, gap), each = np.split(np.concatenate([result.point[-1:], result.draws[-1]]).T, [2])
    parts = zip(*np.split(each, 3), costs, strict=True)
    return [_price(small, gap, gain, rho, own)._asdict() | {"lift": lift} for gain, rho, lift, own in parts]


def _settings(outcomes: pd.DataFrame, ratios: Sequence[float]) -> list[tuple[str, Costs]]:
    """Every cost ratio with every c_V: nothing, c_S, and the measured tokens (over those of the answer) where known."""
    charges = {"0 c_S": 0.0, "1 c_S": 1.0}
    if set(TOKENS) <= set(outcomes.columns):
        answer, check = outcomes[TOKENS].mean()
        charges["tokens"] = check / answer
    return [(label, Costs(1.0, ratio, charge)) for ratio in ratios for label, charge in charges.items()]


def comparison_table(
    outcomes: pd.DataFrame,
    fit_outcomes: pd.DataFrame,
    cost_ratios: Sequence[float] = COST_RATIOS,
    methods: Sequence[Method] = tuple(CANDIDATES),
    tau: float = 0.5,
    k: int = 8,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """FogGen and every meta-verifier, one row a method, cost ratio 1:c and c_V; shares are 0..1, means over domains.

    Meta-verifiers are fitted on `fit_outcomes`, never on the rows that they are judged on. Columns: method, parameter
    (of most fits), n, ratio, c_V, accuracy, routed, cost, ibc, ibc_base, dibc, lift (means over the fits), dibc_sd
    (over the fits), fits, forward_passes (on the edge, a query), tokens (generated on the edge, a query) and note (why
    a cell is NaN). Accuracy, routed, lift and dibc have 95% intervals (_low, _high) for the policies as fitted;
    `refitted_table` has those with the noise of fitting. dIBC is unstable where the cloud is nearly as good as the edge
    or where little is routed.
    """
    unsure, v = [_unsure(outcomes, tau)], shares(outcomes)
    cases: list[tuple[str, str, Costs, list[str], list[Mask]]] = [
        ("FogGen", "0 c_S", Costs(1.0, ratio, 0.0), [str(tau)], unsure) for ratio in cost_ratios
    ]
    for method, (label, costs) in product(methods, _settings(outcomes, cost_ratios)):
        found = fits(method, fit_outcomes, costs)
        names = [f"{policy.method} {policy.parameter}" for policy in found]
        cases.append((method, label, costs, names, [policy.route(v) for policy in found]))
    paid, masks = zip(*((costs, mask) for _, _, costs, _, own in cases for mask in own), strict=True)
    measured = iter(worth(outcomes, masks, paid, resamples, seed))
    answer, check = (outcomes[name].mean() if name in outcomes else np.nan for name in TOKENS)
    rows = []
    for name, label, costs, names, own in cases:
        each = [next(measured) for _ in own]
        mean = pd.DataFrame({key: np.mean([one[key] for one in each], axis=0) for key in each[0]})
        row = {"method": name, "parameter": Counter(names).most_common(1)[0][0], "n": len(outcomes)}
        row |= {"ratio": costs.large, "c_V": label, **_summary(mean)}
        row |= {"dibc_sd": float(np.std([one["dibc"][0] for one in each])), "fits": len(own)}
        passes, tokens = (1, answer) if name == "FogGen" else (1 + k, answer + check)
        rows.append(row | {"forward_passes": passes, "tokens": tokens})
    return _explained(pd.DataFrame(rows))


def _explained(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a `note` that says why a cell is NaN."""
    reasons = {"dibc": "the cloud is as good as the edge", "tokens": "not measured"}
    told = table.drop(columns="dibc_sd", errors="ignore")  # it is NaN where dibc is
    return table.assign(note=["; ".join(stats.undefined(row, reasons)) for _, row in told.iterrows()])


def _unsure(outcomes: pd.DataFrame, tau: float) -> Mask:
    """What FogGen routes: no readable confidence, or one below tau."""
    unsure: Mask = ~(outcomes["confidence"] >= tau).to_numpy(bool)
    return unsure


def _summary(drawn: pd.DataFrame) -> dict[str, float]:
    """The values of `worth`, and 95% intervals of some."""
    row: dict[str, float] = drawn.loc[0].to_dict()
    ends = drawn.loc[1:, ["accuracy", "routed", "lift", "dibc"]].quantile([0.025, 0.975])  # passes over undefined ones
    for name, (low, high) in ends.items():
        row |= {f"{name}_low": low, f"{name}_high": high}
    return row


def refitted_table(
    outcomes: pd.DataFrame,
    fit_outcomes: pd.DataFrame,
    costs: Costs = Costs(),
    methods: Sequence[Method] = tuple(CANDIDATES),
    tau: float = 0.5,
    resamples: int = 300,
    seed: int = 0,
) -> pd.DataFrame:
    """FogGen and every meta-verifier at one cost, with intervals that contain the noise of fitting, a row a method.

    Each resample refits on a copy of `fit_outcomes` and judges on a copy of `outcomes`. accuracy, routed, lift and dibc
    are means over domains; `difference` is FogGen's lift minus the method's, paired. FogGen has nothing to fit, and
    pays no c_V.
    """

    def evaluate(policies: list[Policy], frame: pd.DataFrame) -> pd.DataFrame:
        masks = [_unsure(frame, tau), *(policy.route(shares(frame)) for policy in policies)]
        paid = [replace(costs, verify=0.0)] + [costs] * len(policies)
        table = pd.DataFrame([{name: float(one[name][0]) for name in shown} for one in worth(frame, masks, paid)])
        return table.set_axis(["FogGen", *methods]).assign(difference=table["lift"][0] - table["lift"].to_numpy())

    shown = ["accuracy", "routed", "dibc", "lift"]
    names = ["id", "domain", "fact", "local_correct", "cloud_correct", "confidence", "verification"]
    dev, test = (frame[[name for name in names if name in frame]] for frame in (fit_outcomes, outcomes))
    result = stats.nested_bootstrap(
        dev, test, lambda frame: [fit(method, frame, costs) for method in methods], evaluate, resamples, seed
    )
    return _explained(result.rename_axis("method").reset_index())
