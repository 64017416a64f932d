"""Routing metrics, published rows, outcomes files, the choice of tau and the baselines."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outcomes_factory import make_outcomes

from foggen import routing
from foggen.routing import OutcomesError, check_outcomes, read_outcomes
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


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        yield


def test_the_toy_table_by_hand() -> None:
    row = routing.routing_table(TOY, resamples=50).iloc[0]
    # c and the unparsed d are routed: 1, 0, 1, 0 right
    assert row[["cloud", "raw", "routed", "sysacc"]].tolist() == [0.75, 0.5, 0.5, 0.5]
    assert row["random"] == 0.625 and row["lift"] == -0.125 and row["oracle"] == 1.0 and row["gap_recovered"] == 0
    assert row["gold_share"] == 0.75 and row["chance"] == (3 / 4 + 1 / 2) / 4 and row["n"] == 4


@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.sampled_from([0, 0.25, 0.5, 1, math.nan])),
        min_size=1,
        max_size=30,
    )
)
@settings(max_examples=40, deadline=None)
def test_metrics_are_their_definitions(rows: list[tuple[bool, bool, float]]) -> None:
    frame = pd.DataFrame(rows, columns=["local_correct", "cloud_correct", "confidence"]).astype(float)
    frame = frame.assign(id=[str(i) for i in range(len(frame))], domain="d")
    row = routing.routing_table(frame, resamples=20).iloc[0]
    keep = np.array([not math.isnan(c) and c >= 0.5 for _, _, c in rows])
    local, cloud = frame["local_correct"], frame["cloud_correct"]
    assert row["sysacc"] == pytest.approx((keep * local + ~keep * cloud).mean())
    assert row["random"] == pytest.approx(keep.mean() * local.mean() + (1 - keep.mean()) * cloud.mean())
    assert row["lift"] == pytest.approx(row["sysacc"] - row["random"])
    assert row["sysacc"] <= row["oracle"] + 1e-9
    assert np.isnan(row["gap_recovered"]) == (cloud.mean() <= local.mean())
    assert not np.isnan(row["gap_recovered"]) or "no gap to recover" in row["note"]


def test_means_are_over_domains_not_questions() -> None:
    outcomes = pd.concat(
        [make_outcomes(30, 1), make_outcomes(300, 1, seed=1).assign(domain="big", id=lambda f: "b" + f["id"])]
    )
    table = routing.routing_table(outcomes, resamples=100)
    inner, mean = table.iloc[:-1], table.iloc[-1]
    for name in ("cloud", "raw", "random", "sysacc", "routed", "lift", "oracle"):
        assert mean[name] == pytest.approx(inner[name].mean())
        assert (table[f"{name}_low"] <= table[name] + 1e-6).all() and (
            table[name] <= table[f"{name}_high"] + 1e-6
        ).all()
    assert mean["gap_recovered"] == pytest.approx((mean["sysacc"] - mean["raw"]) / (mean["cloud"] - mean["raw"]))
    assert table["n"].tolist() == [30, 300, 330]


# ---- published rows


@pytest.mark.parametrize("name", ["fg", "g1b", "g270"])
def test_published_rows_follow_from_their_other_columns(name: str) -> None:
    table = routing.published(name)
    assert (table["random_again"] - table["random"]).abs().max() <= 0.1
    assert table["source"].str.startswith("issai/").all()


def test_published_means_and_lifts() -> None:
    table = routing.published("fg").set_index("domain")
    inner = table.drop("mean")
    for name in ("cloud", "raw", "random", "sysacc", "routed"):
        assert abs(inner[name].mean() - table.loc["mean", name]) <= 0.1
    lift = inner["lift"].mean()
    automix = routing.published("automix").set_index("method")
    assert lift == pytest.approx(4.64, abs=0.01) and abs(lift - automix.loc["FogGen", "lift"]) <= 0.1
    assert automix.loc["FogGen", "routed"] == table.loc["mean", "routed"]
    tasks = routing.published("open_ended").set_index("task")
    assert (
        tasks.drop("mean")[["r14_raw", "r15_raw"]].mean() - tasks.loc["mean", ["r14_raw", "r15_raw"]]
    ).abs().max() <= 0.1


# ---- outcomes files


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_three_formats_read_alike(tmp_path: Path, ending: str) -> None:
    outcomes = make_outcomes(20, rich=True, per_fact=2)
    outcomes.loc[3, "confidence"] = math.nan
    outcomes["domain"] = outcomes["domain"].replace("domain0", "NA")  # a name, not a missing value
    path = tmp_path / f"outcomes.{ending}"
    {
        "csv": lambda: outcomes.to_csv(path, index=False),
        "jsonl": lambda: outcomes.to_json(path, orient="records", lines=True, double_precision=15),
        "parquet": lambda: outcomes.to_parquet(path),
    }[ending]()
    read = read_outcomes(path)
    pd.testing.assert_frame_equal(read, check_outcomes(outcomes), check_dtype=False)
    assert read["domain"].iloc[0] == "NA" and math.isnan(read["confidence"].iloc[3])


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_confidence_that_was_never_readable_is_a_column_too(tmp_path: Path, ending: str) -> None:
    outcomes, path = make_outcomes(20).assign(confidence=None), tmp_path / f"outcomes.{ending}"
    {
        "csv": lambda: outcomes.to_csv(path, index=False),
        "jsonl": lambda: outcomes.to_json(path, orient="records", lines=True),
        "parquet": lambda: outcomes.to_parquet(path),
    }[ending]()
    read = read_outcomes(path)
    assert read["confidence"].isna().all() and (routing.routing_table(read, resamples=5)["routed"] == 1).all()


def test_json_lines_may_be_blank_and_keep_what_they_say(tmp_path: Path) -> None:
    rows = ['{"id": "007", "domain": "2026-01-02", "local_correct": true, "cloud_correct": 1, "confidence": 0.1}', ""]
    rows += [
        '{"id": 9007199254740993, "domain": "заң", "local_correct": 0, "cloud_correct": 1, "confidence": null}',
        "",
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    read = read_outcomes(tmp_path / "a.jsonl")
    assert read["id"].tolist() == ["007", "9007199254740993"] and read["domain"].tolist() == ["2026-01-02", "заң"]
    assert read["local_correct"].tolist() == [1, 0] and read["confidence"].iloc[0] == 0.1
    apart = {**json.loads(rows[0]), "question": "Who\u2028or\x0cwhat\u0085?", "big": 10**30}
    write_jsonl(tmp_path / "b.jsonl", [apart])
    assert read_outcomes(tmp_path / "b.jsonl")["question"].tolist() == ["Who\u2028or\x0cwhat\u0085?"]
    for line in ("{", "[1, 2]", '"text"'):
        (tmp_path / "c.jsonl").write_text(f"{rows[0]}\n\n{line}\n", encoding="utf-8")
        with pytest.raises(OutcomesError, match=r"line 3.*expected: one JSON object a line"):
            read_outcomes(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (
            "confidence",
            "high",
            r"row 2, column `confidence`: 'high'; expected a number from 0 to 1, or empty",
        ),
        ("confidence", 1.5, r"row 2, column `confidence`: 1.5; expected a number from 0 to 1"),
        ("local_correct", "", r"row 2, column `local_correct`: ''; expected a number from 0 to 1"),
        ("cloud_correct", math.nan, r"row 2, column `cloud_correct`: nan"),
        ("id", "a", r"row 2, column `id`: 'a' is there twice"),
        ("domain", "mean", r"row 2, column `domain`: 'mean'; expected a name other than mean"),
        ("domain", None, r"row 2, column `domain`"),
        ("n_options", 1, r"row 2, column `n_options`: 1; expected a number of at least 2"),
        ("votes", "AB?", r"row 2, column `votes`: 'AB\?'; expected one letter a sample"),
        ("local_tokens", math.inf, r"row 2, column `local_tokens`: inf"),
    ],
)
def test_wrong_values_are_named(column: str, value: object, message: str) -> None:
    frame = TOY.assign(votes="AAAAAAA-", local_tokens=3).astype(object)
    frame.loc[1, column] = value
    with pytest.raises(OutcomesError, match="^mine: " + message):
        check_outcomes(frame, "mine")


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(OutcomesError, match="no such file"):
        read_outcomes(tmp_path / "none.csv")
    for name, text in {
        "a.txt": "x",
        "b.csv": "",
        "c.csv": "id\n1\n",
        "d.jsonl": "{",
        "e.parquet": "x",
        "f.jsonl": "",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(OutcomesError, match=name):
            read_outcomes(tmp_path / name)
    with pytest.raises(OutcomesError, match="no rows"):
        check_outcomes(TOY.iloc[:0])


def test_all_problems_are_reported_together_and_booleans_are_read() -> None:
    frame = TOY.astype(object)
    frame.loc[:, "local_correct"] = 7
    frame.loc[2, "confidence"] = "?"
    with pytest.raises(OutcomesError) as caught:
        check_outcomes(frame)
    assert str(caught.value).count("\n") == 4
    assert check_outcomes(TOY.assign(local_correct=["True", "false", False, True]))["local_correct"].tolist() == [
        1,
        0,
        0,
        1,
    ]
    with pytest.raises(OutcomesError, match="and 3980 more"):
        check_outcomes(pd.concat([TOY.assign(local_correct=2)] * 1000))


# ---- degenerate outcomes


def degenerate() -> dict[str, pd.DataFrame]:
    outcomes = make_outcomes(12, 2)
    empty = outcomes.assign(domain=pd.Categorical(outcomes["domain"], ["domain0", "domain1", "empty"]))
    return {
        "one class": outcomes.assign(local_correct=1.0),
        "always wrong": outcomes.assign(local_correct=0.0, cloud_correct=0.0),
        "all routed": outcomes.assign(confidence=0.0),
        "none routed": outcomes.assign(confidence=1.0),
        "cloud worse": outcomes.assign(local_correct=1.0, cloud_correct=0.0),
        "a domain empty": empty,
        "never parsed": outcomes.assign(confidence=math.nan),
        "ties": outcomes.assign(confidence=0.5),
        "one question": outcomes.iloc[:1],
    }


@pytest.mark.parametrize("name", degenerate())
def test_degenerate_outcomes_have_no_unexplained_nan(name: str) -> None:
    outcomes = degenerate()[name].assign(n_options=4, gold="A", votes="AAAAAAAA", sample_tokens=80)
    tables = [routing.routing_table(outcomes, resamples=50), routing.baselines_table(outcomes, resamples=50)]
    tables += [
        routing.stats.calibration_table(outcomes, resamples=50),
        routing.sweep_table(outcomes, resamples=50),
    ]
    for table in tables:
        hollow = table.drop(columns="note").isna().any(axis=1)
        assert (table.loc[hollow, "note"] != "").all()
        assert not np.isinf(table.select_dtypes(float).drop(columns="tau", errors="ignore")).any().any()
    curve = routing.share_curve(outcomes, resamples=20)
    assert curve.notna().all().all()


def test_degenerate_values() -> None:
    found = {name: routing.routing_table(outcomes, resamples=50).iloc[-1] for name, outcomes in degenerate().items()}
    assert found["all routed"]["sysacc"] == found["all routed"]["cloud"] and found["all routed"]["lift"] == 0
    assert found["never parsed"]["routed"] == 1 and found["none routed"]["routed"] == 0
    assert found["none routed"]["sysacc"] == found["none routed"]["raw"] and found["none routed"]["lift"] == 0
    assert found["cloud worse"]["sysacc"] < 1 and "no gap to recover" in found["cloud worse"]["note"]
    assert "without empty" in found["a domain empty"]["note"]
    assert routing.routing_table(degenerate()["a domain empty"], resamples=5)["note"].iloc[2] == "no questions"


def test_seed_columns() -> None:
    runs = pd.concat([make_outcomes(50, seed=s).assign(seed=s) for s in range(3)], ignore_index=True)
    table = routing.routing_table(runs, resamples=50)
    each = [routing.routing_table(part, resamples=1)["lift"] for _, part in runs.groupby("seed")]
    np.testing.assert_allclose(table["lift_seed_sd"], np.std(each, axis=0, ddof=1))
    assert (table["n"] == [50, 50, 50, 150]).all()


# ---- sweep, curve, display


def test_sweep_routes_more_as_tau_rises() -> None:
    table = routing.sweep_table(make_outcomes(), resamples=20)
    routed = table[table["domain"] == "mean"]["routed"]
    assert routed.is_monotonic_increasing and routed.iloc[0] == 0 and len(table) == 5 * 4


@pytest.mark.parametrize("score", ["confidence", "graded_confidence"])
def test_the_curve_joins_local_and_cloud_through_the_threshold(score: str) -> None:
    outcomes = make_outcomes(rich=True)
    curve = routing.share_curve(outcomes, score, points=1001, resamples=20)
    mean = routing.routing_table(outcomes, score=score, resamples=20).iloc[-1]
    assert curve["sysacc"].iloc[[0, -1]].tolist() == pytest.approx([mean["raw"], mean["cloud"]])
    at = np.interp(mean["routed"], curve["share"], curve["sysacc"])
    assert at == pytest.approx(mean["sysacc"], abs=2e-3)
    assert (curve["sysacc"] <= curve["oracle"] + 1e-9).all()
    assert curve["lift"].iloc[[0, -1]].abs().max() < 1e-9


def test_percent() -> None:
    table = pd.DataFrame({"domain": ["a", "b"], "n": [3, 0], "lift": [0.046, math.nan], "lift_low": [0.04, math.nan]})
    shown = routing.percent(table.assign(lift_high=[0.05, math.nan], raw=[-1e-9, 1.0], p=[0.0001, math.nan]))
    assert shown["lift"].tolist() == ["+4.6 [+4.0, +5.0]", "-"] and shown["raw"].tolist() == ["0.0", "100.0"]
    assert shown["p"].tolist() == ["0.0001", "-"] and shown["n"].tolist() == [3, 0]


# ---- tau for a purpose


def test_tau_for_a_budget() -> None:
    outcomes = make_outcomes(2000)
    choice = routing.choose_tau(outcomes, max_cloud_share=0.3)
    assert choice.tau == 0.5 and choice.cloud_share <= 0.3 and choice.n == 6000
    assert routing.choose_tau(outcomes.assign(cloud_correct=0.0), max_cloud_share=1).tau == 0
    with pytest.raises(ValueError, match=r"the least is 1\.000"):
        routing.choose_tau(outcomes.assign(confidence=math.nan), max_cloud_share=0.5)
    for wrong in ({}, {"max_risk": 0.1, "max_cloud_share": 0.1}):
        with pytest.raises(ValueError, match="give one of"):
            routing.choose_tau(outcomes, **wrong)


def test_tau_for_a_risk() -> None:
    outcomes = make_outcomes(2000)
    assert routing.choose_tau(outcomes, max_risk=0.3).tau == 0.75  # true risks .50 .37 .32 .24 .15
    assert routing.choose_tau(outcomes, max_risk=0.01).tau == math.inf
    assert routing.choose_tau(outcomes.assign(confidence=math.nan), max_risk=0.5).tau == math.inf
    with pytest.raises(ValueError, match="0 or 1"):
        routing.choose_tau(outcomes.assign(local_correct=0.5), max_risk=0.3)
    assert routing.choose_tau(make_outcomes(600, per_fact=3), max_risk=0.3).n == 600


@pytest.mark.slow
@pytest.mark.parametrize(("max_risk", "true_safe"), [(0.145, math.inf), (0.24, 1.0), (0.305, 0.75)])
def test_the_risk_bound_fails_at_most_delta_of_the_time(max_risk: float, true_safe: float) -> None:
    # true risks .15 at tau 1, .241 at .75, .310 at .5: the next bucket is just unsafe
    delta, runs = 0.1, 1000
    taus = [routing.choose_tau(make_outcomes(400, 1, seed), max_risk=max_risk, delta=delta).tau for seed in range(runs)]
    failed = np.mean(np.array(taus) < true_safe)
    assert failed <= delta + 2 * math.sqrt(delta * (1 - delta) / runs)
    assert true_safe == math.inf or np.mean(np.isfinite(taus)) > 0.5  # not bought by always asking the cloud


# ---- baselines


def test_baselines_at_matched_share() -> None:
    outcomes, train = (
        make_outcomes(rich=True),
        make_outcomes(rich=True, seed=9).assign(id=lambda f: "t" + f["id"]),
    )
    table = routing.baselines_table(outcomes, train, resamples=200)
    mean = table[table["domain"] == "mean"].set_index("method")
    plain = routing.routing_table(outcomes, resamples=10).iloc[-1]
    assert mean.loc["FogGen", "sysacc"] == pytest.approx(plain["sysacc"]) and mean.loc["FogGen", "difference"] == 0
    assert mean.loc["oracle", "sysacc"] == pytest.approx(plain["oracle"])
    assert mean.loc[["random", "always 1.0", "cloud only", "local only"], "lift"].abs().max() < 1e-9
    assert mean.loc["cloud only", "sysacc"] == pytest.approx(plain["cloud"])
    matched = mean.drop(["cloud only", "local only"])
    np.testing.assert_allclose(matched["share"], plain["routed"])
    assert mean.loc["text-only router", "auroc"] > 0.6
    kept = (outcomes["confidence"] >= 0.5).mean()  # those two decide before the edge model runs
    passes = {"text-only router": kept, "random": kept, "P(True)": 2, "self-consistency": 9, "cloud only": 0}
    assert mean["forward_passes"].to_dict() == pytest.approx(dict.fromkeys(mean.index, 1) | passes)
    assert mean.loc["self-consistency", "extra_tokens"] == 112
    assert (table["p_holm"].dropna() >= table["p"].dropna()).all()


def test_baselines_without_optional_columns() -> None:
    outcomes = make_outcomes(50)
    table = routing.baselines_table(outcomes, resamples=20)
    assert set(table["method"]) == {"FogGen", "always 1.0", "random", "oracle", "cloud only", "local only"}
    same = outcomes.assign(graded_confidence=outcomes["confidence"], votes="AAAA")  # and no sample_tokens
    table = routing.baselines_table(same, resamples=20).set_index(["method", "domain"])
    graded, voted = table.loc[("graded confidence", "mean")], table.loc[("self-consistency", "mean")]
    assert graded["difference"] == 0 and graded["p"] == 1 and "extra_tokens: needs" in voted["note"]


def test_votes() -> None:
    frame = pd.DataFrame({"votes": ["AAAB", "----", "ABCD"], "local_answer": ["B", "A", ""]})
    assert routing.vote_share(frame).tolist() == [0.25, 0, 0]
    assert routing.vote_share(frame[["votes"]]).tolist() == [0.75, 0, 0.25]


def test_text_router() -> None:
    train, test = (
        make_outcomes(rich=True, seed=1).assign(id=lambda f: "t" + f["id"]),
        make_outcomes(rich=True),
    )
    assert (routing.text_router(train.assign(local_correct=1.0), test) == 1).all()
    with pytest.raises(ValueError, match="900 test questions are in train"):
        routing.text_router(test, test)
