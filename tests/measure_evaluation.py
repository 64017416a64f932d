"""Measures tables at full size: `python tests/measure_evaluation.py` writes `evaluation.md`."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from outcomes_factory import make_outcomes

from foggen import routing, stats
from foggen.store import ROOT, write_text

TARGET = ROOT / "data" / "results" / "evaluation.md"


def measured(what: str, bar: float, work: Callable[[], object]) -> str:
    """A row of the table: what, bar, wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return f"| {what} | {bar:g} | {wall:.1f} | {cpu:.1f} |"


def main() -> None:
    outcomes = make_outcomes(16_200 // 7 + 1, 7, rich=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.csv"
        outcomes.to_csv(file, index=False)
        rows = [
            measured("a file of outcomes, read and checked", 5,
                     lambda: routing.read_outcomes(file)),
            measured("`routing_table`, 10,000 resamples", 20,
                     lambda: routing.routing_table(outcomes, resamples=10_000)),
            measured("`calibration`, 10,000 resamples", 20,
                     lambda: stats.bootstrap(outcomes, stats.calibration, 10_000).table()),
        ]  # fmt: skip
    about = (
        f"{len(outcomes):,} questions in 7 domains, made up by `tests/outcomes_factory.py`; "
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}. "
        "Written by `.venv/bin/python tests/measure_evaluation.py`."
    )
    table = ["| what | bar (s) | wall (s) | CPU (s) |", "|---|---|---|---|", *rows]
    write_text(TARGET, "\n".join(["# Speed of the evaluation", "", about, "", *table, ""]))


if __name__ == "__main__":
    main()
