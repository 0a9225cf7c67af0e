"""Definitions of maps, shared keys and corrected scores, in the simplest code. Faster code is tested against them.

    map = softmax(cap(scaling · (Q Kᵀ + shift(Q_v Rᵀ))) + bias + mask),    context = map @ V

Only tests import this module.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def attention_map(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch heads key dim"],
    *,
    scaling: float,
    mask: Bool[Tensor, "#batch #heads #query key"] | None = None,
    bias: Float[Tensor, "#batch #heads #query key"] | None = None,
    is_causal: bool = False,
    relative_query: Float[Tensor, "batch heads query dim"] | None = None,
    relative_key: Float[Tensor, "#batch heads distances dim"] | None = None,
    cap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads query key"]:
    """Compute an attention map. Its rows sum to one, or to zero if a query may attend to no key.

    Relative positions of Transformer-XL (Dai et al. 2019, appendix B) add `relative_query[i] · relative_key[p]` to
    the score of query i and key j, with p = (num_keys − 1) − i + j: the keys are sorted by distance i − j, from
    num_keys − 1 downwards.

    A cap replaces a score s, before bias and mask, by cap · tanh(s / cap). A sink is the score of one more key, whose
    column of the map is dropped. Rows then sum to less than one.
    """
    scores = scaling * torch.einsum("bhqd,bhkd->bhqk", query, key)
    num_queries, num_keys = scores.shape[-2:]
    rows = torch.arange(num_queries, device=query.device)[:, None]
    columns = torch.arange(num_keys, device=query.device)[None, :]
    if relative_query is not None and relative_key is not None:
        by_distance = torch.einsum("bhqd,bhpd->bhqp", relative_query, relative_key.expand(len(query), -1, -1, -1))
        index = (num_keys - 1 - rows + columns).expand(scores.shape)
        scores = scores + scaling * by_distance.gather(-1, index)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if bias is not None:
        scores = scores + bias
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        allowed = allowed & mask
    if is_causal:
        allowed = allowed & (columns <= rows)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :num_keys]
    return torch.where(allowed.any(-1, keepdim=True), weights, 0.0)


def shared_keys(
    weights: Float[Tensor, "batch heads query key"],
    allowed: Bool[Tensor, "batch query key"],
    *,
    keys: int,
    window: int,
    block: int,
) -> Bool[Tensor, "batch 1 query key"]:
    """The keys that the queries of a reusing layer may attend to, in share mode "keys", from the map of its source.

    A query attends to its window, the first key, and the keys that its source layer published for its block:

        published[n] = the `keys` largest j by max weights[h, i, j] over all heads h and queries i of block n that
                       have j outside their window

    A position of a query is its own index if there are as many queries as keys,
    and else the last key that it may attend to. The first key, which does not compete, is the first one that any
    query may attend to. Blocks are counted from the first query that may attend to a key.

    Args:
        weights: the map of the source layer.
        allowed: the keys that each query may attend to by mask and causality. The result is limited to these.
        keys, window, block: as for `ReusePlan`.
    """
    batch, _, num_queries, num_keys = weights.shape
    found = torch.zeros(batch, 1, num_queries, num_keys, dtype=torch.bool)
    for item in range(batch):
        used_keys, used_queries = allowed[item].any(0).nonzero(), allowed[item].any(1).nonzero()
        if len(used_keys) == 0:
            continue
        first, start = int(used_keys[0]), int(used_queries[0])
        near = torch.zeros(num_queries, num_keys, dtype=torch.bool)
        for i in range(num_queries):
            own = allowed[item, i].nonzero()
            position = i if num_queries == num_keys else int(own[-1]) if len(own) else num_keys
            near[i] = (torch.arange(num_keys) - position).abs() < window
        near[:, first] = True
        far = weights[item] * ~near
        for rows in torch.arange(start, num_queries).split(block):
            published = torch.zeros(num_keys, dtype=torch.bool)
            published[far[:, rows].amax((0, 1)).topk(min(keys, num_keys)).indices] = True
            found[item, 0, rows] = (near[rows] | published) & allowed[item, rows]
    return found


def corrected_map(
    scores: Float[Tensor, "batch heads query key"],
    query: Float[Tensor, "batch heads query rank"],
    key: Float[Tensor, "batch heads key rank"],
    sink: Float[Tensor, "batch heads query sinks"] | None = None,
) -> Float[Tensor, "batch heads query all_keys"]:
    """The map of a reusing layer in share mode "corrected", from the scores of its source.

    With half = rank / 2, q[p] = query[p] + √−1 · query[p + half] are complex numbers, and so are k[p]. They are
    rotated by their positions, so that only the distance of query i and key j counts:

        map[i, j] = softmax(scores[i, j] + Re Σ_p q[i, p] · conj(k[j, p]) · exp(√−1 · (i − j) · 10000^(−p / half)))

    Args:
        scores: the scores of the source layer, with −∞ for keys that a query may not attend to. The last query is at
            the position of the last key.
        query, key: low-rank queries and keys of the reusing layer.
        sink: a score that takes part in the softmax unchanged, as one more key at the end.
    """
    num_queries, num_keys = scores.shape[-2:]
    half = query.shape[-1] // 2
    rows = torch.arange(num_keys - num_queries, num_keys, device=scores.device)
    distances = rows[:, None] - torch.arange(num_keys, device=scores.device)
    turns = torch.polar(torch.ones(()), distances[..., None] * 10000 ** (-torch.arange(half) / half))
    one, other = (torch.complex(*part.float().chunk(2, -1)) for part in (query, key))
    term = torch.einsum("bhip,bhjp,ijp->bhij", one, other.conj(), turns).real
    corrected = scores + term
    return torch.softmax(corrected if sink is None else torch.cat([corrected, sink], -1), dim=-1)
