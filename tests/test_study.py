"""The reference study's table, on outcomes whose truth is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from foggen import stats, study
from foggen.questions import DOMAINS


def outcomes(seeds: int = 2, n: int = 60) -> pd.DataFrame:
    """`foggen` knows what it knows; the other checkpoints state a constant or chance confidence."""
    rows = []
    for seed in range(seeds):
        dice = np.random.default_rng(seed)
        for domain in DOMAINS:
            right = dice.random(n) < 0.5
            cloud = (dice.random(n) < 0.9).astype(int)
            said = {
                "R0": np.ones(n),
                "foggen": np.where(right ^ (dice.random(n) < 0.1), 1.0, 0.0),
                "random labels": dice.choice([0.0, 1.0], n),
                "permuted labels": dice.choice([0.0, 1.0], n),
                "no replay": dice.choice([0.0, 1.0], n),
            }
            for variant, confidence in said.items():
                rows.append(
                    pd.DataFrame(
                        {
                            "id": [f"{domain}-{i}" for i in range(n)],
                            "domain": domain,
                            "variant": variant,
                            "seed": seed,
                        }
                        | {
                            "fact": [f"{domain}/{i // 2}" for i in range(n)],
                            "local_correct": right.astype(int),
                        }
                        | {"cloud_correct": cloud, "confidence": confidence, "graded_confidence": confidence}
                    )
                )
    return pd.concat(rows, ignore_index=True)


@pytest.fixture(scope="module")
def summary() -> pd.DataFrame:
    return study.summarise(outcomes(), resamples=300)


def value(summary: pd.DataFrame, variant: str, metric: str) -> pd.Series:
    row = summary[(summary["variant"] == variant) & (summary["metric"] == metric) & (summary["domain"] == stats.MEAN)]
    assert len(row) == 1
    return row.iloc[0]


def test_a_constant_confidence_has_no_lift(summary: pd.DataFrame) -> None:
    base = value(summary, "R0", "lift")
    assert base["value"] == base["low"] == base["high"] == 0
    assert value(summary, "R0", "auroc")["value"] == pytest.approx(0.5)


def test_knowing_lifts_and_chance_does_not(summary: pd.DataFrame) -> None:
    assert value(summary, "foggen", "lift")["low"] > 0.1
    control = value(summary, "permuted labels", "lift")
    assert control["low"] < 0 < control["high"]
    assert control["difference_low"] > 0.1


def test_the_table_says_how_much_it_rests_on(summary: pd.DataFrame) -> None:
    assert set(summary["n"]) == {60 * len(DOMAINS)} and set(summary["seeds"]) == {2}
    assert value(summary, "foggen", "lift")["seed_sd"] >= 0
    assert set(summary["domain"]) == {*DOMAINS, stats.MEAN}


def test_the_readme_table_has_a_line_a_variant(summary: pd.DataFrame) -> None:
    table = study.readme_table(summary, "pocket")
    assert all(name in table for name in study.SHOWN.values())
    assert "420 test questions, 2 seeds" in table


def test_the_branch_is_compared_with_its_chain_seed_by_seed() -> None:
    """R15 gets two open-ended answers in ten right that R14 does not, and changes nothing on the seven domains."""
    rows = []
    for seed in (0, 1):
        for kind, domain in (("open-ended", "squad"), ("open-ended", "gsm8k"), ("seven domains", "law")):
            for i in range(100):
                for checkpoint in ("R14", "R15"):
                    right = i % 10 < 4 or (checkpoint == "R15" and kind == "open-ended" and i % 10 < 6)
                    rows.append(
                        {"id": f"{domain}-{i}", "fact": f"{domain}/{i}", "domain": domain, "seed": seed}
                        | {"set": kind, "checkpoint": checkpoint, "local_correct": int(right)}
                        | {"cloud_correct": 1, "confidence": float(right)}
                    )
    table = study.branch_summary(pd.DataFrame(rows), resamples=300).set_index(["set", "domain"])
    gained, kept = (table.loc[(kind, stats.MEAN)] for kind in ("open-ended", "seven domains"))
    assert gained["difference"] == pytest.approx(0.2) and gained["difference_low"] > 0.1
    assert kept["difference"] == kept["difference_low"] == kept["difference_high"] == 0
    assert gained["n"] == 400 and gained["R15_auroc"] == 1 and gained["seeds"] == 2
