"""Metrics of stored outcomes, calibration and ranking, with intervals by resampling whole facts.

A resample is a row of counts: how often each question is in it. A metric is a function of a matrix
of counts (resamples, questions), so that one matrix product serves all resamples. Works on arrays
or on outcomes tables (see `foggen.routing`); knows no model, no file and no threshold.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pandas import DataFrame as Frame
from scipy.sparse import csr_array
from scipy.special import ndtr, ndtri, stdtr, stdtrit
from statsmodels.stats.proportion import proportion_confint

from foggen.prompts import BUCKETS

Array = NDArray[np.floating[Any]]
Codes = NDArray[np.intp]
Values = dict[str, Array]
Statistic = Callable[[Frame, Array], Values]

MEAN = "mean"
FEW = 20  # facts: fewer hardly tell an interval
# How the names of metrics begin that are shares of questions
PROPORTIONS = tuple(
    "cloud raw random sysacc routed oracle share parsed bucket accuracy local_accuracy".split()
)
UNDEFINED = {  # why a metric may be NaN, by the first word of its name
    **dict.fromkeys(("mean", "ece", "brier"), "no parsed confidence"),
    "auroc": "answers all right or all wrong",
}
_CHUNK = 512  # resamples evaluated together: more are no faster, and leave the cache
_NOISE = 1e-6  # float32 rounding: a smaller value is 0
_FAR = 40.0  # a normal score beyond all others


# ---- sums and counts


def ratio(top: ArrayLike, bottom: ArrayLike, empty: float = np.nan) -> Array:
    """top / bottom, and `empty` where bottom is 0; float32 stays float32."""
    top, bottom = np.broadcast_arrays(np.atleast_1d(top), bottom)
    out = np.full(top.shape, empty, np.result_type(top, bottom, np.float32))
    return np.asarray(np.divide(top, bottom, out=out, where=bottom != 0))


def means(counts: Array, columns: ArrayLike) -> Array:
    """Means (resamples, ...) of columns (questions, ...)."""
    values = np.asarray(columns, counts.dtype)
    return ratio(counts @ values, counts.sum(axis=1, keepdims=values.ndim > 1))


def fact_codes(outcomes: Frame) -> Codes:
    """(rows,) codes 0..F-1 of what is resampled: facts where known, else questions (all seeds)."""
    names = "question " + outcomes["id"].astype(str)
    if "fact" in outcomes:
        names = names.where(outcomes["fact"].isna(), "fact " + outcomes["fact"].astype(str))
    return np.asarray(pd.factorize(names)[0])


def draw_counts(codes: Codes, resamples: int, rng: np.random.Generator) -> Array:
    """(resamples, questions) float32 counts when the facts `codes` are drawn with replacement."""
    size = int(codes.max()) + 1
    drawn = rng.integers(0, size, (resamples, size))
    counts = np.array([np.bincount(facts, minlength=size) for facts in drawn], np.float32)
    return counts if size == len(codes) else counts[:, codes]  # from (resamples, facts)


def _counts(codes: Codes, resamples: int, rng: np.random.Generator) -> Iterator[Array]:
    """The counts of the sample itself, (1, questions), then those of resamples, in chunks."""
    yield np.ones((1, len(codes)))
    for start in range(0, resamples, _CHUNK):
        yield draw_counts(codes, min(_CHUNK, resamples - start), rng)


def seed_noise(seeds: int, resamples: int, rng: np.random.Generator) -> Array:
    """(seeds, resamples) factors that turn the seeds' deviations into Student's t noise of a mean.

    A resample of three seeds never leaves their range: its intervals cover about 80%, not 95%.
    """
    noise = rng.standard_normal((seeds, resamples))
    scale = np.sqrt(seeds * rng.chisquare(max(seeds - 1, 1), resamples))
    return np.asarray((noise - noise.mean(axis=0)) / scale)


def _over_seeds(values: Array, noise: Array) -> Array:
    """(resamples,) means over seeds of values (seeds, resamples), with the seeds' noise."""
    middle, known = Frame(values).mean().to_numpy(), np.isfinite(values)  # of what is not NaN
    drawn = middle + np.where(known, (values - middle) * noise, 0.0).sum(axis=0)
    least, most = values.min(initial=0.0, where=known), values.max(initial=1.0, where=known)
    return np.asarray(np.clip(drawn, least, most))


# ---- the bootstrap


