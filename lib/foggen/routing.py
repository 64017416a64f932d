"""Keep or route: what a confidence threshold does to accuracy, on stored outcomes, and beside its baselines.

Holds the outcomes table and its checks, the metrics of the model cards, the choice of tau, and the baselines.
Must not know how an outcome came about: no model, no prompt, no figure.

The table has one row a question (or a question and `seed`): id, domain, local_correct and cloud_correct
(0..1), confidence (0..1, empty = unparsed). Optional columns add rows and columns to the tables: see
`NUMBERS` and `TEXTS`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binom
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from foggen import stats
from foggen.prompts import BUCKETS
from foggen.stats import MEAN, Array, router_score
from foggen.store import ROOT

REQUIRED = ("id", "domain", "local_correct", "cloud_correct", "confidence")
SHARE, SHARE_OR_EMPTY, COUNT = (
    "a number from 0 to 1",
    "a number from 0 to 1, or empty",
    "a number of at least 0",
)
NUMBERS = dict.fromkeys(("local_correct", "cloud_correct"), SHARE)
NUMBERS |= dict.fromkeys(
    ("confidence", "graded_confidence", "option_probability", "p_true", "verification"), SHARE_OR_EMPTY
)
NUMBERS |= dict.fromkeys(
    ("local_tokens", "cloud_tokens", "sample_tokens", "verification_tokens", "seed"), COUNT
)
NUMBERS |= {"n_options": "a number of at least 2"}
TEXTS = {
    "id": (r".+", "a name, once a seed"),
    "domain": (r"(?!mean$).+", "a name other than mean"),
    "votes": (r"[A-Z-]+", "one letter a sample, - for an unparsed one, such as AACA-AAB"),
}
FREE_TEXTS = ("gold", "fact", "local_answer", "cloud_answer", "question")
METRICS = ("cloud", "raw", "random", "sysacc", "routed", "lift", "oracle", "gap_recovered")
REASONS = {
    "chance": "needs a column n_options",
    "gold_share": "needs a column gold of letters",
    "gap_recovered": "cloud not better than local, there is no gap to recover",
    "extra_tokens": "needs a column of token counts",
} | stats.REASONS
REASONS |= dict.fromkeys(
    ("difference", "p", "p_holm"), "not compared (FogGen itself, or another cloud share)"
)


class OutcomesError(ValueError):
    """An outcomes table that cannot be used; the message names file, row, column and the expected form."""


# ---- the outcomes table


def _read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)  # a domain called NA is a name


def _read_jsonl(path: Path) -> pd.DataFrame:
    return pd.DataFrame([json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()])


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": pd.read_parquet}


def read_outcomes(path: Path | str) -> pd.DataFrame:
    """Read and check outcomes from a .csv, .jsonl or .parquet file; raises `OutcomesError`."""
    path = Path(path)
    if not path.is_file():
        raise OutcomesError(f"{path}: no such file; expected outcomes as .csv, .jsonl or .parquet")
    try:
        frame = READERS[path.suffix](path)
    except KeyError:
        raise OutcomesError(f"{path}: unknown ending; expected .csv, .jsonl or .parquet") from None
    except ValueError as error:  # every reader's own error is one
        raise OutcomesError(f"{path}: not readable as {path.suffix}: {error}") from error
    return check_outcomes(frame, str(path))


def check_outcomes(frame: pd.DataFrame, source: str = "outcomes") -> pd.DataFrame:
    """A checked copy with numeric columns as floats; all problems are reported together in one
    `OutcomesError`.
    """
    problems = [
        f"column `{name}` is missing; expected {', '.join(REQUIRED)}"
        for name in REQUIRED
        if name not in frame
    ]
    if not problems and frame.empty:
        problems = ["no rows; expected one a question"]
    table = frame.copy().reset_index(drop=True)
    for name in [c for c in table.columns if c in NUMBERS]:
        table[name], found = _number(table[name], NUMBERS[name])
        problems += found
    for name in [c for c in table.columns if c in TEXTS or c in FREE_TEXTS]:
        table[name], found = _text(table[name], *TEXTS.get(name, (r"(?s:.*)", "text")))
        problems += found
    if not problems:
        keys = ["id", "seed"] if "seed" in table else ["id"]
        problems = [
            f"row {row + 1}, column `id`: {table['id'][row]!r} is there twice"
            for row in _rows(table.duplicated(keys))
        ]
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise OutcomesError("\n".join(f"{source}: {problem}" for problem in problems[:20] + more))
    return table


def _rows(mask: pd.Series) -> list[int]:
    return [int(row) for row in np.flatnonzero(mask.to_numpy())]


def _number(column: pd.Series, form: str) -> tuple[pd.Series, list[str]]:
    """The column as floats, and a problem for every value that is not of the `form`."""
    words = {"true": 1.0, "false": 0.0} | dict.fromkeys(("", "nan", "none", "null", "<na>"), np.nan)
    given = column.map(lambda value: words.get(str(value).strip().lower(), value))
    values = pd.to_numeric(given, errors="coerce").astype(float)
    lowest, highest = (2 if form.endswith("2") else 0), (1 if form.startswith(SHARE) else sys.float_info.max)
    fits = values.between(lowest, highest) | (given.isna() if form == SHARE_OR_EMPTY else False)
    return values, [
        f"row {r + 1}, column `{column.name}`: {column[r]!r}; expected {form}" for r in _rows(~fits)
    ]


def _text(column: pd.Series, pattern: str, form: str) -> tuple[pd.Series, list[str]]:
    """The column as text, and a problem for every value that does not match the pattern."""
    empty = column.isna()
    values = column.astype(object).where(~empty, "").astype(str)
    fits = values.str.fullmatch(pattern)
    if column.name == "fact":  # without a name for its fact a question stands for itself
        values = values.where(values != "", None)
    return values, [
        f"row {r + 1}, column `{column.name}`: {column[r]!r}; expected {form}" for r in _rows(~fits)
    ]


# ---- SysAcc, random, lift


def routing_metrics(
    frame: pd.DataFrame, weights: Array, tau: float = 0.5, score: str = "confidence"
) -> Array:
    """`METRICS` (resamples, metrics) of one domain: keep if the score is parsed and >= tau, else ask the
    cloud.

    random = (1 - routed) raw + routed cloud; lift = sysacc - random; oracle routes the same share of
    questions, those that gain most; gap_recovered = (sysacc - raw) / (cloud - raw), NaN unless cloud > raw.
    """
    local, cloud = (frame[f"{side}_correct"].to_numpy(float) for side in ("local", "cloud"))
    keep = (frame[score] >= tau).to_numpy()
    columns = np.stack([cloud, local, np.where(keep, local, cloud), ~keep], axis=1).astype(weights.dtype)
    clouds, raw, sysacc, routed = stats.ratio(weights @ columns, weights.sum(axis=1, keepdims=True)).T
    random = (1 - routed) * raw + routed * clouds
    oracle = stats.accuracy_at_share(local - cloud, local, cloud, weights, routed)
    gap = np.where(clouds > raw, stats.ratio(sysacc - raw, clouds - raw), np.nan)
    return np.stack([clouds, raw, random, sysacc, routed, sysacc - random, oracle, gap], axis=1)


def routing_table(
    outcomes: pd.DataFrame,
    tau: float = 0.5,
    resamples: int = 10_000,
    seed: int = 0,
    score: str = "confidence",
) -> pd.DataFrame:
    """One row a domain and one for the mean over domains: n, chance, gold_share and `METRICS` with 95%
    intervals.

    gold_share is what the best constant letter would score. The mean's gap_recovered is the ratio of the
    means. Any 0/1 column of keep decisions may stand for `score`. Outcomes of several seeds get `_seed_sd`
    columns.
    """
    result = stats.bootstrap(
        outcomes, lambda frame, w: routing_metrics(frame, w, tau, score), METRICS, resamples, seed
    )
    for values in (result.point, result.draws):
        clouds, raw, sysacc = (values[-1][..., METRICS.index(name)] for name in ("cloud", "raw", "sysacc"))
        values[-1][..., -1] = np.where(clouds > raw, stats.ratio(sysacc - raw, clouds - raw), np.nan)
    table = result.table()
    for name, measure in (("gold_share", _gold_share), ("chance", _chance)):
        known = {str(domain): measure(part) for domain, part in outcomes.groupby("domain", observed=True)}
        table.insert(
            1, name, [*(known.get(row, math.nan) for row in result.rows[:-1]), pd.Series(known).mean()]
        )
    if "seed" in outcomes and outcomes["seed"].nunique() > 1:
        table = table.assign(**_seed_columns(outcomes, tau, score, list(result.rows)))
    return stats.annotate(table, outcomes, REASONS)


def _chance(part: pd.DataFrame) -> float:
    return float((1 / part["n_options"]).mean()) if "n_options" in part else math.nan


def _gold_share(part: pd.DataFrame) -> float:
    letters = "gold" in part and part["gold"].str.fullmatch("[A-Z]").all()
    return float(part["gold"].value_counts(normalize=True).max()) if letters else math.nan


def _seed_columns(outcomes: pd.DataFrame, tau: float, score: str, rows: list[str]) -> dict[str, Array]:
    """Between-seed sd of raw, sysacc, routed and lift for each row of the routing table."""
    names = ["raw", "sysacc", "routed", "lift"]

    def measure(part: pd.DataFrame) -> pd.Series:
        table = stats.bootstrap(part, lambda f, w: routing_metrics(f, w, tau, score), METRICS, 0)
        points = pd.DataFrame(table.point, table.rows, METRICS)[names]
        return points.reindex(rows).stack(future_stack=True)

    spread = stats.seed_spread(outcomes, measure)["seed_sd"].unstack()
    return {f"{name}_seed_sd": spread.loc[rows, name].to_numpy() for name in names}


def sweep_table(
    outcomes: pd.DataFrame,
    taus: Sequence[float] = BUCKETS,
    resamples: int = 2000,
    seed: int = 0,
    score: str = "confidence",
) -> pd.DataFrame:
    """`routing_table` at every tau, stacked, with a leading column `tau`; `score="graded_confidence"` for
    E[c].
    """
    parts = [routing_table(outcomes, tau, resamples, seed, score).assign(tau=tau) for tau in taus]
    table = pd.concat(parts, ignore_index=True)
    return table[["tau", *table.columns.drop("tau")]]


def share_curve(
    outcomes: pd.DataFrame, score: str = "confidence", points: int = 101, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Accuracy against cloud share for one threshold common to all domains: the mean over domains, with 95%
    band.

    Columns share, sysacc (+_low, _high), random and oracle (each domain at its own routed share), lift
    (+_low, _high). Between two thresholds questions are mixed at random; unparsed answers are routed first.
    """
    scores = router_score(outcomes, score)
    levels = (
        np.unique(scores)
        if len(np.unique(scores)) <= points
        else np.unique(np.quantile(scores, np.linspace(0, 1, points)))
    )
    thresholds = [*levels, math.inf]
    frame = outcomes.assign(_score=scores)

    def statistic(part: pd.DataFrame, weights: Array) -> Array:
        parts = [routing_metrics(part, weights, tau, "_score") for tau in thresholds]
        return np.concatenate([part[:, [4, 3, 2, 6]] for part in parts], axis=1)

    names = [f"{name}{i}" for i in range(len(thresholds)) for name in ("share", "sysacc", "random", "oracle")]
    result = stats.bootstrap(frame, statistic, names, resamples, seed)
    shares = np.linspace(0, 1, points)
    lines = _interpolate(result.point[-1:], shares)[0]
    low, high = np.quantile(_with_lift(_interpolate(result.draws[-1], shares)), [0.025, 0.975], axis=0)
    table = pd.DataFrame(_with_lift(lines[None])[0].T, columns=["sysacc", "random", "oracle", "lift"])
    table.insert(0, "share", shares)
    return table.assign(
        sysacc_low=low[0], sysacc_high=high[0], lift_low=low[3], lift_high=high[3], n=outcomes["id"].nunique()
    )


