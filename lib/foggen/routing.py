"""Keep or route: what a confidence threshold does to accuracy, on stored outcomes, and beside its baselines.

Holds the outcomes table and its checks, the metrics of the model cards, the choice of tau, and the baselines.
Must not know how an outcome came about: no model, no prompt, no figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from scipy.stats import binom
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from foggen import stats
from foggen.prompts import BUCKETS
from foggen.stats import MEAN, Array, router_score
from foggen.store import ROOT, read_json, read_jsonl

METRICS = ("cloud", "raw", "random", "sysacc", "routed", "lift", "oracle", "gap_recovered")
REASONS = stats.REASONS | {
    "chance": "needs a column n_options",
    "gold_share": "needs a column gold of letters",
    "gap_recovered": "cloud not better than local, there is no gap to recover",
    "extra_tokens": "needs a column of token counts",
    **dict.fromkeys(("difference", "p", "p_holm"), "not compared (FogGen itself, or another cloud share)"),
}


# ---- the outcomes table

WORDS = {"true": 1.0, "false": 0.0, **dict.fromkeys(("", "nan", "none", "null"))}
Words = BeforeValidator(lambda value: WORDS.get(str(value).strip().lower(), value))
Share = Annotated[float, Field(ge=0, le=1)]
Correct = Annotated[Share, Words, Field(description="a number from 0 to 1")]
Score = Annotated[Share | None, Words, Field(description="a number from 0 to 1, or empty")]
Count = Annotated[float, Field(ge=0, description="a number of at least 0")]
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value), Field(description="text")]
Fact = Annotated[str | None, BeforeValidator(lambda value: value or None), Field(description="text")]


class Outcome(BaseModel):
    """One row of an outcomes table: a question, or a question and the training `seed` of its checkpoint.

    The first five columns are required. Every other one adds rows or columns to the tables: the scores are what a
    router may rank by, `votes` are the sampled answers, tokens are generated ones. Unknown columns are kept.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, coerce_numbers_to_str=True, regex_engine="python-re")
    id: str = Field(min_length=1, description="a name, once a seed")
    domain: str = Field(pattern=r"^(?!mean$).", description="a name other than mean")
    local_correct: Correct
    cloud_correct: Correct
    confidence: Score  # empty: the answer states no readable confidence
    graded_confidence: Score = None
    option_probability: Score = None
    p_true: Score = None
    verification: Score = None
    local_tokens: Count = 0
    cloud_tokens: Count = 0
    sample_tokens: Count = 0
    verification_tokens: Count = 0
    seed: Count = 0
    n_options: float = Field(2, ge=2, description="a number of at least 2")
    votes: str = Field(
        "", pattern="^[A-Z-]+$", description="one letter a sample, - for an unparsed one, such as AACA-AAB"
    )
    fact: Fact = None  # questions about one fact are resampled together
    gold: Text = ""
    local_answer: Text = ""
    cloud_answer: Text = ""
    question: Text = ""


REQUIRED = tuple(name for name, field in Outcome.model_fields.items() if field.is_required())
NUMBERS = tuple(name for name, field in Outcome.model_fields.items() if "float" in str(field.annotation))
ROWS = TypeAdapter(list[Outcome])


class OutcomesError(ValueError):
    """An outcomes table that cannot be used; the message names file, row, column and the expected form."""


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": partial(pd.read_csv, dtype=str, keep_default_na=False),  # a domain called NA is a name
    ".jsonl": lambda path: pd.DataFrame(read_jsonl(path), dtype=object),
    ".parquet": pd.read_parquet,
}


def read_outcomes(path: Path | str) -> pd.DataFrame:
    """Read and check outcomes from a .csv, .jsonl or .parquet file; raises `OutcomesError`."""
    path = Path(path)
    if path.suffix not in READERS or not path.is_file():
        raise OutcomesError(f"{path}: no such file, or of another kind; expected .csv, .jsonl or .parquet")
    try:
        frame = READERS[path.suffix](path)
    except ValueError as error:  # every reader's own error is one
        raise OutcomesError(f"{path}: not readable as {path.suffix}: {error}") from error
    return check_outcomes(frame, str(path))


