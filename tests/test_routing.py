"""Outcomes files, routing metrics, published rows, the choice of tau and fitted scores."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outcomes_factory import make_outcomes, make_seeds, mean_row

from foggen import routing
from foggen.inputs import TableError
from foggen.routing import at_share, check_outcomes, choose_tau, read_outcomes
from foggen.stats import bootstrap, calibration, fact_codes
from foggen.store import write_jsonl

TOY = pd.DataFrame(
    {
        "id": ["a", "b", "c", "d"],
        "domain": "toy",
        "local_correct": [1.0, 0.0, 0.0, 1.0],
        "cloud_correct": [1.0, 1.0, 1.0, 0.0],
        "confidence": [1.0, 0.5, 0.25, math.nan],
        "n_options": [4, 4, 2, 4],
    }
)
REQUIRED = ["id", "domain", "local_correct", "cloud_correct", "confidence"]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        yield


def write(path: Path, outcomes: pd.DataFrame) -> Path:
    """The outcomes in the format of the file's ending."""
    if path.suffix == ".csv":
        outcomes.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        outcomes.to_json(path, orient="records", lines=True, double_precision=15)
    else:
        outcomes.to_parquet(path)
    return path


# ---- outcomes files

FORMATS = pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])


@FORMATS
def test_three_formats_read_alike(tmp_path: Path, ending: str) -> None:
    outcomes = make_outcomes(20, rich=True, per_fact=2)
    outcomes.loc[3, "confidence"] = math.nan
    # Names that are no missing values, and no markup
    names = {"domain0": "NA", "domain1": "US$ bonds & AU$", "domain2": "None"}
    outcomes["domain"] = outcomes["domain"].replace(names)
    outcomes.loc[5, "local_answer"], outcomes["verification"] = "None", None
    read = read_outcomes(write(tmp_path / f"outcomes{ending}", outcomes))
    pd.testing.assert_frame_equal(read, check_outcomes(outcomes), check_dtype=False)
    assert list(read["domain"].unique()) == list(names.values())
    assert math.isnan(read["confidence"][3]) and read["local_answer"][5] == "None"
    assert read["verification"].isna().all() and read["verification"].dtype == float
    table = routing.routing_table(read, resamples=5)
    assert table["domain"].tolist() == [*names.values(), "mean"]


@FORMATS
@pytest.mark.parametrize(
    ("facts", "names"),
    [
        ([0, 0, 12, 12], ["0", "0", "12", "12"]),
        ([0, 0, 12, None], ["0", "0", "12", None]),
        (["0", "None", " ", ""], ["0", "None", None, None]),
        ([0.5, 0.5, 2.5, 2.5], ["0.5", "0.5", "2.5", "2.5"]),
    ],
)
def test_any_scalar_names_a_fact(tmp_path: Path, ending: str, facts: list, names: list) -> None:
    whole = "Int64" if isinstance(facts[0], int) else None  # a nullable column of integers
    outcomes = TOY[REQUIRED].assign(fact=pd.Series(facts, dtype=whole))
    read = read_outcomes(write(tmp_path / f"facts{ending}", outcomes))
    assert [None if pd.isna(fact) else fact for fact in read["fact"]] == names
    blank = sum(name is None for name in names)  # each a fact of its own
    assert len(set(fact_codes(read))) == len({*names} - {None}) + blank
    floats = check_outcomes(outcomes.assign(fact=[0.0, 0.0, 12.0, math.nan], id=[7, 8, 9.0, "x"]))
    assert floats["fact"].tolist()[:3] == ["0", "0", "12"] and floats["fact"].isna()[3]
    assert floats["id"].tolist() == ["7", "8", "9", "x"]


