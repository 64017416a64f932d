"""Statistics of stored per-question outcomes: calibration, ranking, intervals and tests.

Works on arrays and on outcomes tables (see `foggen.routing`); knows no model, no file and no threshold
policy. Resamples are matrices of counts: a metric is a function of a (resamples, questions) array of weights,
so that one matrix product evaluates it in every resample. Questions about one fact are resampled together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.special import ndtr
from scipy.stats import binomtest
from scipy.stats import t as student

from foggen.prompts import BUCKETS

Array = NDArray[np.floating[Any]]
Codes = NDArray[np.intp]
Statistic = Callable[[pd.DataFrame, Array], Array]
Policy = TypeVar("Policy")

MEAN = "mean"
CALIBRATION = ("parsed", "ece_bucket", "ece_bucket_debiased", "ece_mass", "ece_mass_debiased", "brier", "reliability",
               "resolution", "uncertainty", "auroc", "auprc_errors", "aurc")  # fmt: skip
ROUND = ("local_accuracy", "mean_confidence", "ece", "auroc", "parse_rate",
         *(f"bucket {bucket:g}" for bucket in BUCKETS))  # fmt: skip
REASONS = {"auroc": "answers all right or all wrong", "auprc_errors": "no wrong answer"}
REASONS |= dict.fromkeys((*CALIBRATION[1:9], "ece", "mean_confidence"), "no parsed confidence")
_CHUNK = 256  # resamples evaluated together: 256 x 2,300 float32 weights stay in the cache
_NOISE = 1e-6  # float32 rounding: a smaller difference is none


# ---- resampling


def clusters(frame: pd.DataFrame) -> Codes:
    """Codes 0..C-1 of the units to resample: facts where known, else questions (so all seeds of one stay together)."""
    unit = frame["id"]
    if "fact" in frame:
        unit = unit.astype(str).where(frame["fact"].isna(), "fact " + frame["fact"].astype(str))
    codes: Codes = pd.factorize(unit)[0]
    return codes


def draw_counts(codes: Codes, resamples: int, rng: np.random.Generator) -> Array:
    """(resamples, questions) float32 counts: how often each question is in each resample of the clusters `codes`."""
    size = int(codes.max()) + 1
    drawn = rng.integers(0, size, (resamples, size))
    counts = np.array([np.bincount(row, minlength=size) for row in drawn], np.float32)
    return counts if size == len(codes) else counts[:, codes]


@dataclass(frozen=True)
class Bootstrap:
    """Point estimates (rows, metrics) and draws (rows, resamples, metrics); rows are the domains, then their mean.

    `units` (rows,) is how many facts or questions were resampled, for the mean how many a domain.
    """

    rows: tuple[str, ...]
    metrics: tuple[str, ...]
    point: Array
    draws: Array
    units: Array

    def split(self, names: Sequence[Any]) -> dict[Any, Bootstrap]:
        """Equal parts of the metrics, one a name: what a statistic put one after the other."""
        size = len(self.metrics) // len(names)
        parts = [slice(start, start + size) for start in range(0, len(self.metrics), size)]
        cut = [replace(self, metrics=self.metrics[p], point=self.point[:, p], draws=self.draws[..., p]) for p in parts]
        return dict(zip(names, cut, strict=True))

    def interval(self, level: float = 0.95) -> tuple[Array, Array]:
        """Percentile interval, each (rows, metrics), widened for few units and moved to centre the draws on the point.

        The widening is Hesterberg's (2015): a t quantile, and n / (n - 1) for the variance. The move matters for the
        debiased ECE, whose draws lie too high. Not BCa: it covers accuracies, lifts and AUROC as well (93-96%), the
        debiased ECE worse (86-93%). Below its own noise the debiased ECE stays too high in every domain, and their
        mean with it: near perfect calibration no interval here covers. Plain ECE and reliability are biased upwards.
        """
        n = np.maximum(self.units, 2)
        tails = ndtr(np.sqrt(n / (n - 1)) * student.ppf((1 - level) / 2, n - 1))
        with warnings.catch_warnings():  # an undefined metric has no draws; the table's note explains it
            warnings.simplefilter("ignore", RuntimeWarning)
            ends = [np.nanquantile(row, [q, 0.5, 1 - q], axis=0) for row, q in zip(self.draws, tails, strict=True)]
            # The move must not leave the range: what is never negative stays so, and what is never above 1.
            least = np.minimum(np.nanmin(self.draws, axis=1), 0)
            most = np.maximum(np.nanmax(self.draws, axis=1), 1)
        low, middle, high = np.swapaxes(ends, 0, 1)
        move = self.point - middle
        return np.maximum(low + move, least), np.minimum(high + move, most)

    def p_values(self) -> Array:
        """Two-sided bootstrap p (rows, metrics) that the metric is 0: twice the smaller share of draws beyond 0.

        Never below 2 / (1 + resamples): to correct over m comparisons, take far more than 2 m / alpha resamples.
        """
        below, above = (self.draws <= _NOISE).sum(axis=1), (self.draws >= -_NOISE).sum(axis=1)
        p: Array = np.minimum(1.0, 2 * (1 + np.minimum(below, above)) / (1 + self.draws.shape[1]))
        return p

    def table(self) -> pd.DataFrame:
        """One row a domain and one for the mean; each metric with `_low` and `_high` beside it (95%)."""
        table = with_ends(pd.DataFrame(self.point, columns=self.metrics), *self.interval())
        table.insert(0, "domain", self.rows)
        return table


def bootstrap(
    outcomes: pd.DataFrame, statistic: Statistic, metrics: Sequence[str], resamples: int = 10_000, seed: int = 0
) -> Bootstrap:
    """Paired bootstrap, stratified by domain: every metric and every method sees the same resamples.

    `statistic(frame, weights)` maps one domain's questions and a (resamples, questions) matrix of counts to
    (resamples, metrics). A domain without questions (an unused category) gives NaN and stays out of the mean.
    """
    domain = outcomes["domain"]
    names = domain.cat.categories if isinstance(domain.dtype, pd.CategoricalDtype) else domain.unique()
    point, units = np.full((len(names), len(metrics)), np.nan), np.zeros(len(names))
    draws = np.full((len(names), resamples, len(metrics)), np.nan)
    for d, name in enumerate(names):
        frame = outcomes[domain == name].reset_index(drop=True)
        if len(frame):
            codes, rng = clusters(frame), np.random.default_rng([seed, d])
            units[d] = codes.max() + 1
            point[d] = statistic(frame, np.ones((1, len(frame))))[0]
            for start in range(0, resamples, _CHUNK):
                size = min(_CHUNK, resamples - start)
                draws[d, start : start + size] = statistic(frame, draw_counts(codes, size, rng))
    units = np.append(units, units.sum() / max((units > 0).sum(), 1))
    return Bootstrap((*map(str, names), MEAN), tuple(metrics), _with_mean(point), _with_mean(draws), units)


def _with_mean(values: Array) -> Array:
    """`values` (domains, ...) with the mean over the domains where it is defined as a last row."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=0, keepdims=True)
    return np.concatenate([values, ratio(total, known.sum(axis=0, keepdims=True))])


