"""The chain: a buffer labelled by the raw model, then rounds of sampling, labelling, replay, fine-tuning and merging.

What takes long is a stage of the run's store. Knows no engine by name: models run behind the `Engine` protocol.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd

from foggen import confidence, engines, open_ended, prompts, training
from foggen.confidence import SftRow
from foggen.config import Settings, SettingsError, derive_seed
from foggen.engines import NOTHING, Engine, Sampling
from foggen.hub import download
from foggen.prompts import mcq_messages, parse_response
from foggen.questions import OpenQuestion, Question, by_domain, draw, draw_balanced, subset
from foggen.stats import CALIBRATION, calibration
from foggen.store import ROOT, Store, digest, progress, read_json, read_jsonl, write_json, write_jsonl
from foggen.training import limit_threads

EngineFactory = Callable[[Path], Engine]
MODEL = ("engine", "engine_options", "dtype")  # settings that every answer of a model depends on


def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model: of the checkout where it has one of that name, else the hub's local copy of it."""
    if (ROOT / model).is_dir():
        return ROOT / model
    if model.count("/") > 1 or model.startswith((".", "/")):
        raise SettingsError(f"model {model!r}: no such folder in this checkout, and not the name of a hub model")
    return download(model, revision)


def edge_engine(settings: Settings) -> EngineFactory:
    """Loads the edge model's checkpoints into the engine that the settings name."""
    limit_threads(settings)
    options = {"dtype": settings.dtype, **settings.engine_options}
    return lambda folder: engines.make_engine(settings.engine, folder, **options)


