"""Cached layer outputs, against complete forward passes."""

import functools

import pytest
import torch
from families import FAMILIES, build
from oracle import output_of_layer
from packed_encoders import encoder, peaked
from text_batches import random_batches
from vision_blocks import VisionTransformer

import mapreuse as mr
from mapreuse.conversion import PlanEvaluator, _layer_cache
from mapreuse.conversion._layer_cache import LayerCache
from mapreuse.models import find_stack, layout_of, output_projection

FAMILIES_AND_ENCODERS = {
    **{family: functools.partial(build, family) for family in FAMILIES},
    "torch": lambda: (encoder(batch_first=True), {"src": torch.randn(3, 9, 32)}),
    "torch, positions first": lambda: (encoder(batch_first=False), {"src": torch.randn(9, 3, 32)}),
    "timm": lambda: (peaked(VisionTransformer()), {"pixel_values": torch.randn(4, 3, 16, 16)}),
}
PLAN = mr.ReusePlan.from_sources([0, 1, 0, 1], {2: [2, 0, 3, 1]})
CHAIN = mr.ReusePlan(
    ((None,) * 4, (None, (0, 0), None, (0, 1)), (None, (1, 0), None, (1, 2)), (None, (2, 0), None, None))
)


@pytest.fixture(params=FAMILIES_AND_ENCODERS.values(), ids=FAMILIES_AND_ENCODERS)
def made(request):
    torch.manual_seed(0)
    return request.param()


def by_batch(model, states):
    """States with the batch first."""
    return states if getattr(find_stack(model).layers[0].attention, "batch_first", True) else states.transpose(0, 1)


def run_by(model, call):
    """The layers whose attention runs during a call."""
    found = []
    stack = find_stack(model)
    for index, layer in enumerate(stack.layers):
        layer.attention.register_forward_pre_hook(lambda *_, index=index: found.append(index))
    call()
    for layer in stack.layers:
        layer.attention._forward_pre_hooks.popitem()
    return found


def assert_unchanged(model):
    """No hooks or other forwards are left in the layers, and layers release maps as `PLAN` says."""
    layers = find_stack(model).layers
    assert not any("forward" in vars(one.layer) for one in layers)
    assert not any(one.layer._forward_hooks or one.layer._forward_pre_hooks for one in layers)
    assert [layout_of(one).releases for one in layers] == [(), (), (0,), (1,)]


def test_outputs_after_weight_changes_equal_those_of_complete_passes(made):
    """Also with cached earlier layers; the layer is the last to apply a map, which must not be released."""
    model, batch = made
    mr.apply(model, PLAN)
    layer = find_stack(model).layers[2]
    projection = output_projection(layer)
    weight = projection.weight.detach().clone()

    def change(factor):
        with torch.no_grad():
            projection.weight.copy_(factor * weight)

    factors = (1.0, 0.5, 0.0, 1.0)
    cache = LayerCache(model, [batch])
    for _ in range(2):
        found = cache.outputs(2, 0, [functools.partial(change, factor) for factor in factors])
        assert len(found) == len(factors)
        assert torch.equal(found[0], found[3])
        assert not torch.allclose(found[0], found[1])
        for factor, output in zip(factors, found, strict=True):
            change(factor)
            torch.testing.assert_close(output, by_batch(model, output_of_layer(model, 2, batch)))
    assert_unchanged(model)


def test_contexts_equal_those_of_complete_passes(made):
    model, batch = made
    mr.apply(model, PLAN)
    cache, layer = LayerCache(model, [batch]), find_stack(model).layers[3]
    expected = {}
    with (
        torch.no_grad(),
        output_projection(layer).register_forward_pre_hook(
            lambda _, args: expected.update(context=args[0].flatten(2))
        ),
    ):
        model(**batch)
    expected["inputs"] = by_batch(model, output_of_layer(model, 2, batch))
    for _ in range(2):
        context, inputs = cache.context(3, 0)
        torch.testing.assert_close(context, expected["context"])
        torch.testing.assert_close(inputs, expected["inputs"])


@pytest.mark.parametrize(
    ("plan", "runs"),
    [(None, [3]), (PLAN, [1, 3]), (mr.ReusePlan.from_sources([0, 0, 2, 2]), [2, 3]), (CHAIN, [0, 1, 2, 3])],
)
def test_cached_layers_run_again_only_up_to_maps_that_are_applied(plan, runs):
    """In a chain of sources, all of them; their feed-forward modules do not run."""
    model, batch = build("bert")
    if plan is not None:
        mr.apply(model, plan)
    cache, completed = LayerCache(model, [batch, batch]), []
    expected = output_of_layer(model, 3, batch)
    for index, layer in enumerate(model.encoder.layer):
        layer.intermediate.register_forward_hook(lambda *_, index=index: completed.append(index))
    for again in (False, True):
        for number in range(2):
            completed.clear()
            found = run_by(
                model, lambda number=number: torch.testing.assert_close(cache.outputs(3, number)[0], expected)
            )
            assert found == (runs if again else [0, 1, 2, 3])
            assert completed == ([3] if again else [0, 1, 2, 3])