def ratio(top: ArrayLike, bottom: ArrayLike, empty: float = np.nan) -> Array:
    """top / bottom, and `empty` where bottom is 0; float32 stays float32."""
    top, bottom = np.broadcast_arrays(np.atleast_1d(top), bottom)
    out = np.full(top.shape, empty, np.result_type(top, bottom, np.float32))
    return np.asarray(np.divide(top, bottom, out=out, where=bottom != 0))


def means(weights: Array, columns: ArrayLike) -> Array:
    """Weighted means (resamples, ...) of columns (questions, ...)."""
    values = np.asarray(columns, weights.dtype)
    return np.asarray((weights @ values) / weights.sum(axis=1, keepdims=values.ndim > 1))


def correctness(frame: pd.DataFrame) -> tuple[Array, Array]:
    """local_correct and cloud_correct, each (questions,)."""
    return frame["local_correct"].to_numpy(float), frame["cloud_correct"].to_numpy(float)


def with_ends(values: pd.DataFrame, low: ArrayLike, high: ArrayLike) -> pd.DataFrame:
    """Each column with its `_low` and `_high` beside it; both are shaped as `values`."""
    ends = [pd.DataFrame(end, values.index, values.columns) for end in (low, high)]
    table = pd.concat([values, ends[0].add_suffix("_low"), ends[1].add_suffix("_high")], axis=1)
    return table[[f"{name}{end}" for name in values for end in ("", "_low", "_high")]]


