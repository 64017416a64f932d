"""The reference study: the chain and its controls, each with several seeds, on the test questions.

`python -m foggen.study` writes `data/results/<profile>/`: the outcomes of every checkpoint, the rounds' curves and
the table that the notebooks and the README show. Chains are stages of a run folder, so it can be killed and goes on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from foggen import data, open_ended, stats
from foggen.config import Settings, load_profile
from foggen.outcomes import Examination, OpenExamination
from foggen.questions import TASKS, subset
from foggen.rounds import Loan, Round, edge_engine, run_chain, run_r15
from foggen.routing import routing_metrics, routing_table
from foggen.stats import CALIBRATION, Array
from foggen.store import LOCK_VARIABLE, ROOT, Store, fill, progress, write_json

# What is changed against the profile. The controls break the link between label and question, or drop the replay.
VARIANTS: dict[str, dict[str, Any]] = {
    "foggen": {},
    "random labels": {"label_control": "random"},
    "permuted labels": {"label_control": "permuted"},
    "no replay": {"replay_rows": 0},
}
BASE = "R0"
METRICS = ("raw", "routed", "lift", "auroc", "graded_auroc", "ece", "graded_ece")
KEPT = (
    "id",
    "domain",
    "fact",
    "difficulty",
    "local_correct",
    "cloud_correct",
    "confidence",
    "graded_confidence",
)


def results_folder(profile: str) -> Path:
    """Where a profile's reference results lie."""
    return ROOT / "data" / "results" / profile


def run_variant(settings: Settings, store: Store, variant: str) -> tuple[list[pd.DataFrame], pd.DataFrame]:
    """Outcomes of R0 and of the last round on the test questions, and one row a round."""
    parts = data.splits(settings)
    asked = subset(parts["test"], settings.test_questions, 0)
    results = run_chain(settings, store, parts["train"], parts["dev"])
    examination = Examination(settings, store, "test", asked, Loan(edge_engine(settings)))
    names = {question.id: question.difficulty for question in asked}
    # R0 is the same in every variant: it is examined once a seed.
    checkpoints = {variant: results[-1]} | ({BASE: results[0]} if variant == "foggen" else {})
    tables = []
    for label, result in checkpoints.items():
        table = examination.outcomes(label.replace(" ", "-"), result.model, ("scores",))
        table["difficulty"] = table["id"].map(names)
        tables.append(table[list(KEPT)].assign(variant=label, seed=settings.seed))
    examination.edge.close()
    return tables, rounds_table(results).assign(variant=variant, seed=settings.seed)


def run_branch(settings: Settings, store: Store) -> pd.DataFrame:
    """Outcomes of the chain's last round (R14) and of its branch round (R15), on both `sets` of test questions."""
    parts, pools = data.splits(settings), data.open_splits(settings)
    results = run_chain(settings, store, parts["train"], parts["dev"])
    loan = Loan(edge_engine(settings))
    branch = run_r15(settings, store, results, open_ended.r15_questions(pools["train"], settings), loan)
    limits = dict.fromkeys(TASKS, settings.open_ended.eval_questions)
    opened = OpenExamination(settings, store, "open", open_ended.first(pools["test"], limits), loan)
    chosen = Examination(settings, store, "test", subset(parts["test"], settings.test_questions, 0), loan)
    tables = []
    for name, label, model in (("R14", "foggen", results[-1].model), ("R15", "R15", branch.model)):
        sets = {
            "open-ended": opened.outcomes(label, model),
            "seven domains": chosen.outcomes(label, model, ()),
        }
        tables += [
            table[[column for column in KEPT if column in table]].assign(set=kind, checkpoint=name, seed=settings.seed)
            for kind, table in sets.items()
        ]
    loan.close()
    return pd.concat(tables, ignore_index=True)


def branch_summary(outcomes: pd.DataFrame, resamples: int = 10_000) -> pd.DataFrame:
    """R14 against R15 on both sets of questions: accuracy, its paired difference, lift and AUROC, seeds pooled.

    A row a set and domain (and their mean), with 95% intervals that resample facts; n counts questions times seeds.
    """
    pooled = outcomes.assign(id=outcomes["seed"].astype(str) + "/" + outcomes["id"])
    tables = []
    for kind, both in pooled.groupby("set"):
        r14, r15 = (both[both["checkpoint"] == name] for name in ("R14", "R15"))
        table = stats.paired_change(r14, r15, resamples=resamples).drop(columns="note")
        for name, one in (("R14", r14), ("R15", r15)):
            more = routing_table(one, 0.5).merge(stats.calibration_table(one, resamples=2000), on="domain")
            more = more[["domain", *more.filter(regex="^(cloud|sysacc|routed|lift|auroc)(_low|_high)?$")]]
            table = table.merge(more.set_index("domain").add_prefix(f"{name}_").reset_index(), on="domain")
        tables.append(table.assign(set=kind))
    return pd.concat(tables, ignore_index=True).assign(seeds=outcomes["seed"].nunique())