def check_outcomes(frame: pd.DataFrame, source: str = "outcomes") -> pd.DataFrame:
    """A checked copy with numeric columns as floats; all problems are reported together in one `OutcomesError`."""
    frame = frame.reset_index(drop=True)
    missing = [name for name in REQUIRED if name not in frame]
    problems = [f"column `{name}` is missing; expected {', '.join(REQUIRED)}" for name in missing]
    if not missing and frame.empty:
        problems = ["no rows; expected one a question"]
    if not problems:
        table, problems = _validated(frame)
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise OutcomesError("\n".join(f"{source}: {problem}" for problem in problems[:20] + more))
    return table


def _validated(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The table as `Outcome` reads it, and what is wrong with it."""
    try:
        rows = ROWS.validate_python(frame.astype(object).where(frame.notna(), None).to_dict("records"))
    except ValidationError as error:
        places = [(int(one["loc"][0]), str(one["loc"][1])) for one in error.errors()]
        forms = {name: field.description for name, field in Outcome.model_fields.items()}
        return frame, [f"row {r + 1}, column `{c}`: {frame[c][r]!r}; expected {forms[c]}" for r, c in places]
    table = pd.DataFrame([row.model_dump(exclude_unset=True) for row in rows])[frame.columns]
    table = table.astype({name: float for name in NUMBERS if name in table})
    twice = table.duplicated([name for name in ("id", "seed") if name in table])
    return table, [f"row {r + 1}, column `id`: {table['id'][r]!r} is there twice" for r in np.flatnonzero(twice)]


# ---- SysAcc, random, lift


def routing_metrics(frame: pd.DataFrame, weights: Array, tau: float = 0.5, score: str = "confidence") -> Array:
    """`METRICS` (resamples, metrics) of one domain: keep if the score is parsed and >= tau, else ask the cloud.

    random = (1 - routed) raw + routed cloud; lift = sysacc - random; oracle routes the same share of
    questions, those that gain most; gap_recovered = (sysacc - raw) / (cloud - raw), NaN unless cloud > raw.
    """
    local, cloud = stats.correctness(frame)
    keep = (frame[score] >= tau).to_numpy()
    columns = np.stack([cloud, local, np.where(keep, local, cloud), ~keep], axis=1)
    clouds, raw, sysacc, routed = stats.means(weights, columns).T
    random = (1 - routed) * raw + routed * clouds
    oracle = stats.accuracy_at_share(local - cloud, local, cloud, weights, routed)
    gap = _gap_recovered(sysacc, raw, clouds)
    return np.stack([clouds, raw, random, sysacc, routed, sysacc - random, oracle, gap], axis=1)


def _gap_recovered(sysacc: Array, raw: Array, cloud: Array) -> Array:
    return np.where(cloud > raw, stats.ratio(sysacc - raw, cloud - raw), np.nan)


def routing_table(
    outcomes: pd.DataFrame, tau: float = 0.5, resamples: int = 10_000, seed: int = 0, score: str = "confidence"
) -> pd.DataFrame:
    """One row a domain and one for the mean over domains: n, chance, gold_share and `METRICS` with 95% intervals.

    gold_share is what the best constant letter would score. The mean's gap_recovered is the ratio of the
    means. Any 0/1 column of keep decisions may stand for `score`. Outcomes of several seeds get `_seed_sd`
    columns.
    """

    def statistic(frame: pd.DataFrame, weights: Array) -> Array:
        return routing_metrics(frame, weights, tau, score)

    result = stats.bootstrap(outcomes, statistic, METRICS, resamples, seed)
    for values in (result.point[-1], result.draws[-1]):
        values[..., -1] = _gap_recovered(*(values[..., METRICS.index(m)] for m in ("sysacc", "raw", "cloud")))
    table = result.table()
    if "seed" in outcomes and outcomes["seed"].nunique() > 1:
        spread = stats.seed_sd(outcomes, statistic, METRICS)
        shown = ("raw", "sysacc", "routed", "lift")
        table = table.assign(**{f"{name}_seed_sd": spread[:, METRICS.index(name)] for name in shown})
    for name, value in _ignorance(outcomes).items():
        table.insert(1, name, table["domain"].map({**value, MEAN: value.mean()}))
    return stats.annotate(table, outcomes, REASONS)


def _ignorance(outcomes: pd.DataFrame) -> dict[str, pd.Series]:
    """What knowing nothing scores in each domain: the commonest gold letter, and chance; NaN where it is unknown."""
    by = outcomes["domain"].astype(str)
    gold = outcomes.get("gold", pd.Series("", outcomes.index))
    letters = gold.str.fullmatch("[A-Z]").groupby(by).all()
    commonest = gold.groupby(by).agg(lambda part: part.value_counts(normalize=True).max())
    chance = 1 / outcomes.get("n_options", pd.Series(np.nan, outcomes.index))
    return {"gold_share": commonest.where(letters), "chance": chance.groupby(by).mean()}


def sweep_table(
    outcomes: pd.DataFrame,
    taus: Sequence[float] = BUCKETS,
    resamples: int = 2000,
    seed: int = 0,
    score: str = "confidence",
) -> pd.DataFrame:
    """`routing_table` at every tau, stacked, with a leading column `tau`; `score="graded_confidence"` for E[c]."""
    parts = {tau: routing_table(outcomes, tau, resamples, seed, score) for tau in taus}
    return stats.stack(parts, "tau")


def share_curve(
    outcomes: pd.DataFrame, score: str = "confidence", points: int = 101, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Accuracy against cloud share for one threshold common to all domains: the mean over domains, with 95% band.

    Columns share, sysacc (+_low, _high), random and oracle (each domain at its own routed share), lift
    (+_low, _high). Between two thresholds questions are mixed at random; unparsed answers are routed first.
    """
    scores = router_score(outcomes, score)
    levels = np.unique(scores)
    if len(levels) > points:
        levels = np.unique(np.quantile(scores, np.linspace(0, 1, points)))
    thresholds = [*levels, math.inf]

    def statistic(part: pd.DataFrame, weights: Array) -> Array:
        return np.concatenate([routing_metrics(part, weights, tau, "_score") for tau in thresholds], axis=1)

    result = stats.bootstrap(outcomes.assign(_score=scores), statistic, METRICS * len(thresholds), resamples, seed)
    runs = np.concatenate([result.point[-1:], result.draws[-1]]).reshape(-1, len(thresholds), len(METRICS))
    shares, at, names = np.linspace(0, 1, points), METRICS.index, ["sysacc", "random", "oracle", "lift"]
    lines = [[np.interp(shares, run[:, at("routed")], run[:, at(name)]) for name in names] for run in runs]
    values, *draws = np.swapaxes(lines, 1, 2)
    table = stats.with_ends(pd.DataFrame(values, columns=names), *np.quantile(draws, [0.025, 0.975], axis=0))
    return pd.DataFrame({"share": shares, "n": outcomes["id"].nunique()}).join(table)


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
    """The tau for a cloud budget or for an error bound, over questions (not domains): give exactly one of the two.

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
        fits, least = table[table["cloud_share"] <= max_cloud_share], table["cloud_share"].min()
        if fits.empty:
            raise ValueError(f"choose_tau: no candidate routes at most {max_cloud_share}; the least is {least:.3f}")
        row = fits.loc[fits["accuracy"].idxmax()]
        reason = f"most accurate with cloud share <= {max_cloud_share}"
    else:
        outcomes = _one_a_fact(outcomes, seed)
        table = _candidates(outcomes, [*sorted(candidates), math.inf], score)
        table["p"] = np.where(table["kept"] > 0, binom.cdf(table["errors"], table["kept"], max_risk), 1.0)
        table["p_holm"] = [*stats.holm(table["p"][:-1]), 0.0]  # asking the cloud always keeps no wrong answer
        row = table[table["p_holm"] <= delta].iloc[0]
        reason = f"lowest tau with error of kept answers <= {max_risk} at confidence {1 - delta:g}"
    tau, accuracy, share, risk = map(float, row[["tau", "accuracy", "cloud_share", "risk"]])
    return TauChoice(tau, accuracy, share, risk, len(outcomes), table, reason)


def _one_a_fact(outcomes: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One random row of every fact (over all seeds), so that the rows are independent; checks that they are 0 or 1."""
    if not outcomes["local_correct"].isin([0, 1]).all():
        raise ValueError("choose_tau: the exact bound needs local_correct of 0 or 1 in every row")
    shuffled = outcomes.sample(frac=1, random_state=seed)
    unit = pd.DataFrame({"domain": shuffled["domain"].astype(str), "unit": stats.clusters(shuffled)})
    return shuffled[~unit.duplicated()]


def _candidates(outcomes: pd.DataFrame, taus: Sequence[float], score: str) -> pd.DataFrame:
    """For each tau: accuracy, cloud_share, kept (count), errors (among kept), risk (0 when nothing is kept)."""
    local, cloud = (values[:, None] for values in stats.correctness(outcomes))
    keep = outcomes[score].to_numpy(float)[:, None] >= np.array(taus)
    kept, errors = keep.sum(axis=0), (keep * (1 - local)).sum(axis=0)
    found = {"tau": taus, "accuracy": np.where(keep, local, cloud).mean(axis=0)}
    found |= {"cloud_share": 1 - keep.mean(axis=0), "kept": kept, "errors": errors}
    return pd.DataFrame(found | {"risk": errors / np.maximum(kept, 1)})


# ---- baselines


def vote_share(outcomes: pd.DataFrame) -> Array:
    """Self-consistency: the share of sampled votes that agree with the local answer (else with the commonest vote)."""
    commonest = [max(set(v) - {"-"}, key=v.count, default="") for v in outcomes["votes"]]
    answers = outcomes.get("local_answer", commonest)
    pairs = zip(outcomes["votes"], answers, strict=True)
    return np.array([v.count(answer) / len(v) if answer else 0.0 for v, answer in pairs])


def text_router(train: pd.DataFrame, test: pd.DataFrame) -> Array:
    """P(local answer right) from the question's text alone: TF-IDF of words and word pairs, logistic regression.

    Raises ValueError when a test question is in the training table.
    """
    if shared := set(train["id"]) & set(test["id"]):
        raise ValueError(f"text_router: {len(shared)} test questions are in train, such as {min(shared)!r}")
    right = train["local_correct"].to_numpy() >= 0.5
    if right.all() or not right.any():
        return np.full(len(test), float(right[0]))
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(max_iter=1000)).fit(train["question"], right)
    return np.asarray(model.predict_proba(test["question"])[:, 1])


