"""The reference study: the chain, its controls and variants of its recipe, with several seeds.

`make study` writes `data/results/<profile>/`: what every checkpoint answered to every test
question, with all scores that a router could rank by. Notebooks 03 to 06 compute their tables from
these files, so nobody has to train anything to check them. Chains are stages of a run folder:
killed at any moment, the same command resumes. Holds no metric.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd

from foggen import chain, evaluation, open_ended
from foggen.chain import Round
from foggen.config import Settings, load_profile
from foggen.engines import EngineSlot
from foggen.questions import TASKS, Question, open_splits, r15_asked, splits
from foggen.store import LOCK_VARIABLE, ROOT, Run, progress, write_json
from foggen.training import buffer_model

ALL_PARTS = ("scores", "votes", "verification")
COLUMNS = """
    id domain fact gold n_options text local_answer local_correct cloud_answer cloud_correct
    confidence expected_confidence option_probability p_true votes verification
    local_tokens cloud_tokens sample_tokens verification_tokens
    """.split()
Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Variant:
    """A recipe of the study: what it changes against the profile, and with how many seeds."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 3


def variants(settings: Settings) -> dict[str, Variant]:
    """The recipes by name. Those with fewer rows take as many training steps as the chain does."""
    new, replayed, epochs = settings.new_rows, settings.replay_rows, settings.sft.num_train_epochs
    chain_rows = settings.rounds * (new + replayed)
    all_rows = settings.calibration_rows + settings.rounds * new
    return {
        "foggen": Variant(seeds=5),
        # Controls: no link between label and question, or a part of the recipe left out
        "random labels": Variant({"label_control": "random"}),
        "permuted labels": Variant({"label_control": "permuted"}),
        "no replay": Variant(
            {"replay_rows": 0, "sft.num_train_epochs": epochs * (new + replayed) / new}
        ),
        "frozen labels": Variant({"label_control": "frozen"}),
        "one round": Variant({"sft.num_train_epochs": epochs * round(chain_rows / all_rows)}),
        # Questions about the recipe
        "own answer taught": Variant({"answer_target": "self"}),
        "cloud's answer taught": Variant({"answer_target": "cloud", "label_reference": "cloud"}),
        "top_p 0.8, top_k 20": Variant({"top_p": 0.8, "top_k": 20}),
        "exact labels": Variant({"labels": "exact"}),
        "ties down": Variant({"tie": "down"}),
        "replay relabelled": Variant({"relabel_replay": True}),
    }


# --------------------------------------------------------------------------------------------------
# One variant with one seed


@dataclass
class Job:
    """A variant with one seed: its run with the settings, its questions and its engine."""

    variant: str
    run: Run
    edge: EngineSlot
    parts: Mapping[str, Sequence[Question]]

    def filed(self, table: pd.DataFrame, variant: str) -> pd.DataFrame:
        """The stored columns of a table, under a variant's name and the seed."""
        seed = self.run.settings.seed
        return table.filter(items=COLUMNS).assign(variant=variant, seed=seed)

    def outcomes(
        self, model: Path, variant: str, parts: Sequence[str] = ("scores",), split: str = "test"
    ) -> pd.DataFrame:
        """The outcomes of a checkpoint on a split's questions, filed under a variant's name."""
        name = f"{split}-{variant.replace(' ', '_')}"
        table = evaluation.outcomes(self.run, self.edge, self.parts[split], model, name, parts)
        return self.filed(table, variant)


def one_round(job: Job) -> Path:
    """The checkpoint of one round on the questions of all rounds, labelled by the raw model."""
    settings = job.run.settings
    plan = chain.round_questions(job.parts["train"], settings)
    model = buffer_model(settings)
    rows = [
        row
        for number, (_, questions) in enumerate(plan)
        for row in chain.label_questions(job.run, job.edge, f"r{number:02d}", model, questions)
    ]
    return chain.fine_tune(job.run, job.edge, "r01", model, rows)[0]


