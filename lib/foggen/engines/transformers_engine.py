"""Runs any `AutoModelForCausalLM` on a CPU or GPU: shared prefixes once, big batches, n samples a prefill."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as bars

from foggen.engines.base import Completion, EngineError, Sampling, cut_at_stop
from foggen.engines.tree import State, attention, new_state, tree_problem, window
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
        problem = tree_problem(model)
        self.longest = (
            0 if problem else window(model)
        )  # tokens up to which beginnings are shared without copies
        if problem:
            log.info("%s: shared beginnings are copied, since %s", self.name, problem)

    @classmethod
    def load(
        cls, path: str | Path, dtype: str = "auto", device: str = "auto", **options: Any
    ) -> TransformersEngine:
        """From a folder or hub name. `dtype`: auto, float32, bfloat16, float16; `device`: auto, cpu, cuda..."""
        where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        with no_bars():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=pick_dtype(dtype, where))
        return cls(
            model.to(where),  # type: ignore[arg-type]
            AutoTokenizer.from_pretrained(path),
            str(path),
            **options,
        )

    def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[list[Completion]]:
        """As in `Engine`. A prompt's samples depend on the seed and on itself, not on its neighbours."""
        prefix, rest = split_prefix([encode_chat(self.tokenizer, messages) for messages in prompts])
        tree = self._fits(prefix, rest, sampling.max_tokens)
        noise = sample_noise(prefix, rest, sampling) if sampling.temperature > 0 else None
        results: list[list[Completion]] = [[] for _ in prompts]
        with attention(self.model, tree):
            root = self._root(prefix, tree)
            few = 8 + sampling.max_tokens // 16  # texts are short, as a rule, and end together
            for batch in self._batches(rest, tree, sampling.n * few, sampling.n * sampling.max_tokens):
                uniform = (
                    None if noise is None else torch.from_numpy(noise[batch]).flatten(0, 1).to(self.device)
                )
                rows = self._continue(root, [rest[i] for i in batch], sampling, uniform)
                texts = [self._completion(row, sampling) for row in rows]
                for place, index in enumerate(batch):
                    results[index] = texts[place * sampling.n : (place + 1) * sampling.n]
        return results

    def score(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[str]], temperature: float = 1.0
    ) -> list[list[float]]:
        """As in `Engine`. One prefill a prompt; continuations with a common beginning share its computation."""
        ids = {text: plain_ids(self.tokenizer, text) for texts in continuations for text in texts}
        if not all(ids.values()):
            raise EngineError("score: a continuation is empty; expected at least one token")
        ends = [[ids[text] for text in texts] for texts in continuations]
        stems = [_stems(texts) for texts in ends]
        prefix, rest = split_prefix([encode_chat(self.tokenizer, messages) for messages in prompts])
        results: list[list[float]] = [[] for _ in prompts]
        most = max(map(len, stems), default=0)
        width = max((len(stem) for own in stems for stem in own), default=0)
        rows = LOGITS // max(1, most * width * self.model.config.get_text_config().vocab_size)
        tree = self._fits(prefix, rest, width)
        with attention(self.model, tree):
            root = self._root(prefix, tree)
            for batch in self._batches(rest, tree, most * width, most * width, max(rows, 1)):
                some = [rest[i] for i in batch], [ends[i] for i in batch], [stems[i] for i in batch]
                for index, row in zip(batch, self._score(root, *some, temperature), strict=True):
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

    def _fits(self, prefix: Ids, rows: list[Ids], more: int) -> bool:
        """Whether all attention is full: beyond a sliding window it is not, and caches have to be copied."""
        return len(prefix) + max(map(len, rows), default=0) + more <= self.longest

    def _root(self, prefix: Ids, tree: bool) -> State:
        """The common prefix, computed once."""
        root = new_state(self.model, tree)
        if prefix:
            root.extend(self._tensor([prefix]))
        return root

    def _prefill(self, root: State, rows: list[Ids]) -> tuple[State, torch.Tensor]:
        """The state after each row, and its logits [rows, vocabulary]; pads on the left."""
        width = max(map(len, rows))
        state = root.fork(len(rows))
        ids = self._tensor([[0] * (width - len(row)) + row for row in rows])
        padded = any(len(row) < width for row in rows)
        real = self._tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]) if padded else None
        return state, state.extend(ids, real)[:, -1]

    def _continue(
        self, root: State, rows: list[Ids], sampling: Sampling, uniform: torch.Tensor | None
    ) -> list[Ids]:
        """Generated ids of `n` continuations of each row, in row order; the end token is kept."""
        state, logits = self._prefill(root, rows)
        n, width = (
            sampling.n,
            sampling.n,
        )  # texts picked from one row of logits: n at first, then each has its own
        done: list[Ids] = [[] for _ in range(len(rows) * n)]
        alive = torch.arange(len(done), device=self.device)
        for step in range(sampling.max_tokens):
            drawn = None if uniform is None else uniform[alive, step].view(-1, width)
            token = pick_tokens(logits, sampling.temperature, drawn, width).flatten()
            going = self._append(done, alive.tolist(), token.tolist(), sampling)
            if not any(going) or step + 1 == sampling.max_tokens:
                break
            if step == 0:
                state, width = state.fork(n), 1
            groups = self._tensor(going).view(-1, n).any(1)
            if not groups.all():
                rest = state.keep(groups.nonzero()[:, 0])
                alive, token = alive[rest], token[rest]
            logits = state.extend(token[:, None])[:, -1]
        return done

    def _append(self, done: list[Ids], alive: list[int], tokens: list[int], sampling: Sampling) -> list[bool]:
        """Adds a step's tokens to the texts that go on; says which of these still do."""
        going = []
        for row, token in zip(alive, tokens, strict=True):
            ids = done[row]
            if not self._ended(ids, sampling):
                ids.append(token)
            going.append(not self._ended(ids, sampling))
        return going

    def _ended(self, ids: Ids, sampling: Sampling) -> bool:
        if not ids or not sampling.stop:
            return bool(ids) and ids[-1] in self.end_ids
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return ids[-1] in self.end_ids or cut_at_stop(text, sampling.stop) != text

    def _completion(self, ids: Ids, sampling: Sampling) -> Completion:
        whole = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        text = cut_at_stop(whole, sampling.stop)
        return Completion(text, len(ids), ids[-1] in self.end_ids or text != whole)

    def _score(
        self,
        root: State,
        rows: list[Ids],
        ends: list[list[Ids]],
        stems: list[list[Ids]],
        temperature: float,
    ) -> list[list[float]]:
        """Log-probabilities of each row's ends. Only stems (ends but for their last token) are run, once each."""
        state, logits = self._prefill(root, rows)
        flat = [(row, end) for row, texts in enumerate(ends) for end in texts]
        if not flat:
            return [[] for _ in ends]
        total = _log_probability(logits, temperature, self._tensor([(row, end[0]) for row, end in flat]))
        steps = [
            (index, row, _stem_of(end, stems[row]), place, token)
            for index, (row, end) in enumerate(flat)
            for place, token in enumerate(end[1:])
        ]
        if steps:
            index, *at = self._tensor(steps).unbind(1)
            later = self._later(state, stems)
            total = total.index_add(0, index, _log_probability(later, temperature, torch.stack(at, 1)))
        values = iter(total.tolist())
        return [[next(values) for _ in texts] for texts in ends]

    def _later(self, state: State, stems: list[list[Ids]]) -> torch.Tensor:
        """Logits after each token of each stem [rows, stems, width, vocabulary]; pads on the right."""
        most = max(map(len, stems))
        width = max(len(stem) for own in stems for stem in own)
        flat = [stem for own in stems for stem in own + [[]] * (most - len(own))]
        ids = self._tensor([stem + [0] * (width - len(stem)) for stem in flat])
        logits = state.fork(most).extend(ids, last=False)
        return logits.view(len(stems), most, *logits.shape[1:])

    def _batches(
        self, rows: list[Ids], tree: bool, ahead: int, held: int, most: int | None = None
    ) -> Iterator[list[int]]:
        """Indices of rows, longest first: at most `most`, and as many as budget and memory allow.

        After its own tokens a row is counted with `ahead` tokens in the budget, and may come to hold `held`.
        Beyond a sliding window only rows of one length go together, since pads would take places in it.
        """
        memory = self._cache_tokens()
        alike = not tree and self.longest > 0
        batch: list[int] = []
        for index in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            width, count = (len(rows[batch[0]]) if batch else 0), len(batch) + 1
            full = count * (width + ahead) > self.token_budget or count * (width + held) > memory
            if batch and (full or len(batch) == most or (alike and len(rows[index]) < width)):
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