class Baseline(NamedTuple):
    """A router's scores (questions,), with its cost: edge passes and extra tokens a query (NaN = unknown).

    `share` is the cloud share it is judged at; None: FogGen's.
    """

    score: Array
    passes: float
    extra_tokens: float
    share: float | None = None


SCORES = {  # column: name, edge passes and extra tokens a query
    "confidence": ("FogGen", 1, 0),
    "graded_confidence": ("graded confidence", 1, 0),
    "option_probability": ("max option probability", 1, 0),
    "p_true": ("P(True)", 2, 1),
}


def baselines(outcomes: pd.DataFrame, train: pd.DataFrame | None = None, tau: float = 0.5) -> dict[str, Baseline]:
    """The routers that these outcomes can score: all keep the same local answer and differ in what they route."""
    kept, even = float((outcomes["confidence"] >= tau).mean()), np.ones(len(outcomes))
    known = {column: cost for column, cost in SCORES.items() if column in outcomes}
    found = {name: Baseline(router_score(outcomes, column), *cost) for column, (name, *cost) in known.items()}
    if "votes" in outcomes:
        tokens = outcomes["sample_tokens"].mean() if "sample_tokens" in outcomes else math.nan
        passes = 1 + outcomes["votes"].str.len().mean()
        found["self-consistency"] = Baseline(vote_share(outcomes), passes, tokens)
    if train is not None and "question" in train and "question" in outcomes:  # decides before any edge pass
        found["text-only router"] = Baseline(text_router(train, outcomes), kept, 0)
    local, cloud = stats.correctness(outcomes)
    found |= {"always 1.0": Baseline(even, 1, 0), "random": Baseline(even, kept, 0)}
    found["oracle"] = Baseline(local - cloud, 1, 0)
    return found | {"cloud only": Baseline(even, 0, 0, share=1.0), "local only": Baseline(even, 1, 0, share=0.0)}


