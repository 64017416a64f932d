"""The reference study: the chain and its controls, each with several seeds, on the test questions.

`python -m foggen.study` writes `data/results/<profile>/`: the outcomes of every checkpoint, the rounds' curves and
the table that the notebooks and the README show. Chains are stages of a run folder, so it can be killed and goes on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from foggen import data, open_ended, routing, stats
from foggen.config import load_profile
from foggen.outcomes import Examination, OpenExamination
from foggen.questions import TASKS, subset
from foggen.rounds import Loan, edge_engine, run_chain, run_r15
from foggen.stats import Array
from foggen.store import LOCK_VARIABLE, ROOT, Store, fill, progress, write_json, write_text

# What is changed against the profile. The controls break the link between label and question, or drop the replay.
VARIANTS: dict[str, dict[str, Any]] = {
    "foggen": {},
    "random labels": {"label_control": "random"},
    "permuted labels": {"label_control": "permuted"},
    "no replay": {"replay_rows": 0},
}
BASE = "R0"
METRICS = ("raw", "routed", "lift", "auroc", "graded_auroc", "ece", "graded_ece")
DIFFERENT = ["local_correct", "confidence", "graded_confidence"]  # between the checkpoints
KEPT = ["id", "domain", "fact", "difficulty", "local_correct", "cloud_correct", "confidence", "graded_confidence"]


def results_folder(profile: str) -> Path:
    """Where a profile's reference results lie."""
    return ROOT / "data" / "results" / profile


def run_one(profile: str, run: str, variant: str, seed: int) -> dict[str, pd.DataFrame]:
    """What one chain adds to the stored tables.

    `outcomes` of its last round on the test questions, and `rounds`, one row a round. The plain chain adds the outcomes
    of R0, and `branch_outcomes`: of its last round (R14) and its branch round (R15) on both `sets` of test questions.
    """
    progress(f"== {variant}, seed {seed}")
    settings, store = load_profile(profile, {"seed": seed, **VARIANTS[variant]}), Store(run)
    parts = data.splits(settings)
    results = run_chain(settings, store, parts["train"], parts["dev"])
    asked = subset(parts["test"], settings.test_questions, 0)
    loan = Loan(edge_engine(settings))
    test = Examination(settings, store, "test", asked, loan)
    difficulty = {question.id: question.difficulty for question in asked}

    def kept(table: pd.DataFrame, **names: str) -> pd.DataFrame:
        return table.filter(items=KEPT).assign(**names, seed=seed)

    def examined(label: str, model: Path) -> pd.DataFrame:
        table = test.outcomes(label.replace(" ", "-"), model, ("scores",))
        return kept(table.assign(difficulty=table["id"].map(difficulty)), variant=label)

    tables = {"outcomes": examined(variant, results[-1].model)}
    tables["rounds"] = pd.DataFrame([one.record() for one in results]).assign(variant=variant, seed=seed)
    if variant == "foggen":  # R0 is the same in every variant: it is examined once a seed
        tables["outcomes"] = pd.concat([tables["outcomes"], examined(BASE, results[0].model)])
        pools, limits = data.open_splits(settings), dict.fromkeys(TASKS, settings.open_ended.eval_questions)
        opened = OpenExamination(settings, store, "open", open_ended.first(pools["test"], limits), loan)
        branch = run_r15(settings, store, results, open_ended.r15_questions(pools["train"], settings), loan)
        both = []
        for name, label, model in (("R14", "foggen", results[-1].model), ("R15", "R15", branch.model)):
            both.append(kept(opened.outcomes(label, model), set="open-ended", checkpoint=name))
            both.append(kept(test.outcomes(label, model, ()), set="seven domains", checkpoint=name))
        tables["branch_outcomes"] = pd.concat(both)
    loan.close()
    return tables


def run_study(profile: str, run: str, seeds: Sequence[int], jobs: int = 1) -> Path:
    """Runs every variant with every seed, and writes outcomes, curves, summaries and the settings they came from.

    `jobs` chains run at a time, each in a process of its own.
    """
    folder, store = results_folder(profile), Store(run)
    with store.locked():
        os.environ[LOCK_VARIABLE] = str(store.run)  # the lock holds for the chains' processes too
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            asked = [(profile, run, variant, seed) for variant in VARIANTS for seed in seeds]
            added = [*pool.map(run_one, *zip(*asked, strict=True))]
    outcomes, rounds, branch = (
        pd.concat([tables[name] for tables in added if name in tables], ignore_index=True)
        for name in ("outcomes", "rounds", "branch_outcomes")
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in {"outcomes": outcomes, "branch_outcomes": branch}.items():
        table.to_parquet(folder / f".{name}.tmp", index=False, compression="zstd")
        os.replace(folder / f".{name}.tmp", folder / f"{name}.parquet")
    for name, table in {"rounds": rounds, "summary": summarise(outcomes), "branch": branch_summary(branch)}.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    command = f"python -m foggen.study --profile {profile} --seeds {' '.join(map(str, seeds))}"
    recipe = load_profile(profile).model_dump(mode="json")
    write_json(folder / "study.json", {"command": command, "seeds": list(seeds), "settings": recipe})
    return folder


def load_results(profile: str = "pocket") -> dict[str, pd.DataFrame]:
    """The stored results: `outcomes`, `rounds`, `summary` and `branch` (R15). Raises FileNotFoundError without them."""
    folder = results_folder(profile)
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("rounds", "summary", "branch")}
    return tables | {"outcomes": pd.read_parquet(folder / "outcomes.parquet")}


