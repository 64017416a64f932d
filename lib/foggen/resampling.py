"""Intervals and tests of any metric of stored outcomes, by resampling whole facts.

A resample is a row of counts: how often each question is in it. A statistic maps a matrix of counts
(resamples, questions) to the values of its metrics in every resample, so that one matrix product
serves them all. Knows no metric.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pandas import DataFrame as Frame
from scipy.special import ndtri, stdtr, stdtrit
from statsmodels.stats.proportion import proportion_confint

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
_PARSED = "mean_confidence ece_bucket ece_bucket_debiased ece_mass ece_mass_debiased brier".split()
UNDEFINED = {  # metric: why it may be
    **dict.fromkeys(_PARSED, "no parsed confidence"),
    "auroc": "answers all right or all wrong",
    "gap_recovered": "the cloud is no better than the edge",
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


def mean_defined(values: Array) -> Array:
    """Mean over the first axis of what is not NaN."""
    known = np.isfinite(values)
    return ratio(np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0))


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
    middle, known = mean_defined(values), np.isfinite(values)
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

    def interval(self, metric: str, level: float = 0.95) -> Array:
        """(rows, 3): the ends of the bootstrap interval, and the p that the metric is 0.

        See `quantile_interval`. A proportion of 0 or 1 has no spread to draw: its ends are those of
        the exact binomial (Clopper-Pearson) interval of as many facts.
        """
        draws, filled = denoised(self.values[metric]), self.facts[:-1][self.facts[:-1] > 0]
        sizes = np.append(self.facts[:-1], filled.mean())
        rows, centre = zip(draws, sizes, strict=True), metric.startswith("ece")
        table = np.array([quantile_interval(row, n, level, centre) for row, n in rows])
        if metric.startswith(self.proportions):
            sizes[-1] = len(filled) ** 2 / (1 / filled).sum()  # the mean spreads as so many facts
            rates = draws[:, 0].round()
            exact = np.abs(draws[:, 0] - rates) < _NOISE  # none, or all
            ends = proportion_confint((rates * sizes)[exact], sizes[exact], 1 - level, "beta")
            table[exact, :2] = np.transpose(ends)
        return table

    def table(self) -> Frame:
        """A row per domain and for their mean: n, facts, metrics with 95% ends, and a note.

        The ends of `x` are called `x_low` and `x_high`; a metric `difference` has its `p`.
        """
        columns = {"domain": self.rows, "n": self.questions, "facts": self.facts}
        for metric, values in self.values.items():
            low, high, p = self.interval(metric).T
            columns |= {metric: denoised(values[:, 0])}
            columns |= {f"{metric}_low": low, f"{metric}_high": high}
            columns |= {"p": p} if metric == "difference" else {}
        return annotate(Frame(columns))


def denoised(values: Array) -> Array:
    """The values, with 0 for what float32 rounding leaves of a 0."""
    return np.where(np.abs(values) < _NOISE, 0.0, values)


def quantile_interval(
    draws: Array, n: float, level: float = 0.95, centre: bool = False
) -> tuple[float, float, float]:
    """Low, high and two-sided p from an estimate and its draws (1 + resamples,) over `n` facts.

    Quantiles of the draws, widened for few facts as Hesterberg (2015) does: a t quantile, and
    n / (n - 1) for the variance. `centre` first moves the draws so that their median is the
    estimate: those of a calibration error lie too high. p inverts the interval: it is below
    1 - level where 0 lies outside. It is never below 2 / (1 + resamples): to correct over m
    comparisons, take far more than 2 m / alpha resamples. Near perfect calibration no interval
    here covers: the debiased ECE is biased upwards there, plain ECE everywhere. All are NaN where
    fewer than 20 facts leave the draws without spread: too few to tell chance from certainty.
    """
    known = np.sort(draws[1:][np.isfinite(draws[1:])])
    if len(known) < 2 or np.isnan(draws[0]) or (n < FEW and known[0] == known[-1]):
        return np.nan, np.nan, np.nan
    # What is never negative stays so, and what is never above 1
    least, most = min(known[0], 0), max(known[-1], 1)
    known = known + draws[0] - np.median(known) if centre else known
    # Normal scores of the draws; beyond them both go on as straight as from the median to the end
    finest, middle = 1 / (1 + len(known)), np.median(known)
    scores = ndtri(np.linspace(0, 1, len(known)).clip(finest, 1 - finest))
    ends = middle + (known[[0, -1]] - middle) * _FAR / abs(scores[0])
    scores, known = np.hstack([-_FAR, scores, _FAR]), np.hstack([ends[0], known, ends[1]])
    n = max(n, 2)  # draws of one fact spread by the seeds alone
    wider = np.sqrt(n / (n - 1))
    tail = wider * stdtrit(n - 1, (1 - level) / 2)
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
    estimated, and its draws hold the noise of training beside that of the questions. A domain
    without questions (an unused category) is NaN and stays out of the mean. For other strata:
    `outcomes.assign(domain=outcomes["difficulty"])`.
    """
    domain = outcomes["domain"]
    names = domain.cat.categories if hasattr(domain, "cat") else domain.unique()
    seeds = pd.factorize(outcomes.get("seed", np.zeros(len(outcomes))))[0]
    noise = seed_noise(seeds.max() + 1, resamples, np.random.default_rng([seed, len(names)]))
    noise = np.insert(noise, 0, 0.0, axis=1)  # the estimate stands before the draws
    # Every domain has draws of its own
    sizes, draws = [], []
    for number, name in enumerate(names):
        inside = (domain == name).to_numpy()
        frame, rng = outcomes[inside], np.random.default_rng([seed, number])
        sizes.append((frame["id"].nunique(), len(np.unique(fact_codes(frame)))))
        draws.append(_drawn(frame, seeds[inside], statistic, noise, rng) if len(frame) else {})
    # Add the mean of the domains
    blank, values = np.full(1 + resamples, np.nan), {}
    for metric in max(draws, key=len):
        rows = np.array([drawn.get(metric, blank) for drawn in draws])
        values[metric] = np.vstack([rows, mean_defined(rows)])
    questions, facts = np.array([*sizes, np.sum(sizes, axis=0)]).T
    ids = list(zip(outcomes["id"], seeds, domain, fact_codes(outcomes), strict=True))
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
        trouble = "the same questions, seeds, domains and facts in the same order"
        raise ValueError(f"paired_table: expected {trouble}")
    a, b = first.values[metric], second.values[metric]
    values = dict(zip([*sides, "difference"], [a, b, a - b], strict=True))
    proportions = tuple(sides) if metric.startswith(first.proportions) else ()
    return replace(first, values=values, proportions=proportions).table()


