"""From models to the outcomes table: everything that routing, AutoMix and the baselines need of a checkpoint.

Each part (one greedy pass, exact scores, votes, verifications, the cloud's answers) is a stage of the run's store,
so asking again is free. The table's columns are those of `routing`. Knows no metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from foggen import automix, confidence, engines, open_ended, prompts, rounds
from foggen.config import Settings, derive_seed
from foggen.engines import Engine, make_engine
from foggen.prompts import VERIFY_DECISION, verify_messages
from foggen.questions import OpenQuestion, Question
from foggen.rounds import MODEL, Loan, edge_engine, model_folder
from foggen.store import Store, digest, read_json, read_jsonl, write_json, write_jsonl, write_text

PARTS = ("scores", "votes", "verification")


def cloud_engine(settings: Settings) -> Engine:
    """The strong model as the profile names it: local weights, or an OpenAI-compatible endpoint."""
    cloud = settings.cloud
    if cloud.engine == "openai":
        given = {"base_url": cloud.base_url, "key_variable": cloud.key_variable, **cloud.options}
        return make_engine("openai", cloud.model, **given)
    return make_engine(
        cloud.engine, model_folder(cloud.model, cloud.revision), **{"dtype": settings.dtype, **cloud.options}
    )


@dataclass
class Examination:
    """One set of questions, put to checkpoints and to the cloud. `edge` is shared with the chain's loan."""

    settings: Settings
    store: Store
    name: str  # of the set, such as `test`
    questions: Sequence[Question]
    edge: Loan

    @classmethod
    def of(cls, settings: Settings, store: Store, name: str, questions: Sequence[Question]) -> Examination:
        """An examination with an engine of its own."""
        return cls(settings, store, name, questions, Loan(edge_engine(settings)))

    def outcomes(self, label: str, model: Path, parts: Sequence[str] = PARTS) -> pd.DataFrame:
        """The outcomes table of a checkpoint (`label` names it in the store), with the optional `parts` asked for."""
        columns = [self._greedy(label, model), self._cloud()]
        columns += [getattr(self, f"_{part}")(label, model) for part in parts]
        return self._named(pd.concat(columns, axis=1))

    def local(self, label: str, model: Path) -> pd.DataFrame:
        """The checkpoint's own part of the table, without the cloud: what a router may be trained on."""
        return self._named(self._greedy(label, model))

    def _named(self, table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(question=[one.question for one in self.questions], seed=self.settings.seed)

    def seconds(self, label: str, model: Path) -> dict[str, float]:
        """What answering and verifying all the questions took, in seconds on the machine that did it."""
        folders = {"answers": self._answered(label, model), "verification": self._verified(label, model)}
        return {part: float(read_json(folder / "stage.json")["seconds"]) for part, folder in folders.items()}

    def texts(self, label: str, model: Path) -> list[list[str]]:
        """The k verification texts of every question."""
        folder = self._verified(label, model)
        texts: list[list[str]] = read_json(folder / "texts.json")
        return texts

    def _stage(
        self,
        part: str,
        keys: Sequence[str],
        inputs: Sequence[Path],
        compute: Callable[[Path], object],
        code: Sequence[Any],
        **more: Any,
    ) -> Path:
        keyed = {
            **self.settings.only("prompt_variant", *keys),
            **more,
            "questions": digest([question.model_dump(mode="json") for question in self.questions]),
        }
        used = [prompts, engines, *code]
        return self.store.stage(f"{self.name}-{part}", keyed, inputs, compute, used)

    def _seed(self, part: str) -> int:
        return derive_seed(self.settings.seed, self.name, part)

    def _answered(self, label: str, model: Path) -> Path:
        def compute(folder: Path) -> None:
            rows = rounds.evaluate(self.edge.at(model), self.questions, self.settings)
            write_jsonl(folder / "rows.jsonl", rows)

        return self._stage(
            f"{label}-answers", ("max_new_tokens", *MODEL), [model], compute, [rounds.evaluate]
        )

    def _greedy(self, label: str, model: Path) -> pd.DataFrame:
        rows = read_jsonl(self._answered(label, model) / "rows.jsonl")
        return pd.DataFrame(rows).astype({"confidence": float})

    def _cloud(self) -> pd.DataFrame:
        """The cloud gets the very prompt that the edge gets, and is asked once for all checkpoints."""

        def compute(folder: Path) -> None:
            engine = cloud_engine(self.settings)
            try:
                write_jsonl(folder / "rows.jsonl", rounds.evaluate(engine, self.questions, self.settings))
            finally:
                engine.close()

        cloud = self.settings.cloud
        local = [model_folder(cloud.model, cloud.revision)] if cloud.engine != "openai" else []
        folder = self._stage("cloud", ("max_new_tokens", "cloud", "dtype"), local, compute, [rounds.evaluate])
        rows = pd.DataFrame(read_jsonl(folder / "rows.jsonl"))
        names = {
            "local_answer": "cloud_answer",
            "local_correct": "cloud_correct",
            "local_tokens": "cloud_tokens",
        }
        return rows[list(names)].rename(columns=names)

    def _scores(self, label: str, model: Path) -> pd.DataFrame:
        """Exact probabilities: graded confidence, the likeliest option's share, and P(True) of the greedy answer."""

        def compute(folder: Path) -> None:
            engine = self.edge.at(model)
            scores = confidence.score_answers(engine, self.questions, self.settings.prompt_variant)
            letters = [score.letters / max(score.letters.sum(), 1e-12) for score in scores]
            rows = {
                "graded_confidence": [score.graded_confidence for score in scores],
                "option_probability": [float(p.max()) for p in letters],
                "p_true": self._p_true(engine, [str(answer) for answer in answers]),
            }
            write_json(folder / "columns.json", rows)

        answers = self._greedy(label, model)["local_answer"].fillna("A")
        code = [confidence.score_answers, Examination._p_true]
        folder = self._stage(f"{label}-scores", MODEL, [model], compute, code)
        return pd.DataFrame(read_json(folder / "columns.json"))

    def _p_true(self, engine: Engine, answers: Sequence[str]) -> list[float]:
        """P(True): the probability of the verdict "Correct" against "Incorrect", asked without any reasoning."""
        asked = [
            [*verify_messages(question, answer), {"role": "assistant", "content": VERIFY_DECISION}]
            for question, answer in zip(self.questions, answers, strict=True)
        ]
        scores = np.array(engine.score(asked, [[" Correct.", " Incorrect."]] * len(asked)))
        return [float(p) for p in 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))]

    def _votes(self, label: str, model: Path) -> pd.DataFrame:
        def compute(folder: Path) -> None:
            seed = self._seed("votes")
            samples = confidence.sample_answers(self.edge.at(model), self.questions, self.settings, seed)
            rows = [{"votes": one["votes"], "sample_tokens": one["tokens"]} for one in samples]
            write_jsonl(folder / "rows.jsonl", rows)

        keys = ("samples", "temperature", "max_new_tokens", *MODEL)
        code = [confidence.sample_answers]
        folder = self._stage(f"{label}-votes", keys, [model], compute, code, seed=self._seed("votes"))
        return pd.DataFrame(read_jsonl(folder / "rows.jsonl"))

    def _verified(self, label: str, model: Path) -> Path:
        answers = [
            None if answer != answer else answer for answer in self._greedy(label, model)["local_answer"]
        ]

        def compute(folder: Path) -> None:
            rule = self.settings.automix
            limits = (rule.k, rule.temperature, rule.max_new_tokens)
            seed = self._seed("verification")
            found = automix.verify(self.edge.at(model), self.questions, answers, *limits, seed)
            columns = {"verification": found.v.tolist(), "verification_tokens": found.tokens.tolist()}
            write_json(folder / "columns.json", columns)
            write_json(folder / "texts.json", found.texts)

        more = {"answers": digest(answers), "seed": self._seed("verification")}
        return self._stage(
            f"{label}-verification", ("automix", *MODEL), [model], compute, [automix.verify], **more
        )

    def _verification(self, label: str, model: Path) -> pd.DataFrame:
        return pd.DataFrame(read_json(self._verified(label, model) / "columns.json"))


