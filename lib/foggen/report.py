"""From a reader's outcomes file to tables, figures and a page: `python -m foggen.report outcomes.csv --out report/`.

Only puts together what `routing`, `stats` and `plots` compute.
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from foggen import plots, routing, stats
from foggen.stats import MEAN
from foggen.store import write_text

SCORES = {column: name for column, (name, *_) in routing.SCORES.items()}
SCORES |= {"confidence": "stated confidence", "verification": "verification share"}
STATED = pd.Index(["confidence", "graded_confidence"])  # probabilities, so they can be calibrated
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body{{font:15px/1.5 sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#222}}
img{{max-width:100%;width:46rem}} .table{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:13px;margin:.5rem 0}}
th,td{{padding:.25rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid #ddd}}
th{{border-bottom:2px solid #888}} td:first-child,th:first-child,td:last-child{{text-align:left}}
</style></head><body><h1>{title}</h1><p>{about}</p>{body}</body></html>
"""
ABOUT = (
    "{n:,} questions in {domains} domains. Answers with confidence of at least {tau:g} are kept, others and unparsed "
    "ones go to the cloud. Shares are percent with 95% intervals (percentile bootstrap over facts within domains, "
    "{resamples:,} resamples); mean is the mean over domains. Lift is accuracy over random routing of the same share."
)


def markdown(table: pd.DataFrame) -> str:
    """The table as a Markdown table."""
    cells = [[*table.columns], ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in cells)


def make_tables(
    outcomes: pd.DataFrame, train: pd.DataFrame | None, tau: float, resamples: int, seed: int
) -> dict[str, pd.DataFrame]:
    """Every table of the report by its title."""
    again: dict[str, Any] = {"resamples": resamples, "seed": seed}
    tables = {"Routing": routing.routing_table(outcomes, tau, **again)}
    for score in STATED.intersection(outcomes.columns):
        sweep = routing.sweep_table(outcomes, score=score, **again)
        tables[f"Thresholds on {SCORES[score]}"] = sweep[sweep["domain"] == MEAN]
        tables[f"Calibration of {SCORES[score]}"] = stats.calibration_table(outcomes, score, **again)
    # p-values of 2,000 resamples are too coarse to survive a correction over so many comparisons
    compared = routing.baselines_table(outcomes, train, tau, 5 * resamples, seed)
    tables["Baselines at the same cloud share"] = compared[compared["domain"] == MEAN]
    tables["Baselines by domain"] = compared[compared["domain"] != MEAN]
    return tables


def make_figures(outcomes: pd.DataFrame, table: pd.DataFrame, tau: float, seed: int) -> dict[str, Figure]:
    """Every figure of the report by its title."""
    known = {column: label for column, label in SCORES.items() if column in outcomes}
    curves = {label: routing.share_curve(outcomes, column, resamples=200, seed=seed) for column, label in known.items()}
    routed, sysacc = table[["routed", "sysacc"]].iloc[-1]
    figures = {
        "Accuracy against cloud share": plots.accuracy_curve(curves[SCORES["confidence"]], (routed, sysacc), tau=tau),
        "Domains": plots.domain_dumbbells(table),
        "Lift of several scores": plots.matched_curves(curves, routed),
        "Risk and coverage": plots.risk_coverage(outcomes, known, tau),
    }
    for column in STATED.intersection(outcomes.columns[outcomes.notna().any()]):
        figures[f"Reliability of {known[column]}"] = plots.reliability(outcomes, column, known[column])
        figures[f"Histogram of {known[column]}"] = plots.confidence_histogram(outcomes, column, known[column])
    return figures


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def write_report(
    outcomes: pd.DataFrame, out: Path, title: str, train: pd.DataFrame | None, tau: float, resamples: int, seed: int
) -> Path:
    """Write tables/*.md and *.csv, figures/*.png and *.svg and a self-contained index.html into `out`."""
    tables = make_tables(outcomes, train, tau, resamples, seed)
    figures = make_figures(outcomes, tables["Routing"], tau, seed)
    sections = []
    for name, figure in figures.items():
        plots.save(figure, out / "figures", _slug(name))
        image = base64.b64encode((out / "figures" / f"{_slug(name)}.png").read_bytes()).decode()
        sections.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{image}">')
    for name, table in tables.items():
        shown = routing.percent(table)
        write_text(out / "tables" / f"{_slug(name)}.csv", table.to_csv(index=False))
        write_text(out / "tables" / f"{_slug(name)}.md", markdown(shown))
        sections.append(f'<h2>{name}</h2><div class="table">{shown.to_html(index=False, border=0)}</div>')
    count = {"n": outcomes["id"].nunique(), "domains": outcomes["domain"].nunique()}
    about = ABOUT.format(**count, tau=tau, resamples=resamples)
    page = PAGE.format(title=html.escape(title), about=about, body="\n".join(sections))
    return write_text(out / "index.html", page)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 2 when a file or a setting cannot be used, with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m foggen.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.epilog = "columns, * required:\n" + "".join(
        f"  {'*' if field.is_required() else ' '} {name:<20} {field.description}\n"
        for name, field in routing.Outcome.model_fields.items()
    )
    parser.add_argument("outcomes", type=Path, help="outcomes as .csv, .jsonl or .parquet")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write into")
    parser.add_argument("--train", type=Path, help="train-pool outcomes with `question`, for the text-only router")
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.resamples < 1 or not 0 <= given.tau <= 1:
        parser.error("expected --resamples of at least 1 and --tau from 0 to 1")
    try:
        outcomes = routing.read_outcomes(given.outcomes)
        train = routing.read_outcomes(given.train) if given.train else None
        page = write_report(outcomes, given.out, given.outcomes.name, train, given.tau, given.resamples, given.seed)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
