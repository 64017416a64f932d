"""The paper profile without notebooks: python paper.py [--packages PATH] RUN name=value ...

The chain, every part of the evaluation, and the open-ended branch; prints what came of it as one
line of JSON. `--packages`: more packages, for a Python that has an engine but no trainer.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any


def rehearse(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Runs the profile with these overrides in the run folder; returns the figures to look at."""
    from foggen.chain import edge_slot, run_chain, run_r15
    from foggen.config import load_profile
    from foggen.evaluation import evaluated_questions, open_outcomes, outcomes
    from foggen.inputs import pin
    from foggen.open_ended import first
    from foggen.questions import open_splits, r15_asked, splits
    from foggen.routing import check_outcomes, routing_table
    from foggen.store import Run

    overrides |= pin(load_profile("paper", overrides))
    settings = load_profile("paper", overrides)
    run, parts, open_parts = Run(folder, settings), splits(settings), open_splits(settings)
    test = evaluated_questions(parts["test"], settings)
    with closing(edge_slot(settings)) as edge:
        rounds = run_chain(run, parts["train"], parts["dev"], edge)
        last = rounds[-1].model
        table = check_outcomes(outcomes(run, edge, test, last, f"test-r{settings.rounds:02d}"))
        asked = first(open_parts["train"], r15_asked(settings))
        branch = run_r15(run, rounds, asked, edge)
        texts = open_outcomes(run, edge, open_parts["test"], branch.model, "open-r15")
    routed = routing_table(table, tau=settings.tau, resamples=50)
    return {
        "rounds": [result.record() for result in rounds],
        "models": [str(result.model) for result in (*rounds, branch)],
        "sources": [source.revision for source in settings.data.sources],
        "outcomes": json.loads(table.to_json(orient="records")),
        "routing": json.loads(routed.to_json(orient="records")),
        "r15": {"new": len(branch.rows), "old": len(branch.replayed), "sft": branch.training},
        "open": json.loads(texts.to_json(orient="records")),
    }


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] == "--packages":
        sys.path.append(arguments[1])
        arguments = arguments[2:]
    from foggen.config import parse_override

    found = rehearse(Path(arguments[0]), dict(map(parse_override, arguments[1:])))
    print(json.dumps(found))
