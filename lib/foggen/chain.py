"""The chain: a buffer labelled by the raw model, then rounds of labelling, replay and fine-tuning.

What takes long is a stage of the run. Knows no engine by name, and nothing of how models compare.
"""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from foggen import labels, open_ended, prompts, stats, training
from foggen.config import Settings, SettingsError, derive_seed
from foggen.engines import EngineError, EngineSlot, make_engine
from foggen.evaluation import DRAWN, answers, stage
from foggen.inputs import model_folder
from foggen.labels import Questions, SftRow
from foggen.questions import TASKS, Question, by_domain, draw, subset
from foggen.store import ROOT, Row, Run, digest, progress, read_record, write_jsonl
from foggen.training import Job, buffer_model

Plan = list[tuple[str | None, list[Question]]]  # domain (R0: None) and new questions of every round
Letters = dict[str, str] | None  # question id -> the cloud's letter; None: the gold letters count


class Round(NamedTuple):
    """What one round left behind. R0 is the model before the chain; its rows are the buffer."""

    number: int
    domain: str | None
    model: Path
    rows: list[SftRow]  # the newly labelled ones
    training: Row
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

    def record(self) -> Row:
        """A flat row of a table: number, domain, labels by bucket, training and dev metrics."""
        row: Row = {"number": self.number, "domain": self.domain}
        row |= {f"labels {name}": n for name, n in labels.label_histogram(self.rows).items()}
        row |= {f"sft {name}": value for name, value in self.training.items()}
        return {**row, "cloud wrong": self.cloud_wrong, **self.metrics}


# ------------------------------------------------------------------------------------------------
# The recipe


def run_chain(run: Run, train: Questions, dev: Questions, edge: EngineSlot) -> list[Round]:
    """R0 and all rounds, made or found in the run, with a line of each on stderr.

    R0 is the raw edge model, and labels the buffer. With `format_install` a sibling labels it, and
    R0 has learnt the format from these labels. `train` feeds the buffer and the rounds; `dev` is
    what every checkpoint is evaluated on.
    """
    s, plan = run.settings, round_questions(train, run.settings)
    dev = subset(dev, s.dev_questions, derive_seed(s.seed, "dev"))
    if not dev:
        raise SettingsError("no dev questions: give data.sources one of use=dev, or use=divide")
    asked = {question.id: question for _, questions in plan for question in questions}
    cloud = cloud_letters(run, edge, list(asked.values()))
    model, labeller = model_folder(s.edge.model, s.edge.revision), buffer_model(s)
    rounds: list[Round] = []
    for number, (domain, questions) in enumerate(plan):
        name, record = f"r{number:02d}", Row()
        control = partial(labels.control_labels, s.label_control, buffer=buffer_rows(rounds[:1]))
        # The checkpoint that stands labels new questions, from its answers
        new = label_questions(run, edge, name, labeller, questions, cloud)
        new = control(new, derive_seed(s.seed, name, "samples"))
        # Rows of the buffer are replayed beside them, as a rule with the labels that they have
        old = replay(buffer_rows(rounds), s.replay_rows, derive_seed(s.seed, name))
        if s.relabel_replay and old:
            again, replayed = f"{name}-replay", [asked[row["id"]] for row in old]
            old = label_questions(run, edge, again, labeller, replayed, cloud)
            old = control(old, derive_seed(s.seed, again, "samples"))
        # It learns both; the merged weights are the next checkpoint
        if s.edge.format_install and not rounds:
            edge.close()  # the sibling's engine cannot take another architecture's weights
        if rounds or s.edge.format_install:
            model, record = fine_tune(run, edge, name, model, [*new, *old])
        evaluation = answers(run, edge, dev, model, f"{name}-dev")
        wrong = sum(cloud.get(q.id) != q.answer for q in questions) if cloud else None
        rounds.append(Round(number, domain, model, new, record, evaluation, s.tau, wrong))
        labeller = rounds[0].model if s.label_control == "frozen" else model
        shown = "right {local_accuracy:.3f}  kept {kept:.3f}  AUROC {auroc:.3f}"
        progress(f"R{number:<2} {domain or 'base':<15} {shown.format(**rounds[-1].metrics)}")
    return rounds


# ------------------------------------------------------------------------------------------------
# Questions and rows of a round


def calibration_questions(train: Questions, settings: Settings) -> list[Question]:
    """The questions of R0's buffer: `calibration_rows`, in equal parts from all domains."""
    seed = derive_seed(settings.seed, "buffer")
    return subset(train, settings.calibration_rows, seed, *settings.domains)


