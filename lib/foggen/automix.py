"""AutoMix: the edge model verifies its own answer k times, and a meta-verifier decides who answers.

Holds the verification of answers, the meta-verifiers, their costs and the table that sets AutoMix beside a one-pass
confidence router. Works on outcome tables (one row a question); must not know how a model is run or a figure drawn.

Source: Aggarwal, Madaan et al., "AutoMix: Automatically Mixing Language Models", NeurIPS 2024, and its public code.
Notation: v = verification share, S/L = small (edge) and large (cloud) model, P = mean quality, c = cost, rho = share
of routed queries, IBC = incremental benefit per cost, dIBC = its relative gain over sending queries at random.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter1d

from foggen import stats
from foggen.engines import Sampling
from foggen.prompts import parse_verification, verify_messages

if TYPE_CHECKING:
    from foggen.engines import Engine
    from foggen.questions import Question

Method = Literal[
    "Threshold",
    "DoubleThreshold",
    "TripleThreshold",
    "SelfConsistency",
    "POMDPSimple",
    "GreedyPOMDP",
    "POMDP",
]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_TOKENS = ("local_tokens", "verification_tokens")
BINS = 8  # one bin a verification: v is a multiple of 1/8 when all eight can be read
MAX_REWARD = 4999  # the POMDP's penalty for routing in vain is tried at every integer from 0 to here
COST_RATIOS = (10.0, 50.0, 100.0)
VERIFY_COSTS: tuple[float | Literal["tokens"], ...] = (0.0, 1.0, "tokens")


# ---------------------------------------------------------------------------------------------------------------
# Verification


class Verification(NamedTuple):
    """Verifications of n answers: `v` (n,) in 0..1, `tokens` (n,) generated in all k samples, `texts` n lists of k."""

    v: Floats
    tokens: NDArray[np.int64]
    texts: list[list[str]]


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
) -> Verification:
    """Asks the engine k times whether each answer (a letter) is correct.

    An answer that could not be read (None) has nothing to verify: v = 0 and no tokens. The prompts share their
    worked examples as a common prefix, which an engine with a prefix cache reads once.
    """
    asked = [index for index, answer in enumerate(answers) if answer is not None]
    prompts = [verify_messages(questions[index], str(answers[index])) for index in asked]
    sampling = Sampling(n=k, temperature=temperature, max_tokens=max_tokens, seed=seed)
    texts: list[list[str]] = [[] for _ in questions]
    tokens = np.zeros(len(questions), dtype=np.int64)
    for index, samples in zip(asked, engine.generate(prompts, sampling) if prompts else [], strict=True):
        texts[index] = [sample.text for sample in samples]
        tokens[index] = sum(sample.tokens for sample in samples)
    return Verification(np.array([verification_share(one) for one in texts], dtype=float), tokens, texts)


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

    accuracy: float
    routed: float
    cost: float
    ibc: float
    ibc_base: float
    dibc: float


def column(outcomes: pd.DataFrame, name: str, empty: float = np.nan) -> Floats:
    """A column as floats, with `empty` in its empty cells; ValueError names a column that is missing or has gaps."""
    if name not in outcomes or outcomes.empty:
        found = ", ".join(map(str, outcomes.columns))
        raise ValueError(f"outcomes need rows and a column `{name}`; got {len(outcomes)} rows of: {found}")
    values: Floats = outcomes[name].to_numpy(dtype=float, na_value=empty)
    if np.isnan(values).any():
        row = int(np.isnan(values).argmax())
        raise ValueError(f"outcomes row {row}: `{name}` is empty, expected a number")
    return values


def shares(outcomes: pd.DataFrame) -> Floats:
    """v of every row; an empty cell is 0, as where no verification can be read."""
    return column(outcomes, "verification", empty=0.0)


def price(outcomes: pd.DataFrame, routed: ArrayLike, costs: Costs, weights: Floats | None = None) -> Price:
    """Accuracy and cost of routing the masked rows; `weights` (n,) sum to 1, default: every row alike.

    IBC = (P - P_S) / (C - c_S) with C = c_S + c_V + rho c_L; its base line is (P_L - P_S) / (c_L - c_S), without
    c_V; dIBC = (IBC - base) / |base|, so that more is better also where the cloud is worse than the edge. Spending
    nothing gains nothing: IBC = 0 at rho = c_V = 0. With P_L = P_S there is no base line, and dIBC is NaN.
    """
    share = np.full(len(outcomes), 1 / len(outcomes)) if weights is None else weights
    return Price(*(float(value[0]) for value in _prices(outcomes, routed, costs, share[None])))


def _prices(outcomes: pd.DataFrame, routed: ArrayLike, costs: Costs, weights: Floats) -> list[Floats]:
    """The fields of `Price`, each (resamples,), for row weights (resamples, n)."""
    mask = np.asarray(routed, dtype=float)
    small, large = column(outcomes, "local_correct"), column(outcomes, "cloud_correct")
    own, spread, gain, rho = (
        weights @ np.stack([small, large - small, mask * (large - small), mask], axis=1)
    ).T
    extra, base = costs.verify + rho * costs.large, spread / (costs.large - costs.small)
    ibc = stats.ratio(gain, extra, empty=0.0)
    dibc = stats.ratio(ibc - base, np.where(np.abs(spread) > 1e-12, np.abs(base), 0.0))
    return [own + gain, rho, costs.small + extra, ibc, base, dibc]


# ---------------------------------------------------------------------------------------------------------------
# Meta-verifiers: every method is a list of candidate policies; fitting picks one


class Policy(Protocol):
    """A rule that says from v alone which queries go to the cloud."""

    @property
    def method(self) -> Method: ...
    @property
    def parameter(self) -> tuple[float, ...]: ...
    def route(self, v: ArrayLike) -> Mask:
        """(n,) shares in 0..1 -> (n,) True where the cloud is asked."""
        ...


@dataclass(frozen=True)
class Intervals:
    """Routes where v lies in a closed interval; the ends are `parameter`, with 0 in front when their number is odd.

    (t) is Threshold, v <= t; (t1, t2) is DoubleThreshold, t1 <= v <= t2; (t1, t2, t3) is TripleThreshold.
    """

    method: Method
    parameter: tuple[float, ...]

    def route(self, v: ArrayLike) -> Mask:
        ends = (0.0,) * (len(self.parameter) % 2) + self.parameter
        x = np.asarray(v, dtype=float)
        pairs = zip(ends[::2], ends[1::2], strict=True)
        routed: Mask = np.logical_or.reduce([(low <= x) & (x <= high) for low, high in pairs])
        return routed


@dataclass(frozen=True)
class Bins:
    """Routes where the bin nearest to v is marked 1 in `parameter`, which has one entry for each of B + 1 bins."""

    method: Method
    parameter: tuple[float, ...]

    def route(self, v: ArrayLike) -> Mask:
        return np.asarray(self.parameter, dtype=bool)[nearest_bin(v, len(self.parameter) - 1)]


def nearest_bin(v: ArrayLike, bins: int = BINS) -> NDArray[np.int64]:
    """Index of the nearest multiple of 1/bins; half-way goes up. Exact for v = i/bins at any number of bins."""
    return np.floor(np.asarray(v, dtype=float) * bins + 0.5).astype(np.int64)


def categories(outcomes: pd.DataFrame) -> NDArray[np.str_]:
    """NEEDY, GOOD, HOPELESS or UNDEFINED, row by row, computed from both scores; the first match wins."""
    small, large = column(outcomes, "local_correct"), column(outcomes, "cloud_correct")
    low = (small <= np.quantile(small, 0.1)) & (large <= np.quantile(large, 0.1))
    names = ["NEEDY", "GOOD", "HOPELESS"]
    return np.select([small < large, (small == large) & (small != 0), low], names, "UNDEFINED")


def _intervals(method: Method, ends: int, edges: int) -> Callable[[pd.DataFrame, int], list[Policy]]:
    """Candidates whose ends are all the rising choices of `ends` among the first bins + `edges` multiples of 1/bins."""

    def candidates(_: pd.DataFrame, bins: int) -> list[Policy]:
        grid = [i / bins for i in range(bins + edges)]
        return [Intervals(method, chosen) for chosen in combinations(grid, ends)]

    return candidates


def _self_consistency(_: pd.DataFrame, bins: int) -> list[Policy]:
    """A majority vote: no choice to make."""
    return [Intervals("SelfConsistency", (0.5,))]


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
        np.bincount(index[inside & (kind == name)], minlength=bins + 1)
        for name in ("NEEDY", "GOOD", "HOPELESS")
    )
    start = (100 * (needy + good + hopeless) - hopeless) // np.maximum(needy, 1) + 1
    start[needy == 0] = MAX_REWARD + 1
    rewards = [*np.unique(start[start <= MAX_REWARD])[::-1].tolist(), 0]
    return [Bins("POMDPSimple", tuple((start <= reward).astype(int).tolist())) for reward in rewards]


def _greedy_pomdp(outcomes: pd.DataFrame, bins: int) -> list[Policy]:
    """Nested sets: bins (rounded down) by falling mean gain, smoothed over neighbours with a Gaussian of sigma 2."""
    gain = column(outcomes, "cloud_correct") - column(outcomes, "local_correct")
    index = np.floor(shares(outcomes) * bins + 1e-9).astype(np.int64)
    count = np.bincount(index, minlength=bins + 1)
    mean = np.bincount(index, weights=gain, minlength=bins + 1) / np.maximum(count, 1)
    order = np.argsort(gaussian_filter1d(mean, sigma=2), kind="stable")[::-1]
    rank = np.argsort(order)
    return [Bins("GreedyPOMDP", tuple((rank <= last).astype(int).tolist())) for last in range(bins + 1)]


def _pomdp(outcomes: pd.DataFrame, bins: int) -> list[Policy]:
    """The union that the paper calls POMDP."""
    members = (_pomdp_simple, _greedy_pomdp, CANDIDATES["DoubleThreshold"], CANDIDATES["Threshold"])
    return [policy for member in members for policy in member(outcomes, bins)]


CANDIDATES: dict[Method, Callable[[pd.DataFrame, int], list[Policy]]] = {
    "Threshold": _intervals("Threshold", 1, 1),
    "DoubleThreshold": _intervals("DoubleThreshold", 2, 0),
    "TripleThreshold": _intervals("TripleThreshold", 3, 0),
    "SelfConsistency": _self_consistency,
    "POMDPSimple": _pomdp_simple,
    "GreedyPOMDP": _greedy_pomdp,
    "POMDP": _pomdp,
}


def fit(
    method: Method,
    outcomes: pd.DataFrame,
    costs: Costs,
    bins: int = BINS,
    always: ArrayLike | None = None,
    cost_range: tuple[float, float] = (0.0, float("inf")),
) -> Policy:
    """The candidate with the highest dIBC on `outcomes` (verification, local_correct, cloud_correct); first wins a tie.

    `always` (n,) marks rows that go to the cloud whatever v is (the original's fixed-answer routing). Candidates whose
    cost a query is outside `cost_range` are left out; ValueError when none is left. Where the cloud is no better than
    the edge, dIBC would reward losing accuracy at the highest cost: there the highest accuracy is taken.
    """
    v = shares(outcomes)
    fixed = np.zeros(len(v), dtype=bool) if always is None else np.asarray(always, dtype=bool)
    gain = column(outcomes, "cloud_correct") - column(outcomes, "local_correct")
    policies = CANDIDATES[method](outcomes, bins)
    # Rows with the same v are routed alike: one column a distinct v keeps refitting inside a bootstrap cheap.
    values, where = np.unique(v[~fixed], return_inverse=True)
    masks = np.array([policy.route(values) for policy in policies], dtype=float)
    rho = (masks @ np.bincount(where, minlength=len(values)) + fixed.sum()) / len(v)
    gains = (masks @ np.bincount(where, gain[~fixed], minlength=len(values)) + gain[fixed].sum()) / len(v)
    extra = costs.verify + rho * costs.large
    ibc = np.divide(gains, extra, out=np.zeros_like(extra), where=extra > 0)
    worth = np.where(gain.sum() > 0, ibc, gains)  # IBC ranks as dIBC does: the base line is the same for all
    worth[(costs.small + extra < cost_range[0]) | (costs.small + extra > cost_range[1])] = -np.inf
    if not np.isfinite(worth).any():
        raise ValueError(f"{method}: no candidate costs between {cost_range[0]} and {cost_range[1]} a query")
    return policies[int(np.isclose(worth, worth.max(), rtol=1e-12, atol=1e-15).argmax())]


def fits(
    method: Method, outcomes: pd.DataFrame, costs: Costs, rows: int = 1000, seeds: Sequence[int] = range(10)
) -> list[Policy]:
    """The paper's protocol: one fit on `rows` sampled rows a seed; a single fit on all rows when there are fewer."""
    if len(outcomes) <= rows:
        return [fit(method, outcomes, costs)]
    return [fit(method, outcomes.sample(rows, random_state=seed), costs) for seed in seeds]


# ---------------------------------------------------------------------------------------------------------------
# Beside a one-pass confidence router


def domain_weights(outcomes: pd.DataFrame, resamples: int = 0, seed: int = 0) -> Floats:
    """Row weights that sum to 1 and make every weighted mean an average over domains, as in the tables: (n,).

    With `resamples` (1 + resamples, n): those, and then bootstrap copies of the rows (whole facts, within each domain).
    """
    rng = np.random.default_rng(seed)
    weights = np.zeros((1 + resamples, len(outcomes)))
    domains = outcomes.groupby("domain", sort=False).indices
    for rows in domains.values():
        counts = np.ones((1 + resamples, len(rows)))
        if resamples:
            counts[1:] = stats.draw_counts(stats.clusters(outcomes.iloc[rows]), resamples, rng)
        weights[:, rows] = counts / (counts.sum(axis=1, keepdims=True) * len(domains))
    return weights if resamples else weights[0]


def lift_over_random(outcomes: pd.DataFrame, routed: Mask) -> float:
    """Accuracy above sending the same share of each domain at random, averaged over domains."""
    return float(_lifts(outcomes, routed, domain_weights(outcomes)[None])[0])


def _lifts(outcomes: pd.DataFrame, routed: ArrayLike, weights: Floats) -> Floats:
    """The lift (resamples,) for row weights (resamples, n) that sum to the same in every domain."""
    gain = column(outcomes, "cloud_correct") - column(outcomes, "local_correct")
    mask = np.asarray(routed, dtype=float)
    lift = np.zeros(len(weights))
    for rows in outcomes.groupby("domain", sort=False).indices.values():
        part = weights[:, rows]
        rho = (part @ mask[rows]) / part.sum(axis=1)
        lift += part @ (gain * mask)[rows] - rho * (part @ gain[rows])
    return lift


def measured_verify_cost(outcomes: pd.DataFrame) -> float:
    """c_V in units of c_S: tokens generated for verification over tokens generated for the answer."""
    return float(column(outcomes, "verification_tokens").mean() / column(outcomes, "local_tokens").mean())


def _row(outcomes: pd.DataFrame, routings: Sequence[Mask], costs: Costs, weights: Floats) -> dict[str, float]:
    """Mean over fits of what a routing is worth, and the spread of dIBC over the fits; 95% intervals from the weights.

    The first row of `weights` gives the values and the others the intervals.
    """
    draws = [[*_prices(outcomes, m, costs, weights), _lifts(outcomes, m, weights)] for m in routings]
    names = (*Price._fields, "lift")
    values = dict(zip(names, np.mean(draws, axis=0), strict=True))
    found = {name: float(value[0]) for name, value in values.items()}
    for name in ("accuracy", "routed", "lift", "dibc"):
        known = values[name][1:][np.isfinite(values[name][1:])]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    spread = np.std([draw[names.index("dibc")][0] for draw in draws])
    return {**found, "dibc_sd": float(spread), "fits": len(routings)}


def _settings(outcomes: pd.DataFrame, ratios: Sequence[float]) -> Iterator[tuple[str, Costs]]:
    """Every cost ratio with every c_V; measured tokens only where they were measured."""
    measured = set(_TOKENS) <= set(outcomes.columns)
    for ratio, charge in product(ratios, VERIFY_COSTS):
        if charge != "tokens":
            yield f"{charge:g} c_S", Costs(1.0, ratio, charge)
        elif measured:
            yield "tokens", Costs(1.0, ratio, measured_verify_cost(outcomes))


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
    (of most fits), n, ratio, c_V, accuracy, routed, cost, ibc, ibc_base, dibc, lift, dibc_sd, fits, forward_passes
    (on the edge, a query), tokens (generated on the edge, a query) and note (why a cell is NaN). Accuracy, routed, lift
    and dibc have 95% intervals (_low, _high) for the policies as they were fitted; `refitted_table` has those with the
    noise of fitting. dIBC is unstable where the cloud is nearly as good as the edge or where little is routed.
    """
    weights = np.atleast_2d(domain_weights(outcomes, resamples, seed))
    confident = outcomes["confidence"].to_numpy(dtype=float, na_value=np.nan) >= tau
    v, rows = shares(outcomes), []
    for ratio in cost_ratios:
        named = {"method": "FogGen", "parameter": str(tau), "ratio": ratio, "c_V": "0 c_S"}
        rows.append({**named, **_row(outcomes, [~confident], Costs(1.0, ratio, 0.0), weights)})
    for method, (label, costs) in product(methods, _settings(outcomes, cost_ratios)):
        policies = fits(method, fit_outcomes, costs)
        usual = Counter((policy.method, policy.parameter) for policy in policies).most_common(1)[0][0]
        named = {"method": method, "parameter": f"{usual[0]} {usual[1]}", "ratio": costs.large, "c_V": label}
        rows.append({**named, **_row(outcomes, [policy.route(v) for policy in policies], costs, weights)})
    table = pd.DataFrame(rows)
    table.insert(2, "n", len(outcomes))
    one_pass = table["method"] == "FogGen"
    table["forward_passes"] = np.where(one_pass, 1, 1 + k)
    answer, check = (float(outcomes[name].mean()) if name in outcomes else np.nan for name in _TOKENS)
    table["tokens"] = np.where(one_pass, answer, answer + check)
    reasons = {"dibc": "dibc: the cloud is as good as the edge", "tokens": "tokens: not measured"}
    gaps = table[list(reasons)].isna().to_numpy()
    table["note"] = ["; ".join(np.array(list(reasons.values()))[row]) for row in gaps]
    return table


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
    are means over domains; `difference` is FogGen's lift minus the method's, paired. FogGen has nothing to fit.
    """
    free = Costs(costs.small, costs.large, 0.0)

    def evaluate(policies: dict[Method, Policy], frame: pd.DataFrame) -> dict[str, float]:
        v, weights = shares(frame), domain_weights(frame)
        unsure = ~(frame["confidence"] >= tau).to_numpy()
        masks = {"FogGen": unsure} | {method: policy.route(v) for method, policy in policies.items()}
        found: dict[str, float] = {}
        for name, mask in masks.items():
            one = price(frame, mask, free if name == "FogGen" else costs, weights)
            lift = float(_lifts(frame, mask, weights[None])[0])
            values = {"accuracy": one.accuracy, "routed": one.routed, "lift": lift, "dibc": one.dibc}
            found |= {f"{name}:{key}": value for key, value in values.items()}
            found[f"{name}:difference"] = found["FogGen:lift"] - lift
        return found

    names = ["id", "domain", "fact", "local_correct", "cloud_correct", "confidence", "verification"]
    dev, test = (frame[[name for name in names if name in frame]] for frame in (fit_outcomes, outcomes))
    result = stats.nested_bootstrap(
        dev, test, lambda frame: {m: fit(m, frame, costs) for m in methods}, evaluate, resamples, seed
    )
    rows: dict[str, dict[str, float]] = {}
    for name, row in result.iterrows():
        method, metric = str(name).split(":")
        ends = {metric: row["value"], f"{metric}_low": row["low"], f"{metric}_high": row["high"]}
        rows.setdefault(method, {"n": int(row["n"])}).update(ends)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method").reset_index()


def curve(
    method: Method, outcomes: pd.DataFrame, fit_outcomes: pd.DataFrame, bins: int = BINS
) -> pd.DataFrame:
    """Accuracy against cloud share: routed share and accuracy (means over domains) of every candidate, by share."""
    weights, v = domain_weights(outcomes), shares(outcomes)
    policies = CANDIDATES[method](fit_outcomes, bins)
    prices = [price(outcomes, policy.route(v), Costs(), weights) for policy in policies]
    table = pd.DataFrame({"parameter": [str(policy.parameter) for policy in policies]})
    table[["routed", "accuracy"]] = [(one.routed, one.accuracy) for one in prices]
    return table.sort_values("routed", kind="stable", ignore_index=True)