def foggen_tables(job: Job, rounds: Sequence[Round]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Of FogGen alone: all scores of R0 and R14, the rows that rivals learn from, and R15."""
    first, last = rounds[0], rounds[-1]
    best = min(rounds[1:], key=lambda result: result.metrics["ece_bucket"])
    for variant, model in (("R0", first.model), ("foggen", last.model)):
        yield "outcomes", job.outcomes(model, variant, ALL_PARTS)
        yield "dev", job.outcomes(model, variant, ALL_PARTS, "dev")
    stopped = job.outcomes(best.model, "stopped early")
    yield "outcomes", stopped.assign(round=best.number)
    yield "train", training_table(job, rounds)
    yield from branch_tables(job, rounds)


def training_table(job: Job, rounds: Sequence[Round]) -> pd.DataFrame:
    """The rows that the chain learnt from, with what the raw model's logits say of their questions.

    {"id": "law-train-7", "label": 0.75, "votes": "AABA-AAA", "option_probability": 0.61, ...}
    """
    rows = chain.buffer_rows(rounds)
    by_id = {question.id: question for question in job.parts["train"]}
    learnt = [by_id[row["id"]] for row in rows]
    raw = rounds[0].model
    answers = evaluation.answers(job.run, job.edge, learnt, raw, "train-R0")
    scores = evaluation.scores(job.run, job.edge, learnt, raw, "train-R0")
    labels = pd.DataFrame({"label": [row["confidence"] for row in rows]})
    table = pd.concat([answers, scores, labels], axis=1).assign(
        label_votes=[row["votes"] for row in rows]
    )
    columns = [*COLUMNS, "label", "label_votes"]
    return table.filter(items=columns).assign(seed=job.run.settings.seed)


def branch_tables(job: Job, rounds: Sequence[Round]) -> Iterator[tuple[str, pd.DataFrame]]:
    """R14 and R15 on the open-ended test questions and on the seven domains."""
    run, settings = job.run, job.run.settings
    pools = open_splits(settings)
    questions = open_ended.first(pools["train"], r15_asked(settings))
    branch = chain.run_r15(run, rounds, questions, job.edge)
    tested = open_ended.first(
        pools["test"], dict.fromkeys(TASKS, settings.open_ended.eval_questions)
    )
    for checkpoint, model in (("R14", rounds[-1].model), ("R15", branch.model)):
        name = f"open-{checkpoint.lower()}"
        table = evaluation.open_outcomes(run, job.edge, tested, model, name)
        yield "branch", job.filed(table, "foggen").assign(checkpoint=checkpoint, set="open-ended")
        if checkpoint == "R15":
            yield (
                "branch",
                job.outcomes(model, "R15", ()).assign(checkpoint=checkpoint, set="seven domains"),
            )


def run_job(profile: str, folder: str, variant: str, seed: int) -> Tables:
    """All tables that one variant with one seed adds to the study; a finished job is kept.

    It is kept until its settings change: after a change of the code, name another run folder.
    """
    overrides = variants(load_profile(profile))[variant].overrides
    settings = load_profile(profile, {"seed": seed, **overrides})
    run = Run(folder, settings)

    def compute(stage: Path) -> None:
        progress(f"== {variant}, seed {seed}")
        for name, table in job_tables(run, variant).items():
            table.to_parquet(stage / f"{name}.parquet", index=False)

    key = {"variant": variant, **settings.model_dump(mode="json")}
    stage = run.cached(f"study-{variant.replace(' ', '_')}", key, compute)
    return {file.stem: pd.read_parquet(file) for file in stage.glob("*.parquet")}


def job_tables(run: Run, variant: str) -> Tables:
    """Runs the chain of a variant and evaluates its checkpoints."""
    settings, seed = run.settings, run.settings.seed
    parts = splits(settings)
    parts["test"] = evaluation.evaluated_questions(parts["test"], settings)
    tables: dict[str, list[pd.DataFrame]] = {"outcomes": [], "rounds": []}
    with closing(chain.edge_slot(settings)) as edge:
        job = Job(variant, run, edge, parts)
        if variant == "one round":
            tables["outcomes"].append(job.outcomes(one_round(job), variant))
        else:
            rounds = chain.run_chain(run, parts["train"], parts["dev"], edge)
            record = pd.DataFrame([result.record() for result in rounds])
            tables["rounds"].append(record.assign(variant=variant, seed=seed))
            if variant != "foggen":
                tables["outcomes"].append(job.outcomes(rounds[-1].model, variant))
        if variant == "foggen":
            for name, table in foggen_tables(job, rounds):
                tables.setdefault(name, []).append(table)
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items() if parts}


# --------------------------------------------------------------------------------------------------
# All of them


def run_study(profile: str, folder: str, chosen: Mapping[str, int], processes: int) -> Path:
    """Runs variants with so many seeds each, and writes the tables that they add up to.

    `processes` jobs run at a time, each in a process of its own.
    """
    settings, results = load_profile(profile), ROOT / "data" / "results" / profile
    jobs = [
        (profile, folder, name, seed) for name, seeds in chosen.items() for seed in range(seeds)
    ]
    run = Run(folder, settings)
    with run.locked():
        os.environ[LOCK_VARIABLE] = str(run.folder)  # the lock holds for the jobs' processes too
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            added = list(pool.map(run_job, *zip(*jobs, strict=True)))
    results.mkdir(parents=True, exist_ok=True)
    for name in ("outcomes", "dev", "train", "branch", "rounds"):
        parts = [tables[name] for tables in added if name in tables]
        if parts:
            write_table(pd.concat(parts, ignore_index=True), results / f"{name}.parquet")
    known = variants(settings)
    recipes = {
        name: {"seeds": seeds, "overrides": dict(known[name].overrides)}
        for name, seeds in chosen.items()
    }
    record = {"variants": recipes, "settings": settings.model_dump(mode="json")}
    write_json(results / "study.json", record)
    return results


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Writes a table whole, as compressed Parquet with scores in single precision."""
    floats = table.select_dtypes("float64").columns
    small = table.astype(dict.fromkeys(floats, "float32"))
    small.to_parquet(file.with_suffix(".tmp"), index=False, compression="zstd")
    os.replace(file.with_suffix(".tmp"), file)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="pocket")
    parser.add_argument("--run", default="runs/study")
    parser.add_argument("--only", nargs="+", metavar="VARIANT[=SEEDS]", help="these alone")
    parser.add_argument("--processes", type=int, default=1, help="chains at a time")
    arguments = parser.parse_args(argv)
    known = variants(load_profile(arguments.profile))
    chosen = {}
    for text in arguments.only or known:
        name, _, seeds = text.partition("=")
        chosen[name] = int(seeds or known[name].seeds)
    results = run_study(arguments.profile, arguments.run, chosen, arguments.processes)
    print(results.relative_to(ROOT))


if __name__ == "__main__":
    main()
