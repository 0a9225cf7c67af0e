"""Each technique against its dense definition, for utterances of different lengths in one batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_encoders import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_LAYERS,
    Case,
    batch,
    by_head,
    compressed,
    content_map,
    encoder,
    joined,
    relative_map,
)

from mapreuse import ReusePlan
from mapreuse.techniques import parse

FRAMES = (70, 33, 5, 2, 1)
SCALING = HEAD_DIM**-0.5


def distances(frames):
    """j − i of query i and key j."""
    places = torch.arange(frames)
    return places[None, :] - places[:, None]


def relative(attention, hidden_states, positions, **more):
    return relative_map(
        attention,
        by_head(attention.q_proj(hidden_states)),
        by_head(attention.k_proj(hidden_states)),
        by_head(attention.relative_k_proj(positions)),
        SCALING,
        **more,
    )


# --- full attention with other projections


def test_full_attention_is_transformers_own():
    inputs = batch(70, 33, 5, 1)
    with torch.no_grad():
        expected = encoder()(**inputs).last_hidden_state
        ours = compressed("full")(**inputs).last_hidden_state
    for item, frames in enumerate((70, 33, 5, 1)):
        torch.testing.assert_close(ours[item, :frames], expected[item, :frames], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "heads", "dim"), [("heads-2", 2, 8), ("wide-heads-2", 2, 16), ("wide-heads-1", 1, 32)]
)
def test_fewer_heads_are_transformers_own_with_the_first_of_the_weights(name, heads, dim):
    model, inputs = compressed(name), batch(33, 5)
    original = encoder()
    for block in original.layers:
        attention, width = block.self_attn, heads * dim
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.relative_k_proj):
            projection.weight.data = projection.weight.data[:width]
            if projection.bias is not None:
                projection.bias.data = projection.bias.data[:width]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, :width]
        attention.bias_u.data = attention.bias_u.data.flatten()[:width].view(heads, dim)
        attention.bias_v.data = attention.bias_v.data.flatten()[:width].view(heads, dim)
        attention.head_dim, attention.scaling = dim, dim**-0.5
    original.config.num_attention_heads = original.config.num_key_value_heads = heads
    with torch.no_grad():
        expected = original(**inputs).last_hidden_state
        ours = model(**inputs).last_hidden_state
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours[1, :5], expected[1, :5], rtol=1e-3, atol=1e-4)


def test_the_heads_of_another_model_with_the_same_settings_stay_as_they_are():
    from transformers import ParakeetEncoder

    first = encoder()
    second = ParakeetEncoder(first.config)
    parse("heads-2").apply(first)
    with torch.no_grad():
        assert second.eval()(**batch(5)).last_hidden_state.isfinite().all()


def test_a_smaller_query_key_dimension_is_the_map_of_its_first_dimensions():
    case, original = Case("qk-dim-3", *FRAMES), encoder().layers[0].self_attn

    def context(hidden_states, positions):
        query, key, relative_key = (
            by_head(projection(inputs))[..., :3]
            for projection, inputs in (
                (original.q_proj, hidden_states),
                (original.k_proj, hidden_states),
                (original.relative_k_proj, positions),
            )
        )
        weights = relative_map(case.attention, query, key, relative_key, 3**-0.5)
        return joined(weights @ by_head(original.v_proj(hidden_states)))

    case.check(context)


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_queries_meet_the_first_keys_and_values_of_their_group(groups):
    case, original = Case(f"gqa-{groups}", *FRAMES), encoder().layers[0].self_attn
    first = [head - head % (NUM_HEADS // groups) for head in range(NUM_HEADS)]

    def context(hidden_states, positions):
        query, key = by_head(original.q_proj(hidden_states)), by_head(original.k_proj(hidden_states))[first]
        weights = relative_map(original, query, key, by_head(original.relative_k_proj(positions)), SCALING)
        return joined(weights @ by_head(original.v_proj(hidden_states))[first])

    case.check(context)


# --- layers that share


def _hidden_states_before_attention(model, inputs):
    """For every layer, what its attention reads and what it returns."""
    seen = []
    handles = [
        block.self_attn.register_forward_hook(
            lambda _, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])), with_kwargs=True
        )
        for block in model.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("size", [2, 3])
def test_layers_of_a_group_use_the_keys_and_values_of_its_first(size):
    model, original, inputs = compressed(f"cla-{size}"), encoder(), batch(33)
    seen = _hidden_states_before_attention(model, inputs)
    positions = model.encode_positions(seen[0][0])[0]
    for layer, (hidden_states, output) in enumerate(seen):
        own, source = original.layers[layer].self_attn, original.layers[layer - layer % size].self_attn
        shared = seen[layer - layer % size][0][0]
        with torch.no_grad():
            query, key = by_head(own.q_proj(hidden_states[0])), by_head(source.k_proj(shared))
            weights = relative_map(own, query, key, by_head(own.relative_k_proj(positions)), SCALING)
            expected = own.o_proj(joined(weights @ by_head(source.v_proj(shared))))
        torch.testing.assert_close(output[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["window-3+reuse-2x2", "window-3-global-2+reuse-4x1", "window-2+reuse-[0,1,0,1]"])
def test_reusing_layers_apply_the_windowed_map_of_their_source(name):
    model, original, inputs = compressed(name), encoder(), batch(70, 33)
    technique = parse(name)
    seen = _hidden_states_before_attention(model, inputs)
    for layer in range(NUM_LAYERS):
        source = (*technique.plan.sources(layer), layer)[0]
        of_source, own = original.layers[source].self_attn, original.layers[layer].self_attn
        for item, frames in enumerate((70, 33)):
            there, here = seen[source][0][item, :frames], seen[layer][0][item, :frames]
            with torch.no_grad():
                positions = model.encode_positions(there[None])[0]
                weights = _windowed(of_source, there, positions, technique.radius, technique.num_global)
                expected = own.o_proj(joined(weights @ by_head(own.v_proj(here))))
            torch.testing.assert_close(seen[layer][1][item, :frames], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("reuse-2x2", ReusePlan.grouped(4, 2)),
        ("reuse-4x1", ReusePlan.grouped(4, 4)),
        ("reuse-1x1,3x1", ReusePlan.from_sources([0, 1, 1, 1])),
        ("reuse-[0,1,0,1]", ReusePlan.from_sources([0, 1, 0, 1])),
        (
            "reuse-2x2-partial-1",
            ReusePlan.from_sources([0, 0, 2, 2], heads={1: [None] * 3 + [3], 3: [None] * 3 + [3]}),
        ),
    ],
)
def test_a_name_of_reuse_stands_for_its_plan(name, plan):
    from mapreuse import plan_of

    assert plan_of(compressed(name)) == plan


def test_any_plan_has_a_name_that_gives_it_back():
    from mapreuse.techniques import Reuse

    for plan in (
        ReusePlan.full(4),
        ReusePlan.parse("1x2,2x1"),
        ReusePlan.from_sources([0, 0, 2, 0]),
        ReusePlan.from_sources([0, 0, 2, 2], heads={1: [3, 1, None, 0]}),
    ):
        assert parse(Reuse(plan).name) == Reuse(plan)


# --- fewer pairs of frames


def _windowed(attention, hidden_states, positions, radius, num_global=0):
    """The map of a band and of global frames, between which contents alone count."""
    frames = len(hidden_states)
    apart = distances(frames)
    is_global = torch.zeros(frames, frames, dtype=torch.bool)
    is_global[:num_global], is_global[:, :num_global] = True, True
    query, key = by_head(attention.q_proj(hidden_states)), by_head(attention.k_proj(hidden_states))
    relative_key = by_head(attention.relative_k_proj(positions))[:, frames - 1 + apart]
    content = (query + attention.bias_u[:, None]) @ key.mT
    positional = torch.einsum("hid,hijd->hij", query + attention.bias_v[:, None], relative_key)
    scores = (content + positional.masked_fill(is_global, 0.0)) * SCALING
    allowed = (apart.abs() <= radius) | is_global
    return torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)


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
            _windowed(case.attention, hidden_states, positions, radius, num_global)
            @ by_head(case.attention.v_proj(hidden_states))
        )
    )


@given(st.integers(1, 80), st.integers(1, 90), st.integers(0, 3))
def test_a_window_of_any_size_is_right_for_any_length(radius, frames, num_global):
    case = Case(f"window-{radius}" + (f"-global-{num_global}" if num_global else ""), frames)
    case.check(
        lambda hidden_states, positions: joined(
            _windowed(case.attention, hidden_states, positions, radius, num_global)
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


# --- kernels, slots and landmarks


def _normalised(weights):
    return weights / weights.sum(-1, keepdim=True)


def test_linear_attention_is_the_map_of_its_kernel():
    case = Case("linear", *FRAMES)

    def context(hidden_states, positions):
        query, key, values = (
            by_head(projection(hidden_states))
            for projection in (case.attention.q_proj, case.attention.k_proj, case.attention.v_proj)
        )
        query, key = (torch.where(x > 0, x + 1, x.exp()) for x in (query, key))
        return joined(_normalised(torch.einsum("hif,hjf->hij", query, key)) @ values)

    case.check(context)


def test_performer_is_the_map_of_its_random_features():
    case = Case("performer-13", *FRAMES)
    directions = case.attention.directions.double()

    def features(vectors, greatest):
        vectors = vectors.double() / HEAD_DIM**0.25
        products = torch.einsum("hid,fd->hif", vectors, directions)
        return (products - vectors.square().sum(-1, keepdim=True) / 2 - greatest(products)).exp() + 1e-4

    def context(hidden_states, positions):
        query, key, values = (
            by_head(projection(hidden_states))
            for projection in (case.attention.q_proj, case.attention.k_proj, case.attention.v_proj)
        )
        query = features(query, lambda products: products.max(-1, keepdim=True).values)
        key = features(key, lambda products: products.flatten(1).max(-1).values[:, None, None])
        return joined((_normalised(query @ key.mT) @ values.double()).float())

    case.check(context)


def test_performer_with_many_features_is_near_softmax_attention():
    case = Case("performer-20000", 33)
    case.hidden_states = case.hidden_states / 4  # the variance of the estimate grows as the exponential of the norms
    attention = case.attention

    def context(hidden_states, positions):
        query, key = by_head(attention.q_proj(hidden_states)), by_head(attention.k_proj(hidden_states))
        return joined(content_map(query, key) @ by_head(attention.v_proj(hidden_states)))

    def uniform(hidden_states, positions):
        return attention.v_proj(hidden_states).mean(0, keepdim=True).expand(len(hidden_states), -1)

    case.check(context, tolerance=0.02)
    with pytest.raises(AssertionError):
        case.check(uniform, tolerance=0.02)


def test_performers_directions_are_orthogonal_in_blocks():
    directions = Case("performer-13", 1).attention.directions
    for block in directions.split(HEAD_DIM):
        products = block @ block.T
        assert (products - products.diag().diag()).abs().max() < 1e-4
    assert len(set(directions.norm(dim=-1).tolist())) == 13


@pytest.mark.parametrize("frames", [FRAMES, (300, 256, 255)])
def test_linformer_is_attention_to_learned_mixtures_of_frames(frames):
    case = Case("linformer-5", *frames)
    attention = case.attention

    def context(hidden_states, positions):
        number = len(hidden_states)
        weights = torch.zeros(5, number)
        for frame in range(number):
            place = min(max((frame + 0.5) * 256 / number - 0.5, 0), 255)
            left, share = min(int(place), 254), place - min(int(place), 254)
            weights[:, frame] = attention.mixture[:, left] * (1 - share) + attention.mixture[:, left + 1] * share
        mixed = weights * 256 / number @ hidden_states
        query, key = by_head(attention.q_proj(hidden_states)), by_head(attention.k_proj(mixed))
        return joined(content_map(query, key) @ by_head(attention.v_proj(mixed)))

    case.check(context, tolerance=1e-4)


@pytest.mark.parametrize("landmarks", [3, 8])
def test_nystrom_attention_is_the_product_of_three_maps(landmarks):
    case = Case(f"nystrom-{landmarks}", *FRAMES)
    attention = case.attention

    def context(hidden_states, positions):
        frames = len(hidden_states)
        number = min(landmarks, frames)
        segments = torch.arange(frames) * number // frames
        means = torch.stack([hidden_states[segments == segment].mean(0) for segment in range(number)])
        query, key, few_queries, few_keys = (
            by_head(projection(inputs))
            for inputs in (hidden_states, means)
            for projection in (attention.q_proj, attention.k_proj)
        )
        between = content_map(few_queries, few_keys)
        identity = torch.eye(number)
        norms = between.abs().sum(-1).amax(-1) * between.abs().sum(-2).amax(-1)
        inverse = between.mT / norms[:, None, None]
        for _ in range(6):
            product = between @ inverse
            inverse = inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product))) / 4
        weights = content_map(query, few_keys) @ inverse @ content_map(few_queries, key)
        return joined(weights @ by_head(attention.v_proj(hidden_states)))

    case.check(context, tolerance=2e-4)


def test_nystroms_pseudo_inverse_approaches_the_true_one():
    from mapreuse.techniques._nystrom import pseudo_inverse

    torch.manual_seed(0)
    maps = torch.softmax(2 * torch.eye(6) + 0.5 * torch.randn(3, 6, 6), dim=-1)
    torch.testing.assert_close(pseudo_inverse(maps), torch.linalg.pinv(maps), rtol=1e-3, atol=1e-3)
    maps[:, 4:], maps[..., 4:] = 0.0, 0.0
    assert (pseudo_inverse(maps)[:, 4:] == 0).all()
    assert (pseudo_inverse(maps)[..., 4:] == 0).all()


# --- maps that are fixed, layers without


@pytest.mark.parametrize("width", [1, 2])
def test_gaussian_maps_are_functions_of_distance(width):
    case = Case(f"gaussian-{width}", *FRAMES)

    def context(hidden_states, positions):
        apart = distances(len(hidden_states)).double()
        contexts = []
        for head, values in enumerate(by_head(case.attention.v_proj(hidden_states)).double()):
            centre = (2 * head - 3) * width
            weights = torch.exp(-((apart - centre) ** 2) / (2 * width**2))
            contexts.append(_normalised(torch.where(apart.abs() <= 6 * width, weights, 0.0)) @ values)
        return joined(torch.stack(contexts)).float()

    case.check(context)


def test_a_diagonal_map_gives_every_frame_its_own_values():
    case = Case("diagonal", *FRAMES)
    case.check(lambda hidden_states, positions: case.attention.v_proj(hidden_states))


def test_layers_without_attention_only_feed_forward_and_convolve():
    model, original, inputs = compressed("skip-2"), encoder(), batch(33)
    for block in original.layers[2:]:
        block.self_attn.o_proj.weight.data.zero_()
        block.self_attn.o_proj.bias.data.zero_()
    with torch.no_grad():
        expected = original(**inputs).last_hidden_state
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-3, atol=1e-4)


def test_dropped_layers_are_the_upper_ones():
    model, original, inputs = compressed("layers-2"), encoder(), batch(33)
    original.layers = original.layers[:2]
    with torch.no_grad():
        expected = original(**inputs).last_hidden_state
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-3, atol=1e-4)
    assert model.config.num_hidden_layers == 2
