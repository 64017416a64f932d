"""KV caches of rows that share their beginnings: what is shared is held once and attended to by one product.

Rows branch only where their tokens differ. The simpler ways, a copied cache a row or a row for each sample, were tried
and are slower, most of all where prompts share worked examples.
After Juravsky et al. 2024, "Hydragen", arXiv 2402.05099. Knows nothing of prompts, sampling or texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import PreTrainedModel

NAME = "foggen_tree"
FULL = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Level:
    """Keys and values that rows share, of each layer [sequences, heads, length, size]."""

    layers: list[tuple[Tensor, Tensor]]
    bias: Tensor | None  # [sequences, 1, 1, length], added to scores; None: nothing is hidden
    owner: Tensor  # [rows], ascending: the sequence that each row continues
    most: int = 1  # rows of the sequence that has most
    place: Tensor | None = None  # of each row, with room for `most` a sequence; None: all of it is taken

    def own(self, owner: Tensor) -> Level:
        """The same for other rows."""
        layers, bias, count = self.layers, self.bias, len(self.layers[0][0])
        alive, inverse = torch.unique(owner, return_inverse=True)
        if 2 * len(alive) <= count:  # most sequences have ended
            owner, count, bias = inverse, len(alive), bias if bias is None or len(bias) == 1 else bias[alive]
            layers = [(keys[alive], values[alive]) for keys, values in layers]
        rows = owner.bincount(minlength=count)
        most = int(rows.max())
        rank = torch.arange(len(owner), device=owner.device) - (rows.cumsum(0) - rows)[owner]
        place = owner * most + rank if len(owner) < count * most else None
        return Level(layers, bias, owner, most, place)

    def gather(self, rows: Tensor) -> Tensor:
        """[rows, heads, queries, x] -> [sequences, heads, most * queries, x]."""
        if self.place is not None:
            room = rows.new_zeros(len(self.layers[0][0]) * self.most, *rows.shape[1:])
            room[self.place] = rows
            rows = room
        return rows.view(-1, self.most, *rows.shape[1:]).transpose(1, 2).flatten(2, 3)

    def scatter(self, joined: Tensor) -> Tensor:
        """The way back."""
        sequences, heads, queries, _ = joined.shape
        rows = joined.view(sequences, heads, self.most, queries // self.most, -1).transpose(1, 2).flatten(0, 1)
        return rows if self.place is None else rows[self.place]


class Tree:
    """Rows that go on together after `root` (nothing, or the level that all of them share)."""

    def __init__(self, model: PreTrainedModel, root: Level | None = None, rows: int = 1) -> None:
        self.model, self.cache = model, DynamicCache()
        nobody = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.levels = [root.own(nobody)] if root else []
        self.position = nobody + (root.layers[0][0].shape[2] if root else 0)
        self.bias: Tensor | None = None

    def extend(self, ids: Tensor, seen: Tensor | None = None, keep: int = 1) -> Tensor:
        """Logits [rows, keep, vocabulary] of the last tokens of `ids` [rows, width].

        `seen` [rows or 1, width, width] says which of these tokens each one looks at: itself, and those before it in
        its text, so their number is its position. Without it `ids` is one token a row, the first or a later one.
        """
        count = ids.new_ones(1, 1) if seen is None else seen.sum(-1)
        self.bias = None if seen is None else _bias(seen, self.model.dtype)[:, None]
        positions = (self.position[:, None] + count - 1).clamp(min=0)
        self.position = positions[:, -1] + 1
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            tree=self,
            logits_to_keep=keep,
        ).logits
        return logits

    def level(self) -> Level:
        """What was extended so far, to be shared."""
        # The last token is no pad: it sees all but pads.
        bias = None if self.bias is None else self.bias[:, :, -1:]
        layers: Any = self.cache.layers
        rows = torch.arange(len(self.position), device=self.position.device)
        return Level([(layer.keys, layer.values) for layer in layers], bias, rows)

    def fork(self) -> None:
        """From here on rows may branch."""
        self.levels.append(self.level())
        self.cache = DynamicCache()

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows (ascending): a row named twice branches, one not named ends."""
        if len(rows) == len(self.position) and bool((rows[1:] > rows[:-1]).all()):
            return
        self.levels = [level.own(level.owner[rows]) for level in self.levels]
        self.position = self.position[rows]
        if self.cache.get_seq_length():
            self.cache.batch_select_indices(rows)


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where something is seen, else very low."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min / 2)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree: Tree | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` [rows, heads, width, size] over the tree's levels and the rows' own `key` and `value`."""
    if tree is None or more.get("softcap") is not None or more.get("s_aux") is not None:
        raise TypeError("soft caps and sinks are unknown to this attention")
    index: int = module.layer_idx  # type: ignore[assignment]
    shared = [(level, *level.layers[index]) for level in tree.levels]
    if query.shape[2] > 1 or not shared:
        return _prompts(query, shared, key, value, tree.bias, scaling), None
    rows, heads, _, size = query.shape
    own = (query * (scaling or size**-0.5)).view(rows, key.shape[1], -1, size)
    scores = []
    for level, keys, _ in shared:
        part = level.gather(own) @ keys.transpose(2, 3)
        scores.append(level.scatter(part if level.bias is None else part + level.bias))
    scores.append(own @ key.transpose(2, 3))
    weights = torch.cat(scores, -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    parts = torch.split(weights, [part.shape[-1] for part in scores], -1)
    out = parts[-1] @ value
    for part, (level, _, values) in zip(parts, shared, strict=False):
        out += level.scatter(level.gather(part) @ values)
    return out.view(rows, 1, heads, size), None


def _prompts(
    query: Tensor,
    shared: list[tuple[Level, Tensor, Tensor]],
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Prompts after the root: long enough for the fused kernel to be worth a copy of the root."""
    keys, values = key, value
    if shared:
        _, above, worth = shared[0]
        keys, values = (
            torch.cat([old.expand(len(query), -1, -1, -1), new], 2) for old, new in ((above, key), (worth, value))
        )
        bias = bias if bias is None else torch.nn.functional.pad(bias, (above.shape[2], 0))
    grouped = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, bias, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(NAME, tree_attention)


@contextmanager
def attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends over trees; outside it is as before (so that it can be trained or compared)."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.set_attn_implementation(before)


def tree_problem(model: PreTrainedModel) -> str | None:
    """Why this model cannot attend over trees, or None; decided by its logits on a few tokens."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or []) - FULL
    if kinds or not model._can_set_attn_implementation():
        return f"its attention cannot be replaced {sorted(kinds)}"
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    causal = torch.ones(1, 4, 4, dtype=torch.bool, device=model.device).tril()
    with torch.inference_mode():
        want = model(input_ids=ids).logits[0, -1].float()
    try:
        with attention(model):
            tree = Tree(model)
            tree.extend(ids[:, :4], causal)
            tree = Tree(model, tree.level())
            tree.extend(ids[:, 4:7], causal[:, :3, :3])
            tree.fork()
            got = tree.extend(ids[:, 7:])[0, -1].float()
    except TypeError as error:
        return str(error)
    off = float((got - want).abs().max() / want.abs().max())
    return None if off < (1e-3 if model.dtype == torch.float32 else 5e-2) else f"its logits would be off by {off:.1%}"


def window(model: PreTrainedModel) -> float:
    """Tokens up to which every layer sees all of them."""
    config = model.config.get_text_config()
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    return float(config.sliding_window) if sliding and config.sliding_window else math.inf
