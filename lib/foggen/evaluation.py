"""From a checkpoint to its outcomes table: what routing, AutoMix and the baselines need of it.

Every part is asked for once and kept in the run: `outcomes` -> `answers` -> `greedy_answers` ->
`engine.generate`, with the cache (`stage`) in between. Knows no metric, and no training.
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame as Table
from scipy.special import expit

from foggen import automix, engines, labels, open_ended, prompts
from foggen.config import Settings, derive_seed
from foggen.engines import NOTHING, Engine, EngineSlot, Sampling, make_engine
from foggen.inputs import model_folder
from foggen.labels import Questions
from foggen.questions import Question, subset
from foggen.store import ROOT, Row, Run, digest, progress, read_record

MODEL = ("engine", "engine_options", "dtype")  # what every answer of a checkpoint depends on
CLOUD = ("cloud", "dtype")
DRAWN = ("samples", "temperature", "top_p", "top_k", "max_new_tokens")
PARTS = ("scores", "votes", "verification")
Parts = Sequence[str]
Model = Path | None  # the folder of a checkpoint; None: the cloud
Letters = list[str | None]  # None: unreadable
Ask = partial[list[Row]]  # a function of an engine and questions


def evaluated_questions(test: Questions, settings: Settings) -> list[Question]:
    """The test questions that a run evaluates: the same ones for every seed."""
    return subset(test, settings.test_questions, seed=0)


def greedy_answers(engine: Engine, questions: Questions, settings: Settings) -> list[Row]:
    """One greedy pass, a row per question:

    {"id": "law-7", "domain": "law", "question": "Who may ...?", "fact": "law/3", "gold": "A",
     "n_options": 4, "local_answer": "B", "local_correct": 0, "confidence": 0.25,
     "local_tokens": 5, "text": "Confidence: 0.25\\nFinal answer: B", "failed": 0}

    An unreadable answer or confidence is None, and so is the confidence of an unreadable answer:
    nothing can be kept of it. `failed`: the cloud gave no text, not even an empty one.
    """
    messages = [prompts.mcq_messages(question, settings.prompt_variant) for question in questions]
    replies = engine.generate(messages, Sampling(max_tokens=settings.max_new_tokens))
    rows = []
    for question, completions in zip(questions, replies, strict=True):
        reply = completions[0] if completions else NOTHING
        confidence, answer = prompts.parse_response(reply.text, len(question.options))
        row = question.model_dump(include={"id", "domain", "question", "fact"})
        row |= {"gold": question.answer, "n_options": len(question.options)}
        row |= {"local_answer": answer, "local_correct": int(answer == question.answer)}
        row |= {"confidence": confidence if answer else None, "local_tokens": reply.tokens}
        rows.append({**row, "text": reply.text, "failed": int(not completions)})
    return rows


# ------------------------------------------------------------------------------------------------
# The cache


class CloudFailed(Exception):
    """Some questions got no text of the cloud; carries all rows past the cache."""


def stage(
    run: Run, edge: EngineSlot, model: Model, name: str, ask: Ask, questions: Any, key: Row
) -> list[Row]:
    """The rows that `ask(engine, questions)` gets from the checkpoint `model`, or the cloud.

    They are asked for once. `key`: what they depend on beside model, code, prompts and questions,
    as plain values. Where the cloud failed, rows are counted and shown, but not kept: the next run
    asks again.
    """
    key = {**key, **run.settings.only("prompt_variant", *(MODEL if model else CLOUD))}
    key["questions"] = digest([question.model_dump(mode="json") for question in questions])
    modules = [prompts, engines, labels, sys.modules[__name__], sys.modules[ask.func.__module__]]
    cloud, inputs = run.settings.cloud, [model] if model else []
    if not model and cloud.engine != "openai":
        inputs = [model_folder(cloud.model, cloud.revision)]

    def compute() -> list[Row]:
        if model:
            return ask(edge.load(model), questions)
        if inputs:
            edge.close()  # room for the cloud; in one process two vLLM engines kill each other
        with closing(cloud_engine(run.settings)) as engine:
            rows = ask(engine, questions)
        if failed := sum(row["failed"] for row in rows):
            progress(f"  {name}: no answer to {failed} of {len(rows)}; the next run asks again")
            raise CloudFailed(rows)
        return rows

    try:
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


def answers(run: Run, edge: EngineSlot, questions: Questions, model: Model, name: str) -> Table:
    """`greedy_answers` of a checkpoint, or of the cloud to the very same prompts."""
    ask = partial(greedy_answers, settings=run.settings)
    key = run.settings.only("max_new_tokens")
    rows = stage(run, edge, model, f"{name}-answers", ask, questions, key)
    return Table(rows).astype({"confidence": float})


def answer_letters(table: Table) -> Letters:
    """The letters in a table of `answers`; None where unreadable."""
    return [None if pd.isna(letter) else str(letter) for letter in table["local_answer"]]


def scores(run: Run, edge: EngineSlot, questions: Questions, model: Path, name: str) -> Table:
    """Exact probabilities: E[c], the likeliest letter's share, and P(True) of the greedy answer."""
    letters = answer_letters(answers(run, edge, questions, model, name))
    ask = partial(score_rows, letters=letters, variant=run.settings.prompt_variant)
    key = {"answers": digest(letters)}
    return Table(stage(run, edge, model, f"{name}-scores", ask, questions, key)).astype(float)


