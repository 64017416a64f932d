"""The chain: a buffer labelled by the raw model, then rounds of labelling, replay and fine-tuning.

What takes long is a stage of the run. Knows no engine by name, and nothing of how models compare.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from foggen import labels, open_ended, prompts, stats, training
from foggen.config import Settings, SettingsError, derive_seed
from foggen.engines import Engine, EngineError, EngineSlot, make_engine
from foggen.evaluation import DRAWN, answers, cloud_answers, stage, stage_key
from foggen.inputs import model_folder
from foggen.labels import GOLD, Letters, Questions, Sample, SftRow
from foggen.questions import OpenQuestion, Question, by_domain, draw, draw_balanced, subset
from foggen.store import ROOT, Run, digest, progress, read_record, write_jsonl
from foggen.training import Record

Plan = list[tuple[str | None, list[Question]]]  # domain (R0: None) and new questions of every round
Log = Callable[[str], None]
SHOWN = ("local_accuracy", "mean_confidence", "kept", "parsed", "ece_bucket", "auroc")


@dataclass(frozen=True)
class Round:
    """What one round left behind. R0 is the model before the chain; its rows are the buffer."""

    number: int
    domain: str | None
    model: Path
    rows: list[SftRow]  # the newly labelled ones
    training: Record
    evaluation: pd.DataFrame  # `answers` to the dev questions
    tau: float
    cloud_wrong: int | None  # letters of the cloud that are not gold; None: it was not asked

    @property
    def metrics(self) -> dict[str, float]:
        """`stats.calibration` on the dev questions; n of these, and `kept`, their share at tau."""
        n, stated = len(self.evaluation), self.evaluation["confidence"]
        measured = stats.calibration(self.evaluation, np.ones((1, n)))
        metrics = {name: float(values[0]) for name, values in measured.items()}
        return {"n": n, "kept": float((stated >= self.tau).mean()), **metrics}

    def line(self) -> str:
        """The round in one line."""
        counts = "/".join(map(str, labels.label_histogram(self.rows).values()))
        values = "  ".join(f"{name} {self.metrics[name]:.3f}" for name in SHOWN)
        return f"R{self.number:<2} {self.domain or 'base':<15} labels {counts}  {values}"

    def record(self) -> Record:
        """A flat row of a table: number, domain, labels by bucket, training and dev metrics."""
        row: Record = {"number": self.number, "domain": self.domain}
        row |= {f"labels {name}": n for name, n in labels.label_histogram(self.rows).items()}
        row |= {f"sft {name}": value for name, value in self.training.items()}
        return {**row, "cloud wrong": self.cloud_wrong, **self.metrics}


# ------------------------------------------------------------------------------------------------
# The recipe


def run_chain(
    run: Run, train: Questions, dev: Questions, edge: EngineSlot | None = None, show: Log = progress
) -> list[Round]:
    """R0 and all rounds, made or found in the run; `show` gets a line of every round.

    `train` feeds the buffer and the rounds; `dev` is what every checkpoint is evaluated on.
    """
    if edge is None:
        with closing(edge_slot(run.settings)) as slot:
            return run_chain(run, train, dev, slot, show)
    plan = round_questions(train, run.settings)
    dev = subset(dev, run.settings.dev_questions, derive_seed(run.settings.seed, "dev"))
    if not dev:
        raise SettingsError("no dev questions: give data.sources one of use=dev, or use=divide")
    cloud = cloud_letters(run, edge, plan)
    rounds: list[Round] = []
    while len(rounds) < len(plan):
        rounds.append(next_round(run, edge, rounds, plan, dev, cloud))
        show(rounds[-1].line())
    return rounds


def next_round(
    run: Run, edge: EngineSlot, rounds: list[Round], plan: Plan, dev: Questions, cloud: Letters
) -> Round:
    """The round that follows `rounds`. R0 is the raw edge model, and labels the buffer.

    With `format_install` a sibling labels the buffer, and R0 has learnt the format from its labels.
    """
    s, number = run.settings, len(rounds)
    name, (domain, questions) = f"r{number:02d}", plan[number]
    model = rounds[-1].model if rounds else model_folder(s.edge.model, s.edge.revision)
    labeller = model if rounds else buffer_model(s)
    if rounds and s.label_control == "frozen":
        labeller = rounds[0].model
    overall = [row["confidence"] for row in rounds[0].rows] if rounds else []

    def label(name: str, questions: Questions) -> list[SftRow]:
        rows = label_questions(run, edge, name, labeller, questions, cloud)
        seed = derive_seed(s.seed, name, "samples")
        return labels.control_labels(rows, s.label_control, seed, overall)

    # The checkpoint that stands labels new questions, from its answers
    new = label(name, questions)
    # Rows of the buffer are replayed beside them, as a rule with the labels that they have
    old = replay(buffer_rows(rounds), s.replay_rows, derive_seed(s.seed, name))
    if s.relabel_replay and old:
        by_id = {question.id: question for _, questions in plan for question in questions}
        old = label(f"{name}-replay", [by_id[row["id"]] for row in old])
    # It learns both; the merged weights are the next checkpoint
    record: Record = {}
    if s.edge.format_install and not rounds:
        edge.close()  # the sibling's engine cannot take another architecture's weights
    if rounds or s.edge.format_install:
        model, record = fine_tune(run, edge, name, model, [*new, *old])
    evaluation = answers(run, edge, dev, model, f"{name}-dev")
    wrong = sum(cloud.get(q.id) != q.answer for q in questions) if cloud else None
    return Round(number, domain, model, new, record, evaluation, s.tau, wrong)


# ------------------------------------------------------------------------------------------------
# Questions and rows of a round


def calibration_questions(train: Questions, settings: Settings) -> list[Question]:
    """The questions of R0's buffer: `calibration_rows`, in equal parts from all domains."""
    seed = derive_seed(settings.seed, "buffer")
    return draw_balanced(train, settings.calibration_rows, settings.domains, seed)