def pick_tokens(
    logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None, n: int = 1
) -> torch.Tensor:
    """n tokens a row [rows, n]: greedy without `uniform` [rows, n]; else where the cumulated probability passes it."""
    if uniform is None:
        return logits.argmax(-1, keepdim=True).expand(-1, n)
    total = (logits.float() / temperature).softmax(-1).cumsum(-1)
    wanted = uniform.to(total.dtype) * total[:, -1:]
    return torch.searchsorted(total, wanted, right=True).clamp(max=logits.shape[-1] - 1)


def _log_probability(logits: torch.Tensor, temperature: float, at: torch.Tensor) -> torch.Tensor:
    """Of the tokens at the index tuples `at` [count, dimensions of logits], under softmax(logits / temperature)."""
    scaled = logits.float() / temperature
    places = at.unbind(1)
    return scaled[places] - scaled.logsumexp(-1)[places[:-1]]


def _stem_of(end: Ids, stems: list[Ids]) -> int:
    """The stem that `end` but for its last token begins."""
    return next((k for k, stem in enumerate(stems) if stem[: len(end) - 1] == end[:-1]), 0)


def _stems(ends: list[Ids]) -> list[Ids]:
    """The distinct ends without their last token that begin no other one."""
    stems = sorted({tuple(end[:-1]) for end in ends if len(end) > 1})
    return [
        list(stem) for k, stem in enumerate(stems) if k + 1 == len(stems) or stems[k + 1][: len(stem)] != stem
    ]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a turn: the model's own list and the tokenizer's end token."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    listed = own if isinstance(own, list) else [own]
    return frozenset(int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None)
