"""Each technique's attention against its formula, written as plainly as possible for one utterance without padding.

A formula takes the attention module, hidden states (frames, width) and encodings of distances (2·frames − 1, width),
and returns the context (frames, width).
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_encoders import (
    HEAD_DIM,
    NUM_HEADS,
    Case,
    batch,
    by_head,
    compressed,
    content_map,
    distances,
    encoder,
    full_context,
    joined,
    map_at_distances,
    projected,
    relative_map,
    windowed_map,
)

FRAMES = (70, 33, 5, 2, 1)


def smaller_query_key_dim(attention, hidden_states, positions):
    original, dim = encoder().layers[0].self_attn, attention.technique.dim
    query, key, values = projected(original, hidden_states)
    relative_key = by_head(original.relative_k_proj(positions))
    weights = relative_map(attention, query[..., :dim], key[..., :dim], relative_key[..., :dim], dim**-0.5)
    return joined(weights @ values)


def grouped_queries(attention, hidden_states, positions):
    original, size = encoder().layers[0].self_attn, NUM_HEADS // attention.technique.groups
    first = [head - head % size for head in range(NUM_HEADS)]
    query, key, values = projected(original, hidden_states)
    weights = relative_map(original, query, key[first], by_head(original.relative_k_proj(positions)))
    return joined(weights @ values[first])


def window(attention, hidden_states, positions):
    technique = attention.technique
    weights = windowed_map(attention, hidden_states, positions, technique.radius, technique.num_global)
    return joined(weights @ by_head(attention.v_proj(hidden_states)))


def strided(attention, hidden_states, positions):
    stride = attention.technique.stride
    rows = torch.arange(len(hidden_states)) // stride * stride
    return joined(full_context(attention, hidden_states, positions)[:, rows])


def grouped(attention, hidden_states, positions):
    size, frames = attention.technique.size, len(hidden_states)
    groups = math.ceil(frames / size)
    missing = torch.zeros(NUM_HEADS, groups * size - frames, HEAD_DIM)
    query, key, values = (
        torch.cat([part, missing], 1).unflatten(1, (groups, size)) for part in projected(attention, hidden_states)
    )
    relative_key = by_head(attention.relative_k_proj(positions))
    contexts = torch.zeros(NUM_HEADS, groups * size, HEAD_DIM)
    for head in range(NUM_HEADS):
        for one in range(groups):
            scores = torch.zeros(groups)
            for other in range(groups):
                apart = relative_key[head, frames - 1 - (one - other) * size]
                for frame in range(size):
                    scores[other] += (query[head, one, frame] + attention.bias_u[head]) @ key[head, other, frame]
                    scores[other] += (query[head, one, frame] + attention.bias_v[head]) @ apart
            weights = torch.softmax(scores / math.sqrt(size * HEAD_DIM), dim=0)
            contexts[head, one * size : (one + 1) * size] = torch.einsum("g,gfd->fd", weights, values[head])
    return joined(contexts[:, :frames])


def pooled(attention, hidden_states, positions):
    size, frames = attention.technique.size, len(hidden_states)
    means = torch.stack([part.mean(0) for part in hidden_states.split(size)])
    steps = torch.arange(frames)[:, None] // size - torch.arange(len(means))
    relative_key = by_head(attention.relative_k_proj(positions))[:, frames - 1 - steps * size]
    query, key = by_head(attention.q_proj(hidden_states)), by_head(attention.k_proj(means))
    return joined(map_at_distances(attention, query, key, relative_key) @ by_head(attention.v_proj(means)))


def prob_sparse(attention, hidden_states, positions):
    frames = len(hidden_states)
    number = min(frames, max(2, math.ceil(attention.technique.factor * math.log(frames))))
    query, key, values = projected(attention, hidden_states)
    products = query @ key[:, [int((rank + 0.5) * frames / number) for rank in range(number)]].mT
    measure = products.amax(-1) - products.mean(-1)
    contexts = values.mean(1, keepdim=True).expand_as(values).clone()
    full = full_context(attention, hidden_states, positions)
    for head in range(NUM_HEADS):
        chosen = measure[head].argsort(descending=True)[:number]
        contexts[head, chosen] = full[head, chosen]
    return joined(contexts)


def linear(attention, hidden_states, positions):
    query, key, values = projected(attention, hidden_states)
    query, key = (torch.where(x > 0, x + 1, x.exp()) for x in (query, key))
    return joined(_rows_summing_to_one(torch.einsum("hif,hjf->hij", query, key)) @ values)


def performer(attention, hidden_states, positions):
    def features(vectors, maximum):
        vectors = vectors.double() / HEAD_DIM**0.25
        products = torch.einsum("hid,fd->hif", vectors, attention.directions.double())
        return (products - vectors.square().sum(-1, keepdim=True) / 2 - maximum(products)).exp() + 1e-4

    query, key, values = projected(attention, hidden_states)
    query = features(query, lambda products: products.max(-1, keepdim=True).values)
    key = features(key, lambda products: products.flatten(1).max(-1).values[:, None, None])
    return joined((_rows_summing_to_one(query @ key.mT) @ values.double()).float())


def linformer(attention, hidden_states, positions):
    frames = len(hidden_states)
    weights = torch.zeros(5, frames)
    for frame in range(frames):
        place = min(max((frame + 0.5) * 256 / frames - 0.5, 0), 255)
        left, share = min(int(place), 254), place - min(int(place), 254)
        weights[:, frame] = attention.mixture[:, left] * (1 - share) + attention.mixture[:, left + 1] * share
    mixed = weights * 16 / frames @ hidden_states
    query, key = by_head(attention.q_proj(hidden_states)), by_head(attention.k_proj(mixed))
    return joined(content_map(query, key) @ by_head(attention.v_proj(mixed)))


def nystrom(attention, hidden_states, positions):
    frames = len(hidden_states)
    number = min(attention.technique.landmarks, frames)
    segments = torch.arange(frames) * number // frames
    means = torch.stack([hidden_states[segments == segment].mean(0) for segment in range(number)])
    query, key, values = projected(attention, hidden_states)
    few_queries, few_keys, _ = projected(attention, means)
    between = content_map(few_queries, few_keys)
    identity = torch.eye(number)
    norms = between.abs().sum(-1).amax(-1) * between.abs().sum(-2).amax(-1)
    inverse = between.mT / norms[:, None, None]
    for _ in range(6):
        product = between @ inverse
        inverse = inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product))) / 4
    return joined(content_map(query, few_keys) @ inverse @ content_map(few_queries, key) @ values)


def gaussian(attention, hidden_states, positions):
    width, apart = attention.technique.width, distances(len(hidden_states)).double()
    contexts = []
    for head, values in enumerate(by_head(attention.v_proj(hidden_states)).double()):
        weights = torch.exp(-((apart - (2 * head - 3) * width) ** 2) / (2 * width**2))
        contexts.append(_rows_summing_to_one(torch.where(apart.abs() <= 6 * width, weights, 0.0)) @ values)
    return joined(torch.stack(contexts)).float()


def diagonal(attention, hidden_states, positions):
    return attention.v_proj(hidden_states)


def softmax_attention(attention, hidden_states, positions):
    query, key, values = projected(attention, hidden_states)
    return joined(content_map(query, key) @ values)


def uniform(attention, hidden_states, positions):
    return attention.v_proj(hidden_states).mean(0, keepdim=True).expand(len(hidden_states), -1)


def _rows_summing_to_one(weights):
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "formula", "frames"),
    [
        ("qk-dim-3", smaller_query_key_dim, FRAMES),
        *((f"gqa-{groups}", grouped_queries, FRAMES) for groups in (1, 2)),
        ("window-1", window, FRAMES),
        ("window-3", window, (33, 32, 31, 7, 1)),
        ("window-40", window, (150, 100, 41, 3)),
        ("window-200", window, FRAMES),
        ("window-3-global-2", window, FRAMES),
        ("window-50-global-1", window, (170, 60, 1)),
        ("window-2-global-7", window, (40, 6, 1)),
        *((f"strided-{stride}", strided, (300, 299, 70, 8, 1)) for stride in (2, 3, 7)),
        *((f"grouped-{size}", grouped, FRAMES) for size in (2, 3, 5)),
        *((f"pool-{size}", pooled, FRAMES) for size in (2, 3, 5)),
        *((f"probsparse-{factor}", prob_sparse, FRAMES) for factor in (1, 3, 30)),
        ("linear", linear, FRAMES),
        ("performer-13", performer, FRAMES),
        *((f"gaussian-{width}", gaussian, FRAMES) for width in (1, 2)),
        ("diagonal", diagonal, FRAMES),
    ],
)
def test_a_technique_computes_its_formula(name, formula, frames):
    Case(name, *frames).check(formula)


@pytest.mark.parametrize(
    ("name", "formula", "frames", "tolerance"),
    [
        ("linformer-5", linformer, (300, 256, 255), 1e-4),
        ("linformer-5", linformer, FRAMES, 1e-4),
        ("nystrom-3", nystrom, FRAMES, 2e-4),
        ("nystrom-8", nystrom, FRAMES, 2e-4),
        ("nystrom-70", softmax_attention, FRAMES, 0.03),  # a landmark for every frame
    ],
)
def test_a_technique_computes_its_formula_approximately(name, formula, frames, tolerance):
    Case(name, *frames).check(formula, tolerance)


@settings(max_examples=25)
@given(st.integers(1, 80), st.integers(1, 90), st.integers(0, 3))
def test_a_window_of_any_size_is_right_for_any_length(radius, frames, num_global):
    Case(f"window-{radius}" + (f"-global-{num_global}" if num_global else ""), frames).check(window)


def test_performer_with_many_features_is_near_softmax_attention():
    case = Case("performer-20000", 33)
    case.hidden_states = case.hidden_states / 4  # the variance of the estimate grows as the exponential of the norms
    case.check(softmax_attention, tolerance=0.02)
    with pytest.raises(AssertionError):
        case.check(uniform, tolerance=0.02)


def test_performers_directions_are_orthogonal_in_blocks():
    directions = Case("performer-13", 1).attention.directions
    for block in directions.split(HEAD_DIM):
        products = block @ block.T
        assert (products - products.diag().diag()).abs().max() < 1e-4
    assert len(set(directions.norm(dim=-1).tolist())) == 13


def test_the_upper_layers_lose_their_attention_or_are_dropped():
    skipped, dropped, inputs = encoder(), encoder(), batch(33)
    for block in skipped.layers[2:]:
        block.self_attn.o_proj.weight.data.zero_()
        block.self_attn.o_proj.bias.data.zero_()
    dropped.layers = dropped.layers[:2]
    for name, original in (("skip-2", skipped), ("layers-2", dropped)):
        with torch.no_grad():
            found, expected = compressed(name)(**inputs)[0], original(**inputs)[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert compressed("layers-2").config.num_hidden_layers == 2
