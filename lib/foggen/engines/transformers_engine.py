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
from foggen.engines.tree import State, attention, new_state, tree_problem
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


class TransformersEngine:
    """See `Engine`. `token_budget` bounds the tokens held in one batch's KV cache (rows times length)."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        token_budget: int = 32768,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name or str(model.config._name_or_path)
        self.token_budget = token_budget
        self.device: torch.device = model.device
        self.end_ids = _end_ids(model, tokenizer)
        problem = tree_problem(model)
        self.tree = problem is None
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
        noise = sample_noise(prefix, rest, sampling) if sampling.temperature > 0 else None
        results: list[list[Completion]] = [[] for _ in prompts]
        with attention(self.model, self.tree):
            root = self._root(prefix)
            for batch in self._batches(rest, len(prefix) + sampling.max_tokens, sampling.n):
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
        ids = [encode_chat(self.tokenizer, messages) for messages in prompts]
        ends = [[plain_ids(self.tokenizer, text) for text in texts] for texts in continuations]
        if not all(all(texts) for texts in ends):
            raise EngineError("score: a continuation is empty; expected at least one token")
        prefix, rest = split_prefix(ids)
        results: list[list[float]] = [[] for _ in prompts]
        longest = max((len(end) for texts in ends for end in texts), default=0)
        width = max((len(texts) for texts in ends), default=1)
        with attention(self.model, self.tree):
            root = self._root(prefix)
            for batch in self._batches(rest, len(prefix) + longest, max(width, 1)):
                scores = self._score(root, [rest[i] for i in batch], [ends[i] for i in batch], temperature)
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

    def _root(self, prefix: Ids) -> State:
        """The common prefix, computed once."""
        root = new_state(self.model, self.tree)
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
        state, logits = state.fork(sampling.n), logits.repeat_interleave(sampling.n, 0)
        alive = torch.arange(len(logits), device=self.device)
        done: list[Ids] = [[] for _ in range(len(logits))]
        for step in range(sampling.max_tokens):
            token = pick_tokens(
                logits, sampling.temperature, None if uniform is None else uniform[alive, step]
            )
            going = self._append(done, alive.tolist(), token.tolist(), sampling)
            if not going.any() or step + 1 == sampling.max_tokens:
                break
            groups = going.view(-1, sampling.n).any(1)
            if not groups.all():
                rest = state.keep(groups.nonzero()[:, 0])
                alive, token = alive[rest], token[rest]
            logits = state.extend(token[:, None], room=sampling.max_tokens)[:, -1]
        return done

    def _append(
        self, done: list[Ids], alive: list[int], tokens: list[int], sampling: Sampling
    ) -> torch.Tensor:
        """Adds a step's tokens to the rows that go on; says which of these still do."""
        going = [not self._ended(done[row], sampling) for row in alive]
        for row, token, on in zip(alive, tokens, going, strict=True):
            if on:
                done[row].append(token)
        return self._tensor([not self._ended(done[row], sampling) for row in alive])

    def _ended(self, ids: Ids, sampling: Sampling) -> bool:
        if not ids:
            return False
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)) if sampling.stop else ""
        return ids[-1] in self.end_ids or cut_at_stop(text, sampling.stop) != text

    def _completion(self, ids: Ids, sampling: Sampling) -> Completion:
        whole = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        text = cut_at_stop(whole, sampling.stop)
        return Completion(text, len(ids), ids[-1] in self.end_ids or text != whole)

    def _score(
        self, root: State, rows: list[Ids], ends: list[list[Ids]], temperature: float
    ) -> list[list[float]]:
        """Log-probabilities of each row's ends. Only stems (ends but for their last token) are run, once each."""
        state, logits = self._prefill(root, rows)
        first = (logits.float() / temperature).log_softmax(-1)
        stems = [_stems(texts) for texts in ends]
        later = self._later(state, stems, temperature)
        results: list[list[float]] = []
        for row, texts in enumerate(ends):
            results.append([])
            for end in texts:
                total = first[row, end[0]]
                if len(end) > 1:
                    stem = next(k for k, own in enumerate(stems[row]) if own[: len(end) - 1] == end[:-1])
                    places = torch.arange(len(end) - 1, device=self.device)
                    total = total + later[row, stem, places, self._tensor(end[1:])].sum()
                results[-1].append(float(total))
        return results

    def _later(self, state: State, stems: list[list[Ids]], temperature: float) -> torch.Tensor:
        """Log-probabilities after each token of each stem [rows, stems, width, vocabulary]; pads on the right."""
        most = max(map(len, stems))
        width = max((len(stem) for own in stems for stem in own), default=0)
        if not width:
            return torch.empty(0)
        flat = [stem for own in stems for stem in own + [[]] * (most - len(own))]
        ids = self._tensor([stem + [0] * (width - len(stem)) for stem in flat])
        logits = state.fork(most).extend(ids, last=False)
        later = (logits.float() / temperature).log_softmax(-1)
        return later.view(len(stems), most, *later.shape[1:])

    def _batches(self, rows: list[Ids], extra: int, n: int) -> Iterator[list[int]]:
        """Indices of rows, longest first (memory peaks at once), at most `token_budget` tokens a batch."""
        batch: list[int] = []
        for index in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            width = len(rows[batch[0]]) if batch else 0
            if batch and (len(batch) + 1) * n * (width + extra) > self.token_budget:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

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


def pick_tokens(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None) -> torch.Tensor:
    """Greedy without `uniform` [rows]; else the token at which the cumulated probability passes it."""
    if uniform is None:
        return logits.argmax(-1)
    total = (logits.float() / temperature).softmax(-1).cumsum(-1)
    wanted = uniform[:, None].to(total.dtype) * total[:, -1:]
    return torch.searchsorted(total, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


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
