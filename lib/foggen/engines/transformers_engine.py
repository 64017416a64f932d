"""Runs any `AutoModelForCausalLM` on a CPU or GPU: what prompts and their samples have in common is run once."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as bars

from foggen.engines.base import Completion, Engine, EngineError, Sampling, cut_at_stop
from foggen.prompts import Messages, encode_chat, plain_ids

log = logging.getLogger(__name__)
Ids = list[int]


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars of transformers: in a notebook they are debris."""
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


class TransformersEngine(Engine):
    """See `Engine`. `token_budget` bounds the tokens of one pass through the model (default: by device).

    The prompts' common beginning (`root`) is run once and held once, if the model's attention is plain and sees all
    of the prompt; else each prompt is run whole. Samples of a prompt are rows that branch where their tokens differ.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        token_budget: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.device = model.eval(), tokenizer, model.device
        self.name = name or str(model.config._name_or_path)
        # A CPU's own caches want few tokens at a time, a GPU many: 8192 suit 16 GB.
        self.token_budget = token_budget or (4096 if self.device.type == "cpu" else 8192)
        self.end_ids = _end_ids(model, tokenizer)

    @classmethod
    def load(cls, path: str | Path, dtype: str = "auto", device: str = "auto", **options: Any) -> TransformersEngine:
        """From a folder or hub name. `dtype`: auto, float32, bfloat16, float16; `device`: auto, cpu, cuda..."""
        where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        with no_bars():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=pick_dtype(dtype, where))
        tokenizer = AutoTokenizer.from_pretrained(path)
        return cls(model.to(where), tokenizer, str(path), **options)  # type: ignore[arg-type]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        """As in `Engine`. A prompt's samples depend on the seed and on itself, not on its neighbours."""
        n, tokens = sampling.n, sampling.max_tokens
        whole = [encode_chat(self.tokenizer, messages) for messages in prompts]
        prefix, rows = self._split(whole, tokens)
        noise = torch.from_numpy(sample_noise(whole, sampling)) if sampling.temperature > 0 else None
        results: list[list[Completion]] = [[] for _ in prompts]
        with self._rooted(prefix):
            # Counted as short: texts are, as a rule, and end together.
            for batch in self._batches(rows, n * (8 + tokens // 16), n * tokens):
                uniform = None if noise is None else noise[batch].flatten(0, 1).to(self.device)
                texts = self._continue(len(prefix), [rows[i] for i in batch], sampling, uniform)
                for place, index in enumerate(batch):
                    results[index] = [self._completion(ids, sampling) for ids in texts[place * n : (place + 1) * n]]
        return results

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[str]], temperature: float = 1.0
    ) -> list[list[float]]:
        """As in `Engine`. A prompt and all its continuations, as a trie, are one row of one pass."""
        ids = {text: plain_ids(self.tokenizer, text) for text in {t for texts in continuations for t in texts}}
        if not all(ids.values()):
            raise EngineError("score: a continuation is empty; expected at least one token")
        known = {texts: Trie.of([ids[text] for text in texts]) for texts in set(map(tuple, continuations))}
        tries = [known[tuple(texts)] for texts in continuations]
        most = max((len(trie.tokens) for trie in tries), default=0)
        prefix, rows = self._split([encode_chat(self.tokenizer, messages) for messages in prompts], most)
        if not prefix and any(len(texts) > 1 for texts in continuations):  # a trie needs an attention of our own
            pairs = [(prompt, [text]) for prompt, texts in zip(prompts, continuations, strict=True) for text in texts]
            single = iter(self.score([prompt for prompt, _ in pairs], [text for _, text in pairs], temperature))
            return [[next(single)[0] for _ in texts] for texts in continuations]
        results: list[list[float]] = [[] for _ in prompts]
        with self._rooted(prefix):
            for batch in self._batches(rows, most, most):
                chosen = [rows[i] for i in batch], [tries[i] for i in batch]
                for index, row in zip(batch, self._score(len(prefix), *chosen, temperature), strict=True):
                    results[index] = row
        return results

    def sleep(self) -> None:
        """Leaves the GPU (not a CPU: nobody else needs its memory more)."""
        self.model.to("cpu")
        torch.cuda.empty_cache()  # else this process holds on to the memory that it has freed

    def reload(self, path: Path) -> None:
        """Takes new weights; nothing of the old ones is kept (prefix caches live for one call)."""
        with no_bars():
            fresh = AutoModelForCausalLM.from_pretrained(path, dtype=self.model.dtype)
        self.model = fresh.to(self.device).eval()  # type: ignore[arg-type]

    def close(self) -> None:
        """Frees the weights."""
        del self.model
        torch.cuda.empty_cache()

    def _split(self, whole: list[Ids], more: int) -> tuple[Ids, list[Ids]]:
        """The root, and what follows it in each row; without a root where the model cannot share one."""
        longest = max(map(len, whole), default=0) + more
        return split_prefix(whole) if longest <= shared_length(self.model) else ([], whole)

    @contextmanager
    def _rooted(self, prefix: Ids) -> Iterator[None]:
        """Inside, every row goes on from `prefix`."""
        if not prefix:
            yield
            return
        root = DynamicCache()
        self.model(input_ids=self._tensor([prefix]), past_key_values=root, logits_to_keep=1)
        before = self.model.config._attn_implementation
        AttentionInterface.register(ROOTED, partial(rooted_attention, root))
        self.model.set_attn_implementation(ROOTED)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def _run(self, start: int, ids: Tensor, mask: Tensor, cache: DynamicCache, keep: int = 1) -> Tensor:
        """Logits [rows, keep, vocabulary] of the last of `ids` [rows, width], after `start` tokens of the root.

        `mask` [rows, length] is 0 for pads, or, [rows, 1, width, length], says what each token sees.
        """
        seen = mask[:, 0].sum(-1) if mask.dim() == 4 else mask.cumsum(-1)[:, -ids.shape[1] :]
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(start + seen - 1).clamp(min=0),
            past_key_values=cache,
            logits_to_keep=keep,
        ).logits
        return logits

    def _padded(self, rows: list[Ids]) -> tuple[Tensor, Tensor]:
        """Ids and mask [rows, width], with pads on the left."""
        width = max(map(len, rows))
        ids = self._tensor([[0] * (width - len(row)) + row for row in rows])
        return ids, self._tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def _continue(self, start: int, rows: list[Ids], sampling: Sampling, uniform: Tensor | None) -> list[Ids]:
        """Generated ids of `n` texts of each row, in row order, with the end token; equal beginnings are run once."""
        ids, mask = self._padded(rows)
        cache = DynamicCache() if start else DynamicCache(config=self.model.config)
        logits = self._run(start, ids, mask, cache)[:, -1]
        size = logits.shape[-1]
        texts: list[Ids] = [[] for _ in range(len(rows) * sampling.n)]
        alive = list(range(len(texts)))
        branch = torch.arange(len(rows), device=self.device).repeat_interleave(sampling.n)  # the row of each alive text
        for step in range(sampling.max_tokens):
            token = pick_tokens(logits, branch, sampling.temperature, None if uniform is None else uniform[alive, step])
            for index, new in zip(alive, token.tolist(), strict=True):
                texts[index].append(new)
            going = [place for place, index in enumerate(alive) if not self._ended(texts[index], sampling)]
            if not going or step + 1 == sampling.max_tokens:
                break
            alive = [alive[place] for place in going]
            nodes, branch = torch.unique(branch[going] * size + token[going], return_inverse=True)
            parents = nodes // size
            if len(parents) != len(mask) or bool((parents[1:] == parents[:-1]).any()):
                cache.reorder_cache(parents)
                mask = mask[parents]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            logits = self._run(start, nodes[:, None] % size, mask, cache)[:, -1]
        return texts

    def _ended(self, ids: Ids, sampling: Sampling) -> bool:
        return ids[-1] in self.end_ids or bool(sampling.stop and self._completion(ids, sampling).finished)

    def _completion(self, ids: Ids, sampling: Sampling) -> Completion:
        whole = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        text = cut_at_stop(whole, sampling.stop)
        return Completion(text, len(ids), ids[-1] in self.end_ids or text != whole)

    def _score(self, start: int, rows: list[Ids], tries: list[Trie], temperature: float) -> list[list[float]]:
        """Log-probabilities of the ends of each row's trie."""
        ids, mask = self._padded([row + trie.tokens for row, trie in zip(rows, tries, strict=True)])
        most = max(len(trie.tokens) for trie in tries)
        if start:
            seen = mask[:, None, None].bool() & torch.ones_like(mask[0]).diag().cumsum(0).bool()
            for row, trie in zip(seen[:, 0], tries, strict=True):
                own = row.shape[0] - len(trie.tokens)
                row[own:, own:] = self._tensor(trie.seen)
            mask = seen
        logits = self._run(start, ids, mask, DynamicCache(), most + 1).float() / temperature
        total = logits.logsumexp(-1)
        scores = []
        for row, trie in enumerate(tries):
            node, token, end = self._tensor(trie.steps).unbind(1)
            node += most - len(trie.tokens)
            gains = logits[row, node, token] - total[row, node]
            scores.append(gains.new_zeros(trie.ends).index_add(0, end, gains).tolist())
        return scores

    def _batches(self, rows: list[Ids], ahead: int, held: int) -> Iterator[list[int]]:
        """Indices of rows, longest first: as many as the budget allows when a row counts with `ahead` tokens to come.

        A row may come to hold `held` tokens more; the keys and values of eight budgets must fit into the memory.
        """
        batch: list[int] = []
        for index in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            width, count = (len(rows[batch[0]]) if batch else 0), len(batch) + 1
            if batch and max(count * (width + ahead), count * (width + held) // 8) > self.token_budget:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self.device)


# ---------------------------------------------------------------------------------------------------------------
# Attention over a shared beginning, after Juravsky et al. 2024, "Hydragen", arXiv 2402.05099

ROOTED = "foggen_rooted"


def rooted_attention(
    root: DynamicCache,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` [rows, heads, width, size] over the one root and the rows' own `key` and `value`."""
    layer: Any = root.layers[module.layer_idx]  # type: ignore[index]
    rows, heads, width, size = query.shape
    groups, length = key.shape[1], layer.keys.shape[2]
    query = (query * (scaling or size**-0.5)).reshape(rows, groups, -1, size)
    shared = query.transpose(0, 1).flatten(1, 2) @ layer.keys[0].transpose(1, 2)
    shared = shared.view(groups, rows, -1, length).transpose(0, 1)
    own = (query @ key.transpose(2, 3)).view(rows, groups, -1, width, key.shape[2])
    own = own.masked_fill(~attention_mask[:, :, None], -math.inf).flatten(2, 3)
    weights = torch.cat([shared, own], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    out = weights[..., length:] @ value
    shared = weights[..., :length].transpose(0, 1).flatten(1, 2) @ layer.values[0]
    out += shared.view(groups, rows, -1, size).transpose(0, 1)
    return out.view(rows, heads, width, size).transpose(1, 2), None


def whole_mask(**given: Any) -> Tensor | None:
    """What each token sees, also where the usual kernel would not ask."""
    return sdpa_mask(**{**given, "allow_is_causal_skip": False})


AttentionMaskInterface.register(ROOTED, whole_mask)


def shared_length(model: PreTrainedModel) -> float:
    """Tokens up to which rows may share a root: each layer must attend as torch does, and to all."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    plain = config._attn_implementation == "sdpa" and model._can_set_attn_implementation()
    if not plain or kinds - {"full_attention", "sliding_attention"}:
        return 0
    window = config.sliding_window if "sliding_attention" in kinds else None
    return window or math.inf


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The named dtype; `auto`: bfloat16 where the hardware has it, float16 on older GPUs, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    log.info("dtype float32: this %s has no bf16 instructions, and is about twice as fast without", device)
    return torch.float32


def split_prefix(rows: list[Ids]) -> tuple[Ids, list[Ids]]:
    """The common beginning of all rows, and what follows it (at least one token of each row)."""
    if not rows:
        return [], []
    low, high = min(rows), max(rows)  # all rows lie between these two, so they share what these two share
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False)))
    common = min(common, min(map(len, rows)) - 1)
    return low[:common], [row[common:] for row in rows]


def sample_noise(rows: list[Ids], sampling: Sampling) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Uniform numbers [rows, n, max_tokens]: a function of the seed, the row and how often it came before."""
    seen: Counter[bytes] = Counter()
    noise = np.empty((len(rows), sampling.n, sampling.max_tokens))
    for index, row in enumerate(rows):
        text = repr((sampling.seed, row)).encode()
        key = hashlib.sha256(text + repr(seen[text]).encode()).digest()
        seen[text] += 1
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        noise[index] = generator.random((sampling.n, sampling.max_tokens))
    return noise


class Trie(NamedTuple):
    """Continuations of one prompt as a tree of the tokens to be run: all but each continuation's last one."""

    tokens: Ids
    seen: np.ndarray[Any, np.dtype[np.bool_]]  # [tokens, tokens]: itself and those before it in its continuations
    steps: np.ndarray[Any, np.dtype[np.int64]]  # [steps, 3]: node (0: the prompt's end), token after it, whose end
    ends: int

    @classmethod
    def of(cls, ends: Sequence[Ids]) -> Trie:
        """`ends`: the continuations' ids."""
        nodes: dict[tuple[int, ...], int] = {(): 0}
        steps = [
            (nodes.setdefault(tuple(end[:place]), len(nodes)), token, index)
            for index, end in enumerate(ends)
            for place, token in enumerate(end)
        ]
        seen = np.zeros((len(nodes), len(nodes)), dtype=bool)
        for path, node in nodes.items():
            seen[node, [nodes[path[:place]] for place in range(1, len(path) + 1)]] = True
        tokens = [path[-1] for path in nodes if path]
        return cls(tokens, seen[1:, 1:], np.array(steps, dtype=np.int64).reshape(-1, 3), len(ends))


def pick_tokens(logits: Tensor, branch: Tensor, temperature: float, uniform: Tensor | None) -> Tensor:
    """A token a text from its branch's logits: greedy, or where the cumulated probability passes `uniform`."""
    if uniform is None:
        return logits.argmax(-1)[branch]
    total = (logits.float() / temperature).softmax(-1).cumsum(-1)[branch]
    wanted = uniform[:, None].to(total.dtype) * total[:, -1:]
    return torch.searchsorted(total, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a turn: the model's own list and the tokenizer's end token."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    listed = own if isinstance(own, list) else [own]
    return frozenset(int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None)
