"""From a checkpoint to its outcomes table: what routing, AutoMix and the baselines need of it.

Every part is asked for once and kept in the run: `outcomes` -> `answers` -> `greedy_answers` ->
`engine.generate`, with the cache (`stage`) in between. Knows no metric, and no training.
"""

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
from pandas import DataFrame as Table
from scipy.special import expit

from foggen import automix, engines, labels, open_ended, prompts
from foggen.config import Settings, derive_seed
from foggen.engines import NOTHING, Engine, EngineSlot, Sampling, make_engine
from foggen.inputs import model_folder
from foggen.labels import Questions
from foggen.questions import OpenQuestion, Question, subset
from foggen.store import ROOT, Run, digest, progress, read_record

MODEL = ("engine", "engine_options", "dtype")  # what every answer of a checkpoint depends on
CLOUD = ("cloud", "dtype")
DRAWN = ("samples", "temperature", "top_p", "top_k", "max_new_tokens")
PARTS = ("scores", "votes", "verification")
Parts = Sequence[str]
OpenQuestions = Sequence[OpenQuestion]
Rows = list[dict[str, Any]]
Ask = Callable[[Engine], Rows]


def evaluated_questions(test: Questions, settings: Settings) -> list[Question]:
    """The test questions that a run evaluates: the same ones for every seed."""
    return subset(test, settings.test_questions, seed=0)


def greedy_answers(engine: Engine, questions: Questions, settings: Settings) -> Rows:
    """One greedy pass, a row per question:

    {"id": "law-7", "domain": "law", "fact": "law/3", "gold": "A", "n_options": 4,
     "local_answer": "B", "local_correct": 0, "confidence": 0.25, "local_tokens": 5,
     "text": "Confidence: 0.25\\nFinal answer: B", "failed": 0}

    An unreadable answer or confidence is None, and so is the confidence of an unreadable answer:
    nothing can be kept of it. `failed`: the cloud gave no text, not even an empty one.
    """
    messages = [prompts.mcq_messages(question, settings.prompt_variant) for question in questions]
    replies = engine.generate(messages, Sampling(max_tokens=settings.max_new_tokens))
    rows = []
    for question, completions in zip(questions, replies, strict=True):
        reply = completions[0] if completions else NOTHING
        confidence, answer = prompts.parse_response(reply.text, len(question.options))
        row = question.model_dump(include={"id", "domain", "fact"})
        row |= {"gold": question.answer, "n_options": len(question.options)}
        row |= {"local_answer": answer, "local_correct": int(answer == question.answer)}
        row |= {"confidence": confidence if answer else None, "local_tokens": reply.tokens}
        rows.append({**row, "text": reply.text, "failed": int(not completions)})
    return rows


# ------------------------------------------------------------------------------------------------
# The cache


def stage_key(
    settings: Settings, questions: Questions | OpenQuestions, *names: str, **values: Any
) -> dict[str, Any]:
    """The key of a stage: what its answers depend on, beside model and code."""
    contents = digest([question.model_dump(mode="json") for question in questions])
    return {**settings.only("prompt_variant", *names), **values, "questions": contents}


class CloudFailed(Exception):
    """Some questions got no text of the cloud; carries all rows past the cache."""


def stage(
    run: Run, edge: EngineSlot, model: Path | None, name: str, key: Any, ask: Ask, *code: ModuleType
) -> Rows:
    """The rows that `ask` gets from the checkpoint `model` (None: from the cloud), asked for once.

    Where the cloud failed, rows are counted and shown, but not kept: the next run asks again.
    """
    cloud, key = run.settings.cloud, key | run.settings.only(*(MODEL if model else CLOUD))
    inputs = [model] if model else []
    if not model and cloud.engine != "openai":
        inputs = [model_folder(cloud.model, cloud.revision)]

    def compute() -> Rows:
        if model:
            return ask(edge.load(model))
        if inputs:
            edge.close()  # room for the cloud; in one process two vLLM engines kill each other
        with closing(cloud_engine(run.settings)) as engine:
            rows = ask(engine)
        if failed := sum(row["failed"] for row in rows):
            progress(f"  {name}: no answer to {failed} of {len(rows)}; the next run asks again")
            raise CloudFailed(rows)
        return rows

    try:
        modules = [prompts, engines, sys.modules[__name__], *code]
        return run.cached_rows(name, key, compute, inputs, modules)
    except CloudFailed as failure:
        return list(failure.args[0])


