"""Engines: the one place where models run. A profile's `engine:` picks one; the rest of its block are options."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from foggen.engines.base import NOTHING, Completion, Engine, EngineError, Sampling

__all__ = ["ENGINES", "NOTHING", "Completion", "Engine", "EngineError", "Sampling", "make_engine"]

ENGINES = {  # what makes an engine of a model (a folder or a hub name) and options: loaded when it is asked for
    "transformers": "foggen.engines.transformers_engine:TransformersEngine.load",
    "vllm": "foggen.engines.vllm_engine:VLLMEngine",
    "openai": "foggen.engines.openai_engine:OpenAIEngine",
}


def make_engine(kind: str, model: str | Path, **options: Any) -> Engine:
    """An engine of a name in `ENGINES`; a machine needs only the packages of those that it uses. Raises EngineError."""
    if kind not in ENGINES:
        raise EngineError(f"engine: {kind!r} is unknown; expected one of {', '.join(ENGINES)}")
    engine: Engine = resolve_name(ENGINES[kind])(model, **options)
    return engine