def stack(tables: Mapping[Any, pd.DataFrame], *names: str) -> pd.DataFrame:
    """The tables one under the other, with their keys as the first columns, `names`."""
    return pd.concat(tables, names=names).reset_index(level=names).reset_index(drop=True)


def seed_sd(outcomes: pd.DataFrame, statistic: Statistic, metrics: Sequence[str]) -> Array:
    """Standard deviation (rows, metrics) over training seeds, ddof 1: the noise of training again; NaN for one seed.

    Set it beside the interval of the pooled outcomes, which is the noise of asking other questions.
    """
    outcomes = outcomes.assign(domain=pd.Categorical(outcomes["domain"], outcomes["domain"].unique()))
    runs = [bootstrap(part, statistic, metrics, 0).point for _, part in outcomes.groupby("seed")]
    return np.std(runs, axis=0, ddof=1) if len(runs) > 1 else np.full_like(runs[0], np.nan)


def annotate(table: pd.DataFrame, outcomes: pd.DataFrame, reasons: Mapping[str, str]) -> pd.DataFrame:
    """Put `n` (questions) and `facts` (resampled units) after `domain`, and a `note` that explains every NaN."""
    units = pd.DataFrame({"n": outcomes["id"].to_numpy(), "facts": clusters(outcomes)}, outcomes.index)
    counts = units.groupby(outcomes["domain"].astype(str)).nunique()
    counts.loc[MEAN] = counts.sum()
    counts = counts.reindex(table["domain"]).fillna(0).astype(int)
    for position, name in enumerate(counts, start=1):
        table.insert(position, name, counts[name].to_numpy())
    return table.assign(note=[_explain(row, table, reasons) for _, row in table.iterrows()])


def _explain(row: pd.Series, table: pd.DataFrame, reasons: Mapping[str, str]) -> str:
    """Why cells of a row are NaN, and of what domains a mean is not."""
    if row["n"] == 0:
        return "no questions"
    notes = undefined(row, reasons)
    if row["domain"] == MEAN:
        inner = table[table["domain"] != MEAN]
        partial = [name for name in reasons if name in inner and inner[name].isna().any() and pd.notna(row[name])]
        empty = ", ".join(inner["domain"][inner["n"] == 0])
        notes += [f"{', '.join(partial)}: mean of the domains where defined"] if partial else []
        notes += [f"without {empty}"] if empty else []
    return "; ".join(notes)


def undefined(row: pd.Series, reasons: Mapping[str, str]) -> list[str]:
    """`columns: reason` for the cells of a row that are NaN."""
    found: dict[str, dict[str, None]] = {}  # reasons and their columns, each once and in order
    for cell in row.index[row.isna()]:
        name = cell.removesuffix("_low").removesuffix("_high")
        reason = reasons.get(name, "undefined") if pd.isna(row[name]) else "interval undefined"
        found.setdefault(reason, {})[name] = None
    return [f"{', '.join(names)}: {why}" for why, names in found.items()]


# ---- ranking and calibration, each for a (resamples, questions) matrix of counts


def tie_sums(score: Array | Codes, weights: Array, *values: ArrayLike) -> list[Array]:
    """Counts and sums of each of `values` per distinct score, ascending: arrays (resamples, levels)."""
    levels, group = np.unique(score, return_inverse=True)
    at, shape = (group, np.arange(len(group))), (len(levels), len(group))
    columns = (np.asarray(value, weights.dtype) for value in (np.ones(len(group)), *values))
    turned = np.ascontiguousarray(weights.T)
    return [(csr_array((column, at), shape) @ turned).T for column in columns]


def auroc(count: Array, right: Array) -> Array:
    """P(a right answer scores above a wrong one), ties half, from `tie_sums`; NaN when all are right or all wrong."""
    wrong = count - right
    below = np.cumsum(wrong, axis=1) - wrong / 2
    return ratio((right * below).sum(axis=1), right.sum(axis=1) * wrong.sum(axis=1))


def auprc_errors(count: Array, right: Array) -> Array:
    """Average precision of finding wrong answers from the lowest score up (as scikit-learn, ties together)."""
    wrong = count - right
    precision = ratio(np.cumsum(wrong, axis=1), np.cumsum(count, axis=1), empty=0.0)
    return ratio((wrong * precision).sum(axis=1), wrong.sum(axis=1))