def round_questions(train: Questions, settings: Settings) -> Plan:
    """The domain and the new questions of every round, R0's being the buffer's.

    They are known beforehand, and repeat only once a domain has no others. Raises SettingsError for
    a domain without questions.
    """
    pools = by_domain(train)
    if [name for name in dict.fromkeys(settings.domains) if name in pools] != settings.domains:
        expected = f"each once, of those with training questions: {', '.join(pools)}"
        raise SettingsError(f"domains: {settings.domains}; expected: {expected}")
    plan: Plan = [(None, calibration_questions(train, settings))]
    for number in range(1, settings.rounds + 1):
        domain = settings.domains[(number - 1) % len(settings.domains)]
        used = {question.id for _, questions in plan for question in questions}
        seed = derive_seed(settings.seed, f"r{number:02d}")
        plan.append((domain, draw(pools[domain], settings.new_rows, seed, used)))
    return plan


def cloud_letters(run: Run, edge: EngineSlot, questions: Questions) -> Letters:
    """The cloud's letters to the questions, asked for once; None where the settings use none.

    An unreadable answer has none. Raises EngineError where the cloud failed (`keep_local`).
    """
    if "cloud" not in (run.settings.answer_target, run.settings.label_reference):
        return None
    table = answers(run, edge, questions, None, "chain-cloud")
    if table["failed"].any():
        raise EngineError("the cloud did not answer all training questions; run again to resume")
    return dict(table.set_index("id")["local_answer"].dropna())


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


def label_questions(
    run: Run, edge: EngineSlot, name: str, model: Path, questions: Questions, cloud: Letters = None
) -> list[SftRow]:
    """Training rows for `questions`, labelled by what the checkpoint `model` answers to them.

    `cloud`: its letters, which are taught (`answer_target`) or count as right (`label_reference`);
    a question without one is left out, and so is one without a letter to teach.
    """
    s, seed = run.settings, derive_seed(run.settings.seed, name, "samples")
    letters = {q.id: q.answer for q in questions} if cloud is None else cloud
    asked = [question for question in questions if question.id in letters]
    theirs = [question.model_copy(update={"answer": letters[question.id]}) for question in asked]
    judged = theirs if s.label_reference == "cloud" else asked
    taught = theirs if s.answer_target == "cloud" else asked
    ask = partial(labels.sample_answers, settings=s, seed=seed)
    if s.labels == "exact":
        ask = partial(labels.exact_answers, settings=s)
    key = {**s.only(*DRAWN, "labels"), "seed": seed}
    samples = stage(run, edge, model, f"{name}-samples", ask, judged, key)
    rows = [labels.training_row(q, sample, s) for q, sample in zip(taught, samples, strict=True)]
    return [row for row in rows if row]


def fine_tune(
    run: Run, edge: EngineSlot, name: str, model: Path, rows: list[SftRow]
) -> tuple[Path, Row]:
    """The next checkpoint, `model` trained on `rows`, and the record that `training.sft` gives."""
    s, seed = run.settings, derive_seed(run.settings.seed, name, "sft")

    def compute(folder: Path) -> None:
        write_jsonl(folder / "rows.jsonl", rows)
        edge.sleep()  # the GPU is the training's
        training.train(Job(model=model, rows=rows, settings=s, out=folder / "model", seed=seed))

    key = {**s.only("lora", "sft", "training", "dtype"), "rows": digest(rows), "seed": seed}
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
    """The branch round: its checkpoint and training, new rows, replayed rows, and all questions."""

    model: Path
    training: Row
    rows: list[SftRow]
    replayed: list[SftRow]
    labelled: list[SftRow]  # `open_ended.open_row` of every question, taught or not


def run_r15(
    run: Run, rounds: Sequence[Round], questions: open_ended.Questions, edge: EngineSlot
) -> Branch:
    """One more round from the chain's last checkpoint, which labels open-ended `questions`.

    Every task stops at its number of rows in `open_ended.r15`. The chain stays as it is, and
    replayed rows keep their labels.
    """
    s, model, seed = run.settings, rounds[-1].model, derive_seed(run.settings.seed, "r15")
    ask = partial(open_ended.r15_rows, settings=s, seed=seed)
    key = {**s.only(*DRAWN, "tie", "open_ended"), "seed": seed}
    labelled = stage(run, edge, model, "r15-labels", ask, questions, key)
    new: list[SftRow] = []
    for task in TASKS:
        rows = [row for row in labelled if row["domain"] == task and row["target"]]
        new += rows[: getattr(s.open_ended.r15, task)]
    old = replay(buffer_rows(rounds), s.open_ended.r15.replay, seed)
    if s.open_ended.r15_model:  # trained by others on other rows; these are for the eye
        model = model_folder(s.open_ended.r15_model, s.open_ended.r15_revision)
        return Branch(model, {"steps": 0}, new, old, labelled)
    return Branch(*fine_tune(run, edge, "r15", model, [*new, *old]), new, old, labelled)