def test_a_layer_that_is_not_cached_yet_gets_the_maps_that_it_applies():
    """The first pass ended with layer 2, so it is not cached; layer 0, whose map it applies, is."""
    model, batch = build("bert")
    mr.apply(model, PLAN)
    cache = LayerCache(model, [batch])
    cache.outputs(2, 0)
    expected = output_of_layer(model, 3, batch)
    assert run_by(model, lambda: torch.testing.assert_close(cache.outputs(3, 0)[0], expected)) == [0, 1, 2, 3]


PAIRS = mr.ReusePlan.from_sources([0, 0, 2, 2])


@pytest.mark.parametrize(
    ("plan", "index", "runs"),
    [(PLAN, 2, [0, 2]), (CHAIN, 2, [0, 1, 2]), (PAIRS, 2, [0, 1, 2]), (PAIRS, 3, [0, 1, 2, 3])],
)
def test_layers_before_the_first_reusing_layer_are_taken_from_the_originals_cache(plan, index, runs):
    """In `CHAIN` and `PAIRS` layer 1 is the first that reuses, so it has to run."""
    original, batch = build("bert")
    model = mr.convert(original, plan)
    of_original = LayerCache(original, [batch])
    of_original.outputs(3, 0)
    cache = LayerCache(model, [batch], original=of_original)
    expected = output_of_layer(model, index, batch)
    assert run_by(model, lambda: torch.testing.assert_close(cache.outputs(index, 0)[0], expected)) == runs


@pytest.mark.parametrize(("number", "runs"), [(0, [0, 1, 2, 3]), (2, [2, 3]), (3, [3])])
def test_the_cache_keeps_to_its_size(monkeypatch, number, runs):
    """The output of a layer has 4 · 7 · 32 floats of four bytes."""
    monkeypatch.setattr(_layer_cache, "_MAX_BYTES", number * 4 * 7 * 32 * 4)
    model, _ = build("bert")
    batch = {"input_ids": torch.randint(5, 40, (4, 7))}
    cache, expected = LayerCache(model, [batch]), output_of_layer(model, 3, batch)
    assert run_by(model, lambda: cache.outputs(3, 0)) == [0, 1, 2, 3]
    assert run_by(model, lambda: torch.testing.assert_close(cache.outputs(3, 0)[0], expected)) == runs


@pytest.mark.parametrize(("plan", "with_hooks"), [(None, True), (PLAN, False), (PLAN, True)])
def test_layers_that_change_their_inputs_in_place_give_the_same_outputs(with_hooks, plan):
    """Also by hooks, and in layers that are cached, run up to their map, or run twice."""
    model, batch = build("bert")
    if plan is not None:
        mr.apply(model, plan)

    def in_place(forward, hidden_states, *args, **kwargs):
        hidden_states.mul_(0.5)
        hidden_states += forward(hidden_states, *args, **kwargs)
        return hidden_states

    layers = [layer.layer for layer in find_stack(model).layers[:3]]
    forwards = [functools.partial(in_place, layer.forward) for layer in layers]
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
        if with_hooks:
            layer.register_forward_pre_hook(lambda _, args: (args[0] + 0.5, *args[1:]))
            layer.register_forward_hook(lambda _, args, output: output.mul_(0.5))
    expected, cache = output_of_layer(model, 2, batch), LayerCache(model, [batch])
    for _ in range(3):
        once, again = cache.outputs(2, 0, [lambda: None, lambda: None])
        torch.testing.assert_close(once, expected)
        torch.testing.assert_close(again, once)
    assert [layer.forward for layer in layers] == forwards


@pytest.mark.parametrize("call", ["context", "outputs"])
def test_a_stopped_pass_leaves_the_model_unchanged(call):
    model, batch = build("bert")
    mr.apply(model, PLAN)
    cache, layers = LayerCache(model, [batch]), find_stack(model).layers
    cache.outputs(3, 0)

    def stopped(*args):
        raise KeyboardInterrupt

    with layers[3].attention.register_forward_pre_hook(stopped), pytest.raises(KeyboardInterrupt):
        getattr(cache, call)(3, 0)
    assert_unchanged(model)


def test_a_refit_runs_the_first_layer_once_for_each_batch():
    """Under a plan that applies none of its maps."""
    original, plan = build("bert")[0], mr.ReusePlan.from_sources([0, 1, 1, 1])
    model = mr.convert(original, plan)
    assert run_by(model, lambda: mr.refit(model, original, random_batches(8))).count(0) == 8


def test_evaluated_plans_share_the_cache_of_the_original():
    evaluate, runs = PlanEvaluator(build("bert")[0], random_batches(8), lambda model: 0.5), []
    evaluate._targets.cache.layers[0].attention.register_forward_pre_hook(lambda *_: runs.append(0))
    for last in (1, 2):
        evaluate(mr.ReusePlan.from_sources([0, 1, 2, last]))
        assert len(runs) == 8


def test_valid_positions_are_those_of_the_attention_mask():
    model, (batch,) = build("bert")[0], random_batches(1)
    assert torch.equal(LayerCache(model, [batch]).valid(0), batch["attention_mask"].bool())
