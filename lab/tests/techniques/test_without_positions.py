"""Techniques without relative positions, and layers without attention, against their definitions."""

import pytest
import torch
from mapreuse_lab.techniques._nystrom import pseudo_inverse
from small_encoders import HEAD_DIM, Case, batch, by_head, compressed, content_map, distances, encoder, joined

FRAMES = (70, 33, 5, 2, 1)


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
        mixed = weights * 16 / number @ hidden_states
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
    torch.manual_seed(0)
    maps = torch.softmax(2 * torch.eye(6) + 0.5 * torch.randn(3, 6, 6), dim=-1)
    torch.testing.assert_close(pseudo_inverse(maps), torch.linalg.pinv(maps), rtol=1e-3, atol=1e-3)
    maps[:, 4:], maps[..., 4:] = 0.0, 0.0
    assert (pseudo_inverse(maps)[:, 4:] == 0).all()
    assert (pseudo_inverse(maps)[..., 4:] == 0).all()


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
