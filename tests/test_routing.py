"""Outcomes files, routing metrics, published rows, the choice of tau and fitted scores."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outcomes_factory import make_outcomes, make_seeds

from foggen import resampling, routing, stats
from foggen.routing import OutcomesError, check_outcomes, choose_tau, read_outcomes
from foggen.store import write_jsonl

TOY = pd.DataFrame(
    {
        "id": ["a", "b", "c", "d"],
        "domain": "toy",
        "local_correct": [1.0, 0.0, 0.0, 1.0],
        "cloud_correct": [1.0, 1.0, 1.0, 0.0],
        "confidence": [1.0, 0.5, 0.25, math.nan],
        "gold": ["A", "A", "B", "A"],
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
    outcomes.loc[5, "local_answer"] = "None"
    read = read_outcomes(write(tmp_path / f"outcomes{ending}", outcomes))
    pd.testing.assert_frame_equal(read, check_outcomes(outcomes), check_dtype=False)
    assert list(read["domain"].unique()) == list(names.values())
    assert math.isnan(read["confidence"][3]) and read["local_answer"][5] == "None"
    table = routing.routing_table(read, resamples=50)
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
    assert len(set(resampling.fact_codes(read))) == len({*names} - {None}) + blank
    floats = check_outcomes(outcomes.assign(fact=[0.0, 0.0, 12.0, math.nan], id=[7, 8, 9.0, "x"]))
    assert floats["fact"].tolist()[:3] == ["0", "0", "12"] and floats["fact"].isna()[3]
    assert floats["id"].tolist() == ["7", "8", "9", "x"]


@FORMATS
def test_a_confidence_that_was_never_readable_is_a_column_too(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"outcomes{ending}", make_outcomes(20).assign(confidence=None))
    read = read_outcomes(path)
    assert read["confidence"].isna().all()
    assert (routing.routing_table(read, resamples=5)["routed"] == 1).all()


def test_json_lines_keep_what_they_say(tmp_path: Path) -> None:
    path, rest = tmp_path / "a.jsonl", '"cloud_correct": 1, "confidence":'
    row = f'{{"id": "007", "domain": "2026-01-02", "local_correct": true, {rest} 0.1}}'
    big = f'{{"id": 9007199254740993, "domain": "заң", "local_correct": 0, {rest} null}}'
    path.write_text(f"\ufeff{row}\n\n{big}\n", encoding="utf-8")
    read = read_outcomes(path)
    assert read["id"].tolist() == ["007", "9007199254740993"]
    assert read["domain"].tolist() == ["2026-01-02", "заң"]
    assert read["local_correct"].tolist() == [1, 0] and read["confidence"][0] == 0.1
    apart = {**json.loads(row), "question": "Who\u2028or\x0cwhat\u0085?", "big": 10**30}
    assert read_outcomes(write_jsonl(path, [apart]))["question"][0] == "Who\u2028or\x0cwhat\u0085?"
    # A key may lack where the column is optional; a row without a required one is a bad row
    optional = {**json.loads(big), "fact": "f", "verification": 0.5}
    assert read_outcomes(write_jsonl(path, [json.loads(row), optional]))["fact"].isna()[0]
    short = {name: value for name, value in apart.items() if name != "confidence"}
    with pytest.raises(OutcomesError, match=r"a\.jsonl, line 2, column `confidence`: missing"):
        read_outcomes(write_jsonl(path, [{**apart, "id": "b"}, short]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,domain,local_correct,cloud_correct,confidence\na,law,1,1,0.5,\n", "row 1: 6 fields"),
        ("id,domain,local_correct,cloud_correct,confidence\na,law,1,1,1\nb,law,1\n", "row 2: 3"),
        ("id,domain,local_correct,cloud_correct,confidence,id\na,law,1,1,0.5,b\n", "'id'.*twice"),
        ("id;domain;local_correct;cloud_correct;confidence\na;law;1;1;0,5\n", "semicolons"),
        ("id\n1\n", "no column `domain`; expected id, domain, local_correct"),
        (
            "id,domain,local_correct,cloud_correct,confidence\n",
            "no rows; expected one per question",
        ),
        ("", "no rows"),
    ],
)
def test_tables_that_cannot_be_read_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(OutcomesError, match=rf"mine\.csv.*{message}"):
        read_outcomes(tmp_path / "mine.csv")


UTF16 = TOY[REQUIRED].to_csv(index=False).encode("utf-16")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[("a.txt", b"x"), ("b.csv", UTF16), ("c.csv", b"\0\1"), ("d.csv", b"\xff\xfe\xfa")],
        *[("e.csv", None), ("f.jsonl", b"{"), ("g.jsonl", b'"text"'), ("h.parquet", b"x")],
    ],
)
def test_files_of_another_kind_are_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OutcomesError, match=name):
        read_outcomes(tmp_path / name)


def test_long_fields_and_ids_in_an_index_are_read(tmp_path: Path) -> None:
    long = TOY[REQUIRED].assign(question="x" * 200_000)
    assert len(read_outcomes(write(tmp_path / "long.csv", long))["question"][0]) == 200_000
    TOY[REQUIRED].set_index("id").to_parquet(tmp_path / "index.parquet")
    assert read_outcomes(tmp_path / "index.parquet")["id"].tolist() == list("abcd")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("confidence", "high", "'high'; expected a number from 0 to 1, or empty"),
        ("confidence", "None", "'None'; expected a number from 0 to 1, or empty"),  # a text
        ("confidence", "0,5", "'0,5'; expected"),
        ("confidence", 1.5, "1.5; expected a number from 0 to 1"),
        ("confidence", "9" * 5000, "'9{59}; expected"),
        ("local_correct", "", "''; expected a number from 0 to 1"),
        ("cloud_correct", math.nan, "None; expected a number from 0 to 1"),
        ("id", "a", "'a' is there twice"),
        ("id", " ", "' '; expected a name"),
        ("domain", "mean", "'mean'; expected a name other than mean"),
        ("domain", " mean ", "' mean '; expected a name other than mean"),
        ("domain", None, "None; expected a name other than mean"),
        ("fact", [1], r"\[1\]; expected a name"),
        ("n_options", 1, "1; expected a number of at least 2"),
        ("votes", "AB?", r"'AB\?'; expected a letter per sample"),
        ("local_tokens", math.inf, "inf; expected a number of at least 0"),
        ("mine", 2, "2; expected a number from 0 to 1, or empty"),
    ],
)
def test_wrong_values_are_named(column: str, value: object, message: str) -> None:
    frame = TOY.assign(votes="AAAAAAA-", local_tokens=3, fact=None, mine=0.5).astype(object)
    frame.at[1, column] = value
    with pytest.raises(OutcomesError, match=f"^mine, row 2, column `{column}`: {message}"):
        check_outcomes(frame, "mine", scores=["mine"])


def test_seeds_in_other_writings_are_the_same(tmp_path: Path) -> None:
    rows = [dict(id="a", domain="d", local_correct=1, cloud_correct=1, confidence=1)] * 3
    rows = [{**row, "seed": seed} for row, seed in zip(rows, (0, 0.0, None), strict=True)]
    file = tmp_path / "o.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(routing.OutcomesError) as error:
        routing.read_outcomes(file)
    assert str(error.value).count("'a' is there twice") == 2


def test_a_column_named_by_a_number_is_kept() -> None:
    outcomes = make_outcomes(5, 1)
    outcomes[0] = 7
    assert routing.check_outcomes(outcomes)["0"].tolist() == [7] * 5


def test_all_problems_come_together() -> None:
    frame = TOY.astype(object)
    frame.loc[:, "local_correct"] = 7
    frame.loc[2, "confidence"], frame.loc[3, "id"] = "?", "a"
    with pytest.raises(OutcomesError) as caught:
        check_outcomes(frame)
    assert str(caught.value).count("\n") == 5
    with pytest.raises(OutcomesError, match="and 3980 more"):
        check_outcomes(pd.concat([TOY.assign(local_correct=2)] * 1000).assign(seed=range(4000)))


def test_what_is_read_generously(tmp_path: Path) -> None:
    words = TOY.assign(
        local_correct=["True", "false", False, "1"], confidence=["nan", "", " ", "1"]
    )
    checked = check_outcomes(words)
    assert checked["local_correct"].tolist() == [1, 0, 0, 1]
    assert checked["confidence"].isna().tolist() == [True, True, True, False]
    assert check_outcomes(make_seeds(2))["seed"].nunique() == 2  # an id once per seed
    path = write(tmp_path / "mine.csv", TOY.assign(mine=["0.5", "1", None, "0"], other="7"))
    read = read_outcomes(path, scores=["mine"])
    assert read["mine"].tolist()[:2] == [0.5, 1] and read["other"].tolist() == ["7"] * 4
    assert stats.score_table(read, ["mine"], 0.5, resamples=20)["share"][0] == 0.5
    with pytest.raises(OutcomesError, match="no column `yours`"):
        read_outcomes(path, scores=["yours"])


# ---- metrics


def test_the_toy_table_by_hand() -> None:
    row = routing.routing_table(TOY, resamples=50).iloc[0]
    # c and the unparsed d are routed: 1, 0, 1, 0 right
    assert row[["cloud", "raw", "routed", "sysacc"]].tolist() == [0.75, 0.5, 0.5, 0.5]
    assert row[["random", "lift", "oracle", "gap_recovered"]].tolist() == [0.625, -0.125, 1, 0]
    assert row["gold_share"] == 0.75 and row["chance"] == (3 / 4 + 1 / 2) / 4 and row["n"] == 4


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
    assert np.isnan(row["gap_recovered"]) == (cloud.mean() <= local.mean())
    assert not np.isnan(row["gap_recovered"]) or "no better than the edge" in row["note"]


def test_means_are_over_domains_not_questions() -> None:
    big = make_outcomes(300, 1, seed=1).assign(domain="big", id=lambda f: "b" + f["id"])
    table = routing.routing_table(pd.concat([make_outcomes(30, 1), big]), resamples=100)
    inner, mean = table.iloc[:-1], table.iloc[-1]
    for name in ("cloud", "raw", "random", "sysacc", "routed", "lift", "oracle"):
        assert mean[name] == pytest.approx(inner[name].mean())
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
    gap = (mean["sysacc"] - mean["raw"]) / (mean["cloud"] - mean["raw"])
    assert mean["gap_recovered"] == pytest.approx(gap)
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
    names = pd.CategoricalDtype(["domain0", "domain1", "empty"])
    frames = {name: outcomes.assign(**columns) for name, columns in values.items()}
    frames |= {"a domain empty": outcomes.astype({"domain": names}), "one question": outcomes[:1]}
    return frames | {"two seeds": pd.concat([outcomes.assign(seed=s) for s in (0, 1)])}


@pytest.mark.parametrize("name", degenerate())
def test_degenerate_outcomes_have_no_unexplained_nan(name: str) -> None:
    outcomes = degenerate()[name].assign(n_options=4, gold="A", other=0.5)
    tables = [
        routing.routing_table(outcomes, resamples=60),
        stats.calibration_table(outcomes, resamples=60),
        stats.score_table(outcomes, ["confidence", "other"], 0.3, resamples=60),
    ]
    for table in tables:
        hollow = table.drop(columns=["note", "p_holm"], errors="ignore").isna().any(axis=1)
        assert (table.loc[hollow, "note"] != "").all()
        assert not np.isinf(table.select_dtypes(float).to_numpy()).any()
    curve = stats.share_curve(outcomes, points=11, resamples=20)
    assert curve.notna().all(axis=None)


def test_degenerate_values() -> None:
    tables = {
        name: routing.routing_table(frame, resamples=50) for name, frame in degenerate().items()
    }
    result = {name: table.iloc[-1] for name, table in tables.items()}
    for name, same in (("all routed", "cloud"), ("none routed", "raw")):
        assert result[name]["sysacc"] == pytest.approx(result[name][same], abs=1e-12)
        assert result[name]["lift"] == 0
    assert result["never parsed"]["routed"] == 1 and result["none routed"]["routed"] == 0
    assert "gap_recovered: the cloud is no better" in result["cloud worse"]["note"]
    assert tables["a domain empty"]["note"][2] == "no questions"


def test_sweep_routes_more_as_tau_rises() -> None:
    table = routing.sweep_table(make_outcomes(), resamples=20)
    routed = table[table["domain"] == "mean"]["routed"]
    assert routed.is_monotonic_increasing and routed.iloc[0] == 0 and len(table) == 5 * 4


# ---- tau for a purpose


def test_tau_for_a_budget() -> None:
    outcomes = make_outcomes(2000)
    choice = choose_tau(outcomes, max_cloud_share=0.3)
    assert choice.tau == 0.5 and choice.cloud_share <= 0.3 and choice.n == 6000
    assert choose_tau(outcomes.assign(cloud_correct=0.0), max_cloud_share=1).tau == 0
    with pytest.raises(ValueError, match=r"the least is 1\.000"):
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
    assert excess > 0.002 and f"{choices[0].overrun:.3f}" in choices[0].reason


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
        assert table["source"].str.startswith("issai/").all()
        if "cloud" in table:
            stated = table["cloud"].dropna()
            assert stated.equals(card.loc[stated.index, "cloud"])
    means = card.drop("mean").mean(numeric_only=True) - card.loc["mean"].drop("source").astype(
        float
    )
    assert means.abs().max() <= 0.1 and card.loc["mean", "lift"] == pytest.approx(4.64, abs=0.01)
    automix = routing.published("automix").set_index("method").loc["FogGen"]
    assert abs(card.loc["mean", "lift"] - automix["lift"]) <= 0.1
    assert automix["routed"] == card.loc["mean", "routed"]
    tasks = routing.published("open_ended").set_index("task")[["r14_raw", "r15_raw"]]
    assert (tasks.drop("mean").mean() - tasks.loc["mean"]).abs().max() <= 0.1