def aurc(count: Array, right: Array) -> Array:
    """Area under the risk-coverage curve (Geifman et al. 2019), its exact mean over random orders within ties.

    Keeping m tied answers of error rate r after n kept ones with e errors adds m r + (e - n r)(H(n+m) - H(n)).
    """
    count, wrong = count[:, ::-1], (count - right)[:, ::-1]
    total = np.cumsum(count, axis=1)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, total[:, -1].max() + 1))])
    span = np.diff(harmonic[total.astype(np.int32)], axis=1, prepend=0.0)
    before = np.cumsum(wrong, axis=1) - wrong - (total - count) * ratio(wrong, count, empty=0.0)
    return ratio((wrong + before * span).sum(axis=1), total[:, -1])


def buckets(confidence: Array) -> Codes:
    """Index of the nearest of the five confidence buckets."""
    nearest: Codes = np.abs(confidence[:, None] - np.array(BUCKETS)).argmin(axis=1)
    return nearest


def equal_mass(confidence: Array, bins: int = 10) -> Codes:
    """Bins of about equal size; equal confidences share a bin, so a five-level confidence has at most five."""
    edges = np.unique(np.quantile(confidence, np.arange(1, bins) / bins))
    return np.searchsorted(edges, confidence, side="left")


def ece(
    confidence: Array, correct: Array, weights: Array, bins: Codes, units: Codes | None = None
) -> tuple[Array, Array]:
    """Expected calibration error over `bins`, plain and debiased; each (resamples,).

    A bin's |gap| is biased upwards by sampling noise. The debiased value takes off E|N(gap, s^2)| - |gap|, with s^2 the
    variance of the bin's accuracy: the mean that Kumar, Liang & Ma (2019) estimate by simulation, in closed form.
    `units` are the `clusters` of the questions (None: each on its own), which s^2 allows for.
    """
    count, right, stated = tie_sums(bins, weights, correct, confidence)
    rate = ratio(right, count, empty=0.0)
    gap = np.abs(ratio(stated, count, empty=0.0) - rate)
    units = np.arange(len(bins)) if units is None else units
    spread = np.sqrt(_rate_variance(correct, weights, bins, units, rate)) / np.maximum(count, 1)
    z = ratio(gap, spread, empty=np.inf)
    folded = spread * np.sqrt(2 / np.pi) * np.exp(-(z**2) / 2) + gap * (1 - 2 * ndtr(-z))
    share = ratio(count, count.sum(axis=1, keepdims=True))
    plain, bias = (share * gap).sum(axis=1), (share * (folded - gap)).sum(axis=1)
    return plain, np.clip(plain - bias, 0, None)


def _rate_variance(correct: Array, weights: Array, bins: Codes, units: Codes, rate: Array) -> Array:
    """Variance of each bin's sum of right answers about `rate` x count, over units; (resamples, bins).

    The squared counts make it twice as large in a resample as in the sample, as it must be: a resample strays from the
    sample, which strayed from the truth.
    """
    _, first, cell = np.unique(np.stack([units, bins]), axis=1, return_index=True, return_inverse=True)
    n, r = (np.bincount(cell, one) for one in (np.ones(len(cell)), correct))
    _, rr, rn, nn = tie_sums(bins[first], weights[:, first] ** 2, r * r, r * n, n * n)
    filled = np.maximum(np.unique(bins[first], return_counts=True)[1], 2)  # units in the bin: the usual n / (n - 1)
    return np.asarray(np.maximum((rr - 2 * rate * rn + rate**2 * nn) * (filled / (filled - 1)), 0))


def brier(confidence: Array, correct: Array, weights: Array) -> tuple[Array, Array, Array, Array]:
    """Brier score and Murphy's reliability, resolution, uncertainty over the five buckets; each (resamples,).

    For bucket-valued confidences brier = reliability - resolution + uncertainty; for graded ones the
    within-bucket scatter is the difference. `correct` in 0..1 counts as a probability of being right.
    """
    loss = means(weights, correct * (1 - confidence) ** 2 + (1 - correct) * confidence**2)
    count, right, stated = tie_sums(buckets(confidence), weights, correct, confidence)
    share, base = ratio(count, weights.sum(axis=1, keepdims=True)), means(weights, correct)
    rate, level = ratio(right, count, 0.0), ratio(stated, count, 0.0)
    reliability = (share * (level - rate) ** 2).sum(axis=1)
    resolution = (share * (rate - base[:, None]) ** 2).sum(axis=1)
    return loss, reliability, resolution, base * (1 - base)


