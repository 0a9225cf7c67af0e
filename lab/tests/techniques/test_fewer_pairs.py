"""Techniques that compute fewer pairs of frames, against the full maps that they are part of."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_encoders import HEAD_DIM, NUM_HEADS, Case, by_head, compressed, joined, relative_map, windowed_map

FRAMES = (70, 33, 5, 2, 1)
SCALING = HEAD_DIM**-0.5


def relative(attention, hidden_states, positions, **more):
    return relative_map(
        attention,
        by_head(attention.q_proj(hidden_states)),
        by_head(attention.k_proj(hidden_states)),
        by_head(attention.relative_k_proj(positions)),
        SCALING,
        **more,
    )


@pytest.mark.parametrize(
    ("radius", "num_global", "frames"),
    [
        (1, 0, FRAMES),
        (3, 0, (33, 32, 31, 7, 1)),
        (40, 0, (150, 100, 41, 3)),
        (200, 0, FRAMES),
        (3, 2, FRAMES),
        (50, 1, (170, 60, 1)),
        (2, 7, (40, 6, 1)),
    ],
)
def test_a_window_is_full_attention_under_a_band_mask(radius, num_global, frames):
    case = Case(f"window-{radius}" + (f"-global-{num_global}" if num_global else ""), *frames)
    case.check(
        lambda hidden_states, positions: joined(
            windowed_map(case.attention, hidden_states, positions, radius, num_global)
            @ by_head(case.attention.v_proj(hidden_states))
        )
    )


@settings(max_examples=25)
@given(st.integers(1, 80), st.integers(1, 90), st.integers(0, 3))
def test_a_window_of_any_size_is_right_for_any_length(radius, frames, num_global):
    case = Case(f"window-{radius}" + (f"-global-{num_global}" if num_global else ""), frames)
    case.check(
        lambda hidden_states, positions: joined(
            windowed_map(case.attention, hidden_states, positions, radius, num_global)
            @ by_head(case.attention.v_proj(hidden_states))
        )
    )


def test_a_window_costs_memory_in_proportion_to_length():
    """Nothing of T × T numbers is made, by the largest tensor that any operation returns."""
    largest = {}
    for frames in (2000, 4000):
        attention = Case("window-8", 1).attention
        hidden_states = torch.randn(1, frames, 32)
        positions = compressed("full").encode_positions(hidden_states)
        with torch.no_grad(), _LargestResult() as mode:
            attention(hidden_states, positions)
        largest[frames] = mode.largest
    assert largest[4000] <= 2 * largest[2000] < 2000 * 2000


class _LargestResult(torch.utils._python_dispatch.TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().size() // tensor.element_size())
        return result


@pytest.mark.parametrize("stride", [2, 3, 7])
@pytest.mark.parametrize("frames", [FRAMES, (300, 299, 8)])
def test_strided_attention_is_every_so_manyth_row_of_full_attention(stride, frames):
    case = Case(f"strided-{stride}", *frames)

    def context(hidden_states, positions):
        values = by_head(case.attention.v_proj(hidden_states))
        rows = torch.arange(len(hidden_states)) // stride * stride
        return joined((relative(case.attention, hidden_states, positions) @ values)[:, rows])

    case.check(context)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_grouped_attention_is_attention_of_frames_side_by_side(size):
    case = Case(f"grouped-{size}", *FRAMES)
    attention = case.attention

    def context(hidden_states, positions):
        frames = len(hidden_states)
        groups = math.ceil(frames / size)
        projected = [
            torch.cat([projection(hidden_states), torch.zeros(groups * size - frames, 32)])
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        query, key, values = (by_head(part).unflatten(1, (groups, size)) for part in projected)
        relative_key = by_head(attention.relative_k_proj(positions))
        contexts = torch.zeros(NUM_HEADS, groups * size, HEAD_DIM)
        for head in range(NUM_HEADS):
            for one in range(groups):
                scores = torch.zeros(groups)
                for other in range(groups):
                    apart = relative_key[head, frames - 1 - (one - other) * size]
                    for frame in range(size):
                        asking = query[head, one, frame]
                        scores[other] += (asking + attention.bias_u[head]) @ key[head, other, frame]
                        scores[other] += (asking + attention.bias_v[head]) @ apart
                weights = torch.softmax(scores / math.sqrt(size * HEAD_DIM), dim=0)
                contexts[head, one * size : (one + 1) * size] = torch.einsum("g,gfd->fd", weights, values[head])
        return joined(contexts[:, :frames])

    case.check(context)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_pooled_attention_is_attention_to_means_of_frames(size):
    case = Case(f"pool-{size}", *FRAMES)
    attention = case.attention

    def context(hidden_states, positions):
        frames = len(hidden_states)
        pooled = torch.stack([part.mean(0) for part in hidden_states.split(size)])
        query, key = by_head(attention.q_proj(hidden_states)), by_head(attention.k_proj(pooled))
        steps = torch.arange(frames)[:, None] // size - torch.arange(len(pooled))
        relative_key = by_head(attention.relative_k_proj(positions))[:, frames - 1 - steps * size]
        content = (query + attention.bias_u[:, None]) @ key.mT
        positional = torch.einsum("hid,hijd->hij", query + attention.bias_v[:, None], relative_key)
        return joined(torch.softmax((content + positional) * SCALING, dim=-1) @ by_head(attention.v_proj(pooled)))

    case.check(context)


@pytest.mark.parametrize("factor", [1, 3, 30])
def test_probsparse_is_full_attention_for_the_queries_far_from_uniform(factor):
    case = Case(f"probsparse-{factor}", *FRAMES)
    attention = case.attention

    def context(hidden_states, positions):
        frames = len(hidden_states)
        number = min(frames, max(2, math.ceil(factor * math.log(frames))))
        query, key = by_head(attention.q_proj(hidden_states)), by_head(attention.k_proj(hidden_states))
        values = by_head(attention.v_proj(hidden_states))
        sampled = [int((rank + 0.5) * frames / number) for rank in range(number)]
        products = query @ key[:, sampled].mT
        measure = products.amax(-1) - products.mean(-1)
        contexts = values.mean(1, keepdim=True).expand_as(values).clone()
        full = relative(attention, hidden_states, positions) @ values
        for head in range(NUM_HEADS):
            chosen = measure[head].argsort(descending=True)[:number]
            contexts[head, chosen] = full[head, chosen]
        return joined(contexts)

    case.check(context)


def test_probsparse_whose_queries_all_attend_is_full_attention():
    case = Case("probsparse-30", *FRAMES)
    case.check(
        lambda hidden_states, positions: joined(
            relative(case.attention, hidden_states, positions) @ by_head(case.attention.v_proj(hidden_states))
        )
    )
