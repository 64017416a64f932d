"""Runs any `AutoModelForCausalLM` with full attention on a CPU or GPU: what prompts and samples share is run once."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as bars

from foggen.engines.base import Completion, EngineError, Sampling, cut_at_stop
from foggen.engines.tree import Level, Tree, attention, tree_problem, window
from foggen.prompts import Messages, encode_chat, plain_ids

log = logging.getLogger(__name__)
Ids = list[int]
LOGITS = 1 << 28  # numbers of one batch's logits when scoring: 1 GiB
CPU_CACHE = 4 << 30  # bytes that one batch's keys and values may take on a CPU
BUDGET = {"cpu": 4096}  # tokens of one pass: a CPU's caches want few, a GPU many


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


class TransformersEngine:
    """See `Engine`. `token_budget` bounds the tokens of one pass through the model (default: by device)."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        token_budget: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name or str(model.config._name_or_path)
        self.device: torch.device = model.device
        self.token_budget = token_budget or BUDGET.get(self.device.type, 65536)
        self.end_ids = _end_ids(model, tokenizer)
        if problem := tree_problem(model):
            raise EngineError(f"{self.name}: not for engine transformers ({problem}); use engine: vllm")

    @classmethod
    def load(cls, path: str | Path, dtype: str = "auto", device: str = "auto", **options: Any) -> TransformersEngine:
        """From a folder or hub name. `dtype`: auto, float32, bfloat16, float16; `device`: auto, cpu, cuda..."""
        where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        with no_bars():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=pick_dtype(dtype, where))
        tokenizer = AutoTokenizer.from_pretrained(path)
        return cls(model.to(where), tokenizer, str(path), **options)  # type: ignore[arg-type]

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        """As in `Engine`. A prompt's samples depend on the seed and on itself, not on its neighbours."""
        n, tokens = sampling.n, sampling.max_tokens
        noise: torch.Tensor | None = None
        results: list[list[Completion]] = [[] for _ in prompts]
        with attention(self.model):
            prefix, rows = self._encode(prompts, tokens)
            root = self._root(prefix)
            if sampling.temperature > 0:
                noise = torch.from_numpy(sample_noise(prefix, rows, sampling))
            few = 8 + tokens // 16  # texts are short, as a rule, and end together
            for batch in self._batches(rows, n * few, n * tokens):
                uniform = None if noise is None else noise[batch].flatten(0, 1).to(self.device)
                texts = self._continue(root, [rows[i] for i in batch], sampling, uniform)
                for place, index in enumerate(batch):
                    own = texts[place * n : (place + 1) * n]
                    results[index] = [self._completion(ids, sampling) for ids in own]
        return results

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
        limit = LOGITS // ((most + 1) * self.model.config.get_text_config().vocab_size)
        results: list[list[float]] = [[] for _ in prompts]
        with attention(self.model):
            prefix, rows = self._encode(prompts, most)
            root = self._root(prefix)
            for batch in self._batches(rows, most, most, max(1, limit)):
                scores = self._score(root, [rows[i] for i in batch], [tries[i] for i in batch], temperature)
                for index, row in zip(batch, scores, strict=True):
                    results[index] = row
        return results

    def sleep(self) -> None:
        """Leaves the GPU (not a CPU: nobody else needs its memory more)."""
        self.model.to("cpu")

    def reload(self, path: Path) -> None:
        """Takes new weights; nothing of the old ones is kept (prefix caches live for one call)."""
        with no_bars():
            fresh = AutoModelForCausalLM.from_pretrained(path, dtype=self.model.dtype)
        self.model = fresh.to(self.device).eval()  # type: ignore[arg-type]

    def close(self) -> None:
        """Frees the weights."""
        del self.model

    def _encode(self, prompts: Sequence[Messages], more: int) -> tuple[Ids, list[Ids]]:
        """The prompts' common beginning, and what follows it, if with `more` tokens all attention is still full."""
        prefix, rows = split_prefix([encode_chat(self.tokenizer, messages) for messages in prompts])
        longest = len(prefix) + max(map(len, rows), default=0) + more
        if longest > window(self.model):
            raise EngineError(f"{longest} tokens are beyond the sliding window of {self.name}; use engine: vllm")
        return prefix, rows

    def _root(self, prefix: Ids) -> Level | None:
        """The common prefix, computed once."""
        if not prefix:
            return None
        tree = Tree(self.model)
        tree.extend(self._tensor([prefix]), self._tensor(np.tri(len(prefix), dtype=bool))[None])
        return tree.level()

    def _padded(self, rows: list[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [rows, width] with pads on the left, and what each token sees [rows or 1, width, width]."""
        width = max(map(len, rows))
        ids = self._tensor([[0] * (width - len(row)) + row for row in rows])
        places = torch.arange(width, device=self.device)
        seen = (places[:, None] >= places)[None]
        if any(len(row) < width for row in rows):
            seen = seen & (places >= self._tensor([width - len(row) for row in rows])[:, None])[:, None]
        return ids, seen

    def _continue(
        self, root: Level | None, rows: list[Ids], sampling: Sampling, uniform: torch.Tensor | None
    ) -> list[Ids]:
        """Generated ids of `n` texts of each row, in row order, with the end token; equal beginnings are run once."""
        tree = Tree(self.model, root, len(rows))
        logits = tree.extend(*self._padded(rows))[:, -1]
        tree.fork()
        done: list[Ids] = [[] for _ in range(len(rows) * sampling.n)]
        alive = list(range(len(done)))
        branch = torch.arange(len(rows), device=self.device).repeat_interleave(sampling.n)
        for step in range(sampling.max_tokens):
            drawn = None if uniform is None else uniform[alive, step]
            token = pick_tokens(logits, branch, sampling.temperature, drawn)
            for index, new in zip(alive, token.tolist(), strict=True):
                done[index].append(new)
            going = [place for place, index in enumerate(alive) if not self._ended(done[index], sampling)]
            if not going or step + 1 == sampling.max_tokens:
                break
            alive = [alive[place] for place in going]
            size = logits.shape[-1]
            nodes, branch = torch.unique(branch[going] * size + token[going], return_inverse=True)
            tree.select(nodes // size)
            logits = tree.extend(nodes[:, None] % size)[:, -1]
        return done

    def _ended(self, ids: Ids, sampling: Sampling) -> bool:
        return ids[-1] in self.end_ids or bool(sampling.stop and self._completion(ids, sampling).finished)

    def _completion(self, ids: Ids, sampling: Sampling) -> Completion:
        whole = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        text = cut_at_stop(whole, sampling.stop)
        return Completion(text, len(ids), ids[-1] in self.end_ids or text != whole)

    def _score(self, root: Level | None, rows: list[Ids], tries: list[Trie], temperature: float) -> list[list[float]]:
        """Log-probabilities of the ends of each row's trie."""
        ids, causal = self._padded(rows)
        width, most = ids.shape[1], max(len(trie.tokens) for trie in tries)
        ids = torch.nn.functional.pad(ids, (0, most))
        seen = torch.zeros(len(rows), width + most, width + most, dtype=torch.bool, device=self.device)
        seen[:, :width, :width] = causal
        seen[:, width:, :width] = causal[:, -1:]
        for row, trie in enumerate(tries):
            own = slice(width, width + len(trie.tokens))
            ids[row, own] = self._tensor(trie.tokens)
            seen[row, own, own] = self._tensor(trie.seen)
        logits = Tree(self.model, root, len(rows)).extend(ids, seen, most + 1).float() / temperature
        sizes, counts = [len(trie.steps) for trie in tries], [trie.ends for trie in tries]
        rank = np.repeat(np.arange(len(tries)), sizes)
        first = np.repeat(np.cumsum([0, *counts[:-1]]), sizes)
        steps = np.column_stack([rank, np.concatenate([trie.steps for trie in tries])])
        at, node, token, end = self._tensor(steps).unbind(1)
        gains = logits[at, node, token] - logits.logsumexp(-1)[at, node]
        total = gains.new_zeros(sum(counts)).index_add(0, end + self._tensor(first), gains)
        return [part.tolist() for part in torch.split(total, counts)]

    def _batches(self, rows: list[Ids], ahead: int, held: int, most: int | None = None) -> Iterator[list[int]]:
        """Indices of rows, longest first: at most `most`, and as many as budget and memory allow.

        After its own tokens a row is counted with `ahead` tokens in the budget, and may come to hold `held`.
        """
        memory = self._cache_tokens()
        batch: list[int] = []
        for index in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            width, count = (len(rows[batch[0]]) if batch else 0), len(batch) + 1
            full = count * (width + ahead) > self.token_budget or count * (width + held) > memory
            if batch and (full or len(batch) == most):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _cache_tokens(self) -> int:
        """Tokens whose keys and values fit into half the GPU's free memory, or into CPU_CACHE."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        each = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize
        free = torch.cuda.mem_get_info(self.device)[0] // 2 if self.device.type == "cuda" else CPU_CACHE
        return int(free // each)

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, device=self.device)


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


def sample_noise(prefix: Ids, rows: list[Ids], sampling: Sampling) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Uniform numbers [rows, n, max_tokens]: a function of the seed, the row and how often it came before."""
    seen: Counter[bytes] = Counter()
    noise = np.empty((len(rows), sampling.n, sampling.max_tokens))
    for index, row in enumerate(rows):
        text = repr((sampling.seed, prefix + row)).encode()
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


def pick_tokens(
    logits: torch.Tensor, branch: torch.Tensor, temperature: float, uniform: torch.Tensor | None
) -> torch.Tensor:
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