def router_score(outcomes: pd.DataFrame, column: str = "confidence") -> Array:
    """What a router ranks by: the column, with -1 for an unparsed value, which goes to the cloud before any other."""
    score: Array = outcomes[column].fillna(-1.0).to_numpy(float)
    return score


def calibration(frame: pd.DataFrame, weights: Array, column: str = "confidence") -> Array:
    """The `CALIBRATION` metrics (resamples, metrics): errors over parsed confidences, ranking over all answers."""
    correct, parsed = frame["local_correct"].to_numpy(float), frame[column].notna().to_numpy()
    count, right = tie_sums(router_score(frame, column), weights, correct)
    columns = [np.full(len(weights), np.nan)] * 8
    if parsed.any():
        stated, hits, kept = frame[column].to_numpy(float)[parsed], correct[parsed], weights[:, parsed]
        units = clusters(frame[parsed])
        columns = [*ece(stated, hits, kept, buckets(stated), units)]
        columns += [*ece(stated, hits, kept, equal_mass(stated), units), *brier(stated, hits, kept)]
    ranking = [auroc(count, right), auprc_errors(count, right), aurc(count, right)]
    return np.stack([means(weights, parsed), *columns, *ranking], axis=1)


def calibration_table(
    outcomes: pd.DataFrame, column: str = "confidence", resamples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Calibration and ranking per domain and their mean, each with a 95% interval; a `note` explains every NaN."""
    result = bootstrap(outcomes, lambda frame, w: calibration(frame, w, column), CALIBRATION, resamples, seed)
    return annotate(result.table(), outcomes, REASONS)


def round_metrics(frame: pd.DataFrame, weights: Array) -> Array:
    """The `ROUND` metrics (resamples, metrics) of one checkpoint."""
    stated = frame["confidence"].to_numpy(float)
    said = means(weights, stated[:, None] == np.array(BUCKETS))
    measured = dict(zip(CALIBRATION, calibration(frame, weights).T, strict=True))
    accuracy, total = means(weights, np.column_stack([frame["local_correct"], np.nan_to_num(stated)])).T
    stated_mean = ratio(total, measured["parsed"])
    rest = [measured[name] for name in ("ece_bucket_debiased", "auroc", "parsed")]
    return np.column_stack([accuracy, stated_mean, *rest, said])


def round_table(outcomes: Mapping[int, pd.DataFrame], resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """`ROUND` per round and domain, and the mean over domains, each with a 95% interval: what `round_curves` draws.

    `outcomes` maps round numbers to the outcomes of their checkpoints; all rounds see the same resamples.
    """
    tables = {
        number: annotate(bootstrap(frame, round_metrics, ROUND, resamples, seed).table(), frame, REASONS)
        for number, frame in outcomes.items()
    }
    return stack(tables, "round")


# ---- comparing routers and checkpoints


def accuracy_at_share(score: Array, local: Array, cloud: Array, weights: Array, share: ArrayLike) -> Array:
    """System accuracy (resamples,) when the lowest-scored `share` (scalar or one a resample) of questions is routed.

    Ties are routed at random, in expectation; so a constant score gives exactly the random line.
    """
    count, gain = tie_sums(score, weights, cloud - local)
    return means(weights, local) + routed_gain(count, gain, share)


def routed_gain(count: Array, gain: Array, share: ArrayLike) -> Array:
    """Mean accuracy gained by routing the lowest `share` of the questions, from `tie_sums` of cloud - local."""
    total = count.sum(axis=1, keepdims=True)
    before = np.cumsum(count, axis=1) - count
    routed = np.clip(np.reshape(share, (-1, 1)) * total - before, 0, count)
    return ratio((routed * ratio(gain, count, empty=0.0)).sum(axis=1), total[:, 0])


def matched_difference(
    outcomes: pd.DataFrame, first: str, second: str, share: float | str, resamples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """System accuracy of two routers (score columns) at one cloud share, and their paired `difference`.

    `share` is a number or the name of a 0/1 column that marks routed questions: then each domain's share of
    it, taken anew in every resample. Columns get 95% intervals; `p` is the bootstrap p of no difference.
    """

    def statistic(frame: pd.DataFrame, weights: Array) -> Array:
        at = means(weights, frame[share] if isinstance(share, str) else np.full(len(frame), share))
        local, cloud = correctness(frame)
        a, b = (accuracy_at_share(router_score(frame, c), local, cloud, weights, at) for c in (first, second))
        return np.stack([at, a, b, a - b], axis=1)

    return _compared(outcomes, statistic, ("share", first, second, "difference"), resamples, seed)


def paired_change(
    before: pd.DataFrame, after: pd.DataFrame, column: str = "local_correct", resamples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Means of a 0..1 column over the same questions in two tables, and their paired `difference`, with 95% intervals.

    `p` is the bootstrap p of no difference. Raises ValueError when the tables hold other questions.
    """
    if set(before["id"]) != set(after["id"]):
        raise ValueError("paired_change: expected the same questions in both tables")
    both = before.merge(after[["id", column]], on="id", suffixes=("", "_after"), validate="one_to_one")

    def statistic(frame: pd.DataFrame, weights: Array) -> Array:
        values = means(weights, frame[[column, f"{column}_after"]])
        return np.column_stack([values, values[:, 1] - values[:, 0]])

    return _compared(both, statistic, ("before", "after", "difference"), resamples, seed)


def _compared(
    outcomes: pd.DataFrame, statistic: Statistic, metrics: Sequence[str], resamples: int, seed: int
) -> pd.DataFrame:
    """The table of a bootstrap, with the p of the last metric, the difference."""
    result = bootstrap(outcomes, statistic, metrics, resamples, seed)
    return annotate(result.table().assign(p=result.p_values()[:, -1]), outcomes, {})


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Exact two-sided McNemar p for paired 0/1 outcomes; 1.0 without a discordant pair. Assumes independent pairs."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape or not np.isin([a, b], [0, 1]).all():
        raise ValueError("mcnemar: expected two equally long sequences of 0 and 1")
    wins, losses = int((a > b).sum()), int((a < b).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p: ArrayLike) -> Array:
    """Holm's adjusted p-values, in the order given: reject where <= alpha (family-wise error at most alpha).

    A NaN is no test: it stays, and does not count.
    """
    values = np.asarray(p, float)
    order, count = np.argsort(values), np.isfinite(values).sum()
    adjusted = np.full_like(values, np.nan)
    steps = values[order[:count]] * np.arange(count, 0, -1)
    adjusted[order[:count]] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def nested_bootstrap(
    dev: pd.DataFrame,
    test: pd.DataFrame,
    fit: Callable[[pd.DataFrame], Policy],
    evaluate: Callable[[Policy, pd.DataFrame], pd.DataFrame],
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Intervals that contain the noise of choosing: a resample refits on a copy of `dev`, evaluates on one of `test`.

    What `evaluate` gives for `fit(dev)` on `test`, with `_low` and `_high` (95%) beside each column, and n questions.
    Copies are of whole facts, within each domain.
    """
    rng = np.random.default_rng(seed)

    def copies(outcomes: pd.DataFrame) -> Callable[[], pd.DataFrame]:
        places = outcomes.groupby("domain", sort=False, observed=True).indices.values()
        strata = [(rows, clusters(outcomes.iloc[rows])) for rows in places]

        def draw() -> pd.DataFrame:
            parts = [rows.repeat(draw_counts(codes, 1, rng)[0].astype(int)) for rows, codes in strata]
            return outcomes.iloc[np.concatenate(parts)]

        return draw

    value, from_dev, from_test = evaluate(fit(dev), test), copies(dev), copies(test)
    draws = [evaluate(fit(from_dev()), from_test()).to_numpy(float).ravel() for _ in range(resamples)]
    ends = pd.DataFrame(draws).quantile([0.025, 0.975]).to_numpy()  # passes over undefined resamples
    table = with_ends(value, *ends.reshape(2, *value.shape))
    table.insert(0, "n", test["id"].nunique())
    return table
