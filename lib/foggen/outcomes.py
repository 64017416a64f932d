"""From models to the outcomes table: everything that routing, AutoMix and the baselines need of a checkpoint.

Each part (one greedy pass, exact scores, votes, verifications, the cloud's answers) is a stage of the run's store,
so asking again is free. The table's columns are those of `routing`. Knows no metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from foggen import automix, confidence, engines, open_ended, prompts, rounds
from foggen.config import Settings, derive_seed
from foggen.engines import Engine, make_engine
from foggen.prompts import VERIFY_DECISION, verify_messages
from foggen.rounds import MODEL, Loan, fingerprint, model_folder
from foggen.store import Store, digest, read_json, read_jsonl, write_jsonl

PARTS = ("scores", "votes", "verification")
STANDING = ("answer", "correct")  # what the local model's row lends to a cloud's that failed
Rows = Iterable[Mapping[Any, Any]]
Ask = Callable[[Engine], Rows]


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
class _Examiner:
    """One set of questions (`name` is the set's, such as `test`), put to checkpoints and to the cloud.

    `edge` is shared with the chain's loan.
    """

    settings: Settings
    store: Store
    name: str
    questions: Sequence[Any]
    edge: Loan

    def _rows(
        self, part: str, model: Path | None, ask: Ask, code: Sequence[Any], keys: Sequence[str] = (), **more: Any
    ) -> pd.DataFrame:
        """What `ask` gets from a checkpoint's engine, or from the cloud's (None): a stage, so asked for once.

        It depends on the settings `keys`, on `more`, on the model, the questions and `code`. The table's `attrs` hold
        the `seconds` that it took.
        """
        cloud, local = self.settings.cloud, [model] if model else []
        if not model and cloud.engine != "openai":
            local = [model_folder(cloud.model, cloud.revision)]

        def compute(folder: Path) -> None:
            engine = self.edge.at(model) if model else cloud_engine(self.settings)
            try:
                write_jsonl(folder / "rows.jsonl", ask(engine))
            finally:
                if not model:
                    engine.close()

        used = self.settings.only("prompt_variant", *keys, *(MODEL if model else ("cloud", "dtype")))
        keyed = {**used, "questions": fingerprint(self.questions), **more}
        folder = self.store.stage(f"{self.name}-{part}", keyed, local, compute, [prompts, engines, *code])
        table = pd.DataFrame(read_jsonl(folder / "rows.jsonl"))
        table.attrs["seconds"] = float(read_json(folder / "stage.json")["seconds"])
        return table

    def _kept_local(self, table: pd.DataFrame, cloud: pd.DataFrame) -> pd.DataFrame:
        """With `on_cloud_failure: keep_local`: where the cloud gave no text the local answer, marked `cloud_failed`."""
        if self.settings.cloud.options.get("on_cloud_failure") != "keep_local":
            return table
        failed = (cloud["text"] == "").to_numpy()
        kept = {f"cloud_{name}": table[f"cloud_{name}"].mask(failed, table[f"local_{name}"]) for name in STANDING}
        return table.assign(**kept, cloud_failed=failed.astype(int))


class Examination(_Examiner):
    """An examination of multiple-choice questions."""

    def outcomes(self, label: str, model: Path, parts: Sequence[str] = PARTS) -> pd.DataFrame:
        """The outcomes table of a checkpoint (`label` names it in the store), with the optional `parts` asked for."""
        asked = {"scores": self._scores, "votes": self._votes, "verification": self.verifications}
        names = {f"local_{name}": f"cloud_{name}" for name in ("answer", "correct", "tokens")}
        cloud = self._evaluated("cloud", None)  # the very prompts that the edge gets, asked once for all checkpoints
        columns = [self.answers(label, model), cloud[list(names)].rename(columns=names)]
        columns += [asked[part](label, model) for part in parts]
        table = self._kept_local(pd.concat(columns, axis=1), cloud)
        return self._named(table).drop(columns="texts", errors="ignore")

    def local(self, label: str, model: Path) -> pd.DataFrame:
        """The checkpoint's own part of the table, without the cloud: what a router may be trained on."""
        return self._named(self.answers(label, model))

    def _named(self, table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(question=[one.question for one in self.questions], seed=self.settings.seed)

    def _evaluated(self, part: str, model: Path | None) -> pd.DataFrame:
        def ask(engine: Engine) -> Rows:
            return rounds.evaluate(engine, self.questions, self.settings)

        return self._rows(part, model, ask, [rounds.evaluate], ["max_new_tokens"]).astype({"confidence": float})

    def answers(self, label: str, model: Path) -> pd.DataFrame:
        """One greedy pass."""
        return self._evaluated(f"{label}-answers", model)

    def _scores(self, label: str, model: Path) -> pd.DataFrame:
        """Exact probabilities: graded confidence, the likeliest option's share, and P(True) of the greedy answer."""
        answers = self.answers(label, model)["local_answer"].fillna("A")

        def ask(engine: Engine) -> Rows:
            scores = confidence.score_answers(engine, self.questions, self.settings.prompt_variant)
            for score, true in zip(scores, self._p_true(engine, answers), strict=True):
                likeliest = float(score.letters.max() / max(score.letters.sum(), 1e-12))
                graded = float(score.graded_confidence)
                yield {"graded_confidence": graded, "option_probability": likeliest, "p_true": true}

        code = [confidence.score_answers, confidence.AnswerScores, Examination._p_true]
        return self._rows(f"{label}-scores", model, ask, code)

    def _p_true(self, engine: Engine, answers: Iterable[str]) -> list[float]:
        """P(True): the probability of the verdict "Correct" against "Incorrect", asked without any reasoning."""
        decide = {"role": "assistant", "content": VERIFY_DECISION}
        asked = [[*verify_messages(*pair), decide] for pair in zip(self.questions, answers, strict=True)]
        scores = np.array(engine.score(asked, [[" Correct.", " Incorrect."]] * len(asked)))
        return [float(p) for p in 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))]

    def _votes(self, label: str, model: Path) -> pd.DataFrame:
        seed = derive_seed(self.settings.seed, self.name, "votes")

        def ask(engine: Engine) -> Rows:
            samples = confidence.sample_answers(engine, self.questions, self.settings, seed)
            return ({"votes": one["votes"], "sample_tokens": one["tokens"]} for one in samples)

        keys = ["samples", "temperature", "max_new_tokens"]
        return self._rows(f"{label}-votes", model, ask, [confidence.sample_answers], keys, seed=seed)

    def verifications(self, label: str, model: Path) -> pd.DataFrame:
        """AutoMix's self-verification of the greedy answers: verification, verification_tokens and k `texts` each."""
        seed, rule = derive_seed(self.settings.seed, self.name, "verification"), self.settings.automix
        answers = [None if pd.isna(one) else str(one) for one in self.answers(label, model)["local_answer"]]

        def ask(engine: Engine) -> Rows:
            return automix.verify(engine, self.questions, answers, rule.k, rule.temperature, rule.max_new_tokens, seed)

        more = {"answers": digest(answers), "seed": seed}
        code = [automix.verify, automix.verification_share]
        return self._rows(f"{label}-verification", model, ask, code, ["automix"], **more)


