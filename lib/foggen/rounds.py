"""The chain: a buffer labelled by the raw model, then rounds of sampling, labelling, replay, fine-tuning and merging.

Every step is a stage of the run's store. Knows no engine by name: models run behind the `Engine` protocol.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from foggen import confidence, engines, open_ended, prompts, training
from foggen.confidence import SftRow
from foggen.config import Settings, SettingsError, derive_seed
from foggen.engines import Engine, Sampling
from foggen.hub import download
from foggen.prompts import mcq_messages, parse_response
from foggen.questions import OpenQuestion, Question, by_domain, draw, draw_balanced, subset
from foggen.store import ROOT, Store, digest, progress, read_json, read_jsonl, write_json, write_jsonl
from foggen.training import encode_row, limit_threads

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


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(engine: Engine, questions: Sequence[Question], settings: Settings) -> list[dict[str, Any]]:
    """One greedy pass: a row a question, in the columns of an outcomes table (the cloud's are added by routing)."""
    asked = [mcq_messages(question, settings.prompt_variant) for question in questions]
    sampling = Sampling(n=1, temperature=0.0, max_tokens=settings.max_new_tokens)
    rows = []
    for question, (completion,) in zip(questions, engine.generate(asked, sampling), strict=True):
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
    import numpy as np
    import pandas as pd

    from foggen.stats import CALIBRATION, calibration

    frame = pd.DataFrame(rows).astype({"confidence": float})
    values = dict(zip(CALIBRATION, calibration(frame, np.ones((1, len(frame))))[0], strict=True))
    return {
        "n": len(frame),
        "accuracy": float(frame["local_correct"].mean()),
        "confidence": float(frame["confidence"].mean()),
        "kept": float((frame["confidence"] >= tau).mean()),
        "parsed": float(values["parsed"]),
        "ece": float(values["ece_bucket"]),
        "auroc": float(values["auroc"]),
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


@dataclass(frozen=True)
class Round:
    """What one round left behind. Round 0 is the model before the chain; its rows are the calibration buffer."""

    number: int
    domain: str | None
    model: Path
    rows: Path  # the newly labelled rows
    evaluation: Path  # the dev set's outcomes
    labels: dict[str, int]  # new rows a confidence bucket
    training: dict[str, Any]
    metrics: dict[str, float]

    def line(self) -> str:
        """The round in one line."""
        m = self.metrics
        return (
            f"R{self.number:<2} {self.domain or 'base':<15} labels {'/'.join(map(str, self.labels.values()))}"
            f"  accuracy {m['accuracy']:.3f}  confidence {m['confidence']:.2f}  kept {m['kept']:.2f}"
            f"  parsed {m['parsed']:.2f}  ECE {m['ece']:.3f}  AUROC {m['auroc']:.3f}"
        )

    def record(self) -> dict[str, Any]:
        """One flat row of a table: number, domain, labels by bucket, training and dev metrics."""
        values = asdict(self)
        kept = {key: values[key] for key in ("number", "domain")}
        labels = {f"labels {bucket}": count for bucket, count in self.labels.items()}
        return {
            **kept,
            **labels,
            **{f"sft {key}": value for key, value in self.training.items()},
            **self.metrics,
        }


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


@dataclass
class Chain:
    """The rounds of one run, as stages of its store."""

    settings: Settings
    store: Store
    train: Sequence[Question]
    dev: Sequence[Question]
    loan: Loan

    def rounds(self) -> Iterator[Round]:
        """R0, then every round, each as soon as it is done."""
        settings = self.settings
        pools = by_domain(self.train)
        if missing := [domain for domain in settings.domains if domain not in pools]:
            raise SettingsError(
                f"domains: no training questions for {', '.join(missing)}; there are {', '.join(pools)}"
            )
        asked = calibration_questions(self.train, settings)
        model = model_folder(settings.edge.model, settings.edge.revision)
        install = settings.edge.format_install
        teacher = buffer_model(settings)
        rows = self.label("r00", teacher, asked)
        buffer = cast(list[SftRow], read_jsonl(rows))
        overall = [row["confidence"] for row in buffer]
        trained: dict[str, Any] = {}
        if install:
            self.loan.close()  # the sibling's engine cannot take another architecture's weights
            model, trained = self.sft("r00", model, buffer, template=teacher)
        yield self.round(0, None, model, rows, trained)
        used = {question.id for question in asked}
        known = {question.id: question for question in self.train}
        for number in range(1, settings.rounds + 1):
            name = f"r{number:02d}"
            domain = settings.domains[(number - 1) % len(settings.domains)]
            seed = derive_seed(settings.seed, name)
            asked = draw(pools[domain], settings.new_rows, seed, used)
            used |= {question.id for question in asked}
            rows = self.label(name, model, asked, overall)
            new = cast(list[SftRow], read_jsonl(rows))
            old = replay(buffer, settings.replay_rows, seed)
            if settings.relabel_replay:
                again = self.label(f"{name}-replay", model, [known[row["id"]] for row in old], overall)
                old = cast(list[SftRow], read_jsonl(again))
            model, trained = self.sft(name, model, [*new, *old])
            buffer += new
            yield self.round(number, domain, model, rows, trained)

    def label(self, name: str, model: Path, questions: Sequence[Question], overall: Sequence[float] = ()) -> Path:
        """The file of training rows for `questions`, labelled by the checkpoint `model`; two stages."""
        s = self.settings
        seed = derive_seed(s.seed, name, "samples")
        fingerprint = digest([question.model_dump(mode="json") for question in questions])
        names = ("samples", "temperature", "max_new_tokens", "prompt_variant", "labels", *MODEL)

        def ask(folder: Path) -> None:
            engine = self.loan.at(model)
            if s.labels == "exact":
                samples = confidence.exact_answers(engine, questions, s)
            else:
                samples = confidence.sample_answers(engine, questions, s, seed)
            write_jsonl(folder / "samples.jsonl", samples)

        keyed = {**s.only(*names), "questions": fingerprint, "seed": seed}
        code = [
            prompts,
            engines,
            confidence.sample_answers,
            confidence.score_answers,
            confidence.exact_answers,
        ]
        sampled = self.store.stage(f"{name}-samples", keyed, [model], ask, code)

        def write(folder: Path) -> None:
            samples = cast(list[confidence.Sample], read_jsonl(sampled / "samples.jsonl"))
            write_jsonl(folder / "rows.jsonl", confidence.label(questions, samples, s, seed, overall))

        keyed = {**s.only("tie", "answer_target", "label_control"), "questions": fingerprint, "seed": seed}
        if s.label_control == "random":
            keyed["overall"] = digest(list(overall))
        return self.store.stage(f"{name}-labels", keyed, [sampled], write, [prompts, confidence]) / "rows.jsonl"

    def sft(
        self, name: str, model: Path, rows: Sequence[SftRow], template: Path | None = None
    ) -> tuple[Path, dict[str, Any]]:
        """The next checkpoint, trained on `rows` from `model`, and what the training was.

        `template`: a model whose chat template is taken where `model` has none.
        """
        s = self.settings
        seed = derive_seed(s.seed, name, "sft")

        def train(folder: Path) -> None:
            write_jsonl(folder / "rows.jsonl", rows)
            self.loan.sleep()
            record = training.train(model, rows, s, folder / "model", seed, template)
            write_json(folder / "training.json", record)

        keyed = {**s.only("lora", "sft", "dtype"), "rows": digest(list(rows)), "seed": seed}
        inputs = [model] if template is None else [model, template]
        code = [prompts, training.sft, training.sft_config, encode_row]
        folder = self.store.stage(f"{name}-sft", keyed, inputs, train, code)
        return folder / "model", cast(dict[str, Any], read_json(folder / "training.json"))

    def round(self, number: int, domain: str | None, model: Path, rows: Path, trained: dict[str, Any]) -> Round:
        """Evaluates a checkpoint on the dev set and sums the round up."""
        s = self.settings
        questions = subset(self.dev, s.dev_questions, derive_seed(s.seed, "dev"))

        def compute(folder: Path) -> None:
            write_jsonl(folder / "outcomes.jsonl", evaluate(self.loan.at(model), questions, s))

        keyed = {
            **s.only("max_new_tokens", "prompt_variant", *MODEL),
            "questions": digest([question.model_dump(mode="json") for question in questions]),
        }
        folder = self.store.stage(f"r{number:02d}-dev", keyed, [model], compute, [prompts, engines, evaluate])
        outcomes = folder / "outcomes.jsonl"
        labels = confidence.histogram(cast(list[SftRow], read_jsonl(rows)))
        return Round(number, domain, model, rows, outcomes, labels, trained, dev_metrics(read_jsonl(outcomes), s.tau))


def stream_chain(
    settings: Settings,
    store: Store,
    train: Sequence[Question],
    dev: Sequence[Question],
    engine_factory: EngineFactory | None = None,
) -> Iterator[Round]:
    """R0 and all rounds, each as soon as it is made, or found in the store.

    `train` feeds the buffer and the rounds; `dev` is what every checkpoint is evaluated on.
    """
    loan = Loan(engine_factory or edge_engine(settings))
    try:
        yield from Chain(settings, store, train, dev, loan).rounds()
    finally:
        loan.close()


def run_chain(
    settings: Settings,
    store: Store,
    train: Sequence[Question],
    dev: Sequence[Question],
    engine_factory: EngineFactory | None = None,
) -> list[Round]:
    """All that `stream_chain` gives, with a progress line a round."""
    results = []
    for result in stream_chain(settings, store, train, dev, engine_factory):
        progress(result.line())
        results.append(result)
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
    return [cast(SftRow, row) for result in rounds for row in read_jsonl(result.rows)]


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
        "questions": digest([q.model_dump(mode="json") for q in questions]),
    }

    def ask(folder: Path) -> None:
        rows, counts = open_ended.r15_rows(loan.at(model), questions, s, seed)
        write_jsonl(folder / "rows.jsonl", rows)
        write_jsonl(folder / "counts.jsonl", counts.rename_axis("task").reset_index().to_dict("records"))

    folder = store.stage("r15-labels", keyed, [model], ask, [prompts, engines, open_ended, confidence.bucket])
    new = cast(list[open_ended.OpenRow], read_jsonl(folder / "rows.jsonl"))
    old = replay(buffer_rows(rounds), s.open_ended.r15.replay, seed)
    if s.open_ended.r15_model:  # trained by others on rows of its own; ours are for the eye
        branch = model_folder(s.open_ended.r15_model)
        trained: dict[str, Any] = {"rows": len(new) + len(old), "too_long": 0, "steps": 0}
    else:
        branch, trained = Chain(s, store, [], [], loan).sft("r15", model, [*new, *old])
    return Branch(branch, new, read_jsonl(folder / "counts.jsonl"), old, trained)