def round_questions(train: Questions, settings: Settings) -> Plan:
    """The domain and the new questions of every round, R0's being the buffer's.

    They are known beforehand, and repeat only once a domain has no others. Raises SettingsError for
    a domain without questions.
    """
    pools = by_domain(train)
    if missing := [domain for domain in settings.domains if domain not in pools]:
        reason = f"no training questions for {', '.join(missing)}; there are {', '.join(pools)}"
        raise SettingsError(f"domains: {reason}")
    plan: Plan = [(None, calibration_questions(train, settings))]
    for number in range(1, settings.rounds + 1):
        domain = settings.domains[(number - 1) % len(settings.domains)]
        used = {question.id for _, questions in plan for question in questions}
        seed = derive_seed(settings.seed, f"r{number:02d}")
        plan.append((domain, draw(pools[domain], settings.new_rows, seed, used)))
    return plan


def cloud_letters(run: Run, edge: EngineSlot, plan: Plan) -> Letters:
    """The cloud's letters to all questions of the plan, if the settings use them; asked for once.

    An unreadable answer has none. Raises EngineError where the cloud failed (`keep_local`).
    """
    if "cloud" not in (run.settings.answer_target, run.settings.label_reference):
        return GOLD
    questions = {question.id: question for _, questions in plan for question in questions}
    table = cloud_answers(run, edge, list(questions.values()), "chain")
    readable = table.dropna(subset="local_answer")
    if table["failed"].any() or readable.empty:
        raise EngineError("the cloud did not answer all training questions; run again to resume")
    return dict(zip(readable["id"], readable["local_answer"], strict=True))


def buffer_rows(rounds: Sequence[Round]) -> list[SftRow]:
    """The buffer at the end of some rounds: R0's rows, then every round's new ones."""
    return [row for result in rounds for row in result.rows]


def replay(buffer: Sequence[SftRow], n: int, seed: int) -> list[SftRow]:
    """`n` rows of the buffer at random, without repetition; all of it where it has fewer."""
    return random.Random(seed).sample(list(buffer), min(n, len(buffer)))


# ------------------------------------------------------------------------------------------------
# The two stages that a model works on


def edge_slot(settings: Settings) -> EngineSlot:
    """Room for one checkpoint of the edge model at a time, in the engine that the settings name."""
    training.limit_threads(settings)
    options = {"dtype": settings.dtype, **settings.engine_options}
    return EngineSlot(lambda model: make_engine(settings.engine, model, **options))


def buffer_model(settings: Settings) -> Path:
    """The model that labels R0's buffer: the edge model, or the teacher of the format."""
    install, edge = settings.edge.format_install, settings.edge
    model = (install.labels_from, install.revision) if install else (edge.model, edge.revision)
    return model_folder(*model)


