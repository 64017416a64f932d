"""KV caches of many sequences that share their beginnings: one copy of what is shared, one product over all sharers.

Holds tensors and the attention over them; knows nothing of tokens' meaning, sampling or prompts. Attention over a
shared beginning is one matrix product for all its sequences (Juravsky et al. 2024, "Hydragen", arXiv 2402.05099).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_utils import PreTrainedModel

NAME = "foggen_tree"


class Level(NamedTuple):
    """Keys and values [sequences, heads, length, size] and what to add to scores, or None."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None


class _Layer(CacheLayerMixin):
    """One model layer's cache: the levels before, and the growing own level [rows, heads, room, size]."""

    keys: Tensor
    values: Tensor

    def __init__(self, past: list[Level]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.past, self.length = past, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, width, size = key_states.shape
        room = max(width, 8)
        self.keys = key_states.new_empty(rows, heads, room, size)
        self.values = value_states.new_empty(rows, heads, room, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:  # twice the room, so that long texts are copied a few times only
            self.keys, self.values = (torch.cat([part, part], 2) for part in (self.keys, self.values))
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length + sum(level.keys.shape[2] for level in self.past)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class TreeState:
    """Sequences that go on together. `fork` makes n of each; `extend` appends tokens to each; `keep` drops some."""

    def __init__(
        self, model: PreTrainedModel, past: list[list[Level]] | None, position: Tensor, n: int
    ) -> None:
        layers = model.config.get_text_config().num_hidden_layers
        self.model, self.position, self.n = model, position, n
        self.past: list[list[Level]] = past if past is not None else [[] for _ in range(layers)]
        self.bias: Tensor | None = None
        self.layers: list[_Layer] = []

    def fork(self, n: int) -> TreeState:
        """Each sequence n times, in order; what it has so far is kept once."""
        past = self.past
        if self.layers:
            seen = (
                None if self.bias is None else self.bias[..., -1:, :]
            )  # the last query is no pad: it sees all but pads
            past = [
                [
                    *layer.past,
                    Level(layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length], seen),
                ]
                for layer in self.layers
            ]
        return TreeState(self.model, past, self.position.repeat_interleave(n), n)

    def extend(self, ids: Tensor, real: Tensor | None = None, last: bool = True) -> Tensor:
        """Logits [rows, 1 or width, vocabulary] after `ids` [rows, width]; `real` [rows, width] is 0 on pads."""
        width = ids.shape[1]
        if not self.layers:
            self.layers = [_Layer(past) for past in self.past]
        self.bias = _causal(ids, real, self.model.dtype) if width > 1 else None
        count = torch.ones_like(ids) if real is None else real.long()
        positions = (self.position[:, None] + count.cumsum(1) - 1).clamp(min=0)
        self.position = self.position + count.sum(1)
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=Cache(layers=list(self.layers)),
            use_cache=True,
            tree=self,
            logits_to_keep=int(last),
        )
        logits: Tensor = out.logits
        return logits

    def keep(self, groups: Tensor) -> Tensor:
        """Drops all but these groups of n rows; returns the indices of the rows that stay."""
        rows = (groups[:, None] * self.n + torch.arange(self.n, device=groups.device)).flatten()
        self.past = [[_select(level, groups) for level in past] for past in self.past]
        for layer, past in zip(self.layers, self.past, strict=False):
            layer.past, layer.keys, layer.values = past, layer.keys[rows], layer.values[rows]
        self.position = self.position[rows]
        return rows


