"""Runs any `AutoModelForCausalLM` on a CPU or GPU: what all prompts begin with is run once.

Samples of a prompt are rows of a batch, which branch where their tokens differ. Greedy texts are
those of `model.generate`. Knows nothing of questions and labels.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import logging as transformers_logging

from foggen import engines
from foggen.engines import PURE, Chats, Completion, Engine, Sampling, Texts
from foggen.prompts import plain_ids

transformers_logging.disable_progress_bar()  # of loading weights: debris in a notebook


@dataclass
class Rows:
    """Rows of tokens that the model has read: their keys and values, and which places hold pads."""

    cache: Any
    mask: Tensor  # [rows, length]: 1, or 0 for a pad

    def take(self, rows: Tensor) -> None:
        """Goes on with these rows [new rows], each as often as it is named."""
        if not torch.equal(rows, torch.arange(len(self.mask), device=rows.device)):
            self.mask = self.mask[rows]
            self.cache.reorder_cache(rows)


Batch = tuple[list[int], Rows, Tensor]


class TransformersEngine(Engine):
    """See `Engine`. `dtype` is auto, float32, bfloat16 or float16.

    `token_budget` bounds the prompt tokens of one pass through the model (0: by device); the cache
    of keys and values may hold eight times as many.
    """

    def __init__(self, path: str | Path, dtype: str = "auto", token_budget: int = 0) -> None:
        self.name = str(path)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = pick_dtype(dtype, self.device)
        # A CPU's own caches want few tokens at a time, a GPU many: 8192 suit 16 GB
        self.token_budget = token_budget or (4096 if self.device.type == "cpu" else 8192)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.reload(path)

    @torch.inference_mode()
    def generate(self, prompts: Chats, sampling: Sampling) -> list[list[Completion]]:
        """As in `Engine`. A prompt's samples depend on the seed and itself, not on others."""
        whole = engines.prompt_ids(self.tokenizer, prompts, sampling.max_tokens, self.room)
        noise = sample_noise(whole, sampling)  # [prompts, n, tokens]
        results: list[list[Completion]] = [[] for _ in prompts]
        for batch, rows, logits in self._read_prompts(whole, sampling.n, sampling.max_tokens):
            uniform = noise[batch].flatten(0, 1).to(self.device)  # [texts, tokens]
            texts = iter(self._continue(rows, logits, sampling, uniform))
            for index in batch:
                results[index] = [next(texts) for _ in range(sampling.n)]
        return results

    @torch.inference_mode()
    def score(self, prompts: Chats, texts: Texts, sampling: Sampling = PURE) -> list[list[float]]:
        """As in `Engine`. Texts of a prompt that differ in their last token only are run as one."""
        ends = [[plain_ids(self.tokenizer, text) for text in row] for row in texts]
        heads = [longest_beginnings(row) for row in ends]
        copies = max(map(len, heads), default=0)
        more = max((len(head) + 1 for row in heads for head in row), default=0)
        whole = engines.prompt_ids(self.tokenizer, prompts, more, self.room)
        logs: list[dict[tuple[int, ...], float]] = [{} for _ in prompts]
        # Read the prompts but for their last tokens, then a row for every head behind that token
        for batch, rows, _ in self._read_prompts([prompt[:-1] for prompt in whole], copies, more):
            paths = [(place, i, head) for place, i in enumerate(batch) for head in heads[i]]
            rows.take(torch.tensor([place for place, _, _ in paths], device=self.device))
            ids = self._padded([[whole[i][-1], *head] for _, i, head in paths], "right")
            logits = self._read(rows, ids, keep=ids.shape[1])
            for (_, i, head), row in zip(paths, logits, strict=True):  # row: [places, vocabulary]
                log = tempered(row, sampling).log_softmax(-1)
                for end in ends[i]:
                    if end not in logs[i] and head[: len(end) - 1] == end[:-1]:
                        logs[i][end] = float(log[range(len(end)), end].sum())
        return [[known[end] for end in row] for known, row in zip(logs, ends, strict=True)]

    def sleep(self) -> None:
        """Leaves the GPU (not a CPU: nobody else needs its memory more)."""
        self.model.to("cpu")
        torch.cuda.empty_cache()  # else this process holds on to the memory that it has freed

    def reload(self, path: str | Path) -> None:
        """Takes weights and end tokens; nothing of earlier ones stays (caches live for a call)."""
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype)
        self.model = model.to(self.device).eval()
        self.end_ids = engines.end_tokens(model.generation_config, self.tokenizer)
        config = model.config.get_text_config()
        self.room = getattr(config, "max_position_embeddings", math.inf)  # of prompt and text

    def close(self) -> None:
        """Frees the weights."""
        del self.model
        torch.cuda.empty_cache()

    def _read_prompts(self, prompts: list[list[int]], copies: int, more: int) -> Iterator[Batch]:
        """Batches of prompts, read: their indices, rows, and logits [rows, vocabulary] after them.

        A prompt will be `copies` rows in the cache, each with `more` tokens.
        """
        # Read what all prompts begin with once, but for the last token of any. Pads lie behind it:
        # nothing is shared where a layer counts distances by place (a sliding window), or recurs
        nothing = torch.zeros(1, 0, dtype=torch.long, device=self.device)
        prefix = Rows(DynamicCache(config=self.model.config), nothing)
        plain = all(type(layer) is DynamicLayer for layer in prefix.cache.layers)
        heads = [prompt[:-1] for prompt in prompts] if plain else []
        shared = list(commonprefix(heads))  # noqa: RUF071 - of token ids, not of paths
        if shared:
            self._read(prefix, self._padded([shared]))
        # Longest first, as many at a time as the budget allows
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        while order:
            length = len(prompts[order[0]])
            tokens = max(length - len(shared), copies * (length + more) // 8)
            size = max(1, self.token_budget // tokens)
            batch, order = order[:size], order[size:]
            rows = copy.deepcopy(prefix)
            rows.take(torch.zeros(len(batch), dtype=torch.long, device=self.device))
            rests = [prompts[index][len(shared) :] for index in batch]
            yield batch, rows, self._read(rows, self._padded(rests))[:, -1]

    def _continue(
        self, rows: Rows, logits: Tensor, sampling: Sampling, uniform: Tensor
    ) -> list[Completion]:
        """`n` texts of each row, in order.

        Texts share a row of the batch up to where they differ. `uniform`: [texts, tokens].
        """
        texts: list[list[int]] = [[] for _ in range(len(logits) * sampling.n)]
        # The texts that have not ended, and the row that each of them goes on from
        running = list(range(len(texts)))
        row = torch.arange(len(logits), device=self.device).repeat_interleave(sampling.n)
        for step in range(sampling.max_tokens):
            # A token for every running text
            tokens = pick_tokens(logits, row, sampling, uniform[running, step])  # [running]
            for index, token in zip(running, tokens.tolist(), strict=True):
                texts[index].append(token)
            going = [k for k, i in enumerate(running) if not self._ended(texts[i], sampling.stop)]
            if not going or step + 1 == sampling.max_tokens:
                break
            # A new row for every different token of a row
            running = [running[k] for k in going]
            pairs = torch.stack([row[going], tokens[going]], 1)  # [running, 2]
            new, row = torch.unique(pairs, dim=0, return_inverse=True)  # [rows, 2], [running]
            rows.take(new[:, 0])
            logits = self._read(rows, new[:, 1:])[:, -1]
        return [self._completion(ids, sampling.stop) for ids in texts]

    def _read(self, rows: Rows, ids: Tensor, keep: int = 1) -> Tensor:
        """Logits [rows, keep, vocabulary] of the last of `ids` [rows, width] (-1: a pad)."""
        rows.mask = torch.cat([rows.mask, (ids >= 0).long()], 1)
        positions = (rows.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # [rows, width]
        read: dict[str, Any] = {"attention_mask": rows.mask, "position_ids": positions}
        read |= {"past_key_values": rows.cache, "logits_to_keep": keep}
        logits: Tensor = self.model(ids.clamp(min=0), **read).logits
        return logits

    def _padded(self, rows: list[list[int]], side: str = "left") -> Tensor:
        """Ids [rows, width], with pads of -1 on one side."""
        ids = [torch.tensor(row, device=self.device) for row in rows]
        return pad_sequence(ids, batch_first=True, padding_value=-1, padding_side=side)

    def _ended(self, ids: list[int], stop: tuple[str, ...]) -> bool:
        return ids[-1] in self.end_ids or (bool(stop) and self._completion(ids, stop).finished)

    def _completion(self, ids: list[int], stop: tuple[str, ...]) -> Completion:
        """The text before the end token and the first stop string."""
        ended = ids[-1] in self.end_ids
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        stops = [text.find(mark) for mark in stop if mark in text]
        return Completion(text[: min(stops, default=len(text))], len(ids), ended or bool(stops))


def longest_beginnings(ends: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Texts without their last tokens, but for those that another one begins with."""
    heads = {end[:-1] for end in ends} | {()}
    return [a for a in heads if not any(b[: len(a)] == a for b in heads - {a})]


# --------------------------------------------------------------------------------------------------
# Drawing tokens


def sample_noise(prompts: list[list[int]], sampling: Sampling) -> Tensor:
    """Uniform numbers [prompts, n, max_tokens] of the seed, the prompt and its occurrence alone."""
    shape = (sampling.n, sampling.max_tokens)
    seeds = engines.prompt_seeds(sampling.seed, prompts)
    noise = [np.random.Generator(np.random.Philox(key=seed)).random(shape) for seed in seeds]
    return torch.from_numpy(np.array(noise))


def tempered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [rows, vocabulary] over the temperature; -inf where `top_k`, then `top_p` rule out."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k > 0:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    return logits


def pick_tokens(logits: Tensor, row: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """A token [texts] for each text from the logits [rows, vocabulary] of its row [texts].

    Greedy, or where the cumulated probability passes `uniform` [texts].
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)[row]
    total = tempered(logits, sampling).softmax(-1).cumsum(-1)[row]  # [texts, vocabulary]
    below_one = uniform[:, None].float().clamp(max=1 - 2**-24)  # float32 rounds some to 1
    return torch.searchsorted(total, below_one * total[:, -1:], right=True)[:, 0]


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The named dtype; `auto`: bfloat16 in hardware, else float16 on a GPU, or float32."""
    if dtype == "auto" and device.type == "cuda":
        dtype = "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
    elif dtype == "auto":
        dtype = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    return getattr(torch, dtype)  # type: ignore[no-any-return]