def cloud_engine(settings: Settings) -> Engine:
    """The strong model as the profile names it: local weights, or an OpenAI-compatible server."""
    cloud, options = settings.cloud, settings.cloud.options
    if cloud.engine == "openai":
        server = cloud.model_dump(include={"base_url", "key_variable", "on_failure"})
        return make_engine("openai", cloud.model, **server, **options)
    folder = model_folder(cloud.model, cloud.revision)
    return make_engine(cloud.engine, folder, **{"dtype": settings.dtype, **options})


# ------------------------------------------------------------------------------------------------
# Multiple choice; `name`: a set of questions and a checkpoint, such as `test-r14`


def answers(
    run: Run, edge: EngineSlot, questions: Questions, model: Path | None, name: str
) -> Table:
    """`greedy_answers` of a checkpoint (None: of the cloud), with the questions' texts."""
    ask = partial(greedy_answers, questions=questions, settings=run.settings)
    key = stage_key(run.settings, questions, "max_new_tokens")
    rows = stage(run, edge, model, f"{name}-answers", key, ask)
    texts = [question.question for question in questions]
    return Table(rows).assign(question=texts).astype({"confidence": float})


def cloud_answers(run: Run, edge: EngineSlot, questions: Questions, name: str) -> Table:
    """`greedy_answers` of the cloud, to the very prompts that the edge model gets."""
    return answers(run, edge, questions, None, f"{name}-cloud")


def answer_letters(table: Table) -> list[str | None]:
    """The letters in a table of `answers`; None where unreadable."""
    return [None if pd.isna(letter) else str(letter) for letter in table["local_answer"]]


def scores(run: Run, edge: EngineSlot, questions: Questions, model: Path, name: str) -> Table:
    """Exact probabilities: E[c], the likeliest letter's share, and P(True) of the greedy answer."""
    letters = answer_letters(answers(run, edge, questions, model, name))

    def ask(engine: Engine) -> Rows:
        exact = labels.score_answers(engine, questions, run.settings.prompt_variant)
        rows = []
        for score, p in zip(exact, p_true(engine, questions, letters), strict=True):
            row = {"expected_confidence": score.expected_confidence, "p_true": p}
            rows.append({**row, "option_probability": score.option_probability})
        return rows

    key = stage_key(run.settings, questions, answers=digest(letters))
    return Table(stage(run, edge, model, f"{name}-scores", key, ask, labels)).astype(float)


def p_true(engine: Engine, questions: Questions, letters: Sequence[str | None]) -> list[float]:
    """P(True): the probability of the verdict "Correct" against "Incorrect", without reasoning.

    NaN for an answer that could not be read (None): there is nothing to judge.
    """
    decide = {"role": "assistant", "content": prompts.VERIFY_DECISION}
    pairs = zip(questions, letters, strict=True)
    messages = [[*prompts.verify_messages(q, letter), decide] for q, letter in pairs if letter]
    logs = iter(engine.score(messages, [[" Correct.", " Incorrect."]] * len(messages)))
    verdicts = [next(logs) if letter else (math.nan, math.nan) for letter in letters]
    return [float(expit(correct - incorrect)) for correct, incorrect in verdicts]


def votes(run: Run, edge: EngineSlot, questions: Questions, model: Path, name: str) -> Table:
    """The letters of the recipe's samples, one per sample, and the tokens that they took."""
    seed = derive_seed(run.settings.seed, name.partition("-")[0], "votes")
    ask = partial(labels.sample_answers, questions=questions, settings=run.settings, seed=seed)
    key = stage_key(run.settings, questions, *DRAWN, seed=seed)
    samples = Table(stage(run, edge, model, f"{name}-votes", key, ask, labels))
    return samples[["votes", "tokens"]].rename(columns={"tokens": "sample_tokens"})


