"""Metrics of stored outcomes: ranking, calibration, and what routing at a share gains.

Each is a function of a matrix of counts (resamples, questions), as `foggen.resampling` wants it,
and works on arrays or on outcomes tables (see `foggen.routing`). Knows no model, no file and no
threshold.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from pandas import DataFrame as Frame
from scipy.sparse import csr_array
from scipy.special import ndtr
from statsmodels.stats.multitest import multipletests

from foggen.prompts import BUCKETS
from foggen.resampling import MEAN, Array, Codes, Values, bootstrap, fact_codes, means, ratio, stack

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
    pairs = np.stack([codes, bins])
    _, first, cell = np.unique(pairs, axis=1, return_index=True, return_inverse=True)
    cell = cell.ravel()  # numpy 2.0 gives it another shape
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


def calibration_table(outcomes: Frame, column: str = "confidence", **options: int) -> Frame:
    """`calibration` of a score column per domain; `options` are resamples and seed."""
    return bootstrap(outcomes, partial(calibration, column=column), **options).table()


def round_table(outcomes: Mapping[int, Frame], **options: int) -> Frame:
    """`calibration` and the share of each stated bucket per `round` and domain.

    `outcomes` maps round numbers to the outcomes of their checkpoints.
    """

    def statistic(frame: Frame, counts: Array) -> Values:
        stated = {f"bucket {b:g}": means(counts, frame["confidence"] == b) for b in BUCKETS}
        return calibration(frame, counts) | stated

    runs = {n: bootstrap(frame, statistic, **options) for n, frame in outcomes.items()}
    return stack({n: run.table() for n, run in runs.items()}, "round")


# ---- routers


def correctness(frame: Frame) -> tuple[Array, Array]:
    """local_correct and cloud_correct, each (questions,)."""
    return frame["local_correct"].to_numpy(float), frame["cloud_correct"].to_numpy(float)


def router_score(outcomes: Frame, column: str = "confidence") -> Array:
    """What a router ranks by: the column, or -1 where unparsed, which is routed before all else."""
    return np.asarray(outcomes[column].fillna(-1.0), dtype=float)


def routed_gain(count: Array, gain: Array, share: ArrayLike | None) -> Array:
    """Mean accuracy gained by routing the lowest `share`, from `tie_sums` of cloud - local.

    `share` is a number or (resamples,); None: the mean over all shares. Ties are routed at random.
    """
    total, before = count.sum(axis=1), np.cumsum(count, axis=1) - count
    if share is None:  # a gain is there at all shares from its own place on, ties half-way
        return ratio((gain * (total[:, None] - before - count / 2)).sum(axis=1), total**2)
    routed = np.clip(np.reshape(share, (-1, 1)) * total[:, None] - before, 0, count)
    return ratio((routed * ratio(gain, count, empty=0.0)).sum(axis=1), total)


def at_share(
    frame: Frame, counts: Array, score: str = "confidence", share: float | str | None = None
) -> Values:
    """A score as a router, each metric (resamples,), where the lowest-scored `share` is routed.

    `share` is a number, the name of a 0/1 column that marks as many questions (counted anew in
    every resample), or None: the mean over all shares. Beside system accuracy and lift stand AUROC
    and `area`, the lift's mean over all shares. A constant score has neither.
    """
    local, cloud = correctness(frame)
    count, right, gain = tie_sums(router_score(frame, score), counts, local, cloud - local)
    raw, gap = (ratio(sums.sum(axis=1), count.sum(axis=1)) for sums in (right, gain))
    if isinstance(share, str):
        routed = means(counts, frame[share])
    else:
        routed = np.full(len(counts), 0.5 if share is None else share)
    if not isinstance(share, str | None) and not 0 <= share <= 1:
        raise ValueError(f"share={share}; expected 0 to 1")
    everywhere = routed_gain(count, gain, None)
    gained = everywhere if share is None else routed_gain(count, gain, routed)
    values = {"share": routed, "sysacc": raw + gained, "lift": gained - routed * gap}
    return values | {"auroc": auroc(count, right), "area": everywhere - gap / 2}


def system(frame: Frame, counts: Array, routed: Array) -> Values:
    """What routings do: metrics (resamples, routings) of `routed` (questions, routings) chances.

    random = (1 - routed) raw + routed cloud; lift = sysacc - random; oracle routes the same share
    of questions, those that gain most.
    """
    local, cloud = correctness(frame)
    gain = cloud - local
    share = means(counts, routed)
    raw = np.broadcast_to(means(counts, local)[:, None], share.shape)
    clouds = np.broadcast_to(means(counts, cloud)[:, None], share.shape)
    random = (1 - share) * raw + share * clouds
    sysacc = raw + means(counts, routed * gain[:, None])
    count, gains = tie_sums(-gain, counts, gain)
    oracle = raw + np.stack([routed_gain(count, gains, part) for part in share.T], axis=1)
    values = {"cloud": clouds, "raw": raw, "random": random, "sysacc": sysacc, "routed": share}
    return values | {"lift": sysacc - random, "oracle": oracle}


def score_table(
    outcomes: Frame, scores: Sequence[str], share: float | str, **options: int
) -> Frame:
    """Score columns as routers at one cloud share: `at_share`, and differences in SysAcc.

    `difference` is the first score minus this one, paired; p_holm is Holm's over domains x scores,
    and over scores for the mean rows (none for the first score itself).
    """
    runs = {
        score: bootstrap(outcomes, partial(at_share, score=score, share=share), **options)
        for score in scores
    }
    for run in runs.values():
        run.values["difference"] = runs[scores[0]].values["sysacc"] - run.values["sysacc"]
    table = stack({score: run.table() for score, run in runs.items()}, "score")
    tested = table[(table["score"] != scores[0]) & table["p"].notna()]
    families = tested.groupby(tested["domain"] == MEAN)["p"]
    adjusted = families.transform(lambda p: multipletests(p, method="holm")[1])
    return table.assign(p_holm=adjusted)


def share_curve(
    outcomes: Frame, score: str = "confidence", points: int = 101, **options: int
) -> Frame:
    """Accuracy against cloud share for one threshold common to all domains: the mean over domains.

    Columns share, n, and sysacc, random, oracle, lift, each with a 95% percentile band; random and
    oracle route as much of each domain. Ties at the threshold are routed at random.
    """
    outcomes, shares = outcomes.reset_index(drop=True), np.linspace(0, 1, points)
    chances = _chances(outcomes, score, shares)
    names = ("routed", "sysacc", "random", "oracle", "lift")

    def statistic(frame: Frame, counts: Array) -> Values:
        curves = system(frame, counts, chances[frame.index])  # each (resamples, points)
        return {f"{name} {k}": v for name in names for k, v in enumerate(curves[name].T)}

    result = bootstrap(outcomes, statistic, **{"resamples": 1000, **options})
    # Means over domains: (names, points, 1 + resamples)
    means_over_domains = np.array([values[-1] for values in result.values.values()])
    routed, *curves = means_over_domains.reshape(len(names), points, -1)
    table = {"share": shares, "n": outcomes["id"].nunique()}
    for name, curve in zip(names[1:], curves, strict=True):
        # Read off at the same shares in every resample
        pairs = zip(routed.T, curve.T, strict=True)
        drawn = np.array([np.interp(shares, x, y) for x, y in pairs])
        low, high = np.quantile(drawn[1:], [0.025, 0.975], axis=0)
        table |= {name: drawn[0], f"{name}_low": low, f"{name}_high": high}
    return Frame(table)


def _chances(outcomes: Frame, score: str, shares: Array) -> Array:
    """(rows, shares) chances to be routed when each seed routes a share of its mean domain."""
    rows = outcomes[["domain"]].assign(score=router_score(outcomes, score))
    rows["seed"] = outcomes.get("seed", 0)
    size = rows.groupby(["seed", "domain"], observed=True)["score"].transform("size")
    rows["share"] = 1 / size / rows.groupby("seed")["domain"].transform("nunique")
    # A score's rows share the piece from `top - width` to `top` of all that could be routed
    width = rows.groupby(["seed", "score"])["share"].sum()
    top = width.groupby("seed").cumsum()
    pieces = pd.MultiIndex.from_frame(rows[["seed", "score"]])
    top, width = (values[pieces].to_numpy()[:, None] for values in (top, width))
    return np.asarray(np.clip((shares - top + width) / width, 0, 1))
