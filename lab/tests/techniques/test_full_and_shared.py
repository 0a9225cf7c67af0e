"""Techniques whose maps are of all pairs of frames, and those that share between layers, against definitions."""

import pytest
import torch
from mapreuse_lab.techniques import Reuse, parse
from small_encoders import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_LAYERS,
    Case,
    batch,
    by_head,
    compressed,
    encoder,
    joined,
    relative_map,
    windowed_map,
)
from transformers import ParakeetEncoder

from mapreuse import ReusePlan, plan_of

FRAMES = (70, 33, 5, 2, 1)
SCALING = HEAD_DIM**-0.5


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
                weights = windowed_map(of_source, there, positions, technique.radius, technique.num_global)
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
    assert plan_of(compressed(name)) == plan


def test_any_plan_has_a_name_that_gives_it_back():
    for plan in (
        ReusePlan.full(4),
        ReusePlan.parse("1x2,2x1"),
        ReusePlan.from_sources([0, 0, 2, 0]),
        ReusePlan.from_sources([0, 0, 2, 2], heads={1: [3, 1, None, 0]}),
    ):
        assert parse(Reuse(plan).name) == Reuse(plan)