def label_questions(
    run: Run, edge: EngineSlot, name: str, model: Path, questions: Questions, cloud: Letters = GOLD
) -> list[SftRow]:
    """Training rows for `questions`, labelled by what the checkpoint `model` answers to them.

    `cloud`: its letters, which are taught (`answer_target`) or count as right (`label_reference`);
    a question without one is left out, and so is one without a letter to teach.
    """
    s, seed = run.settings, derive_seed(run.settings.seed, name, "samples")
    if cloud:
        questions = [question for question in questions if question.id in cloud]
    reference = cloud if s.label_reference == "cloud" else GOLD
    taught = cloud if s.answer_target == "cloud" else GOLD

    def ask(engine: Engine) -> list[Sample]:
        if s.labels == "exact":
            return labels.exact_answers(engine, questions, s, reference)
        return labels.sample_answers(engine, questions, s, seed, reference)

    right = digest([reference.get(question.id) for question in questions])
    key = stage_key(s, questions, *DRAWN, "labels", seed=seed, reference=right)
    samples = stage(run, edge, model, f"{name}-samples", key, ask, labels)
    pairs = zip(questions, samples, strict=True)
    rows = [labels.training_row(question, sample, s, taught) for question, sample in pairs]
    return [row for row in rows if row]


def fine_tune(
    run: Run, edge: EngineSlot, name: str, model: Path, rows: Sequence[SftRow]
) -> tuple[Path, Record]:
    """The next checkpoint, `model` trained on `rows`, and the record that `training.sft` gives."""
    s, seed = run.settings, derive_seed(run.settings.seed, name, "sft")

    def compute(folder: Path) -> None:
        write_jsonl(folder / "rows.jsonl", rows)
        edge.sleep()  # the GPU is the training's
        out = folder / "model"
        training.train(training.Job(model=model, rows=rows, settings=s, out=out, seed=seed))

    key = {**s.only("lora", "sft", "training", "dtype"), "rows": digest(list(rows)), "seed": seed}
    inputs = [model, buffer_model(s)] if s.edge.format_install else [model]
    folder = run.cached(f"{name}-sft", key, compute, inputs, [prompts, training])
    return folder / "model", read_record(folder / "training.json")


def trained_checkpoint(run: Run) -> Path:
    """The best checkpoint at hand: the run's last round, else a released one, else the edge model.

    The run's counts only if notebook 02 finished with the same edge model; a released one is the
    folder `foggen-r14` beside the edge model.
    """
    results = read_record(run.folder / "done" / "02_rounds.json").get("results", {})
    edge, last = run.settings.edge, run.folder / str(results.get("checkpoint"))
    if results.get("edge") == edge.model and last.is_dir():
        return last
    released = (ROOT / edge.model).with_name("foggen-r14")
    return released if released.is_dir() else model_folder(edge.model, edge.revision)


# ------------------------------------------------------------------------------------------------
# The open-ended branch


class Branch(NamedTuple):
    """The branch round: its checkpoint, new rows, counts per task, replayed rows and training."""

    model: Path
    rows: list[SftRow]
    counts: list[dict[str, Any]]  # see `open_ended.r15_rows`
    replayed: list[SftRow]
    training: Record


def run_r15(
    run: Run, rounds: Sequence[Round], questions: Sequence[OpenQuestion], edge: EngineSlot
) -> Branch:
    """One more round from the chain's last checkpoint, which labels open-ended `questions`.

    The chain stays as it is, and replayed rows keep their labels.
    """
    s, model, seed = run.settings, rounds[-1].model, derive_seed(run.settings.seed, "r15")

    def ask(engine: Engine) -> list[Record]:
        rows, counts = open_ended.r15_rows(engine, questions, s, seed)
        return [{"rows": rows, "counts": counts}]

    key = stage_key(s, questions, *DRAWN, "tie", "open_ended", seed=seed)
    (labelled,) = stage(run, edge, model, "r15-labels", key, ask, labels, open_ended)
    new, old = labelled["rows"], replay(buffer_rows(rounds), s.open_ended.r15.replay, seed)
    if s.open_ended.r15_model:  # trained by others on other rows; these are for the eye
        branch = model_folder(s.open_ended.r15_model, s.open_ended.r15_revision)
        record: Record = {"rows": len(new) + len(old), "too_long": 0, "steps": 0}
    else:
        branch, record = fine_tune(run, edge, "r15", model, [*new, *old])
    return Branch(branch, new, labelled["counts"], old, record)