def test_a_key_may_lack_where_the_column_is_optional(tmp_path: Path) -> None:
    row = {"id": "007", "domain": "2026-01-02", "local_correct": True, "cloud_correct": 1}
    big = {**row, "id": 2**53 + 1, "confidence": None, "fact": "f", "verification": 0.5}
    read = read_outcomes(write_jsonl(tmp_path / "a.jsonl", [{**row, "confidence": 0.1}, big]))
    assert read["id"].tolist() == ["007", "9007199254740993"]
    assert read["domain"][0] == "2026-01-02" and read["local_correct"].tolist() == [1, 1]
    assert read["fact"].isna()[0] and read["verification"].isna()[0]
    with pytest.raises(TableError, match=r"a\.jsonl, line 2: field `confidence`: missing"):
        read_outcomes(write_jsonl(tmp_path / "a.jsonl", [big, row]))
    tokens = {**big, "id": "t", "local_tokens": 3}
    with pytest.raises(TableError, match="line 2: field `local_tokens`: None; expected: a n"):
        read_outcomes(write_jsonl(tmp_path / "a.jsonl", [tokens, big]))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("confidence", "high", "'high'; expected: a number from 0 to 1, or empty"),
        ("confidence", "None", "'None'; expected: a number from 0 to 1, or empty"),  # a text
        ("confidence", "0,5", "'0,5'; expected:"),
        ("confidence", 1.5, "1.5; expected: a number from 0 to 1"),
        ("confidence", "9" * 5000, "'9{59}; expected:"),
        ("local_correct", "", "None; expected: a number from 0 to 1"),
        ("cloud_correct", math.nan, "None; expected: a number from 0 to 1"),
        ("id", "a", "'a' again; expected: once"),
        ("id", " ", "None; expected: a name"),
        ("domain", "mean", "'mean'; expected: a name other than mean"),
        ("domain", " mean ", "'mean'; expected: a name other than mean"),
        ("domain", None, "None; expected: a name other than mean"),
        ("fact", [1], r"\[1\]; expected: a name"),
        ("n_options", 1, "1; expected: a number of at least 2"),
        ("votes", "AB?", r"'AB\?'; expected: a letter per sample"),
        ("local_tokens", math.inf, "inf; expected: a number of at least 0"),
        ("mine", 2, "2; expected: a number from 0 to 1, or empty"),
    ],
)
def test_wrong_values_are_named(column: str, value: object, message: str) -> None:
    frame = TOY.assign(votes="AAAAAAA-", local_tokens=3, fact=None, mine=0.5).astype(object)
    frame.at[1, column] = value
    with pytest.raises(TableError, match=f"^mine, row 2: field `{column}`: {message}"):
        check_outcomes(frame, "mine", scores=["mine"])


def test_all_problems_come_together() -> None:
    with pytest.raises(TableError, match="mine: no rows; expected"):
        check_outcomes(TOY[:0], "mine")
    for name in REQUIRED:
        with pytest.raises(TableError, match=f"mine: no column `{name}`; expected id, domain"):
            check_outcomes(TOY.drop(columns=name), "mine")
    frame = TOY.astype(object)
    frame.loc[:, "local_correct"] = 7
    frame.loc[2, "confidence"], frame.loc[3, "id"] = "?", "a"
    with pytest.raises(TableError) as caught:
        check_outcomes(frame)
    assert str(caught.value).count("\n") == 4
    with pytest.raises(TableError, match="and 3980 more"):
        check_outcomes(pd.concat([TOY.assign(local_correct=2)] * 1000).assign(seed=range(4000)))


def test_what_is_read_generously(tmp_path: Path) -> None:
    words = TOY.assign(
        local_correct=["True", "false", False, "1"], confidence=["nan", "", " ", "1"]
    )
    checked = check_outcomes(words)
    assert checked["local_correct"].tolist() == [1, 0, 0, 1]
    assert checked["confidence"].isna().tolist() == [True, True, True, False]
    assert check_outcomes(make_seeds(2))["seed"].nunique() == 2  # an id once per seed
    with pytest.raises(TableError, match="row 2: field `id`: 'a' again"):
        check_outcomes(TOY[:2].assign(id="a", seed=[0, "0.0"]))
    assert check_outcomes(TOY.assign(**{"0": 7}).rename(columns={"0": 0}))["0"].tolist() == [7] * 4
    path = write(tmp_path / "mine.csv", TOY.assign(mine=["0.5", "1", None, "0"], other="7"))
    read = read_outcomes(path, scores=["mine"])
    assert read["mine"].tolist()[:2] == [0.5, 1] and read["other"].tolist() == ["7"] * 4
    assert routing.score_table(read, ["mine"], 0.5, resamples=20)["share"][0] == 0.5
    with pytest.raises(TableError, match="no column `yours`"):
        read_outcomes(path, scores=["yours"])