def verifications(
    run: Run, edge: EngineSlot, questions: Questions, model: Path, name: str
) -> Table:
    """AutoMix's verifications of the greedy answers, with their texts: see `automix.verify`."""
    letters, rule = answer_letters(answers(run, edge, questions, model, name)), run.settings.automix
    seed = derive_seed(run.settings.seed, name.partition("-")[0], "verification")
    sampling = Sampling(rule.k, rule.temperature, rule.max_new_tokens, seed)
    ask = partial(automix.verify, questions=questions, answers=letters, sampling=sampling)
    key = stage_key(run.settings, questions, "automix", answers=digest(letters), seed=seed)
    return Table(stage(run, edge, model, f"{name}-verification", key, ask, automix))


def outcomes(
    run: Run, edge: EngineSlot, questions: Questions, model: Path, name: str, parts: Parts = PARTS
) -> Table:
    """The outcomes table of a checkpoint, in the columns of `routing.Outcome`, with these parts."""
    measures = {"scores": scores, "votes": votes, "verification": verifications}
    tables = [measures[part](run, edge, questions, model, name) for part in parts]
    table = pd.concat([answers(run, edge, questions, model, name), *tables], axis=1)
    cloud = cloud_answers(run, edge, questions, name.partition("-")[0])
    table = beside_cloud(table.drop(columns="texts", errors="ignore"), cloud)
    return table.assign(seed=run.settings.seed)


def beside_cloud(local: Table, cloud: Table) -> Table:
    """The edge model's table with the cloud's answers to the same questions as `cloud_...` columns.

    Where the cloud failed (`cloud_failed` 1) the edge model's answer stands for its own.
    """
    failed = cloud["failed"] == 1
    table = local.drop(columns="failed")
    for part in ("answer", "correct"):
        table[f"cloud_{part}"] = cloud[f"local_{part}"].mask(failed, local[f"local_{part}"])
    return table.assign(cloud_tokens=cloud["local_tokens"], cloud_failed=cloud["failed"])


# ------------------------------------------------------------------------------------------------
# Open-ended questions


def open_outcomes(
    run: Run, edge: EngineSlot, questions: OpenQuestions, model: Path, name: str
) -> Table:
    """The outcomes table of a checkpoint on open-ended questions, with a task for a domain."""
    limits = run.settings.open_ended.max_new_tokens.model_dump()
    ask = partial(open_ended.evaluate_open, questions=questions, max_new_tokens=limits)
    key = stage_key(run.settings, questions, limits=limits)
    local = stage(run, edge, model, f"{name}-answers", key, ask, open_ended)
    cloud = stage(run, edge, None, f"{name.partition('-')[0]}-cloud-answers", key, ask, open_ended)
    table = beside_cloud(Table(local), Table(cloud)).astype({"confidence": float})
    return table.assign(seed=run.settings.seed)


def judged(run: Run, edge: EngineSlot, questions: OpenQuestions, model: Path, name: str) -> Table:
    """The cloud's grades of a checkpoint's TruthfulQA answers: see `open_ended.judge`."""
    table = open_outcomes(run, edge, questions, model, name)
    texts = answer_letters(table[table["task"] == "truthfulqa"])
    graded = [question for question in questions if question.task == "truthfulqa"]
    ask = partial(open_ended.judge, questions=graded, answers=texts)
    key = stage_key(run.settings, graded, answers=digest(texts))
    rows = stage(run, edge, None, f"{name}-judged", key, ask, open_ended)
    return Table(rows).astype({"correct": float})


# ------------------------------------------------------------------------------------------------
# The stored study


def study_tables(settings: Settings) -> dict[str, Table] | None:
    """The tables of the reference study by name (see `data/results/make_study.py`).

    None where the settings, but for the seed, are not those that the study was made with.
    """
    folder = ROOT / "data" / "results" / settings.name
    stored = read_record(folder / "study.json").get("settings", {})
    recipe = settings.model_dump(mode="json", exclude={"seed", "seeds"})
    if any(stored.get(name) != value for name, value in recipe.items()):
        return None
    return {file.stem: pd.read_parquet(file) for file in sorted(folder.glob("*.parquet"))}