@dataclass(frozen=True)
class Bootstrap:
    """`values` {metric: (rows, 1 + resamples)}: the estimate, then its draws.

    Rows are the domains, then their mean; `questions` and `facts` (rows,) say what they rest on.
    `ids` holds the questions in their order, with their training seeds, domains and facts.
    """

    ids: list[tuple[Any, ...]]
    rows: list[str]
    questions: Codes
    facts: Codes
    values: Values
    proportions: tuple[str, ...] = PROPORTIONS

    def interval(self, metric: str) -> Array:
        """(rows, 3): the ends of the 95% bootstrap interval, and the p that the metric is 0.

        See `quantile_interval`. A proportion of 0 or 1 has no spread to draw: its ends are those of
        the exact binomial (Clopper-Pearson) interval of as many facts.
        """
        draws, facts = denoised(self.values[metric]), self.facts[:-1]
        sizes, centre = np.append(facts, facts.mean()), metric.startswith("ece")
        rows = zip(draws, sizes, strict=True)
        table = np.array([quantile_interval(row, size, centre) for row, size in rows])
        if metric.startswith(self.proportions):
            sizes[-1] = len(facts) ** 2 / (1 / facts).sum()  # the mean spreads as so many facts
            rates = draws[:, 0].round()
            exact = np.abs(draws[:, 0] - rates) < _NOISE  # none, or all
            ends = proportion_confint((rates * sizes)[exact], sizes[exact], method="beta")
            table[exact, :2] = np.transpose(ends)
        return table

    def table(self) -> Frame:
        """A row per domain and for their mean: n, facts, metrics with 95% ends, and a note.

        The ends of `x` are called `x_low` and `x_high`; a metric `difference` has its `p`. The mean
        is over the domains where a metric is defined.
        """
        columns: dict[str, Any] = {"domain": self.rows, "n": self.questions, "facts": self.facts}
        for metric, values in self.values.items():
            columns[metric] = denoised(values[:, 0])
            columns[f"{metric}_low"], columns[f"{metric}_high"], p = self.interval(metric).T
            if metric == "difference":
                columns["p"] = p
        return Frame(columns | {"note": self.notes()})

    def notes(self) -> list[str]:
        """Per row, why cells are NaN, and whether facts are few."""
        notes = []
        for row, facts in enumerate([*self.facts[:-1], min(self.facts)]):
            empty = [name for name, values in self.values.items() if np.isnan(values[row, 0])]
            note = [f"{name}: {UNDEFINED.get(name.split('_')[0], 'undefined')}" for name in empty]
            if facts < FEW:
                note.append(f"fewer than {FEW} facts in a domain: hardly an interval")
            notes.append("; ".join(note))
        return notes


def denoised(values: Array) -> Array:
    """The values, with 0 for what float32 rounding leaves of a 0."""
    return np.where(np.abs(values) < _NOISE, 0.0, values)


def quantile_interval(draws: Array, facts: float, centre: bool = False) -> tuple[float, ...]:
    """Low, high and two-sided p from an estimate and its draws (1 + resamples,) over facts.

    Quantiles of the draws, widened for few facts as Hesterberg (2015) does: a t quantile, and
    n / (n - 1) for the variance of n facts. `centre` first moves the draws so that their median is
    the estimate: those of a calibration error lie too high. p inverts the interval: it is below 5%
    where 0 lies outside. It is never below 2 / (1 + resamples): to correct over m comparisons, take
    far more than 2 m / alpha resamples. Near perfect calibration no interval here covers: the
    debiased ECE is biased upwards there, plain ECE everywhere. All are NaN where fewer than 20
    facts leave the draws without spread: too few to tell chance from certainty.
    """
    known = np.sort(draws[1:][np.isfinite(draws[1:])])
    if len(known) < 2 or np.isnan(draws[0]) or (facts < FEW and known[0] == known[-1]):
        return np.nan, np.nan, np.nan
    # What is never negative stays so, and what is never above 1
    least, most = min(known[0], 0), max(known[-1], 1)
    known = known + draws[0] - np.median(known) if centre else known
    # Normal scores of the draws; beyond them both go on as straight as from the median to the end
    finest, middle = 1 / (1 + len(known)), np.median(known)
    scores = ndtri(np.linspace(0, 1, len(known)).clip(finest, 1 - finest))
    ends = middle + (known[[0, -1]] - middle) * _FAR / abs(scores[0])
    scores, known = np.hstack([-_FAR, scores, _FAR]), np.hstack([ends[0], known, ends[1]])
    n = max(facts, 2)  # draws of one fact spread by the seeds alone
    wider = np.sqrt(n / (n - 1))
    tail = wider * stdtrit(n - 1, 0.025)
    low, high = np.interp([tail, -tail], scores, known)
    zero = min(np.interp(0, known, scores), np.interp(0, -known[::-1], scores))
    p = 2 * max(stdtr(n - 1, zero / wider), finest)
    return max(low, least), min(high, most), min(p, 1)


def p_noise(p: ArrayLike, p_holm: ArrayLike, resamples: int) -> Array:
    """How far (95%) Holm's p may move with the draw of the resamples.

    p: the uncorrected ones, of two tails each, whose shares the resamples estimate by counting.
    """
    tail = np.asarray(p) / 2
    return np.asarray(1.96 * np.sqrt((1 - tail) / tail / resamples) * np.asarray(p_holm))


