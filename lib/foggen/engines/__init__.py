"""Engines: the one place where models run. A profile's `engine:` picks one; the rest of its block are options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foggen.engines.base import Completion, Engine, EngineError, Sampling

__all__ = ["Completion", "Engine", "EngineError", "Sampling", "make_engine"]

KINDS = ("transformers", "vllm", "openai")


def make_engine(kind: str, model: str | Path, **options: Any) -> Engine:
    """`kind`: transformers, vllm or openai; `model`: a folder or hub name; options go to the constructor.

    Imports happen here, so that a machine needs only the packages of the engine it uses.
    """
    if kind == "transformers":
        from foggen.engines.transformers_engine import TransformersEngine

        return TransformersEngine.load(model, **options)
    if kind == "vllm":
        from foggen.engines.vllm_engine import VLLMEngine

        return VLLMEngine(model, **options)
    if kind == "openai":
        from foggen.engines.openai_engine import OpenAIEngine

        return OpenAIEngine(str(model), **options)
    raise EngineError(f"engine: {kind!r} is unknown; expected one of {', '.join(KINDS)}")