# ---------------------------------------------------------------------------------------------------------------
# The tables


def side_by_side(outcomes: pd.DataFrame) -> pd.DataFrame:
    """One row a question and seed; `<variant>/<column>` for what differs between the checkpoints."""
    keys = ["id", "seed", "domain", "fact", "cloud_correct"]
    wide = outcomes.pivot(index=keys, columns="variant", values=DIFFERENT)
    wide.columns = pd.Index([f"{variant}/{column}" for column, variant in wide.columns])
    return wide.reset_index()


def _measures(frame: pd.DataFrame, weights: Array, variant: str) -> Array:
    """The `METRICS` (resamples, metrics) of one variant, from a table that is `side_by_side`."""
    own = frame[[f"{variant}/{name}" for name in DIFFERENT]].astype(float).set_axis(DIFFERENT, axis=1)
    one = frame[["id", "fact", "cloud_correct"]].join(own)
    routed = dict(zip(routing.METRICS, routing.routing_metrics(one, weights).T, strict=True))
    said, graded = (
        dict(zip(stats.CALIBRATION, stats.calibration(one, weights, column).T, strict=True)) for column in DIFFERENT[1:]
    )
    columns = [routed["raw"], routed["routed"], routed["lift"], said["auroc"], graded["auroc"]]
    return np.column_stack([*columns, said["ece_bucket_debiased"], graded["ece_mass_debiased"]])


def summarise(outcomes: pd.DataFrame, resamples: int = 2000) -> pd.DataFrame:
    """Every variant's `METRICS` and its paired difference to `foggen`, seeds pooled, facts resampled.

    One row a variant, metric and domain (and their mean): value, low, high, difference (foggen - variant) with its
    interval, seed_sd of the mean over domains, n (questions), seeds.
    """
    wide = side_by_side(outcomes)
    variants = [name for name in (BASE, *VARIANTS) if f"{name}/confidence" in wide]
    names, pair = [*product(variants, METRICS)], ("value", "difference")

    def statistic(frame: pd.DataFrame, weights: Array) -> Array:
        values = np.stack([_measures(frame, weights, variant) for variant in variants], axis=1)
        differences = values[:, [variants.index("foggen")]] - values
        return np.stack([values, differences], axis=-1).reshape(len(weights), -1)

    result = stats.bootstrap(wide, statistic, pair * len(names), resamples)
    tables = {name: own.table() for name, own in result.split(names).items()}
    table = stats.stack(tables, "variant", "metric").rename(columns={"value_low": "low", "value_high": "high"})
    mean = table["domain"] == stats.MEAN
    table.loc[mean, "seed_sd"] = stats.seed_sd(wide, statistic, result.metrics)[-1, ::2]
    return table.assign(n=wide["id"].nunique(), seeds=wide["seed"].nunique())


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
            more = routing.routing_table(one).merge(stats.calibration_table(one, resamples=2000), on="domain")
            more = more[["domain", *more.filter(regex="^(cloud|sysacc|routed|lift|auroc)(_low|_high)?$")]]
            table = table.merge(more.set_index("domain").add_prefix(f"{name}_").reset_index(), on="domain")
        tables.append(table.assign(set=kind))
    return pd.concat(tables, ignore_index=True).assign(seeds=outcomes["seed"].nunique())


# ---------------------------------------------------------------------------------------------------------------
# The README's table

README = ROOT / "README.md"
SHOWN = {"R0": "raw edge model (R0)", "foggen": "**FogGen (R14)**"} | {
    "random labels": "control: random labels",
    "permuted labels": "control: labels permuted within a domain",
    "no replay": "control: no replay",
}
HEADS = {"raw": "raw accuracy %", "routed": "routed %", "lift": "lift %"}
HEADS |= {"auroc": "AUROC", "ece": "ECE", "graded_ece": "ECE of E[c]"}


def _cell(metric: str, row: pd.Series) -> str:
    scale, form = (100, ".1f") if HEADS[metric].endswith("%") else (1, ".2f")
    form = f"+{form}" if metric == "lift" else form
    return f"{scale * row['value']:{form}} [{scale * row['low']:{form}}, {scale * row['high']:{form}}]"


def readme_table(summary: pd.DataFrame, profile: str) -> str:
    """The results as a Markdown table: means over domains, 95% intervals, with n, seeds and the command."""
    means = summary[summary["domain"] == stats.MEAN].set_index(["variant", "metric"])
    lines = [f"| pocket profile | {' | '.join(HEADS.values())} |", "|---" * (1 + len(HEADS)) + "|"]
    for variant, name in SHOWN.items():
        if variant in means.index:
            cells = [_cell(metric, means.loc[(variant, metric)]) for metric in HEADS]
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