class Loan:
    """One engine at a time, holding the checkpoint that was asked for last; nothing is loaded before it is needed."""

    def __init__(self, factory: EngineFactory) -> None:
        self._factory = factory
        self._engine: Engine | None = None
        self._model: Path | None = None

    def at(self, model: Path) -> Engine:
        """The engine with the weights of `model`."""
        if self._engine is None:
            self._engine = self._factory(model)
        elif model != self._model:
            self._engine.reload(model)
        self._model = model
        return self._engine

    def sleep(self) -> None:
        """Leaves the GPU to a training; the next `at` loads weights again."""
        if self._engine is not None:
            self._engine.sleep()
            self._model = None

    def close(self) -> None:
        """Frees the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(engine: Engine, questions: Sequence[Question], settings: Settings) -> list[dict[str, Any]]:
    """One greedy pass: a row a question, in the columns of an outcomes table (the cloud's are added by routing)."""
    asked = [mcq_messages(question, settings.prompt_variant) for question in questions]
    sampling = Sampling(n=1, temperature=0.0, max_tokens=settings.max_new_tokens)
    rows = []
    for question, completions in zip(questions, engine.generate(asked, sampling), strict=True):
        completion = next(iter(completions), NOTHING)
        stated, answer = parse_response(completion.text, len(question.options))
        rows.append(
            {
                "id": question.id,
                "domain": question.domain,
                "fact": question.fact,
                "gold": question.answer,
                "n_options": len(question.options),
                "local_answer": answer,
                "local_correct": int(answer == question.answer),
                "confidence": stated,
                "local_tokens": completion.tokens,
                "text": completion.text,
            }
        )
    return rows


def dev_metrics(rows: Sequence[Mapping[str, Any]], tau: float) -> dict[str, float]:
    """What a round's line shows: accuracy, mean confidence, share kept at `tau`, parse rate, ECE, AUROC."""
    frame = pd.DataFrame(rows).astype({"confidence": float})
    measured = pd.Series(calibration(frame, np.ones((1, len(frame))))[0], CALIBRATION)
    return {
        "n": len(frame),
        "accuracy": float(frame["local_correct"].mean()),
        "confidence": float(frame["confidence"].mean()),
        "kept": float((frame["confidence"] >= tau).mean()),
        "parsed": float(measured["parsed"]),
        "ece": float(measured["ece_bucket"]),
        "auroc": float(measured["auroc"]),
    }


@dataclass(frozen=True)
class Round:
    """What one round left behind. Round 0 is the model before the chain; its rows are the calibration buffer."""

    number: int
    domain: str | None
    model: Path
    rows: list[SftRow]  # the newly labelled ones
    training: dict[str, Any]
    evaluation: list[dict[str, Any]]  # the dev set's outcomes
    tau: float

    @property
    def metrics(self) -> dict[str, float]:
        """The `dev_metrics` of the checkpoint."""
        return dev_metrics(self.evaluation, self.tau)

    def line(self) -> str:
        """The round in one line."""
        labels, m = confidence.histogram(self.rows), self.metrics
        return (
            f"R{self.number:<2} {self.domain or 'base':<15} labels {'/'.join(map(str, labels.values()))}"
            f"  accuracy {m['accuracy']:.3f}  confidence {m['confidence']:.2f}  kept {m['kept']:.2f}"
            f"  parsed {m['parsed']:.2f}  ECE {m['ece']:.3f}  AUROC {m['auroc']:.3f}"
        )

    def record(self) -> dict[str, Any]:
        """One flat row of a table: number, domain, labels by bucket, training and dev metrics."""
        return {
            "number": self.number,
            "domain": self.domain,
            **{f"labels {bucket}": count for bucket, count in confidence.histogram(self.rows).items()},
            **{f"sft {key}": value for key, value in self.training.items()},
            **self.metrics,
        }


# ---------------------------------------------------------------------------------------------------------------
# The chain


def calibration_questions(train: Sequence[Question], settings: Settings) -> list[Question]:
    """The questions of R0's buffer: `calibration_rows`, in equal parts from all domains."""
    seed = derive_seed(settings.seed, "buffer")
    return draw_balanced(train, settings.calibration_rows, settings.domains, seed)


def buffer_model(settings: Settings) -> Path:
    """The model that labels R0's buffer: the edge model, or the sibling that installs the format."""
    install, edge = settings.edge.format_install, settings.edge
    return model_folder(install.labels_from, install.revision) if install else model_folder(edge.model, edge.revision)


def replay(buffer: Sequence[SftRow], n: int, seed: int) -> list[SftRow]:
    """`n` rows of the buffer at random, without repetition; all of it where it has fewer."""
    return random.Random(seed).sample(list(buffer), min(n, len(buffer)))


def fingerprint(questions: Sequence[Question | OpenQuestion]) -> str:
    """A hash of all that is in the questions, for the key of a stage that asks them."""
    return digest([question.model_dump(mode="json") for question in questions])


@dataclass
class Chain:
    """The rounds of one run; what they compute is kept in its store."""

    settings: Settings
    store: Store
    loan: Loan

    def rounds(self, train: Sequence[Question], dev: Sequence[Question]) -> Iterator[Round]:
        """R0, then every round, each as soon as it is done."""
        s = self.settings
        pools = by_domain(train)
        if missing := [domain for domain in s.domains if domain not in pools]:
            raise SettingsError(
                f"domains: no training questions for {', '.join(missing)}; there are {', '.join(pools)}"
            )
        asked = calibration_questions(train, s)
        model, teacher = model_folder(s.edge.model, s.edge.revision), buffer_model(s)
        new = self.label("r00", teacher, asked)
        trained: dict[str, Any] = {}
        if s.edge.format_install:
            self.loan.close()  # the sibling's engine cannot take another architecture's weights
            model, trained = self.sft("r00", model, new, template=teacher)
        yield Round(0, None, model, new, trained, self.answers("r00", model, dev), s.tau)
        buffer, overall = list(new), [row["confidence"] for row in new]
        used = {question.id for question in asked}
        known = {question.id: question for question in train}
        for number in range(1, s.rounds + 1):
            name, domain = f"r{number:02d}", s.domains[(number - 1) % len(s.domains)]
            seed = derive_seed(s.seed, name)
            asked = draw(pools[domain], s.new_rows, seed, used)
            used |= {question.id for question in asked}
            new = self.label(name, model, asked, overall)
            old = replay(buffer, s.replay_rows, seed)
            if s.relabel_replay:
                old = self.label(f"{name}-replay", model, [known[row["id"]] for row in old], overall)
            model, trained = self.sft(name, model, [*new, *old])
            buffer += new
            yield Round(number, domain, model, new, trained, self.answers(name, model, dev), s.tau)

    def label(
        self, name: str, model: Path, questions: Sequence[Question], overall: Sequence[float] = ()
    ) -> list[SftRow]:
        """Training rows for `questions`, labelled by what the checkpoint `model` answers; the answers are a stage."""
        s = self.settings
        seed = derive_seed(s.seed, name, "samples")
        names = ("samples", "temperature", "max_new_tokens", "prompt_variant", "labels", *MODEL)

        def ask(folder: Path) -> None:
            engine = self.loan.at(model)
            if s.labels == "exact":
                samples = confidence.exact_answers(engine, questions, s)
            else:
                samples = confidence.sample_answers(engine, questions, s, seed)
            write_jsonl(folder / "samples.jsonl", samples)

        keyed = {**s.only(*names), "questions": fingerprint(questions), "seed": seed}
        folder = self.store.stage(f"{name}-samples", keyed, [model], ask, [prompts, engines, confidence])
        samples = cast(list[confidence.Sample], read_jsonl(folder / "samples.jsonl"))
        return confidence.label(questions, samples, s, seed, overall)

    def sft(
        self, name: str, model: Path, rows: Sequence[SftRow], template: Path | None = None
    ) -> tuple[Path, dict[str, Any]]:
        """The next checkpoint, trained on `rows` from `model`, and what the training was. `template`: see `Job`."""
        s = self.settings
        seed = derive_seed(s.seed, name, "sft")

        def train(folder: Path) -> None:
            write_jsonl(folder / "rows.jsonl", rows)
            self.loan.sleep()
            out = folder / "model"
            job = training.Job(model=model, rows=rows, settings=s, out=out, seed=seed, template=template)
            write_json(folder / "training.json", training.train(job))

        keyed = {**s.only("lora", "sft", "dtype"), "rows": digest(list(rows)), "seed": seed}
        inputs = [model] if template is None else [model, template]
        folder = self.store.stage(f"{name}-sft", keyed, inputs, train, [prompts, training])
        return folder / "model", cast(dict[str, Any], read_json(folder / "training.json"))

    def answers(self, name: str, model: Path, dev: Sequence[Question]) -> list[dict[str, Any]]:
        """The outcomes of a checkpoint on the dev questions, or on as many as the settings say."""
        s = self.settings
        questions = subset(dev, s.dev_questions, derive_seed(s.seed, "dev"))

        def ask(folder: Path) -> None:
            write_jsonl(folder / "outcomes.jsonl", evaluate(self.loan.at(model), questions, s))

        keyed = {**s.only("max_new_tokens", "prompt_variant", *MODEL), "questions": fingerprint(questions)}
        folder = self.store.stage(f"{name}-dev", keyed, [model], ask, [prompts, engines, evaluate])
        return read_jsonl(folder / "outcomes.jsonl")


def run_chain(
    settings: Settings,
    store: Store,
    train: Sequence[Question],
    dev: Sequence[Question],
    engine_factory: EngineFactory | None = None,
    show: Callable[[str], None] = progress,
) -> list[Round]:
    """R0 and all rounds, made or found in the store; `show` gets a line of each as soon as it is there.

    `train` feeds the buffer and the rounds; `dev` is what every checkpoint is evaluated on.
    """
    loan = Loan(engine_factory or edge_engine(settings))
    results = []
    try:
        for result in Chain(settings, store, loan).rounds(train, dev):
            show(result.line())
            results.append(result)
    finally:
        loan.close()
    return results


def trained_checkpoint(settings: Settings, store: Store) -> Path:
    """The best checkpoint at hand: the run's last round, else `foggen-r14` beside the edge model, else that model.

    The run's counts only if notebook 02 finished with the same edge model.
    """
    sentinel = store.run / "done" / "02_rounds.json"
    results = read_json(sentinel)["results"] if sentinel.exists() else {}
    trained = store.run / str(results.get("checkpoint"))
    if results.get("edge") == settings.edge.model and trained.is_dir():
        return trained
    released = (ROOT / settings.edge.model).with_name("foggen-r14")
    return released if released.is_dir() else model_folder(settings.edge.model, settings.edge.revision)


# ---------------------------------------------------------------------------------------------------------------
# The open-ended branch


class Branch(NamedTuple):
    """The checkpoint of a branch round; its new rows, what became of the questions, the replay, and the training."""

    model: Path
    rows: list[open_ended.OpenRow]
    counts: list[dict[str, Any]]  # one a task, as `open_ended.r15_rows` counts
    replayed: list[SftRow]
    training: dict[str, Any]


def buffer_rows(rounds: Sequence[Round]) -> list[SftRow]:
    """The buffer at the end of a chain: R0's rows, then every round's new ones."""
    return [row for result in rounds for row in result.rows]


def run_r15(
    settings: Settings, store: Store, rounds: Sequence[Round], questions: Sequence[OpenQuestion], loan: Loan
) -> Branch:
    """One more round from the chain's last checkpoint, which labels open-ended `questions`; the chain stays as it is.

    Replayed rows keep their labels: they are questions of the chain, which the branch does not ask again.
    """
    model, s = rounds[-1].model, settings
    seed = derive_seed(s.seed, "r15")
    keyed = {
        **s.only("samples", "temperature", "tie", *MODEL),
        **s.open_ended.model_dump(include={"max_new_tokens", "r15"}),
        "seed": seed,
        "questions": fingerprint(questions),
    }

    def ask(folder: Path) -> None:
        rows, counts = open_ended.r15_rows(loan.at(model), questions, s, seed)
        write_jsonl(folder / "rows.jsonl", rows)
        write_jsonl(folder / "counts.jsonl", counts)

    folder = store.stage("r15-labels", keyed, [model], ask, [prompts, engines, open_ended, confidence.bucket])
    new = cast(list[open_ended.OpenRow], read_jsonl(folder / "rows.jsonl"))
    old = replay(buffer_rows(rounds), s.open_ended.r15.replay, seed)
    if s.open_ended.r15_model:  # trained by others on rows of its own; ours are for the eye
        branch = model_folder(s.open_ended.r15_model, s.open_ended.r15_revision)
        trained: dict[str, Any] = {"rows": len(new) + len(old), "too_long": 0, "steps": 0}
    else:
        branch, trained = Chain(s, store, loan).sft("r15", model, [*new, *old])
    return Branch(branch, new, read_jsonl(folder / "counts.jsonl"), old, trained)