def bootstrap(
    outcomes: Frame, statistic: Statistic, resamples: int = 10_000, seed: int = 0
) -> Bootstrap:
    """Paired bootstrap of facts within domains: all metrics and methods see the same resamples.

    `statistic(frame, counts)` maps questions of one domain and training seed, and their counts
    (resamples, questions), to {metric: (resamples,)}. Of several seeds (column `seed`) the mean is
    estimated, and its draws hold the noise of training beside that of the questions. For other
    strata: `outcomes.assign(domain=outcomes["difficulty"])`.
    """
    domains, names = pd.factorize(outcomes["domain"])
    seeds = pd.factorize(outcomes.get("seed", np.zeros(len(outcomes))))[0]
    noise = seed_noise(seeds.max() + 1, resamples, np.random.default_rng([seed, len(names)]))
    noise = np.insert(noise, 0, 0.0, axis=1)  # the estimate stands before the draws
    # Every domain has draws of its own
    sizes, draws = [], []
    for number in range(len(names)):
        inside, rng = domains == number, np.random.default_rng([seed, number])
        frame = outcomes[inside]
        sizes.append((frame["id"].nunique(), len(np.unique(fact_codes(frame)))))
        draws.append(_drawn(frame, seeds[inside], statistic, noise, rng))
    # Add the mean of the domains where a metric is defined
    values = {metric: np.array([drawn[metric] for drawn in draws]) for metric in draws[0]}
    values = {metric: np.vstack([rows, Frame(rows).mean()]) for metric, rows in values.items()}
    questions, facts = np.array([*sizes, np.sum(sizes, axis=0)]).T
    ids = list(zip(outcomes["id"], seeds, outcomes["domain"], fact_codes(outcomes), strict=True))
    return Bootstrap(ids, [*map(str, names), MEAN], questions, facts, values)


def _drawn(
    frame: Frame, seeds: Codes, statistic: Statistic, noise: Array, rng: np.random.Generator
) -> Values:
    """{metric: (1 + resamples,)} of one domain's questions, with noise (seeds, 1 + resamples)."""
    places = {seed: np.flatnonzero(seeds == seed) for seed in np.unique(seeds)}
    parts = [(frame.iloc[rows], rows) for rows in places.values()]
    resamples = _counts(fact_codes(frame), noise.shape[1] - 1, rng)
    chunks = [[statistic(part, counts[:, rows]) for part, rows in parts] for counts in resamples]
    values = {}
    for metric in chunks[0][0]:
        # From chunks of (seeds, resamples): (seeds, 1 + resamples)
        by_seed = np.hstack([[measured[metric] for measured in chunk] for chunk in chunks])
        values[metric] = _over_seeds(by_seed, noise[[*places]])
    return values


def paired_table(sides: Mapping[str, Bootstrap], metric: str) -> Frame:
    """One metric of two bootstraps of the same questions, and their paired `difference` with p.

    `sides` maps column names to the bootstraps; the difference is the first minus the second.
    """
    first, second = sides.values()
    if first.ids != second.ids:
        raise ValueError("paired_table: expected the same questions, seeds, domains and facts")
    a, b = first.values[metric], second.values[metric]
    values = dict(zip([*sides, "difference"], [a, b, a - b], strict=True))
    proportions = tuple(sides) if metric.startswith(first.proportions) else ()
    return replace(first, values=values, proportions=proportions).table()


def router_score(outcomes: Frame, column: str = "confidence") -> Array:
    """What a router ranks by: the column, or -1 where unparsed, which is routed before all else."""
    return np.asarray(outcomes[column].fillna(-1.0), dtype=float)


# ---- ranking


def tie_sums(score: Array | Codes, counts: Array, *values: ArrayLike) -> list[Array]:
    """Counts, then sums of each of `values`, per distinct score: arrays (resamples, levels)."""
    levels, group = np.unique(score, return_inverse=True)
    at, shape = (group, np.arange(len(group))), (len(levels), len(group))
    columns = (np.asarray(value, counts.dtype) for value in (np.ones(len(group)), *values))
    turned = np.ascontiguousarray(counts.T)
    sums = (csr_array((column, at), shape) @ turned for column in columns)
    return [np.ascontiguousarray(total.T) for total in sums]  # rows that sum fast


def auroc(count: Array, right: Array) -> Array:
    """P(a right answer scores above a wrong one), ties half, from `tie_sums`; NaN without both."""
    wrong = count - right
    below = np.cumsum(wrong, axis=1) - wrong / 2
    return ratio((right * below).sum(axis=1), right.sum(axis=1) * wrong.sum(axis=1))


