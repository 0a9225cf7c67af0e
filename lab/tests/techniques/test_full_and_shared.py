"""Techniques whose maps are of all pairs of frames, and those that share between layers, against definitions."""

import pytest
import torch
from mapreuse_lab.techniques import Reuse, parse
from small_encoders import (
    NUM_LAYERS,
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


def _assert_equal_without_padding(outputs, expected, lengths):
    for item, frames in enumerate(lengths):
        torch.testing.assert_close(outputs[item, :frames], expected[item, :frames], rtol=1e-3, atol=1e-4)


def test_full_attention_is_transformers_own():
    inputs = batch(70, 33, 5, 1)
    with torch.no_grad():
        expected = encoder()(**inputs).last_hidden_state
        outputs = compressed("full")(**inputs).last_hidden_state
    _assert_equal_without_padding(outputs, expected, (70, 33, 5, 1))


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
        outputs = model(**inputs).last_hidden_state
    _assert_equal_without_padding(outputs, expected, (33, 5))


def test_the_heads_of_another_model_with_the_same_settings_stay_as_they_are():
    first = encoder()
    second = ParakeetEncoder(first.config)
    parse("heads-2").apply(first)
    with torch.no_grad():
        assert second.eval()(**batch(5)).last_hidden_state.isfinite().all()


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
            weights = relative_map(own, query, key, by_head(own.relative_k_proj(positions)))
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