def annotate(table: Frame) -> Frame:
    """The table of domains and mean with a `note`: why cells are NaN, and where facts are few."""
    values = table.drop(columns="p", errors="ignore")
    metrics = [name for name in values if not name.endswith(("_low", "_high", "note"))]
    domains = table["domain"] != MEAN
    partly = table.loc[domains, metrics].isna().any()
    few = table.loc[domains, "facts"].between(1, FEW - 1)
    notes = []
    for place, row in table[metrics].iterrows():
        missing = row.index[row.isna()].to_series()
        groups = missing.groupby(missing.map(UNDEFINED).fillna("undefined"), sort=False)
        note = [f"{', '.join(names)}: {reason}" for reason, names in groups]
        if not row["n"]:
            note = ["no questions"]
        elif few.get(place):
            note.append(f"fewer than {FEW} facts: hardly an interval")
        elif not domains[place]:
            averaged = [name for name in metrics if partly[name] and pd.notna(row[name])]
            where = "mean of the domains where defined"
            note += [f"{', '.join(averaged)}: {where}"] if averaged else []
            note += [f"{few.sum()} domains of fewer than {FEW} facts"] if few.any() else []
        notes.append("; ".join(note))
    return table.assign(note=notes)


def stack(tables: Mapping[Any, Frame], name: str) -> Frame:
    """The tables one under the other, with their keys as the first column, `name`."""
    return pd.concat(tables, names=[name]).reset_index(level=0).reset_index(drop=True)