def score_rows(
    engine: Engine, questions: Questions, letters: Letters, variant: prompts.Variant
) -> list[Row]:
    """A row of `scores` for every question and the letter that was answered to it."""
    exact = Table(labels.score_answers(engine, questions, variant)).drop(columns="letters")
    table = exact.assign(p_true=p_true(engine, questions, letters))
    return list(table.to_dict("records"))


def p_true(engine: Engine, questions: Questions, letters: Letters) -> list[float | None]:
    """P(True): the probability of the verdict "Correct" against "Incorrect", without reasoning.

    None for an answer that could not be read (None): there is nothing to judge.
    """
    decide = {"role": "assistant", "content": prompts.VERIFY_DECISION}
    pairs = zip(questions, letters, strict=True)
    messages = [[*prompts.verify_messages(q, letter), decide] for q, letter in pairs if letter]
    logs = engine.score(messages, [[" Correct.", " Incorrect."]] * len(messages))
    shares = iter([float(expit(correct - incorrect)) for correct, incorrect in logs])
    return [next(shares) if letter else None for letter in letters]


def votes(run: Run, edge: EngineSlot, questions: Questions, model: Path, name: str) -> Table:
    """The letters of the recipe's samples, one per sample, and the tokens that they took."""
    seed = derive_seed(run.settings.seed, name.partition("-")[0], "votes")
    ask = partial(labels.sample_answers, settings=run.settings, seed=seed)
    key = {**run.settings.only(*DRAWN), "seed": seed}
    rows = stage(run, edge, model, f"{name}-votes", ask, questions, key)
    return Table(rows)[["votes", "tokens"]].rename(columns={"tokens": "sample_tokens"})


def verification(run: Run, edge: EngineSlot, questions: Questions, model: Path, name: str) -> Table:
    """AutoMix's verifications of the greedy answers: the share that says correct, and tokens."""
    letters, rule = answer_letters(answers(run, edge, questions, model, name)), run.settings.automix
    seed = derive_seed(run.settings.seed, name.partition("-")[0], "verification")
    sampling = Sampling(rule.k, rule.temperature, rule.max_new_tokens, seed)
    ask = partial(automix.verify, answers=letters, sampling=sampling)
    key = {**run.settings.only("automix"), "answers": digest(letters), "seed": seed}
    rows = stage(run, edge, model, f"{name}-verification", ask, questions, key)
    return Table(rows).drop(columns="texts")


def outcomes(
    run: Run, edge: EngineSlot, questions: Questions, model: Path, name: str, parts: Parts = PARTS
) -> Table:
    """The outcomes table of a checkpoint, in the columns of `routing.Outcome`, with these parts."""
    measures = {"scores": scores, "votes": votes, "verification": verification}
    tables = [measures[part](run, edge, questions, model, name) for part in parts]
    table = pd.concat([answers(run, edge, questions, model, name), *tables], axis=1)
    cloud = answers(run, edge, questions, None, f"{name.partition('-')[0]}-cloud")
    return beside_cloud(table, cloud).assign(seed=run.settings.seed)


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
    run: Run, edge: EngineSlot, questions: open_ended.Questions, model: Path, name: str
) -> Table:
    """The outcomes table of a checkpoint on open-ended questions, with a task for a domain."""
    limits = run.settings.open_ended.max_new_tokens.model_dump()
    ask = partial(open_ended.evaluate_open, max_new_tokens=limits)
    asked, cloud = (ask, questions, {"limits": limits}), name.partition("-")[0]
    local = Table(stage(run, edge, model, f"{name}-answers", *asked))
    table = beside_cloud(local, Table(stage(run, edge, None, f"{cloud}-cloud-answers", *asked)))
    return table.astype({"confidence": float}).assign(seed=run.settings.seed)


# ------------------------------------------------------------------------------------------------
# The stored study


def study_tables(settings: Settings) -> dict[str, Table] | None:
    """The tables of the reference study by name (see `data/results/make_study.py`).

    None where the settings, but for the seed, are not those that the study was made with.
    """
    folder = ROOT / "data" / "results" / settings.name
    stored = read_record(folder / "study.json").get("settings", {})
    if stored | settings.only("seed", "seeds") != settings.model_dump(mode="json"):
        return None
    return {file.stem: pd.read_parquet(file) for file in sorted(folder.glob("*.parquet"))}
