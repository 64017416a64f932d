"""How far a rerun on another kind of machine agrees: the chain of seed 0, twice.

`python data/results/two_runs.py` trains it with the CPU's fastest instructions and again with the
oldest alone, which add numbers in another order as another machine would, and writes
`data/results/pocket/two_runs.json`. About ten minutes per run on one core; a killed run resumes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd

from foggen import chain, evaluation
from foggen.config import load_profile
from foggen.questions import splits
from foggen.stats import auroc, router_score, tie_sums
from foggen.store import ROOT, Run, write_json

OLDEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
}


def dev_answers(folder: Path) -> dict[str, pd.DataFrame]:
    """Answers of the first and the last checkpoint to the dev questions, of a run's chain."""
    settings = load_profile("pocket")
    run, parts = Run(folder, settings), splits(settings)
    with run.locked(), closing(chain.edge_slot(settings)) as edge:
        rounds = chain.run_chain(run, parts["train"], parts["dev"], edge)
        return {
            f"r{number}": evaluation.answers(
                run, edge, parts["dev"], rounds[number].model, f"dev-two-runs-r{number}"
            )
            for number in (0, settings.rounds)
        }


def compare(
    first: dict[str, pd.DataFrame], second: dict[str, pd.DataFrame], tau: float
) -> dict[str, float]:
    """Agreement of two runs: shares of equal texts, words and answers, and second minus first."""
    raw, last = [[run[name] for run in (first, second)] for name in first]
    metrics = [
        {
            "accuracy": table["local_correct"].mean(),
            "routed": 1 - (table["confidence"] >= tau).mean(),
            "auroc": auroc(
                *tie_sums(router_score(table), np.ones((1, len(table))), table["local_correct"])
            )[0],
        }
        for table in last
    ]
    differences = {
        f"{name}_difference": float(metrics[1][name] - value) for name, value in metrics[0].items()
    }
    return {
        "questions": len(last[0]),
        "r0_same_text": float((raw[0]["text"] == raw[1]["text"]).mean()),
        "words_agree": float((last[0]["confidence"] == last[1]["confidence"]).mean()),
        "answers_agree": float((last[0]["local_answer"] == last[1]["local_answer"]).mean()),
        **differences,
    }


def main() -> None:
    """Both runs in processes of their own (`two_runs.py <folder>` is one), then the comparison."""
    runs = {"fastest": {}, "oldest": OLDEST}
    tables: list[dict[str, pd.DataFrame]] = []
    for name, variables in runs.items():
        folder = ROOT / "runs" / "two" / name
        subprocess.run([sys.executable, __file__, folder], env=os.environ | variables, check=True)
        tables.append(pd.read_pickle(folder / "answers.pkl"))
    first, second = tables
    found = compare(first, second, load_profile("pocket").tau)
    write_json(ROOT / "data" / "results" / "pocket" / "two_runs.json", found)
    print(found)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        pd.to_pickle(dev_answers(Path(sys.argv[1])), Path(sys.argv[1]) / "answers.pkl")
    else:
        main()
