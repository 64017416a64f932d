"""Keep or route: what a confidence threshold does to accuracy, on stored outcomes.

Holds the outcomes table and its checks, the tables and the choice of a threshold, and how scores
compare as routers. Must not know how an outcome came about: no model, no prompt, no figure.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pandas import DataFrame as Frame
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, create_model
from scipy.stats import binom
from statsmodels.stats.multitest import multipletests

from foggen import resampling, stats
from foggen.inputs import TableError, read_rows
from foggen.prompts import BUCKETS, LETTERS
from foggen.questions import Fact, as_name
from foggen.resampling import MEAN, Array, Values, bootstrap, means, ratio
from foggen.store import ROOT, read_json

# ---- the outcomes table

OutcomesError = TableError  # a file or a value that cannot be used: the message names its place


def _number(value: Any) -> Any:
    """Blank texts and NaN are missing, true and false are 1 and 0; pydantic reads the rest."""
    words = {"": None, "nan": None, "true": 1.0, "false": 0.0}
    return words.get(str(value).strip().lower(), value)


def _key_part(value: Any) -> str:
    """What makes two ids or seeds the same: 0, 0.0, "0" and false are one."""
    return str(as_name(_number(value)))


SHARE, COUNT = "a number from 0 to 1", "a number of at least 0"
Correct = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1, description=SHARE)]
Score = Annotated[Correct | None, BeforeValidator(_number), Field(description=f"{SHARE}, or empty")]
Count = Annotated[float, Field(ge=0, description=COUNT)]
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
    """Read and check outcomes from a .csv, .jsonl or .parquet file; raises `OutcomesError`.

    `scores` names further columns to rank by: numbers from 0 to 1, or empty.
    """
    return _checked(read_rows(path), str(path), scores)


def check_outcomes(outcomes: Frame, source: str = "outcomes", scores: Sequence[str] = ()) -> Frame:
    """A checked copy with numeric columns as floats; all problems come in one `OutcomesError`."""
    outcomes = outcomes.rename(columns=str)
    rows = outcomes.astype(object).where(outcomes.notna(), None).to_dict("records")
    places = [f"{source}, row {number}" for number in range(1, len(rows) + 1)]
    return _checked(list(zip(places, rows, strict=True)), source, scores)


def _checked(table: list[tuple[str, Any]], source: str, scores: Sequence[str]) -> Frame:
    """Rows with their places as a table; raises `OutcomesError` with what is wrong with them."""
    if not table:
        raise OutcomesError(f"{source}: no rows; expected one per question")
    added: dict[str, Any] = dict.fromkeys(scores, (Score, ...))
    kind: Any = create_model("Scored", __base__=Outcome, **added)
    fields = kind.model_fields
    required = [name for name, field in fields.items() if field.is_required()]
    columns = list(dict.fromkeys(name for _, row in table for name in row))
    absent = [name for name in required if name not in columns]
    problems = [f"{source}: no column `{name}`; expected {', '.join(required)}" for name in absent]
    # Every row by itself
    empty, rows = dict.fromkeys(name for name in columns if name not in required), []
    for place, row in table:
        try:
            rows.append(kind.model_validate(empty | row).model_dump())
        except ValidationError as error:
            names = dict.fromkeys(str(problem["loc"][0]) for problem in error.errors())
            for name in (name for name in names if name in columns):
                value = repr(row[name])[:60] if name in row else "missing"
                form = fields[name].description
                problems.append(f"{place}, column `{name}`: {value}; expected {form}")
    # No question twice
    keys = Frame([map(_key_part, (row.get("id"), row.get("seed") or 0)) for _, row in table])
    for number in np.flatnonzero(keys.duplicated()):
        problems.append(f"{table[number][0]}, column `id`: {keys[0][number]!r} is there twice")
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise OutcomesError("\n".join(problems[:20] + more))
    numbers = [name for name in columns if "float" in str(fields.get(name))]
    return Frame(rows, columns=columns).astype(dict.fromkeys(numbers, float))


# ---- SysAcc, random, lift


def routing_metrics(
    frame: Frame, counts: Array, tau: float = 0.5, score: str = "confidence"
) -> Values:
    """`stats.system` of keeping answers whose score is parsed and >= tau, else asking the cloud.

    Of multiple-choice questions also what knowing nothing scores: chance, and gold_share, the
    share of the commonest letter.
    """
    routed = ~(frame[score] >= tau).to_numpy(bool)
    values = {name: v[:, 0] for name, v in stats.system(frame, counts, routed[:, None]).items()}
    if {"n_options", "gold"} <= {*frame}:
        letters = frame["gold"].to_numpy()[:, None] == np.array([*LETTERS])
        values["chance"] = means(counts, 1 / frame["n_options"])
        values["gold_share"] = means(counts, letters).max(axis=1)
    return values


def routing_table(
    outcomes: Frame, tau: float = 0.5, score: str = "confidence", **options: int
) -> Frame:
    """`routing_metrics` per domain and for their mean, as `Bootstrap.table` gives them.

    gap_recovered = (sysacc - raw) / (cloud - raw), of the mean the ratio of the means. Any 0/1
    column of keep decisions may stand for `score`; `options` are resamples and seed.
    """
    result = bootstrap(outcomes, partial(routing_metrics, tau=tau, score=score), **options)
    cloud, raw, sysacc = (result.values[name] for name in ("cloud", "raw", "sysacc"))
    result.values["gap_recovered"] = ratio(sysacc - raw, np.where(cloud > raw, cloud - raw, 0.0))
    return result.table()


def sweep_table(outcomes: Frame, taus: Sequence[float] = BUCKETS, **options: Any) -> Frame:
    """`routing_table` at every tau, one under the other, with a first column `tau`."""
    return resampling.stack({tau: routing_table(outcomes, tau, **options) for tau in taus}, "tau")


# ---- tau for a purpose


class TauChoice(NamedTuple):
    """A threshold, and what it does on the outcomes it was chosen on.

    Accuracy and cloud share over questions, risk = error rate of the answers kept, n = questions
    that chose it, `candidates` the table it was chosen from. `overrun`: by how much the cloud share
    of other questions is expected to exceed the budget (0 without a budget).
    """

    tau: float
    accuracy: float
    cloud_share: float
    risk: float
    overrun: float
    n: int
    candidates: Frame
    reason: str


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
    for value in (max_cloud_share, max_risk, delta):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"choose_tau: {value}; expected: a share from 0 to 1")
    overrun = 0.0
    if max_cloud_share is not None:
        table = _candidates(outcomes, sorted(candidates), score)
        best, overrun = _within_budget(outcomes, table, score, max_cloud_share, seed)
        here = f"most accurate with cloud share <= {max_cloud_share:g} here"
        reason = f"{here}; elsewhere {overrun:.3f} more"
    else:
        outcomes = _independent(outcomes, seed)
        table = _candidates(outcomes, [*sorted(candidates), math.inf], score)
        p = binom.cdf(table["errors"], table["kept"], max_risk)
        adjusted = multipletests(p[:-1], method="holm")[1]
        table = table.assign(p=p, p_holm=[*adjusted, 0.0])  # tau = inf keeps no wrong answer
        best = (table["p_holm"] <= delta).idxmax()
        reason = f"lowest tau with error of kept answers <= {max_risk} at confidence {1 - delta:g}"
    tau, accuracy, share, risk = table.loc[best, ["tau", "accuracy", "cloud_share", "risk"]]
    return TauChoice(tau, accuracy, share, risk, overrun, len(outcomes), table, reason)


def _candidates(outcomes: Frame, taus: Sequence[float], score: str) -> Frame:
    """Per tau: accuracy, cloud_share, kept (count), errors (among kept), risk (0 of none kept)."""
    local, cloud = stats.correctness(outcomes)
    keep = outcomes[score].to_numpy(float)[:, None] >= np.array(taus)  # (questions, taus)
    kept, errors = keep.sum(axis=0), (1 - local) @ keep
    accuracy = np.where(keep, local[:, None], cloud[:, None]).mean(axis=0)
    columns = {"tau": taus, "accuracy": accuracy, "cloud_share": (~keep).mean(axis=0)}
    return Frame(columns | {"kept": kept, "errors": errors, "risk": ratio(errors, kept, empty=0.0)})


def _within_budget(
    outcomes: Frame, table: Frame, score: str, budget: float, seed: int
) -> tuple[int, float]:
    """The place of the most accurate candidate, and the mean overrun of choices on resamples."""
    allowed, shares = table["cloud_share"] <= budget, table["cloud_share"].to_numpy()
    if not allowed.any():
        trouble = f"no candidate routes at most {budget}; the least is {shares.min():.3f}"
        raise ValueError(f"choose_tau: {trouble}")
    best = table["accuracy"].where(allowed).idxmax()
    # Choose again on resamples: arrays (resamples, taus)
    local, cloud = (values[:, None] for values in stats.correctness(outcomes))
    keep = outcomes[score].to_numpy(float)[:, None] >= table["tau"].to_numpy()
    rng = np.random.default_rng(seed)
    counts = resampling.draw_counts(resampling.fact_codes(outcomes), 200, rng).astype(float)
    accuracy, share = means(counts, np.where(keep, local, cloud)), means(counts, ~keep)
    # Where no candidate fits a resample, the one that routes least
    choices = np.where(share <= budget, accuracy, -share).argmax(axis=1)
    return int(best), float(np.maximum(shares[choices] - budget, 0).mean())


def _independent(outcomes: Frame, seed: int) -> Frame:
    """At most one question of a fact (over all seeds), all questions as likely to be drawn.

    A fact is taken with a chance that rises with its questions: else the risk would be over facts.
    """
    if not outcomes["local_correct"].isin([0, 1]).all():
        raise ValueError("choose_tau: the exact bound needs local_correct of 0 or 1 in every row")
    shuffled = outcomes.sample(frac=1, random_state=seed).reset_index(drop=True)
    facts = [shuffled["domain"].astype(str), resampling.fact_codes(shuffled)]
    size = shuffled.groupby(facts)["id"].transform("size")
    accepted = np.random.default_rng(seed).random(len(shuffled)) < size / size.max()
    return shuffled[accepted & (shuffled.groupby(facts).cumcount() == 0)]


# ---- scores as routers


def vote_share(outcomes: Frame) -> Array:
    """Self-consistency: the share of the sampled votes for the local answer; 0 without one."""
    pairs = zip(outcomes["votes"], outcomes["local_answer"].fillna(""), strict=True)
    return np.array(
        [votes.count(letter) / len(votes) if letter else 0.0 for votes, letter in pairs]
    )


# ---- published rows


def published(name: str = "fg") -> Frame:
    """A table of `data/published.json` (percent) with `source` and `lift` = sysacc - random."""
    document = read_json(ROOT / "data" / "published.json")
    block = document["tables"][name]
    table = Frame(block["rows"]).assign(source=document["sources"][block["source"]]["name"])
    if "random" in table:
        mean = table["domain"] == MEAN
        table["lift"] = table["sysacc"] - table["random"]
        table.loc[mean, "lift"] = table.loc[~mean, "lift"].mean()  # 4.64, rounded columns give 4.7
    return table