def _interpolate(values: Array, shares: Array) -> Array:
    """(runs, thresholds x 4) of share, sysacc, random, oracle -> (runs, 3, shares) of the last three."""
    runs = values.reshape(len(values), -1, 4)
    return np.array([[np.interp(shares, run[:, 0], run[:, k]) for k in (1, 2, 3)] for run in runs])


def _with_lift(lines: Array) -> Array:
    return np.concatenate([lines, lines[:, :1] - lines[:, 1:2]], axis=1)


# ---- tau for a purpose


class TauChoice(NamedTuple):
    """A threshold, and what it does on the outcomes it was chosen on: accuracy and cloud share over
    questions, risk = error rate of the answers kept, n = questions that chose it, `candidates` the table
    it was chosen from.
    """

    tau: float
    accuracy: float
    cloud_share: float
    risk: float
    n: int
    candidates: pd.DataFrame
    reason: str


def choose_tau(
    outcomes: pd.DataFrame,
    *,
    max_cloud_share: float | None = None,
    max_risk: float | None = None,
    delta: float = 0.1,
    score: str = "confidence",
    candidates: Sequence[float] = BUCKETS,
    seed: int = 0,
) -> TauChoice:
    """The tau for a cloud budget or for an error bound, over questions (not domains): give exactly one of the
    two.

    max_cloud_share: the most accurate candidate within the budget. max_risk: the lowest tau whose kept
    answers have an error rate of at most max_risk with probability 1 - delta (Learn then Test, Angelopoulos
    et al. 2021: exact binomial p for each candidate, Holm-Bonferroni over them). Not a fixed sequence from
    the strictest: with verbal confidence the top bucket can be thin or the worst calibrated, and one failure
    there would end the sequence. tau = inf (ask the cloud always) if none passes. Candidates must be fixed
    beforehand; one question a fact and seed is used, since the bound needs independent rows. Raises
    ValueError for a budget no candidate can keep.
    """
    if (max_cloud_share is None) == (max_risk is None):
        raise ValueError("choose_tau: give one of max_cloud_share=0..1 and max_risk=0..1")
    if max_risk is None:
        table = _candidates(outcomes, sorted(candidates), score)
        fits = table[table["cloud_share"] <= max_cloud_share]
        if fits.empty:
            least = table["cloud_share"].min()
            raise ValueError(
                f"choose_tau: no candidate routes at most {max_cloud_share}; the least is {least:.3f}"
            )
        row, reason = (
            fits.loc[fits["accuracy"].idxmax()],
            f"most accurate with cloud share <= {max_cloud_share}",
        )
    else:
        outcomes = _one_a_fact(outcomes, seed)
        table = _candidates(outcomes, [*sorted(candidates), math.inf], score)
        table["p"] = np.where(table["kept"] > 0, binom.cdf(table["errors"], table["kept"], max_risk), 1.0)
        table["p_holm"] = [*stats.holm(table["p"][:-1]), 0.0]  # asking the cloud always keeps no wrong answer
        row = table[table["p_holm"] <= delta].iloc[0]
        reason = f"lowest tau with error of kept answers <= {max_risk} at confidence {1 - delta:g}"
    tau, accuracy, share, risk = (float(row[name]) for name in ("tau", "accuracy", "cloud_share", "risk"))
    return TauChoice(tau, accuracy, share, risk, len(outcomes), table, reason)


