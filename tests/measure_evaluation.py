"""Measures the evaluation at full size: `python tests/measure_evaluation.py` writes `data/results/evaluation.md`."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from outcomes_factory import make_outcomes

from foggen import report, routing, stats
from foggen.store import ROOT, write_text

TARGET = ROOT / "data" / "results" / "evaluation.md"


def measured(what: str, bar: float, work: Callable[[], object]) -> dict[str, object]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"what": what, "bar (s)": bar, "wall (s)": round(wall, 1), "CPU (s)": round(cpu, 1)}


def main() -> None:
    outcomes = make_outcomes(16_200 // 7 + 1, 7, rich=True)
    metrics = len(routing.METRICS) + len(stats.CALIBRATION)

    def tables() -> None:
        routing.routing_table(outcomes, resamples=10_000)
        stats.calibration_table(outcomes, resamples=10_000)

    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "outcomes.csv"
        outcomes.to_csv(given, index=False)
        rows = [
            measured(f"10,000 resamples of {metrics} metrics", 20, tables),
            measured("`python -m foggen.report`, from file to page", 60,
                     lambda: report.main([str(given), "--out", folder])),
        ]  # fmt: skip
    about = (
        f"{len(outcomes):,} questions in 7 domains, made up by `tests/outcomes_factory.py`; {os.cpu_count()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}. Written by "
        "`.venv/bin/python tests/measure_evaluation.py`."
    )
    write_text(TARGET, f"# Speed of the evaluation\n\n{about}\n\n{report.markdown(pd.DataFrame(rows))}")


if __name__ == "__main__":
    main()
