"""Random attentions with the map of the definition."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from mapreuse.maps import RelativePositions, Scores, reference

LENGTHS = (1, 2, 7, 63, 64, 65, 130)
"""Lengths below, at and above one block of rows."""


@dataclass(frozen=True)
class Case:
    """Scores, values, and the map and context of the definition."""

    scores: Scores
    values: Tensor
    map: Tensor

    @property
    def context(self) -> Tensor:
        return self.map @ self.values


@st.composite
def cases(draw, *, lengths=LENGTHS, dtype=torch.float32):
    """Attentions with any combination of mask, bias, causality, relative positions, lengths and strides."""
    return make_case(
        batch=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 4)),
        num_queries=draw(st.sampled_from(lengths)),
        num_keys=draw(st.sampled_from(lengths)),
        mask=draw(st.sampled_from([None, "keys", "queries and keys", "heads"])),
        bias=draw(st.sampled_from([None, "shared", "heads"])),
        is_causal=draw(st.booleans()),
        relative=draw(st.booleans()),
        contiguous=draw(st.booleans()),
        cap=draw(st.sampled_from([None, None, 1.5])),
        sinks=draw(st.sampled_from([False, False, True])),
        seed=draw(st.integers(0, 2**16)),
        dtype=dtype,
    )


def make_case(
    *,
    batch=2,
    heads=3,
    num_queries=7,
    num_keys=7,
    mask=None,
    bias=None,
    is_causal=False,
    relative=False,
    contiguous=True,
    cap=None,
    sinks=False,
    seed=0,
    dtype=torch.float32,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    dim, value_dim = 4, 5
    num_keys = num_queries if relative else num_keys

    def normal(*shape):
        tensor = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        # Projections are stored as (batch, positions, heads, dim).
        return tensor if contiguous else tensor.transpose(1, 2).contiguous().transpose(1, 2)

    masks = {
        "keys": (batch, 1, 1, num_keys),
        "queries and keys": (batch, 1, num_queries, num_keys),
        "heads": (batch, heads, num_queries, num_keys),
    }
    allowed = None
    if mask is not None:
        allowed = torch.rand(masks[mask], generator=generator) < 0.6
        allowed[-1, :, -1] = False  # the last query of the last item attends to no key
    added = None
    if bias is not None:
        added = normal(1 if bias == "shared" else batch, 1 if bias == "shared" else heads, num_queries, num_keys)
    positions = None
    if relative:
        rows = 1 if seed % 2 else batch
        key = normal(rows, heads, 2 * num_queries - 1, dim)
        positions = RelativePositions(normal(batch, heads, num_queries, dim), key)
    scores = Scores(
        query=2 * normal(batch, heads, num_queries, dim),
        key=normal(batch, heads, num_keys, dim),
        scaling=0.7,
        mask=allowed,
        bias=added,
        is_causal=is_causal,
        relative=positions,
        cap=cap,
        sinks=normal(heads, 1, 1, 1).flatten() if sinks else None,
    )
    return Case(scores, normal(batch, heads, num_keys, value_dim), defined_map(scores))


def defined_map(scores: Scores) -> Tensor:
    """The map of these scores by the definition."""
    relative = scores.relative
    return reference.attention_map(
        scores.query,
        scores.key,
        scaling=scores.scaling,
        mask=scores.mask,
        bias=scores.bias,
        is_causal=scores.is_causal,
        relative_query=None if relative is None else relative.query,
        relative_key=None if relative is None else relative.key,
        cap=scores.cap,
        sinks=scores.sinks,
    )


def with_gradients(case: Case) -> tuple[Case, list[Tensor]]:
    """The same attention on new leaves that require gradients, and these leaves."""
    relative = case.scores.relative
    leaves = [case.scores.query, case.scores.key, case.values]
    if case.scores.bias is not None:
        leaves.append(case.scores.bias)
    if relative is not None:
        leaves += [relative.query, relative.key]
    if case.scores.sinks is not None:
        leaves.append(case.scores.sinks)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    return on_leaves(case, leaves), leaves


def on_leaves(case: Case, leaves: list[Tensor]) -> Case:
    """The same attention with other floating-point tensors."""
    query, key, values, *rest = leaves
    bias = None if case.scores.bias is None else rest.pop(0)
    relative = None if case.scores.relative is None else RelativePositions(rest.pop(0), rest.pop(0))
    sinks = None if case.scores.sinks is None else rest.pop(0)
    scores = replace(case.scores, query=query, key=key, bias=bias, relative=relative, sinks=sinks)
    return Case(scores, values, defined_map(scores))