def _one_a_fact(outcomes: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One random row of every fact (over all seeds), so that the rows are independent; checks that they are 0
    or 1.
    """
    if not outcomes["local_correct"].isin([0, 1]).all():
        raise ValueError("choose_tau: the exact bound needs local_correct of 0 or 1 in every row")
    shuffled = outcomes.sample(frac=1, random_state=seed)
    unit = pd.DataFrame({"domain": shuffled["domain"].astype(str), "unit": stats.clusters(shuffled)})
    return shuffled[~unit.duplicated()]


def _candidates(outcomes: pd.DataFrame, taus: Sequence[float], score: str) -> pd.DataFrame:
    """For each tau: accuracy, cloud_share, kept (count), errors (count among kept), risk (0 when nothing is
    kept).
    """
    local, cloud = outcomes["local_correct"].to_numpy(float), outcomes["cloud_correct"].to_numpy(float)
    rows = []
    for tau in taus:
        keep = (outcomes[score] >= tau).to_numpy()
        errors = (1 - local[keep]).sum()
        rows.append(
            (
                tau,
                np.where(keep, local, cloud).mean(),
                1 - keep.mean(),
                keep.sum(),
                errors,
                errors / max(keep.sum(), 1),
            )
        )
    return pd.DataFrame(rows, columns=["tau", "accuracy", "cloud_share", "kept", "errors", "risk"])


# ---- baselines


def vote_share(outcomes: pd.DataFrame) -> Array:
    """Self-consistency: the share of sampled votes that agree with the local answer (else with the commonest
    vote).
    """
    votes = outcomes["votes"].to_numpy()
    if "local_answer" in outcomes:
        return np.array(
            [v.count(a) / len(v) if a else 0.0 for v, a in zip(votes, outcomes["local_answer"], strict=True)]
        )
    return np.array([max(map(v.count, set(v) - {"-"}), default=0) / len(v) for v in votes])


def text_router(train: pd.DataFrame, test: pd.DataFrame) -> Array:
    """P(local answer right) from the question's text alone: TF-IDF of words and word pairs, logistic
    regression.

    Raises ValueError when a test question is in the training table.
    """
    if shared := set(train["id"]) & set(test["id"]):
        raise ValueError(f"text_router: {len(shared)} test questions are in train, such as {min(shared)!r}")
    right = train["local_correct"].to_numpy() >= 0.5
    if right.all() or not right.any():
        return np.full(len(test), float(right[0]))
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000)
    )
    return np.asarray(model.fit(train["question"], right).predict_proba(test["question"])[:, 1])


class Baseline(NamedTuple):
    """A router's scores (questions,), with its cost: edge passes and extra tokens a query (NaN = unknown)."""

    score: Array
    passes: float
    extra_tokens: float


def baselines(
    outcomes: pd.DataFrame, train: pd.DataFrame | None = None, tau: float = 0.5
) -> dict[str, Baseline]:
    """The routers that can be scored on these outcomes; all keep the same local answer and differ in what
    they route.
    """
    routed, even = float((~(outcomes["confidence"] >= tau)).mean()), np.ones(len(outcomes))
    tokens = outcomes["sample_tokens"].mean() if "sample_tokens" in outcomes else math.nan
    found = {"FogGen": Baseline(router_score(outcomes), 1, 0)}
    columns = {
        "graded confidence": ("graded_confidence", 1, 0),
        "max option probability": ("option_probability", 1, 0),
    }
    columns |= {"P(True)": ("p_true", 2, 1)}
    for name, (column, passes, extra) in columns.items():
        if column in outcomes:
            found[name] = Baseline(router_score(outcomes, column), passes, extra)
    if "votes" in outcomes:
        found["self-consistency"] = Baseline(
            vote_share(outcomes), 1 + outcomes["votes"].str.len().mean(), tokens
        )
    if train is not None and "question" in train and "question" in outcomes:  # decides before any edge pass
        found["text-only router"] = Baseline(text_router(train, outcomes), 1 - routed, 0)
    gain = (outcomes["local_correct"] - outcomes["cloud_correct"]).to_numpy(float)
    found |= {"always 1.0": Baseline(even, 1, 0), "random": Baseline(even, 1 - routed, 0)}
    found |= {
        "oracle": Baseline(gain, 1, 0),
        "cloud only": Baseline(even, 0, 0),
        "local only": Baseline(even, 1, 0),
    }
    return found


def baselines_table(
    outcomes: pd.DataFrame,
    train: pd.DataFrame | None = None,
    tau: float = 0.5,
    resamples: int = 2000,
    seed: int = 0,
    routers: dict[str, Baseline] | None = None,
) -> pd.DataFrame:
    """Every router at the cloud share that FogGen has at tau (per domain and resample), per domain and their
    mean.

    Columns method, domain, n, share, sysacc, lift, auroc, difference (FogGen - method, paired), each with a
    95% interval; p and p_holm of the difference (Holm over domains x methods, and over the methods for the
    mean rows); forward_passes and extra_tokens a query. `routers` adds to or replaces `baselines`.
    """
    found = baselines(outcomes, train, tau) | (routers or {})
    frame = outcomes.assign(**{f"_{i}": router.score for i, router in enumerate(found.values())})
    fixed = {"cloud only": 1.0, "local only": 0.0}

    def statistic(part: pd.DataFrame, weights: Array) -> Array:
        base = routing_metrics(part, weights, tau)
        parts = []
        for i, name in enumerate(found):
            share = np.full(len(weights), fixed[name]) if name in fixed else base[:, 4]
            parts.append(_at_share(part, weights, part[f"_{i}"].to_numpy(), share))
        lead = parts[0][:, 2]
        columns = [
            np.column_stack([p, np.full(len(p), np.nan) if n in fixed else lead - p[:, 2]])
            for n, p in zip(found, parts, strict=True)
        ]
        return np.concatenate(columns, axis=1)

    metrics = ("share", "sysacc", "lift", "auroc", "difference")
    names = [f"{i}:{metric}" for i in range(len(found)) for metric in metrics]
    result = stats.bootstrap(frame, statistic, names, resamples, seed)
    wide, p = result.table(), result.p_values()
    tables = []
    for i, (name, router) in enumerate(found.items()):
        own = wide.filter(regex=rf"^{i}:").rename(columns=lambda column: column.split(":")[1])
        own.insert(0, "domain", wide["domain"])
        own["p"] = np.nan if name in {*fixed, "FogGen"} else p[:, i * len(metrics) + 4]
        tables.append(own.assign(method=name, forward_passes=router.passes, extra_tokens=router.extra_tokens))
        tables[-1] = stats.annotate(tables[-1], outcomes, REASONS)
    return _with_holm(pd.concat(tables, ignore_index=True))


def _at_share(part: pd.DataFrame, weights: Array, score: Array, share: Array) -> Array:
    """share, sysacc, lift and AUROC (resamples, 4) of one router at the given shares."""
    local, cloud = (part[f"{side}_correct"].to_numpy(float) for side in ("local", "cloud"))
    count, right, gain = stats.tie_sums(score, weights, local, cloud - local)
    total = weights.sum(axis=1)
    raw, better = right.sum(axis=1) / total, gain.sum(axis=1) / total
    gained = stats.routed_gain(count, gain, share)
    return np.stack([share, raw + gained, gained - share * better, stats.auroc(count, right)], axis=1)


def _with_holm(table: pd.DataFrame) -> pd.DataFrame:
    mean = table["domain"] == MEAN
    table["p_holm"] = np.nan
    for family in (mean, ~mean):
        rows = family & table["p"].notna()
        table.loc[rows, "p_holm"] = stats.holm(table.loc[rows, "p"])
    leading = ["method", "domain"]
    return table[[*leading, *table.columns.drop([*leading, "note"]), "note"]]


# ---- published rows and display


def published(name: str = "fg", path: Path = ROOT / "data" / "published.json") -> pd.DataFrame:
    """A table of `data/published.json` (percent) with `source`; routing tables also get `random_again` = raw
    + routed (cloud - raw) and `lift` = sysacc - random, recomputed from the other columns.
    """
    document: dict[str, Any] = json.loads(path.read_text("utf-8"))
    block = document["tables"][name]
    table = pd.DataFrame(block["rows"]).assign(source=document["sources"][block["source"]]["name"])
    if "random" in table:
        clouds = pd.DataFrame(document["tables"]["fg"]["rows"]).set_index("domain")["cloud"]
        table["cloud"] = table["domain"].map(clouds)  # one cloud model serves every edge model
        table["random_again"] = table["raw"] + table["routed"] / 100 * (table["cloud"] - table["raw"])
        mean = table["domain"] == MEAN
        table.loc[mean, "random_again"] = table.loc[
            ~mean, "random_again"
        ].mean()  # the mean over domains, too
        table["lift"] = table["sysacc"] - table["random"]
        table.loc[mean, "lift"] = table.loc[~mean, "lift"].mean()  # 4.64, where the rounded columns give 4.7
    return table


def percent(table: pd.DataFrame, digits: int = 1) -> pd.DataFrame:
    """For display: shares as percent, `57.0 [55.1, 58.9]` where an interval is known, a sign for lifts, - for
    NaN.
    """
    shown: dict[str, Any] = {}
    for name in table.columns:
        if name.endswith(("_low", "_high")):
            continue
        if name in ("tau", "p", "p_holm", "forward_passes", "extra_tokens"):
            shown[name] = table[name].map(lambda x: "-" if pd.isna(x) else f"{x:.3g}")
        elif not pd.api.types.is_float_dtype(table[name]):
            shown[name] = table[name]
        else:
            sign = "+" if name in ("lift", "difference") else ""
            ends = [table.get(f"{name}_{end}", pd.Series(np.nan, table.index)) for end in ("low", "high")]
            rows = zip(table[name], *ends, strict=True)
            shown[name] = [_percent(value, low, high, sign, digits) for value, low, high in rows]
    return pd.DataFrame(shown, index=table.index)


def _percent(value: float, low: float, high: float, sign: str, digits: int) -> str:
    if math.isnan(value):
        return "-"
    interval = "" if math.isnan(low) else f" [{100 * low:{sign}z.{digits}f}, {100 * high:{sign}z.{digits}f}]"
    return f"{100 * value:{sign}z.{digits}f}{interval}"