def rounds_table(results: Sequence[Round]) -> pd.DataFrame:
    """One row a round: number, domain, labels, training and dev metrics."""
    return pd.DataFrame([result.record() for result in results])


def _chain(profile: str, run: str, variant: str, seed: int) -> tuple[list[pd.DataFrame], pd.DataFrame, Any]:
    """What one chain of the study adds: outcomes, curve, and the branch round's outcomes (of the plain chain)."""
    progress(f"== {variant}, seed {seed}")
    settings, store = load_profile(profile, {"seed": seed, **VARIANTS[variant]}), Store(run)
    tables, curve = run_variant(settings, store, variant)
    return tables, curve, run_branch(settings, store) if variant == "foggen" else None


def run_study(profile: str, run: str, seeds: Sequence[int], jobs: int = 1) -> Path:
    """Runs every variant with every seed, and writes outcomes, curves, summaries and the settings they came from.

    `jobs` chains run at a time, each in a process of its own.
    """
    folder = results_folder(profile)
    store = Store(run)
    with store.locked():
        os.environ[LOCK_VARIABLE] = str(store.run)  # the lock holds for the chains' processes too
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            asked = [(profile, run, variant, seed) for variant in VARIANTS for seed in seeds]
            outcomes, curves, branches = zip(*pool.map(_chain, *zip(*asked, strict=True)), strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.concat([one for tables in outcomes for one in tables], ignore_index=True)
    table.to_parquet(folder / "outcomes.parquet", index=False, compression="zstd")
    pd.concat(curves, ignore_index=True).to_csv(folder / "rounds.csv", index=False)
    summarise(table).to_csv(folder / "summary.csv", index=False)
    branch = pd.concat([one for one in branches if one is not None], ignore_index=True)
    branch.to_parquet(folder / "branch_outcomes.parquet", index=False, compression="zstd")
    branch_summary(branch).to_csv(folder / "branch.csv", index=False)
    command = f"python -m foggen.study --profile {profile} --seeds {' '.join(map(str, seeds))}"
    recipe = load_profile(profile).model_dump(mode="json")
    write_json(folder / "study.json", {"command": command, "seeds": list(seeds), "settings": recipe})
    return folder


def load_results(profile: str = "pocket") -> dict[str, pd.DataFrame]:
    """The stored results: `outcomes`, `rounds`, `summary` and `branch` (R15). Raises FileNotFoundError without them."""
    folder = results_folder(profile)
    return {
        "outcomes": pd.read_parquet(folder / "outcomes.parquet"),
        "rounds": pd.read_csv(folder / "rounds.csv"),
        "summary": pd.read_csv(folder / "summary.csv"),
        "branch": pd.read_csv(folder / "branch.csv"),
    }


# ---------------------------------------------------------------------------------------------------------------
# The table


def side_by_side(outcomes: pd.DataFrame) -> pd.DataFrame:
    """One row a question and seed; `<variant>/<column>` for what differs between the checkpoints."""
    keys = ["id", "seed", "domain", "fact", "cloud_correct"]
    wide = outcomes.pivot(index=keys, columns="variant", values=["local_correct", "confidence", "graded_confidence"])
    wide.columns = pd.Index([f"{variant}/{column}" for column, variant in wide.columns])
    return wide.reset_index()


def _measures(frame: pd.DataFrame, weights: Array, variant: str) -> Array:
    one = frame[["id", "fact", "cloud_correct"]].assign(
        **{
            name: frame[f"{variant}/{name}"].astype(float)
            for name in ("local_correct", "confidence", "graded_confidence")
        }
    )
    routed = routing_metrics(one, weights)
    said = stats.calibration(one, weights)
    graded = stats.calibration(one, weights, "graded_confidence")
    at = CALIBRATION.index
    columns = [routed[:, 1], routed[:, 4], routed[:, 5], said[:, at("auroc")], graded[:, at("auroc")]]
    errors = [said[:, at("ece_bucket_debiased")], graded[:, at("ece_mass_debiased")]]
    return np.stack([*columns, *errors], axis=1)


def summarise(outcomes: pd.DataFrame, resamples: int = 2000) -> pd.DataFrame:
    """Every variant's `METRICS` and its paired difference to `foggen`, seeds pooled, facts resampled.

    One row a variant, metric and domain (and their mean): value, low, high, difference (foggen - variant) with its
    interval, seed_sd of the mean over domains, n (questions), seeds.
    """
    wide = side_by_side(outcomes)
    variants = [name for name in (BASE, *VARIANTS) if f"{name}/confidence" in wide]

    def statistic(frame: pd.DataFrame, weights: Array) -> Array:
        measured = {variant: _measures(frame, weights, variant) for variant in variants}
        return np.concatenate(
            [*measured.values(), *(measured["foggen"] - measured[variant] for variant in variants)], axis=1
        )

    names = [f"{variant}/{metric}" for variant in variants for metric in METRICS]
    result = stats.bootstrap(wide, statistic, [*names, *(f"difference/{name}" for name in names)], resamples)
    low, high = result.interval()
    rows = []
    for i, domain in enumerate(result.rows):
        for j, name in enumerate(names):
            k = j + len(names)
            variant, metric = name.split("/")
            rows.append(
                {"variant": variant, "metric": metric, "domain": domain}
                | {"value": result.point[i, j], "low": low[i, j], "high": high[i, j]}
                | {
                    "difference": result.point[i, k],
                    "difference_low": low[i, k],
                    "difference_high": high[i, k],
                }
            )
    table = pd.DataFrame(rows).merge(_seed_sd(wide, statistic, names), how="left", on=["variant", "metric", "domain"])
    return table.assign(n=wide["id"].nunique(), seeds=wide["seed"].nunique())


def _seed_sd(wide: pd.DataFrame, statistic: stats.Statistic, names: Sequence[str]) -> pd.DataFrame:
    points = []
    for _, part in wide.groupby("seed"):
        both = [*names, *(f"difference/{name}" for name in names)]
        points.append(stats.bootstrap(part, statistic, both, 0).point[-1, : len(names)])
    spread = np.std(points, axis=0, ddof=1) if len(points) > 1 else np.full(len(names), np.nan)
    parts = [name.split("/") for name in names]
    return pd.DataFrame(
        {
            "variant": [p[0] for p in parts],
            "metric": [p[1] for p in parts],
            "domain": stats.MEAN,
            "seed_sd": spread,
        }
    )


# ---------------------------------------------------------------------------------------------------------------
# The README's table

README = ROOT / "README.md"
SHOWN = {"R0": "raw edge model (R0)", "foggen": "**FogGen (R14)**"} | {
    "random labels": "control: random labels",
    "permuted labels": "control: labels permuted within a domain",
    "no replay": "control: no replay",
}


def _cell(row: pd.Series, percent: bool, sign: str = "") -> str:
    scale, digits = (100, 1) if percent else (1, 2)
    value, low, high = (f"{scale * row[name]:{sign}.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def readme_table(summary: pd.DataFrame, profile: str) -> str:
    """The results as a Markdown table: means over domains, 95% intervals, with n, seeds and the command."""
    lines = [
        "| pocket profile | raw accuracy % | routed % | lift % | AUROC | ECE | ECE of E[c] |",
        "|---|---|---|---|---|---|---|",
    ]
    means = summary[summary["domain"] == stats.MEAN].set_index(["variant", "metric"])
    for variant, name in SHOWN.items():
        if variant not in means.index.get_level_values("variant"):
            continue
        rows = {metric: means.loc[(variant, metric)] for metric in METRICS}
        cells = [_cell(rows["raw"], True), _cell(rows["routed"], True), _cell(rows["lift"], True, "+")]
        cells += [_cell(rows[name], False) for name in ("auroc", "ece", "graded_ece")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("| *published, Qwen3-0.6B (R14)* | *59.6* | *21.9* | *+4.6* | *n/a* | *n/a* | *n/a* |")
    n, seeds = int(summary["n"].iloc[0]), int(summary["seeds"].iloc[0])
    note = (
        f"Means over seven domains at tau = 0.5; {n:,} test questions, {seeds} seeds pooled, 95% intervals that "
        f"resample whole facts. Made by `python -m foggen.study --profile {profile}`; stored in "
        f"`data/results/{profile}/`."
    )
    return "\n".join([*lines, "", note])


def update_readme(profile: str = "pocket") -> None:
    """Writes the table of the stored results into the README, between its two marks."""
    fill(README, "results", readme_table(load_results(profile)["summary"], profile))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="pocket")
    parser.add_argument("--run", default="runs/study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="chains at a time, each on cores of its own")
    given = parser.parse_args(argv)
    print(run_study(given.profile, given.run, given.seeds, given.jobs).relative_to(ROOT))
    update_readme(given.profile)


if __name__ == "__main__":
    main()
