"""The definition of an attention map, in the simplest code. All faster implementations are tested against it.

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