def aurc(count: Array, right: Array) -> Array:
    """Area under the risk-coverage curve (Geifman et al. 2019), mean over all orders within ties.

    m tied answers of error rate r after n with e errors add m r + (e - n r)(H(n + m) - H(n)).
    """
    count, wrong = count[:, ::-1], (count - right)[:, ::-1]
    total = np.cumsum(count, axis=1)
    harmonic = np.append(0.0, np.cumsum(1 / np.arange(1, total[:, -1].max() + 1)))
    span = np.diff(harmonic[total.astype(np.int32)], axis=1, prepend=0.0)
    before = np.cumsum(wrong, axis=1) - wrong - (total - count) * ratio(wrong, count, empty=0.0)
    return ratio((wrong + before * span).sum(axis=1), total[:, -1])


# ---- calibration


def buckets(confidence: Array) -> Codes:
    """Index of the nearest of the five confidence buckets."""
    return np.asarray(np.abs(confidence[:, None] - np.array(BUCKETS)).argmin(axis=1))


def equal_mass(confidence: Array, bins: int = 10) -> Codes:
    """Bins of about equal size; equal confidences share a bin, so five levels fill at most five."""
    edges = np.quantile(confidence, np.arange(1, bins) / bins) if len(confidence) else confidence
    return np.asarray(np.searchsorted(np.unique(edges), confidence, side="left"))


def ece(
    stated: Array, correct: Array, counts: Array, bins: Codes, codes: Codes
) -> tuple[Array, Array]:
    """Expected calibration error over `bins`, plain and debiased; each (resamples,).

    A bin's |gap| is biased upwards by sampling noise. The debiased value takes off
    E|N(gap, s^2)| - |gap|, with s^2 the variance of the bin's accuracy: the mean that Kumar, Liang
    & Ma (2019) simulate, in closed form. s^2 allows for the `fact_codes`.
    """
    count, right, confidence = tie_sums(bins, counts, correct, stated)
    rate = ratio(right, count, empty=0.0)
    gap = np.abs(ratio(confidence, count, empty=0.0) - rate)
    spread = np.sqrt(_rate_variance(correct, counts, bins, codes, rate)) / np.maximum(count, 1)
    z = ratio(gap, spread, empty=np.inf)
    folded = spread * np.sqrt(2 / np.pi) * np.exp(-(z**2) / 2) + gap * (1 - 2 * ndtr(-z))
    total = count.sum(axis=1)
    plain, bias = (ratio((count * v).sum(axis=1), total) for v in (gap, folded - gap))
    return plain, np.clip(plain - bias, 0, None)


def _rate_variance(correct: Array, counts: Array, bins: Codes, codes: Codes, rate: Array) -> Array:
    """Variance over facts of each bin's right answers about `rate` x count; (resamples, bins).

    The squared counts make it twice as large in a resample as in the sample, as it must be: a
    resample strays from the sample, which strayed from the truth.
    """
    pairs = codes * (bins.max(initial=0) + 1) + bins  # (questions,) of fact and bin
    _, first, cell = np.unique(pairs, return_index=True, return_inverse=True)
    n, r = np.bincount(cell), np.bincount(cell, correct)  # questions, right: (facts x bins,)
    _, rr, rn, nn = tie_sums(bins[first], counts[:, first] ** 2, r * r, r * n, n * n)
    facts = np.maximum(np.unique(bins[first], return_counts=True)[1], 2)  # in the bin
    return np.asarray(np.maximum((rr - 2 * rate * rn + rate**2 * nn) * (facts / (facts - 1)), 0))


def calibration(frame: Frame, counts: Array, column: str = "confidence") -> Values:
    """Calibration of a score and how it ranks, each metric (resamples,).

    Means and errors are over parsed values, over buckets and over bins of equal mass; ranking is
    over all answers. A `local_correct` between 0 and 1 counts as a probability of being right.
    """
    correct, parsed = frame["local_correct"].to_numpy(float), frame[column].notna().to_numpy()
    stated, right = frame[column].to_numpy(float)[parsed], correct[parsed]
    inside, codes = counts[:, parsed], fact_codes(frame[parsed])
    bucket, bucket_debiased = ece(stated, right, inside, buckets(stated), codes)
    mass, mass_debiased = ece(stated, right, inside, equal_mass(stated), codes)
    sums = tie_sums(router_score(frame, column), counts, correct)
    return {
        "parsed": means(counts, parsed),
        "local_accuracy": means(counts, correct),
        "mean_confidence": means(inside, stated),
        "ece_bucket": bucket,
        "ece_bucket_debiased": bucket_debiased,
        "ece_mass": mass,
        "ece_mass_debiased": mass_debiased,
        "brier": means(inside, right * (1 - stated) ** 2 + (1 - right) * stated**2),
        "auroc": auroc(*sums),
        "aurc": aurc(*sums),
    }