def baselines_table(
    outcomes: pd.DataFrame, train: pd.DataFrame | None = None, tau: float = 0.5, resamples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Every router at the cloud share that FogGen has at tau (per domain and resample), per domain and their mean.

    Columns method, domain, n, share, sysacc, lift, auroc, difference (FogGen - method, paired), each with a
    95% interval; p and p_holm of the difference (Holm over domains x methods, and over the methods for the
    mean rows); forward_passes and extra_tokens a query.
    """
    found = baselines(outcomes, train, tau)
    frame = outcomes.assign(**{f"_{name}": router.score for name, router in found.items()})
    metrics = ("share", "sysacc", "lift", "auroc", "difference")

    def statistic(part: pd.DataFrame, weights: Array) -> Array:
        local, cloud = stats.correctness(part)
        routed = stats.means(weights, ~(part["confidence"] >= tau).to_numpy())
        measured: list[Array] = []
        for name, router in found.items():
            share = routed if router.share is None else np.full_like(routed, router.share)
            count, right, gain = stats.tie_sums(part[f"_{name}"].to_numpy(), weights, local, cloud - local)
            gained = stats.routed_gain(count, gain, share)
            raw, gap = (stats.ratio(one.sum(axis=1), weights.sum(axis=1)) for one in (right, gain))
            lift = gained - share * gap
            lead = measured[0][:, 2] - lift if measured else 0 * lift
            lead = lead if router.share is None else lead + np.nan
            measured.append(np.stack([share, raw + gained, lift, stats.auroc(count, right), lead], axis=1))
        return np.concatenate(measured, axis=1)

    result = stats.bootstrap(frame, statistic, metrics * len(found), resamples, seed)
    tables = {}
    for name, own in result.split(list(found)).items():
        router = found[name]
        compared = router.share is None and name != "FogGen"
        table = own.table().assign(p=own.p_values()[:, -1] if compared else np.nan)
        table = table.assign(forward_passes=router.passes, extra_tokens=router.extra_tokens)
        tables[name] = stats.annotate(table, outcomes, REASONS)
    table = stats.stack(tables, "method")
    table["p_holm"] = table.groupby(table["domain"] == MEAN)["p"].transform(stats.holm)
    return table[[*table.columns.drop("note"), "note"]]


# ---- published rows and display


def published(name: str = "fg") -> pd.DataFrame:
    """A table of `data/published.json` (percent) with `source`; routing tables also get `random_again` = raw
    + routed (cloud - raw) and `lift` = sysacc - random, recomputed from the other columns.
    """
    document = read_json(ROOT / "data" / "published.json")
    block = document["tables"][name]
    table = pd.DataFrame(block["rows"]).assign(source=document["sources"][block["source"]]["name"])
    if "random" in table:
        clouds = pd.DataFrame(document["tables"]["fg"]["rows"]).set_index("domain")["cloud"]
        table["cloud"] = table["domain"].map(clouds)  # one cloud model serves every edge model
        table["random_again"] = table["raw"] + table["routed"] / 100 * (table["cloud"] - table["raw"])
        table["lift"] = table["sysacc"] - table["random"]
        mean, means = table["domain"] == MEAN, ["random_again", "lift"]
        table.loc[mean, means] = table.loc[~mean, means].mean().to_numpy()  # 4.64, where rounded columns give 4.7
    return table


def percent(table: pd.DataFrame, digits: int = 1) -> pd.DataFrame:
    """For display: shares as percent, `57.0 [55.1, 58.9]` where an interval is known, a sign for lifts, - for NaN."""
    ends = [name for name in table if name.endswith(("_low", "_high"))]
    return pd.DataFrame({name: _shown(table, name, digits) for name in table.columns.drop(ends)}, table.index)


def _shown(table: pd.DataFrame, name: str, digits: int) -> pd.Series | list[str]:
    """One column of `percent`."""
    if name in ("tau", "p", "p_holm", "forward_passes", "extra_tokens"):
        return table[name].map(lambda x: "-" if pd.isna(x) else f"{x:.3g}")
    if not pd.api.types.is_float_dtype(table[name]):
        return table[name]
    form = f"{'+' if name in ('lift', 'difference') else ''}z.{digits}f"
    low, high = (table.get(f"{name}_{end}", table[name] * np.nan) for end in ("low", "high"))

    def cell(value: float, low: float, high: float) -> str:
        ends = "" if math.isnan(low) else f" [{100 * low:{form}}, {100 * high:{form}}]"
        return "-" if math.isnan(value) else f"{100 * value:{form}}{ends}"

    return list(map(cell, table[name], low, high))
