"""A recorder returns the maps in effect and the values, in the order of the original heads."""

import gc
import weakref

import pytest
import torch
from families import build
from oracle import softmax_follows, valid_rows
from torch.nn.attention.flex_attention import create_block_mask

from mapreuse import ReusePlan, apply, optimize, plan_of
from mapreuse.models import MapRecorder, not_padding

PLANS = {
    "full": ReusePlan.full(4),
    "groups": ReusePlan.grouped(4, 2),
    "heads": ReusePlan.from_sources([0, 0, 0, 3], {1: [2, 0, 3, 1], 2: [None, 1, 1, None]}),
}


@pytest.mark.parametrize("family", ["bert", "parakeet", "gpt2", "modernbert"])
def test_a_recorder_returns_the_maps_of_a_model_and_leaves_it_as_it_is(family):
    eager, batch = build(family, implementation="eager")
    with torch.no_grad(), softmax_follows(ReusePlan.full(4)) as own:
        rows = valid_rows(eager, batch, eager(**batch))
    model, _ = build(family)
    maps, valid, _ = MapRecorder(model)(batch)
    assert torch.equal(valid, rows)
    for found, expected in zip(maps, own, strict=True):
        found, expected = found.transpose(1, 2)[rows], expected.transpose(1, 2)[rows]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert plan_of(model) is None


@pytest.mark.sample(5)
@pytest.mark.parametrize("storage", ["dense", "recompute"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("family", ["parakeet", "bert"])
def test_a_recorder_under_a_plan_returns_the_maps_in_effect(family, plan, storage):
    model, batch = build(family)
    before = MapRecorder(model)(batch)
    optimize(apply(model, plan, storage=storage))  # as the recorder does, so that both round alike
    found = MapRecorder(model, under_plan=True)(batch)
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions

    assert torch.equal(found.valid, before.valid)
    rows = found.valid
    for one, other in zip(found.maps, attentions, strict=True):
        torch.testing.assert_close(one.transpose(1, 2)[rows], other.transpose(1, 2)[rows], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.values[0], before.values[0])  # the first layer's input is the same
    assert plan_of(model) == plan


def test_recorded_values_keep_the_order_of_the_original_heads():
    model, batch = build("bert")
    before = MapRecorder(model)(batch)
    plan = ReusePlan.from_sources([0, 0, 2, 3], {1: [2, 0, 3, 1]})
    layer = model.encoder.layer[0]
    with torch.no_grad():
        layer.attention.output.dense.weight.zero_()  # so that the second layer's input does not depend on any map
    zeroed = MapRecorder(model)(batch)
    apply(model, plan)
    found = MapRecorder(model, under_plan=True)(batch)

    torch.testing.assert_close(found.values[1], zeroed.values[1])
    torch.testing.assert_close(found.maps[1], before.maps[0][:, [2, 0, 3, 1]])


def test_a_recorder_of_the_original_refuses_a_model_under_a_plan():
    model, _ = build("bert")
    apply(model, PLANS["groups"])
    with pytest.raises(ValueError, match="the model shares attention maps already"):
        MapRecorder(model)


def positions_of(batch):
    """The batch padded at the end, at the start and in one whole row, each with its valid positions."""
    (name,) = (name for name in batch if "mask" in name)
    length = batch[name].shape[1]
    emptied = {key: value.clone() for key, value in batch.items()}
    emptied[name][-1] = 0
    flipped = {key: value.flip(1) if value.shape[1:2] == (length,) else value for key, value in batch.items()}
    return [(one, one[name].bool()) for one in (batch, flipped, emptied)]


@pytest.mark.sample(3)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "clip-text", "gpt2", "llama", "modernbert", "qwen2", "roberta"])
def test_padding_is_recognised_at_any_position(family, implementation):
    model, batch = build(family, implementation=implementation)
    for given, valid in positions_of(batch):
        assert torch.equal(MapRecorder(model)(given).valid, valid)


def test_a_block_mask_is_refused_because_it_does_not_show_padding():
    mask = create_block_mask(lambda batch, head, query, key: query >= key, None, None, 8, 8, device="cpu")
    with pytest.raises(ValueError, match="of type BlockMask; load the model with attn_implementation='sdpa'"):
        not_padding(mask, torch.zeros(1, 8, 4))


@pytest.mark.parametrize("family", ["bert", "parakeet", "gpt2"])
def test_the_copy_is_freed_with_the_recorder(family):
    """Without the collection of cycles: a search makes many copies, each as large as the model."""
    model, batch = build(family)
    recorder = MapRecorder(model)
    recorder(batch)
    copied = [weakref.ref(module) for module in recorder._model.modules()]
    gc.collect()
    gc.disable()
    try:
        del recorder
        assert not any(module() for module in copied)
    finally:
        gc.enable()