# ---- metrics


def test_the_toy_table_by_hand() -> None:
    row = routing.routing_table(TOY, resamples=50).iloc[0]
    # c and the unparsed d are routed: 1, 0, 1, 0 right
    assert row[["cloud", "raw", "routed", "sysacc"]].tolist() == [0.75, 0.5, 0.5, 0.5]
    assert row[["random", "lift", "oracle", "n"]].tolist() == [0.625, -0.125, 1, 4]


ANSWER = st.tuples(st.booleans(), st.booleans(), st.sampled_from([0, 0.25, 0.5, 1, math.nan]))


@given(st.lists(ANSWER, min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_metrics_are_their_definitions(rows: list[tuple[bool, bool, float]]) -> None:
    frame = pd.DataFrame(rows, columns=["local_correct", "cloud_correct", "confidence"])
    frame = frame.astype(float).assign(id=[str(i) for i in range(len(frame))], domain="d")
    row = routing.routing_table(frame, resamples=20).iloc[0]
    keep = np.array([not math.isnan(c) and c >= 0.5 for _, _, c in rows])
    local, cloud = frame["local_correct"], frame["cloud_correct"]
    assert row["sysacc"] == pytest.approx((keep * local + ~keep * cloud).mean())
    random = keep.mean() * local.mean() + (1 - keep.mean()) * cloud.mean()
    assert row["random"] == pytest.approx(random)
    assert row["lift"] == pytest.approx(row["sysacc"] - row["random"], abs=1e-6)
    assert row["sysacc"] <= row["oracle"] + 1e-9


def test_means_are_over_domains_not_questions() -> None:
    big = make_outcomes(300, 1, seed=1).assign(domain="big", id=lambda f: "b" + f["id"])
    table = routing.routing_table(pd.concat([make_outcomes(30, 1), big]), resamples=100)
    inner, mean = table.iloc[:-1], table.iloc[-1]
    for name in ("cloud", "raw", "random", "sysacc", "routed", "lift", "oracle"):
        assert mean[name] == pytest.approx(inner[name].mean())
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
    assert table["n"].tolist() == [30, 300, 330]


def test_the_lift_of_seeds_is_the_mean_of_their_lifts() -> None:
    runs = make_seeds(3, 50)
    table = routing.routing_table(runs, resamples=50)
    lifts = [routing.routing_table(part, resamples=1)["lift"] for _, part in runs.groupby("seed")]
    np.testing.assert_allclose(table["lift"], np.mean(lifts, axis=0))
    strata = runs.assign(domain=np.where(runs["confidence"] > 0.5, "sure", "unsure"))
    assert set(routing.routing_table(strata, resamples=20)["domain"]) == {"sure", "unsure", "mean"}


def degenerate() -> dict[str, pd.DataFrame]:
    outcomes = make_outcomes(12, 2)
    values = {
        "one class": {"local_correct": 1.0},
        "always wrong": {"local_correct": 0.0, "cloud_correct": 0.0},
        "all routed": {"confidence": 0.0},
        "none routed": {"confidence": 1.0},
        "cloud worse": {"local_correct": 1.0, "cloud_correct": 0.0},
        "never parsed": {"confidence": math.nan},
        "ties": {"confidence": 0.5},
    }
    frames = {name: outcomes.assign(**columns) for name, columns in values.items()}
    seeds = pd.concat([outcomes.assign(seed=s) for s in (0, 1)])
    return frames | {"one question": outcomes[:1], "two seeds": seeds}


@pytest.mark.parametrize("name", degenerate())
def test_degenerate_outcomes_have_no_unexplained_nan(name: str) -> None:
    outcomes = degenerate()[name].assign(n_options=4, gold="A", other=0.5)
    tables = [
        routing.routing_table(outcomes, resamples=60),
        bootstrap(outcomes, calibration, 60).table(),
        routing.score_table(outcomes, ["confidence", "other"], 0.3, resamples=60),
    ]
    for table in tables:
        hollow = table.drop(columns=["note", "p_holm"], errors="ignore").isna().any(axis=1)
        assert (table.loc[hollow, "note"] != "").all()
        assert not np.isinf(table.select_dtypes(float).to_numpy()).any()
    curve = routing.share_curve(outcomes, points=11, resamples=20)
    assert curve.notna().all(axis=None)


def test_sweep_routes_more_as_tau_rises() -> None:
    table = routing.sweep_table(make_outcomes(), resamples=20)
    routed = table[table["domain"] == "mean"]["routed"]
    assert routed.is_monotonic_increasing and routed.iloc[0] == 0 and len(table) == 5 * 4


# ---- routing at a share


def test_routing_at_a_share_by_hand() -> None:
    frame = pd.DataFrame({"score": [0.0, 0.5, 0.5, 1.0], "local_correct": [0.0, 0, 1, 1]})
    frame = frame.assign(cloud_correct=[1.0, 1, 0, 1], mark=[1, 1, 0, 0], flat=0.3)
    count = np.ones((1, 4))

    def value(name: str, score: str, share: float | str | None) -> float:
        return float(at_share(frame, count, score, share)[name][0])

    # The two ties gain +1 and -1: routing either is worth 0 in expectation
    shares = [0, 0.25, 0.5, 0.75, 1]
    assert [value("sysacc", "score", s) for s in shares] == [0.5, 0.75, 0.75, 0.75, 0.75]
    assert [value("lift", "flat", s) for s in [*shares, None]] == pytest.approx([0] * 6)
    assert value("share", "score", "mark") == 0.5 and value("lift", "score", "mark") == 0.125
    unparsed = frame.assign(score=[1.0, 0.5, np.nan, 1.0])
    assert at_share(unparsed, count, "score", 0.25)["sysacc"][0] == 0.25  # it goes first


@given(st.lists(ANSWER, min_size=2, max_size=30), st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_the_area_is_the_mean_lift_and_no_router_beats_the_oracle(rows: list, share: float) -> None:
    frame = pd.DataFrame(rows, columns=["local_correct", "cloud_correct", "score"]).astype(float)
    counts = np.arange(1.0, len(rows) + 1)[None] % 3
    at = np.linspace(0, 1, int(counts.sum()) + 1)  # the knots of a piecewise linear curve
    lines = [at_share(frame, counts, "score", s) for s in at]
    for name in ("sysacc", "lift"):
        line = [values[name][0] for values in lines]
        result = at_share(frame, counts, "score", None)[name][0]
        assert result == pytest.approx(np.trapezoid(line, at), abs=1e-9)
    perfect = frame.assign(score=frame["local_correct"] - frame["cloud_correct"])
    best = at_share(perfect, counts, "score", share)["sysacc"][0]
    assert at_share(frame, counts, "score", share)["sysacc"][0] <= best + 1e-9


def test_scores_are_compared_at_one_share() -> None:
    outcomes = make_outcomes(400, rich=True)
    outcomes["noise"] = np.random.default_rng(1).random(1200)
    outcomes["same"], outcomes["routed"] = outcomes["confidence"] * 2 - 1, outcomes["p_true"] < 0.4
    scores = ["confidence", "noise", "same"]
    table = routing.score_table(outcomes, scores, "routed", resamples=500)
    rows = table.set_index(["score", "domain"])
    routed = outcomes.groupby("domain")["routed"].mean()
    assert rows.loc["noise"]["share"].tolist() == pytest.approx([*routed, routed.mean()])
    noise, same = rows.loc[("noise", "mean")], rows.loc[("same", "mean")]
    assert noise["difference_low"] > 0 and noise["p"] == noise["p_holm"] / 2 < 0.01
    assert same["difference"] == 0 and same["p"] == 1 == same["p_holm"]
    assert rows.loc["confidence", "p_holm"].isna().all()
    single = mean_row(routing.score_table(outcomes, ["confidence"], 0.3, resamples=20))
    curve = routing.share_curve(outcomes.assign(domain="all"), resamples=20)
    assert single["area"] > 0.03 and np.isnan(single["p_holm"])
    pooled = routing.score_table(outcomes.assign(domain="all"), ["confidence"], 0.3, resamples=20)
    assert pooled["lift"][0] == pytest.approx(np.interp(0.3, curve["share"], curve["lift"]))


@pytest.mark.parametrize("score", ["confidence", "expected_confidence"])
def test_the_curve_joins_local_and_cloud_through_the_threshold(score: str) -> None:
    outcomes = make_outcomes(rich=True)
    curve = routing.share_curve(outcomes, score, points=1001, resamples=20)
    mean = mean_row(routing.routing_table(outcomes, score=score, resamples=20))
    assert curve["sysacc"].iloc[[0, -1]].tolist() == pytest.approx([mean["raw"], mean["cloud"]])
    for name in ("sysacc", "random", "lift"):
        at = np.interp(mean["routed"], curve["share"], curve[name])
        assert at == pytest.approx(mean[name], abs=2e-3)
    assert (curve["sysacc"] <= curve["oracle"] + 1e-6).all()
    assert curve["lift"].iloc[[0, -1]].abs().max() < 1e-6


def test_the_curve_of_several_seeds_is_the_mean_of_theirs() -> None:
    outcomes = make_seeds(3, 40)
    runs = [routing.share_curve(part, resamples=5) for _, part in outcomes.groupby("seed")]
    both = routing.share_curve(outcomes, resamples=5)
    np.testing.assert_allclose(both["sysacc"], np.mean([run["sysacc"] for run in runs], axis=0))


def test_a_difference_of_rounding_alone_is_0() -> None:
    outcomes = make_outcomes(40, 25, seed=3)
    outcomes["fine"] = np.random.default_rng(3).random(len(outcomes))
    table = routing.score_table(outcomes, ["fine", "confidence"], 1.0, resamples=100)
    rows = table[table["score"] == "confidence"]
    assert (rows[["difference", "difference_low", "difference_high"]] == 0).all(axis=None)
    assert (rows["p"] == 1).all()


@pytest.mark.parametrize("share", [1.5, -0.1, float("nan")])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(ValueError, match="expected 0 to 1"):
        bootstrap(make_outcomes(10, 2), partial(at_share, score="confidence", share=share), 10)


# ---- tau for a purpose


def test_tau_for_a_budget() -> None:
    outcomes = make_outcomes(2000)
    choice = choose_tau(outcomes, max_cloud_share=0.3)
    assert choice.tau == 0.5 and choice.cloud_share <= 0.3 and choice.n == 6000
    assert choose_tau(outcomes.assign(cloud_correct=0.0), max_cloud_share=1).tau == 0
    with pytest.raises(ValueError, match=r"routes at least 1\.000"):
        choose_tau(outcomes.assign(confidence=math.nan), max_cloud_share=0.5)
    for wrong in ({}, {"max_risk": 0.1, "max_cloud_share": 0.1}):
        with pytest.raises(ValueError, match="give one of"):
            choose_tau(outcomes, **wrong)


def test_a_budget_says_how_far_it_is_overrun() -> None:
    """Against choices on new samples of the same world, judged by their true share."""
    rng, grid = np.random.default_rng(0), tuple(np.linspace(0, 1, 101))

    def sample() -> pd.DataFrame:
        frame = make_outcomes(150, 1, int(rng.integers(10**6)))
        return frame.assign(score=rng.random(150))  # so the true share of tau is tau

    choices = [
        choose_tau(sample(), max_cloud_share=0.4, score="score", candidates=grid) for _ in range(40)
    ]
    excess = np.mean([max(choice.tau - 0.4, 0) for choice in choices])
    assert np.mean([choice.overrun for choice in choices]) == pytest.approx(excess, abs=0.004)
    assert excess > 0.002


@pytest.mark.parametrize(
    "options",
    [
        {"max_risk": 20},
        {"max_risk": -1},
        {"max_risk": float("nan")},
        {"max_risk": 0.1, "delta": 2},
        {"max_cloud_share": 30},
        {"max_cloud_share": 0.5, "candidates": []},
    ],
)
def test_tau_for_no_share_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="choose_tau: "):
        routing.choose_tau(make_outcomes(20, 2), **options)


def test_tau_for_a_risk() -> None:
    outcomes = make_outcomes(2000)
    assert choose_tau(outcomes, max_risk=0.3).tau == 0.75  # true risks .50 .37 .32 .24 .15
    assert choose_tau(outcomes, max_risk=0.01).tau == math.inf
    assert choose_tau(outcomes.assign(confidence=math.nan), max_risk=0.5).tau == math.inf
    with pytest.raises(ValueError, match="0 or 1"):
        choose_tau(outcomes.assign(local_correct=0.5), max_risk=0.3)
    assert choose_tau(make_outcomes(600, per_fact=3), max_risk=0.3).n == 600


def test_the_risk_is_that_of_questions_not_of_facts() -> None:
    """Facts of four questions are wrong in 35%, others in 10%: 19% of facts, 27% of questions."""
    rng = np.random.default_rng(0)
    size = np.where(rng.random(900) < 0.36, 4, 1)
    facts = pd.DataFrame({"fact": map(str, range(900)), "domain": "d", "confidence": 1.0})
    facts["local_correct"] = (rng.random(900) > np.where(size == 4, 0.35, 0.10)).astype(float)
    outcomes = facts.loc[facts.index.repeat(size)].reset_index(drop=True).assign(cloud_correct=1.0)
    outcomes["id"] = outcomes.index.astype(str)
    draws = [routing._independent(outcomes, seed) for seed in range(60)]
    assert all(draw["fact"].is_unique for draw in draws)
    wrong = 1 - outcomes["local_correct"].mean()
    drawn = np.mean([1 - draw["local_correct"].mean() for draw in draws])
    assert (
        drawn == pytest.approx(wrong, abs=0.01) and wrong > 0.25 > 1 - facts["local_correct"].mean()
    )
    choices = [choose_tau(outcomes, max_risk=0.25, seed=s, candidates=[0.5]) for s in range(3)]
    assert [choice.tau for choice in choices] == [math.inf] * 3
    assert choose_tau(outcomes, max_risk=0.36, candidates=[0.5]).tau == 0.5  # not always the cloud


@pytest.mark.slow
@pytest.mark.parametrize(("max_risk", "true_safe"), [(0.145, math.inf), (0.24, 1.0), (0.305, 0.75)])
def test_the_risk_bound_fails_at_most_delta_of_the_time(max_risk: float, true_safe: float) -> None:
    # true risks .15 at tau 1, .241 at .75, .310 at .5: the next bucket is just unsafe
    delta, runs = 0.1, 1000
    samples = (make_outcomes(400, 1, seed) for seed in range(runs))
    taus = np.array([choose_tau(s, max_risk=max_risk, delta=delta).tau for s in samples])
    assert np.mean(taus < true_safe) <= delta + 2 * math.sqrt(delta * (1 - delta) / runs)
    assert true_safe == math.inf or np.mean(np.isfinite(taus)) > 0.5


# ---- fitted scores, published rows, display


def test_votes() -> None:
    frame = pd.DataFrame({"votes": ["AAAB", "----", "ABCD"], "local_answer": ["B", "A", None]})
    assert routing.vote_share(frame).tolist() == [0.25, 0, 0]


def test_published_rows_follow_from_their_other_columns() -> None:
    card = routing.published("fg").set_index("domain")
    for name in ("fg", "g1b", "g270"):
        table = routing.published(name).set_index("domain").drop("mean", errors="ignore")
        gap = card["cloud"].reindex(table.index) - table["raw"]  # one cloud serves every edge model
        again = (table["raw"] + table["routed"] / 100 * gap - table["random"]).abs()
        assert again.max() <= 0.1 and again.notna().sum() >= 5
        if "cloud" in table:
            stated = table["cloud"].dropna()
            assert stated.equals(card.loc[stated.index, "cloud"])
    means = card.drop("mean").mean() - card.loc["mean"].astype(float)
    assert means.abs().max() <= 0.1 and card.loc["mean", "lift"] == pytest.approx(4.64, abs=0.01)
    automix = routing.published("automix").set_index("method").loc["FogGen"]
    assert abs(card.loc["mean", "lift"] - automix["lift"]) <= 0.1
    assert automix["routed"] == card.loc["mean", "routed"]
    tasks = routing.published("open_ended").set_index("task")[["r14_raw", "r15_raw"]]
    assert (tasks.drop("mean").mean() - tasks.loc["mean"]).abs().max() <= 0.1
