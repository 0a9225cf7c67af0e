"""Share mode "keys": which keys matter, as a computing layer finds them and later layers attend to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mapreuse.maps._attend import attend, attend_step
from mapreuse.maps._blocked import is_short
from mapreuse.maps._grouped_heads import repeated, with_all_heads
from mapreuse.maps._key_operators import attend_to_keys, find_keys
from mapreuse.maps._operators import is_plain
from mapreuse.maps._places import Places, first_true
from mapreuse.maps._scores import Scores

_MIN_RATIO = 2
"""Keys are gathered if a query has at least this many times as many keys as it attends to; else they are masked."""


@dataclass(frozen=True)
class KeySettings:
    """Settings of share mode "keys": see `ReusePlan`.

    Attributes:
        keys: number of keys that a source publishes for a block of queries.
        window: a reader also attends to the keys less than `window` positions away.
        block: number of queries in a block.
    """

    keys: int
    window: int
    block: int


@dataclass(frozen=True)
class SharedKeys:
    """The keys that a computing layer published for its readers.

        context = softmax(scores over published[block of the query], window, first key) @ values

    Attributes:
        published: for each item and block of queries, the indices of its heaviest keys. Indices beyond the last
            key are ignored.
        settings: their settings.
        places: the places of the queries.
    """

    published: Int[Tensor, "batch blocks keys"]
    settings: KeySettings
    places: Places

    def attend(
        self,
        scores: Scores,
        values: Float[Tensor, "batch value_heads key value_dim"],
        dropout_p: float = 0.0,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """The context of a reader, from its own scores.

        Args:
            scores: scores of the reader, of the shape that the source had. Several heads may share one head of the
                keys, as under grouped-query attention.
            values: values, with as many heads as the keys.
            dropout_p: probability of dropping a weight.
        """
        if dropout_p > 0.0 or not self._saves(scores, values):
            return attend(self.limited(scores), repeated(values, scores), keep=False, dropout_p=dropout_p)[0]
        return attend_to_keys(scores, values, self.published, self.places, self.settings.window, self.settings.block)

    def _saves(self, scores: Scores, values: Tensor) -> bool:
        """Whether gathering keys is possible and saves work."""
        settings = self.settings
        attended = settings.keys + 2 * settings.window + settings.block
        if is_plain(scores, values) or scores.relative is not None:
            return False
        if scores.shape[3] < _MIN_RATIO * attended:
            return False
        rows = self.places.positions
        return torch.compiler.is_compiling() or bool((rows.diff(dim=-1) == 1).all())

    def limited(self, scores: Scores) -> Scores:
        """The scores of a reader with one head of the keys for each head of the queries, and the mask of its keys."""
        mask = self.attended(scores.shape[3])[:, None]
        mask = mask if scores.mask is None else mask & scores.mask
        return replace(with_all_heads(scores), mask=mask)

    def attended(self, num_keys: Any) -> Bool[Tensor, "batch query key"]:
        """The keys that a reader attends to, as far as its mask allows."""
        settings = self.settings
        device = self.published.device
        none = torch.zeros(*self.published.shape[:2], num_keys + settings.keys, dtype=torch.bool, device=device)
        chosen = none.scatter(-1, self.published, torch.ones_like(self.published, dtype=torch.bool))[..., :num_keys]
        index = self.places.blocks(settings.block)[..., None]
        chosen = chosen.gather(1, index.expand(-1, -1, num_keys))
        return chosen | self.places.near(num_keys, settings.window)


def compute_keys(
    scores: Scores,
    values: Float[Tensor, "batch value_heads key value_dim"],
    settings: KeySettings,
    dropout_p: float = 0.0,
) -> tuple[Float[Tensor, "batch heads query value_dim"], SharedKeys]:
    """The context of a computing layer, and the keys that matter to its queries.

        published[n] = the `keys` largest j by max map[h, i, j] over all heads h and queries i of block n that have j
                       outside their window

    The maximum, not the mean: a key that one query of one head needs must not lose against keys that all like a
    little. Positions have no gradients.

    Args:
        scores, values, dropout_p: as for `SharedKeys.attend`; the layer itself attends to all keys.
        settings: number of keys, window and block.
    """
    places = Places.of(scores)
    if scores.shape[2] == 1 and scores.key_heads is not None:
        context, weights = attend_step(scores, values, scores.key_heads, dropout_p=dropout_p)
        return context, SharedKeys(_heaviest(weights.detach(), places, settings), settings, places)
    scores, values = with_all_heads(scores), repeated(values, scores)
    plain = is_plain(scores, values) or torch.is_grad_enabled()
    if not (plain or dropout_p > 0.0 or is_short(values, scores.shape)):
        context, published = find_keys(scores, values, places, settings.keys, settings.window, settings.block)
        return context, SharedKeys(published, settings, places)
    context, own_map = attend(scores, values, keep=True, dropout_p=dropout_p)
    assert own_map is not None
    return context, SharedKeys(_heaviest(own_map.detach(), places, settings), settings, places)


def keys_of_map(
    weights: Float[Tensor, "batch heads positions positions"],
    valid: Bool[Tensor, "batch positions"],
    settings: KeySettings,
) -> SharedKeys:
    """The keys that a computing layer publishes, from its whole map; `valid` is False for padding."""
    first = first_true(valid)
    places = Places(first, first, torch.arange(valid.shape[1], device=valid.device).expand(len(valid), -1))
    return SharedKeys(_heaviest(weights, places, settings), settings, places)


def _heaviest(
    weights: Float[Tensor, "batch heads query key"], places: Places, settings: KeySettings
) -> Int[Tensor, "batch blocks keys"]:
    """The heaviest keys of each block, from the whole map."""
    num_queries, num_keys = weights.shape[2:]
    is_padding = places.positions.new_ones(num_queries).cumsum(0) <= places.first_query[:, None]
    near = places.near(num_keys, settings.window)
    far = weights.amax(1).masked_fill(near | is_padding[..., None], 0.0)
    number = (num_queries + settings.block - 1) // settings.block
    index = places.blocks(settings.block)[..., None].expand(-1, -1, num_keys)
    pooled = far.new_zeros(len(far), number, num_keys).scatter_reduce(1, index, far, "amax")
    # Scores of −1 fill up a short context, so that the number of keys does not depend on its length.
    return functional.pad(pooled, (0, settings.keys), value=-1.0).topk(settings.keys).indices
