"""Keep or route: what a confidence threshold does to accuracy, on stored outcomes.

Holds the outcomes table and its checks, what routing is worth at a threshold and at a cloud share,
and the choice of a threshold. Must not know how an outcome came about: no model, no prompt, no
figure.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
from pandas import DataFrame as Frame
from pydantic import BaseModel, BeforeValidator, Field, create_model
from scipy.stats import binom
from statsmodels.stats.multitest import multipletests

from foggen import stats
from foggen.inputs import Table, TableError, as_name, check_rows, read_rows
from foggen.prompts import BUCKETS
from foggen.questions import Fact
from foggen.stats import MEAN, Array, Values, auroc, bootstrap, means, ratio, router_score, tie_sums
from foggen.store import ROOT, read_json

# ---- the outcomes table


def _number(value: Any) -> Any:
    """Blank texts and NaN are missing, true and false are 1 and 0; pydantic reads the rest."""
    words = {"": None, "nan": None, "true": 1.0, "false": 0.0}
    return words.get(str(value).strip().lower(), value)


SHARE = "a number from 0 to 1"
Correct = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1, description=SHARE)]
Score = Annotated[Correct | None, BeforeValidator(_number), Field(description=f"{SHARE}, or empty")]
Count = Annotated[float, Field(ge=0, description="a number of at least 0")]
Name = Annotated[str, BeforeValidator(as_name)]


class Outcome(BaseModel, extra="allow", allow_inf_nan=False, regex_engine="python-re"):
    """One row of an outcomes table: a question, or a question and the training `seed` of its model.

        {"id": "law-test-007", "domain": "law", "fact": "law/term/tort", "local_correct": 1,
         "cloud_correct": 1, "confidence": 0.75, "expected_confidence": 0.71, "votes": "BBBBDBB-"}

    The first five columns are required. Every other adds to what the tables can say: a router may
    rank by any score, `votes` are the sampled answers, tokens are generated ones. Columns that are
    not named here are kept as they are.
    """

    id: Name = Field(description="a name, once per seed")
    domain: Name = Field(pattern="^(?!mean$)", description="a name other than mean")
    local_correct: Correct
    cloud_correct: Correct
    confidence: Score  # empty: the answer states no readable confidence
    expected_confidence: Score = None
    option_probability: Score = None
    p_true: Score = None
    verification: Score = None
    local_tokens: Count = 0
    cloud_tokens: Count = 0
    sample_tokens: Count = 0
    verification_tokens: Count = 0
    seed: Count = 0
    n_options: float = Field(2, ge=2, description="a number of at least 2")
    votes: str = Field("", pattern="^[A-Z-]+$", description="a letter per sample, - if unreadable")
    fact: Fact = Field(None, description="a name")  # its questions are resampled together


def read_outcomes(path: Path | str, scores: Sequence[str] = ()) -> Frame:
    """Read and check outcomes from a .csv, .jsonl or .parquet file; raises `TableError`.

    `scores` names further columns to rank by: numbers from 0 to 1, or empty.
    """
    return _checked(read_rows(path), str(path), scores)


def check_outcomes(outcomes: Frame, source: str = "outcomes", scores: Sequence[str] = ()) -> Frame:
    """A checked copy with numeric columns as floats; all problems come in one `TableError`."""
    outcomes = outcomes.rename(columns=str)
    rows = outcomes.astype(object).where(outcomes.notna(), None).to_dict("records")
    table = [(f"{source}, row {number}", row) for number, row in enumerate(rows, 1)]
    return _checked(table, source, scores)


def _checked(table: Table, source: str, scores: Sequence[str]) -> Frame:
    """Rows with their places as a table; raises `TableError` with what is wrong with them."""
    added: dict[str, Any] = dict.fromkeys(scores, (Score, ...))
    kind: Any = create_model("Scored", __base__=Outcome, **added)
    fields, columns = kind.model_fields, [*dict.fromkeys(name for _, row in table for name in row)]
    required = [name for name, field in fields.items() if field.is_required()]
    if absent := [name for name in required if name not in columns]:
        missing = f"no column `{absent[0]}`" if table else "no rows"
        raise TableError(f"{source}: {missing}; expected {', '.join(required)}")
    blank = dict.fromkeys({*columns} - {*required})
    rows: list[Any] = check_rows([(p, blank | row) for p, row in table], kind, "id", "seed")
    numbers = {name: float for name in columns if "float" in str(fields.get(name))}
    return Frame([row.model_dump() for row in rows], columns=columns).astype(numbers)


# ---- what a routing is worth


def correctness(frame: Frame) -> tuple[Array, Array]:
    """local_correct and cloud_correct, each (questions,)."""
    return frame["local_correct"].to_numpy(float), frame["cloud_correct"].to_numpy(float)


def routed_gain(count: Array, gain: Array, share: float | Array | None) -> Array:
    """Mean accuracy gained by routing the lowest `share`, from `tie_sums` of cloud - local.

    `share` is a number or (resamples,); None: the mean over all shares. Ties are routed at random.
    """
    total, before = count.sum(axis=1), np.cumsum(count, axis=1) - count
    if share is None:  # a gain is there at all shares from its own place on, ties half-way
        return ratio((gain * (total[:, None] - before - count / 2)).sum(axis=1), total**2)
    routed = np.clip(np.reshape(share, (-1, 1)) * total[:, None] - before, 0, count)
    return ratio((routed * ratio(gain, count, empty=0.0)).sum(axis=1), total)


def at_share(frame: Frame, counts: Array, score: str, share: float | str | None = None) -> Values:
    """A score as a router, each metric (resamples,), where the lowest-scored `share` is routed.

    `share` is a number, the name of a 0/1 column that marks as many questions (counted anew in
    every resample), or None: the mean over all shares. Beside system accuracy and lift stand AUROC
    and `area`, the lift's mean over all shares. A constant score has neither.
    """
    local, cloud = correctness(frame)
    count, right, gain = tie_sums(router_score(frame, score), counts, local, cloud - local)
    raw, gap = (ratio(sums.sum(axis=1), count.sum(axis=1)) for sums in (right, gain))
    everywhere = routed_gain(count, gain, None)
    if isinstance(share, str):
        routed = means(counts, frame[share])
    else:
        routed = np.full(len(counts), 0.5 if share is None else share)
    gained = everywhere if share is None else routed_gain(count, gain, routed)
    if not ((routed >= 0) & (routed <= 1)).all():
        raise ValueError(f"share={share}; expected 0 to 1")
    values = {"share": routed, "sysacc": raw + gained, "lift": gained - routed * gap}
    return values | {"auroc": auroc(count, right), "area": everywhere - gap / 2}


def system(frame: Frame, counts: Array, routed: Array) -> Values:
    """What routings do: metrics (resamples, routings) of `routed` (questions, routings) chances.

    raw and cloud, the accuracies of either model alone, are the same for all: (resamples, 1).
    random = (1 - routed) raw + routed cloud; lift = sysacc - random; oracle routes the same share
    of questions, those that gain most.
    """
    local, cloud = correctness(frame)
    gain, share = cloud - local, means(counts, routed)
    raw, clouds = (means(counts, right)[:, None] for right in (local, cloud))
    random = (1 - share) * raw + share * clouds
    sysacc = raw + means(counts, routed * gain[:, None])
    count, gains = tie_sums(-gain, counts, gain)
    oracle = raw + np.stack([routed_gain(count, gains, part) for part in share.T], axis=1)
    values = {"cloud": clouds, "raw": raw, "random": random, "sysacc": sysacc, "routed": share}
    return values | {"lift": sysacc - random, "oracle": oracle}


def routing_metrics(frame: Frame, counts: Array, tau: float, score: str = "confidence") -> Values:
    """`system` of keeping answers whose score is parsed and >= tau, else asking the cloud."""
    routed = ~(frame[score] >= tau).to_numpy(bool)
    return {name: v[:, 0] for name, v in system(frame, counts, routed[:, None]).items()}


def routing_table(
    outcomes: Frame, tau: float = 0.5, score: str = "confidence", **options: int
) -> Frame:
    """`routing_metrics` per domain and for their mean, as `Bootstrap.table` gives them.

    Any 0/1 column of keep decisions may stand for `score`; `options` are resamples and seed.
    """
    return bootstrap(outcomes, partial(routing_metrics, tau=tau, score=score), **options).table()


def sweep_table(outcomes: Frame, taus: Sequence[float] = BUCKETS, **options: Any) -> Frame:
    """`routing_table` at every tau, one under the other, with a column `tau`."""
    tables = [routing_table(outcomes, tau, **options).assign(tau=tau) for tau in taus]
    return pd.concat(tables, ignore_index=True)


def score_table(outcomes: Frame, scores: list[str], share: float | str, **options: int) -> Frame:
    """Score columns as routers at one cloud share: `at_share`, and differences in SysAcc.

    `difference` is the first score minus this one, paired; p_holm is Holm's over domains x scores,
    and over scores for the mean rows (none for the first score itself).
    """
    routers = {score: partial(at_share, score=score, share=share) for score in scores}
    runs = {score: bootstrap(outcomes, router, **options) for score, router in routers.items()}
    for run in runs.values():
        run.values["difference"] = runs[scores[0]].values["sysacc"] - run.values["sysacc"]
    tables = [run.table().assign(score=score) for score, run in runs.items()]
    table = pd.concat(tables, ignore_index=True)
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
    names, shares = ("routed", "sysacc", "random", "oracle", "lift"), np.linspace(0, 1, points)
    rows = outcomes.assign(seed=outcomes.get("seed", 0), score=router_score(outcomes, score))
    rows = rows.reset_index(drop=True)
    # Each seed routes by rising score; the rows of a score share the piece from top - width to top
    size = rows.groupby(["seed", "domain"], observed=True)["id"].transform("size")
    rows["width"] = 1 / size / rows.groupby("seed")["domain"].transform("nunique")
    rows["top"] = rows.sort_values("score").groupby("seed")["width"].cumsum()
    ties = rows.groupby(["seed", "score"])
    rows = rows.assign(width=ties["width"].transform("sum"), top=ties["top"].transform("max"))

    def statistic(frame: Frame, counts: Array) -> Values:
        width, top = frame["width"].to_numpy()[:, None], frame["top"].to_numpy()[:, None]
        chances = np.clip((shares - top + width) / width, 0, 1)  # (questions, points)
        curves = system(frame, counts, chances)  # each (resamples, points)
        return {f"{name} {k}": v for name in names for k, v in enumerate(curves[name].T)}

    result = bootstrap(rows, statistic, **{"resamples": 1000, **options})
    # Means over domains: (names, points, 1 + resamples)
    means_over_domains = np.array([values[-1] for values in result.values.values()])
    routed, *curves = means_over_domains.reshape(len(names), points, -1)
    table = {"share": shares, "n": outcomes["id"].nunique()}
    for name, curve in zip(names[1:], curves, strict=True):
        # Read off at the same shares in every resample
        drawn = np.array([np.interp(shares, *pair) for pair in zip(routed.T, curve.T, strict=True)])
        low, high = np.quantile(drawn[1:], [0.025, 0.975], axis=0)
        table |= {name: drawn[0], f"{name}_low": low, f"{name}_high": high}
    return Frame(table)


# ---- tau for a purpose


class TauChoice(NamedTuple):
    """A threshold, and what it does on the outcomes it was chosen on.

    Accuracy and cloud share over questions, risk = error rate of the answers kept, n = questions
    that chose it. `overrun`: by how much the cloud share of other questions is expected to exceed
    the budget (0 without a budget).
    """

    tau: float
    accuracy: float
    cloud_share: float
    risk: float
    overrun: float
    n: int


def choose_tau(
    outcomes: Frame,
    *,
    max_cloud_share: float | None = None,
    max_risk: float | None = None,
    delta: float = 0.1,
    score: str = "confidence",
    candidates: Sequence[float] = BUCKETS,
    seed: int = 0,
) -> TauChoice:
    """The tau for a cloud budget or for an error bound, over questions: give one of the two.

    max_cloud_share: the most accurate candidate within the budget on these outcomes. It promises
    nothing on others; `overrun` is the mean excess, on these, of choices made on resampled facts.

    max_risk: the lowest tau whose kept answers have an error rate of at most max_risk with
    probability 1 - delta (Learn then Test, Angelopoulos et al. 2021: exact binomial p per
    candidate, Holm's correction). The bound needs independent rows, so it rests on one question of
    a fact, drawn so that all questions are as likely. tau = inf (always the cloud) if none passes.

    Candidates must be fixed beforehand. Raises ValueError for a budget that no candidate keeps, and
    for shares that are none.
    """
    if (max_cloud_share is None) == (max_risk is None) or not len(candidates):
        raise ValueError("choose_tau: give one of max_cloud_share and max_risk, and candidates")
    if not all(0 <= share <= 1 for share in (max_cloud_share or 0, max_risk or 0, delta)):
        raise ValueError("choose_tau: max_cloud_share, max_risk and delta are shares from 0 to 1")
    taus, overrun = np.sort(candidates), 0.0
    if max_risk is not None:
        outcomes, taus = _independent(outcomes, seed), np.append(taus, np.inf)
    # What every candidate does: arrays (taus,), from arrays (questions, taus)
    local, cloud = correctness(outcomes)
    keep = outcomes[score].to_numpy(float)[:, None] >= taus
    right = np.where(keep, local[:, None], cloud[:, None])
    accuracy, share = right.mean(axis=0), (~keep).mean(axis=0)
    kept, errors = keep.sum(axis=0), (1 - local) @ keep
    if max_cloud_share is None:
        p = binom.cdf(errors, kept, max_risk)[:-1]
        best = np.append(multipletests(p, method="holm")[1] <= delta, True).argmax()
    elif share.min() > max_cloud_share:
        raise ValueError(f"choose_tau: every candidate routes at least {share.min():.3f}")
    else:
        best = np.where(share <= max_cloud_share, accuracy, -1.0).argmax()
        # Choose again on resampled facts; where no candidate fits, what routes least
        rng = np.random.default_rng(seed)
        counts = stats.draw_counts(stats.fact_codes(outcomes), 200, rng).astype(float)
        drawn, routed = means(counts, right), means(counts, ~keep)
        choices = np.where(routed <= max_cloud_share, drawn, -routed).argmax(axis=1)
        overrun = float(np.maximum(share[choices] - max_cloud_share, 0).mean())
    risk = ratio(errors, kept, empty=0.0)
    return TauChoice(taus[best], accuracy[best], share[best], risk[best], overrun, len(outcomes))


def _independent(outcomes: Frame, seed: int) -> Frame:
    """At most one question of a fact (over all seeds), all questions as likely to be drawn.

    A fact is taken with a chance that rises with its questions: else the risk would be over facts.
    """
    if not outcomes["local_correct"].isin([0, 1]).all():
        raise ValueError("choose_tau: the exact bound needs local_correct of 0 or 1 in every row")
    shuffled = outcomes.sample(frac=1, random_state=seed).reset_index(drop=True)
    facts = [shuffled["domain"].astype(str), stats.fact_codes(shuffled)]
    size = shuffled.groupby(facts)["id"].transform("size")
    accepted = np.random.default_rng(seed).random(len(shuffled)) < size / size.max()
    return shuffled[accepted & (shuffled.groupby(facts).cumcount() == 0)]


def vote_share(outcomes: Frame) -> Array:
    """Self-consistency: the share of the sampled votes for the local answer; 0 without one."""
    pairs = zip(outcomes["votes"], outcomes["local_answer"].fillna(""), strict=True)
    return np.array([votes.count(letter or " ") / len(votes) for votes, letter in pairs])


# ---- published rows


def published(name: str = "fg") -> Frame:
    """A table of `data/published.json` (percent) with `lift` = sysacc - random."""
    table = Frame(read_json(ROOT / "data" / "published.json")["tables"][name]["rows"])
    if "random" in table:
        mean = table["domain"] == MEAN
        table["lift"] = table["sysacc"] - table["random"]
        table.loc[mean, "lift"] = table.loc[~mean, "lift"].mean()  # 4.64, rounded columns give 4.7
    return table