@dataclass
class OpenExamination:
    """One set of open-ended questions, put to checkpoints and to the cloud."""

    settings: Settings
    store: Store
    questions: Sequence[OpenQuestion]
    edge: Loan

    def outcomes(self, label: str, model: Path) -> pd.DataFrame:
        """The outcomes table of a checkpoint: `open_ended.open_outcomes`, with a task for a domain."""
        s = self.settings
        local = self._asked(label, s.only(*MODEL), [model], lambda: self.edge.at(model), owned=False)
        weights = [model_folder(s.cloud.model, s.cloud.revision)] if s.cloud.engine != "openai" else []
        cloud = self._asked("cloud", s.only("cloud", "dtype"), weights, lambda: cloud_engine(s), owned=True)
        return open_ended.open_outcomes(local, cloud).assign(seed=s.seed)

    def judged(self, label: str, model: Path) -> pd.DataFrame:
        """The cloud's grades of a checkpoint's TruthfulQA answers, as `open_ended.judge` gives them; asked for once."""
        answers = self.outcomes(label, model).set_index("id")["local_answer"]
        graded = [question for question in self.questions if question.task == "truthfulqa"]
        said = [None if pd.isna(answers[question.id]) else str(answers[question.id]) for question in graded]

        def compute(folder: Path) -> None:
            engine = cloud_engine(self.settings)
            try:
                table = open_ended.judge(engine, graded, said)
            finally:
                engine.close()
            write_text(folder / "rows.jsonl", table.to_json(orient="records", lines=True))

        asked = digest([question.model_dump(mode="json") for question in graded])
        keyed = {**self.settings.only("cloud"), "questions": asked, "answers": digest(said)}
        folder = self.store.stage(f"open-{label}-judged", keyed, [], compute, [engines, open_ended.judge])
        return pd.DataFrame(read_jsonl(folder / "rows.jsonl")).astype({"correct": float})

    def _asked(
        self,
        label: str,
        keys: dict[str, Any],
        weights: Sequence[Path],
        load: Callable[[], Engine],
        owned: bool,
    ) -> pd.DataFrame:
        """The evaluation of one model; an engine of its own (`owned`) is closed after it."""
        limits = self.settings.open_ended.max_new_tokens.model_dump()

        def compute(folder: Path) -> None:
            engine = load()
            try:
                table = open_ended.evaluate_open(engine, self.questions, limits)
            finally:
                if owned:
                    engine.close()
            write_text(
                folder / "rows.jsonl", table.to_json(orient="records", lines=True, double_precision=15)
            )

        asked = digest([question.model_dump(mode="json") for question in self.questions])
        keyed = {**keys, "max_new_tokens": limits, "questions": asked}
        folder = self.store.stage(f"open-{label}", keyed, weights, compute, [prompts, engines, open_ended])
        return pd.DataFrame(read_jsonl(folder / "rows.jsonl")).astype({"confidence": float})
