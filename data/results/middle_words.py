"""What would make the middle words likely: FogGen's chain with labels that a question's kind shows.

`python data/results/middle_words.py` trains the chain with three seeds. Instead of its own share of
right votes every question gets that of its relation (such as "capital of"), over the questions that
are labelled with it. The label then depends on what the model can read, and not on which facts it
happens to know. Writes `data/results/pocket/middle_words.json`: how often R14 states every word on
the test questions, and how often it is right there. About ten minutes per seed on one core; a
killed run resumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pandas as pd

from foggen import chain, evaluation, prompts
from foggen.config import derive_seed, load_profile
from foggen.labels import SftRow, bucket, label_histogram
from foggen.prompts import BUCKET_TEXTS, BUCKETS
from foggen.questions import Question, splits
from foggen.stats import auroc, router_score, tie_sums
from foggen.store import ROOT, Run, progress, write_json
from foggen.training import buffer_model

SEEDS = (0, 1, 2)


def relation(question: Question) -> str:
    """What is asked of a fact: `law/term` of `law/term/tort`."""
    return str(question.fact).rsplit("/", 1)[0]


def labelled_by_relation(rows: Sequence[SftRow], questions: Mapping[str, Question]) -> list[SftRow]:
    """The rows with the bucket of their relation's share of right votes, over these rows."""
    table = pd.DataFrame(
        {
            "relation": [relation(questions[row["id"]]) for row in rows],
            "right": [row["votes"].count(row["answer"]) / len(row["votes"]) for row in rows],
        }
    )
    shares = table.groupby("relation")["right"].transform("mean")
    labels = [bucket(share) for share in shares]
    return [
        {**row, "confidence": label, "target": prompts.target_text(label, row["answer"])}
        for row, label in zip(rows, labels, strict=True)
    ]


def one_seed(seed: int) -> dict[str, Any]:
    """The chain of one seed, and its R14 on the test questions."""
    settings = load_profile("pocket", {"seed": seed})
    run, parts = Run(ROOT / "runs" / "middle" / str(seed), settings), splits(settings)
    questions = {question.id: question for question in parts["train"]}
    model, buffer = buffer_model(settings), list[SftRow]()
    with run.locked(), closing(chain.edge_slot(settings)) as edge:
        for number, (_, drawn) in enumerate(chain.round_questions(parts["train"], settings)):
            name = f"r{number:02d}"
            rows = chain.label_questions(run, edge, name, model, drawn)
            new = labelled_by_relation(rows, questions)
            old = chain.replay(buffer, settings.replay_rows, derive_seed(seed, name))
            buffer += new
            if number:  # R0 fills the buffer only
                model, _ = chain.fine_tune(run, edge, name, model, [*new, *old])
                progress(f"seed {seed}, R{number}")
        table = evaluation.answers(run, edge, parts["test"], model, "test-middle")
    return {"labels": label_histogram(buffer), **measures(table)}


def measures(table: pd.DataFrame) -> dict[str, Any]:
    """Answers that state each word, how many of them are right, and how the word ranks."""
    stated = [table[table["confidence"] == value]["local_correct"] for value in BUCKETS]
    sums = tie_sums(router_score(table), np.ones((1, len(table))), table["local_correct"])
    return {
        "questions": len(table),
        "stated": dict(zip(BUCKET_TEXTS, map(len, stated), strict=True)),
        "right": {word: int(right.sum()) for word, right in zip(BUCKET_TEXTS, stated, strict=True)},
        "auroc": float(auroc(*sums)[0]),
    }


if __name__ == "__main__":
    found = {str(seed): one_seed(seed) for seed in SEEDS}
    write_json(ROOT / "data" / "results" / "pocket" / "middle_words.json", found)
    print(found)