class PlainState:
    """As `TreeState`, by copying caches: for models whose attention cannot be replaced."""

    def __init__(self, model: PreTrainedModel, cache: Cache, mask: Tensor, n: int) -> None:
        self.model, self.cache, self.mask, self.n = model, cache, mask, n

    def fork(self, n: int) -> PlainState:
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(n)
        return PlainState(self.model, cache, self.mask.repeat_interleave(n, 0), n)

    def extend(self, ids: Tensor, real: Tensor | None = None, last: bool = True) -> Tensor:
        before = self.mask.sum(1, keepdim=True)
        count = torch.ones_like(ids) if real is None else real.long()
        self.mask = torch.cat([self.mask, count], 1)
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=(before + count.cumsum(1) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = out.logits
        return logits[:, -1:] if last else logits

    def keep(self, groups: Tensor) -> Tensor:
        rows = (groups[:, None] * self.n + torch.arange(self.n, device=groups.device)).flatten()
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        return rows


State = TreeState | PlainState


def new_state(model: PreTrainedModel, tree: bool) -> State:
    """One sequence without tokens."""
    if tree:
        return TreeState(model, None, torch.zeros(1, dtype=torch.long, device=model.device), 1)
    empty = torch.zeros(1, 0, dtype=torch.long, device=model.device)
    return PlainState(model, DynamicCache(config=model.config), empty, 1)


def tree_problem(model: PreTrainedModel) -> str | None:
    """Why this model must run on copied caches, or None; decided by its logits on a few tokens."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or []) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds or not model._can_set_attn_implementation():
        return f"its attention cannot be replaced {sorted(kinds)}"
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.vocab_size
    with torch.inference_mode():
        want = model(input_ids=ids).logits[:, -1].float()
        try:
            with attention(model, tree=True):
                root = new_state(model, tree=True)
                root.extend(ids[:, :4])
                got = root.fork(1).extend(ids[:, 4:])[:, -1].float()
        except TypeError as error:
            return f"its attention takes no further arguments ({error})"
    off = float((got - want).abs().max() / want.abs().max())
    return None if off < (1e-3 if model.dtype == torch.float32 else 5e-2) else f"logits differ by {off:.1%}"


def window(model: PreTrainedModel) -> float:
    """Tokens up to which every layer sees all of them."""
    config = model.config.get_text_config()
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    return float(config.sliding_window) if sliding and config.sliding_window else math.inf


@contextmanager
def attention(model: PreTrainedModel, tree: bool) -> Iterator[None]:
    """Inside, the model attends over trees; outside it is as before (so that it can be trained or compared)."""
    before = model.config._attn_implementation
    if tree:
        model.set_attn_implementation(NAME)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.set_attn_implementation(before)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree: TreeState | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` [rows, heads, width, size] over all levels; each sequence of a level serves its forks."""
    assert tree is not None
    rows, heads, width, size = query.shape
    share = heads // key.shape[1] * width  # queries of one key head
    levels = [*tree.layers[module.layer_idx].past, Level(key, value, tree.bias)]  # type: ignore[index]
    if width > 1 and all(len(level.keys) == 1 for level in levels[:-1]):
        return _prompts(query, levels, scaling), None
    lengths = [level.keys.shape[2] for level in levels]
    query = (query * (scaling or size**-0.5)).reshape(rows, -1, share, size)
    scores = query.new_empty(rows, key.shape[1], share, sum(lengths))
    for level, part in zip(levels, torch.split(scores, lengths, -1), strict=True):
        place = _grouped(part, len(level.keys))
        place.copy_(_apart(_spread(query, len(level.keys)) @ level.keys.transpose(2, 3), share))
        if level.bias is not None:
            place.view(*place.shape[:3], -1, width, place.shape[-1]).add_(level.bias)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    out = torch.zeros_like(query)
    for level, part in zip(levels, torch.split(weights, lengths, -1), strict=True):
        _grouped(out, len(level.keys)).add_(_apart(_spread(part, len(level.keys)) @ level.values, share))
    return out.view(rows, heads, width, size).transpose(1, 2).contiguous(), None


def _prompts(query: Tensor, levels: list[Level], scaling: float | None) -> Tensor:
    """Attention of prompts over the root and themselves: long enough for the fused kernel to be worth the copies."""
    keys, values = (
        torch.cat([cast(Tensor, level[part]).expand(len(query), -1, -1, -1) for level in levels], 2)
        for part in (0, 1)
    )
    own = cast(Tensor, levels[-1].bias)[:, 0, 0]
    bias = torch.nn.functional.pad(own, (keys.shape[2] - own.shape[-1], 0))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, bias, scale=scaling, enable_gqa=query.shape[1] != keys.shape[1]
    )
    return out.transpose(1, 2).contiguous()


def _select(level: Level, groups: Tensor) -> Level:
    """The level of these groups; a level of one sequence is everybody's."""
    if len(level.keys) == 1:
        return level
    bias = level.bias[groups] if level.bias is not None and len(level.bias) > 1 else level.bias
    return Level(level.keys[groups], level.values[groups], bias)


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """[rows, heads, queries, x] -> [groups, rows / groups, heads, queries, x]."""
    return rows.view(groups, len(rows) // groups, *rows.shape[1:])


def _spread(rows: Tensor, groups: int) -> Tensor:
    """[rows, heads, queries, x] -> [groups, heads, all queries of the group, x]."""
    return _grouped(rows, groups).transpose(1, 2).flatten(2, 3)


def _apart(joined: Tensor, share: int) -> Tensor:
    """[groups, heads, all queries of the group, x] -> [groups, rows / groups, heads, queries, x]."""
    groups, heads, queries, size = joined.shape
    return joined.view(groups, heads, queries // share, share, size).transpose(1, 2)


def _causal(ids: Tensor, real: Tensor | None, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, else very low: [rows or 1, 1, 1, 1, width, width]."""
    width = ids.shape[1]
    seen = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()[None]
    if real is not None:
        seen = seen & real.bool()[:, None]
    low = torch.zeros(seen.shape, dtype=dtype, device=ids.device)
    return low.masked_fill_(~seen, torch.finfo(dtype).min / 2)[:, None, None, None]


AttentionInterface.register(NAME, tree_attention)