class OpenExamination(_Examiner):
    """An examination of open-ended questions."""

    def outcomes(self, label: str, model: Path) -> pd.DataFrame:
        """The outcomes table of a checkpoint: `open_ended.open_outcomes`, with a task for a domain."""
        local, cloud = self._evaluated(label, model), self._evaluated("cloud", None)
        table = self._kept_local(open_ended.open_outcomes(local, cloud), cloud)
        return table.assign(seed=self.settings.seed)

    def _evaluated(self, part: str, model: Path | None) -> pd.DataFrame:
        limits = self.settings.open_ended.max_new_tokens.model_dump()

        def ask(engine: Engine) -> Rows:
            yield from open_ended.evaluate_open(engine, self.questions, limits).to_dict("records")

        return self._rows(part, model, ask, [open_ended], limits=limits).astype({"confidence": float})

    def judged(self, label: str, model: Path) -> pd.DataFrame:
        """The cloud's grades of a checkpoint's TruthfulQA answers, as `open_ended.judge` gives them; asked for once."""
        answers = self.outcomes(label, model).set_index("id")["local_answer"]
        graded = [question for question in self.questions if question.task == "truthfulqa"]
        said = [None if pd.isna(answers[question.id]) else str(answers[question.id]) for question in graded]

        def ask(engine: Engine) -> Rows:
            yield from open_ended.judge(engine, graded, said).to_dict("records")

        table = self._rows(f"{label}-judged", None, ask, [open_ended], answers=digest(said))
        return table.astype({"correct": float})
