"""What the recipe's steps take on a CPU with a model of Qwen3-0.6B's true dimensions.

`.venv/bin/python tests/benchmarks/dimensions.py` writes data/results/bench/dimensions.json: the
seconds of CPU time of every step, and its peak memory beside that of the weights. Weights are
random, so nothing is downloaded. Every step has a process of its own, so that its peak is its own.
Twice the rows show whether anything grows faster than they do. One thread; bfloat16, which is the
paper profile's, and float32, in which a CPU without bfloat16 instructions is many times as fast.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import torch
from benchmarks.gpu import SIZES, TOY, make_model, make_questions
from transformers import AutoTokenizer

from foggen.chain import edge_slot
from foggen.config import Settings, load_profile
from foggen.engines import Sampling
from foggen.labels import score_answers
from foggen.prompts import encode_chat, mcq_messages, target_text
from foggen.questions import DOMAINS, Question
from foggen.store import ROOT, peak_memory, progress, read_json, write_json
from foggen.training import Job, train

STORED = ROOT / "data" / "results" / "bench" / "dimensions.json"
THREADS = 1
TRAINING, SAMPLES = "training step, merge and save", "8 samples per question"
STEPS = {  # rows
    "float32": {
        "load": [0],
        TRAINING: [1, 2],
        SAMPLES: [1, 2],
        "exact scores": [1, 2],
        "reload": [0],
    },
    "bfloat16": {"load": [0], TRAINING: [1], SAMPLES: [1], "reload": [0]},
}


def take(step: str, rows: int, model: Path, tuned: Path, dtype: str) -> dict[str, float]:
    """Takes one step in this process; CPU seconds, and the peak of this process in bytes."""
    settings = load_profile(
        "paper",
        {
            "edge.model": str(model),
            "edge.revision": None,
            "engine": "transformers",
            "engine_options": {},
            "dtype": dtype,
            "threads": THREADS,
            "sft.num_train_epochs": 1,
            "sft.per_device_train_batch_size": max(rows, 1),
        },
    )
    questions = make_questions(rows, DOMAINS) if rows else []
    if step == TRAINING:
        taught = [{"messages": mcq_messages(q), "target": target_text(0.5, "A")} for q in questions]
        started = time.process_time()
        train(Job(model=model, rows=taught, settings=settings, out=tuned / "model", seed=0))
    else:
        started = ask(step, settings, questions, model, tuned / "model")
    taken = {"seconds": time.process_time() - started, "peak": peak_memory()}
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(encode_chat(tokenizer, mcq_messages(question))) for question in questions]
    return {"prompt_tokens": sum(lengths), **taken}


def ask(
    step: str, settings: Settings, questions: list[Question], model: Path, tuned: Path
) -> float:
    """What is asked of an engine; returns when it began, the engine being loaded before."""
    hello, one = [[{"role": "user", "content": "?"}]], Sampling(max_tokens=1)
    started = time.process_time()
    engine = edge_slot(settings).load(model)
    engine.generate(hello, one)  # weights are read from their file when they are used
    if step == "load":
        return started
    started = time.process_time()
    if step == "reload":
        engine.reload(tuned)
        engine.generate(hello, one)
    elif step == "exact scores":
        score_answers(engine, questions, settings.prompt_variant)
    else:
        sampling = Sampling(n=8, temperature=0.7, max_tokens=12)
        engine.generate([mcq_messages(question) for question in questions], sampling)
    return started


def measure(dtype: str, sizes: dict[str, Any], work: Path) -> dict[str, Any]:
    """All steps in this dtype, each in its own process."""
    weights = getattr(torch, dtype).itemsize * make_model(work / "start", sizes, dtype)
    found = []
    for step, counts in STEPS[dtype].items():
        for rows in counts:
            taken = ["--take", step, str(rows), str(work / "start"), str(work / "tuned"), dtype]
            command = [sys.executable, __file__, *taken]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.strip().split("\n")[-1])
            found.append({"step": step, "rows": rows, **row, "copies": row["peak"] / weights})
            told = f"{step}, {rows} rows: {row['seconds']:.0f} s, {row['peak'] / 2**30:.1f} GiB"
            progress(f"{dtype}, {told}")
    return {"weights": weights, "steps": found}


def stored_table() -> str:
    """The stored figures as a table of docs/gpu.md: CPU seconds and peak memory."""
    stored = read_json(STORED)
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for dtype in STEPS:
        for row in stored[dtype]["steps"]:
            told = f"{row['seconds']:.0f} s, {row['peak'] / 2**30:.1f} GiB"
            cells.setdefault((row["step"], row["rows"]), {})[dtype] = told
    lines = [f"| step | rows | {' | '.join(STEPS)} |", f"|---|---|{'---|' * len(STEPS)}"]
    for (step, rows), by_dtype in cells.items():
        shown = " | ".join(by_dtype.get(dtype, "not measured") for dtype in STEPS)
        lines.append(f"| {step} | {rows or ''} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="small dimensions, to try the script")
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--take", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.take:
        step, rows, model, tuned, dtype = given.take
        print(json.dumps(take(step, int(rows), Path(model), Path(tuned), dtype)))
        return
    sizes, versions = TOY if given.toy else SIZES, ("torch", "transformers", "trl", "peft")
    with tempfile.TemporaryDirectory() as work:
        found = {dtype: measure(dtype, sizes, Path(work) / dtype) for dtype in STEPS}
    about = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "sizes": sizes, "threads": THREADS}
    about["versions"] = {name: version(name) for name in versions}
    write_json(given.out, about | found)


if __name__ == "__main__":
    main()
